"""What only a GPU can tell of training steps: that they never wait, compile once, fit and agree in every precision."""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.finding import Finding, Skipped, judged, told
from benchmarks.gpu.parts import RECIPES
from benchmarks.gpu.steps import awake, cached_dit_step, recipe_step
from benchmarks.memory import LiveBytes, recipe_memory
from benchmarks.timing import TrainerStep, wait_for
from benchmarks.training import dit_step, tokenizer_step

_STEPS = 10
_WARM_UP = 3
_CLOSE = {"tf32": 0.01, "bf16": 0.03, "fp16": 0.03}
"""How far a loss may be from float32's, relative to it."""
_SPREAD = 0.15
"""How far measured memory may be from the estimate, relative to it."""
_ADVERSARIAL = "method.adversarial={start_step: 0, weight: 0.5}"
STAGES: Mapping[str, tuple[str, ...]] = {
    "vae": ("vae.yaml", _ADVERSARIAL),
    "send_vae": ("send_vae.yaml",),
    "reglue": ("reglue.yaml",),
    "semvae": ("semvae.yaml",),
}
"""Tokenizers that train, of each kind one, by recipe and settings."""


def has_gpu() -> bool:
    return torch.cuda.is_available()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within this context RuntimeError is raised where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def synchronisation(tiny: bool, folder: Path) -> Finding:
    """Ten steps of each stage, in which nothing makes the host wait."""
    waits: dict[str, str] = {}
    for name in (*STAGES, "dit"):
        (folder / name).mkdir()
        try:
            step = _step_of(name, folder / name)
            for _ in range(1 if tiny else _WARM_UP):
                step.take()
            _take_without_waiting(step, 1 if tiny else _STEPS)
        except Exception as error:  # of one stage; the others are looked at all the same
            waits[name] = told(error)
    if waits:
        return judged(False, "; ".join(f"{name}: {why}" for name, why in waits.items()))
    if not has_gpu():
        raise Skipped("a CPU is never waited for; the steps themselves ran")
    return judged(True, f"{_STEPS} steps each of {', '.join(STAGES)} and a DiT from a cache")


def _step_of(name: str, folder: Path) -> TrainerStep:
    if name == "dit":
        return cached_dit_step(folder)
    recipe, *words = STAGES[name]
    settings = ["train.batch_size=4", *(("train.precision=bf16",) if has_gpu() else ())]
    return tokenizer_step(RECIPES / recipe, [*words, *settings], folder)[0]


def _take_without_waiting(step: TrainerStep, num: int) -> None:
    wait_for(step.trainer.device)
    if not has_gpu():
        for _ in range(num):
            step.take()
        return
    with no_waiting():
        for _ in range(num):
            step.take()
    wait_for(step.trainer.device)


def _losses(step: TrainerStep, num: int) -> list[float]:
    """The sum of a step's losses, of so many steps."""
    sums = []
    for _ in range(num):
        step()
        values = step.trainer.metrics.read(lambda values: values)
        step.trainer.metrics.clear()
        sums.append(sum(value for name, value in values.items() if name.startswith("loss/")))
    return sums


def _dit(tiny: bool, words: list[str], folder: Path) -> TrainerStep:
    """A step whose losses depend on every layer."""
    asked = ("sit", "SiT-T/8", 2) if tiny else ("reglue", "SiT-B/2", 64)
    step, _ = dit_step(*asked, words, folder)
    awake(step.trainer.objective.averaged_module())
    return step


def _apart(ours: list[float], theirs: list[float]) -> float:
    """How far losses are apart at most, relative to the second ones; infinite: one is not finite."""
    gaps = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    return max(gaps) if all(map(math.isfinite, (*ours, *gaps))) else math.inf


def precision(tiny: bool, folder: Path) -> Finding:
    """Ten steps of a DiT in each precision, from the same weights and random numbers."""
    num = 2 if tiny else _STEPS
    curves, skipped = {}, []
    for name in ("fp32", *_CLOSE):
        if name == "fp16" and not has_gpu():
            skipped.append(name)
            continue
        curves[name] = _losses(_dit(tiny, [f"train.precision={name}"], folder), num)
        _release()
    exact = curves["fp32"]
    gaps = {name: _apart(curve, exact) for name, curve in curves.items()}
    holds = all(gaps[name] <= close for name, close in _CLOSE.items() if name in gaps)
    line = ", ".join(f"{name} {gap:.3%}" for name, gap in gaps.items() if name != "fp32")
    line = f"losses of {num} steps from float32's at most: {line}"
    if skipped:
        line += "; not here, which needs a GPU: fp16"
    # Only finite numbers are JSON.
    return judged(holds, line, losses={n: c for n, c in curves.items() if math.isfinite(gaps[n])})


def compiled(tiny: bool, folder: Path) -> Finding:
    """Compiled blocks: nothing is compiled after the first steps, and losses are those of blocks that are not."""
    num = 2 if tiny else _STEPS
    words = ["train.precision=bf16"]
    compiler = "train.compile=" + ("aot_eager" if tiny else "inductor")
    eager = _losses(_dit(tiny, words, folder), _WARM_UP + num)
    _release()
    step = _dit(tiny, [*words, compiler], folder)
    before = counters["stats"]["unique_graphs"]
    first = _losses(step, _WARM_UP)
    after = counters["stats"]["unique_graphs"]
    rest = _losses(step, num)
    again = counters["stats"]["unique_graphs"] - after
    gap = _apart([*first, *rest], eager)
    line = (
        f"{after - before} graphs in the first {_WARM_UP} steps, {again} in the next {num}; losses at most "
        f"{gap:.3%} from those of blocks that are not compiled"
    )
    holds = after > before and not again and gap <= _CLOSE["bf16"]
    return judged(holds, line, graphs=after - before, graphs_after=again)


def memory(tiny: bool, folder: Path) -> Finding:
    """What a step holds at most, beside what the dry run says."""
    num = 2 if tiny else 16
    one_batch = ["train.accumulate=1", f"train.batch_size={num}"]
    dit = "dit.yaml" if tiny else "imagenet256/sit_b2.yaml"
    vae = "vae.yaml" if tiny else "imagenet256/vae_f8d4.yaml"
    vae_words = [*one_batch, *(() if tiny else ("method.adversarial.start_step=0",))]
    cases: dict[str, tuple[Callable[[], TrainerStep], str, list[str], str | None]] = {
        dit: (
            lambda: recipe_step(RECIPES / dit, "sit", one_batch, folder),
            dit,
            one_batch,
            "sit",
        ),
        vae: (
            lambda: tokenizer_step(RECIPES / vae, vae_words, folder, random=True)[0],
            vae,
            vae_words,
            None,
        ),
    }
    told_of, holds, figures = [], True, {}
    for name, (make, recipe, words, latents) in cases.items():
        estimate = recipe_memory(RECIPES / recipe, words, latents, folder)
        # One process exchanges no gradients, of which the estimate counts copies.
        lasting = estimate.fixed - estimate.step - estimate.gradients / 2
        expected = lasting + estimate.step + num * estimate.per_image
        measured = _peak(make, lasting)
        _release()
        holds &= abs(measured / expected - 1) <= _SPREAD
        told_of.append(f"{name}: {measured:.3g} of {expected:.3g} GB")
        figures[name] = {"measured_gb": measured, "estimated_gb": expected}
    return judged(
        holds, f"batch {num}, measured of estimated: {'; '.join(told_of)}", memory=figures
    )


def _peak(make: Callable[[], TrainerStep], lasting: float) -> float:
    """GB that a step holds at most; on a CPU, what comes and goes is counted, and what lasts is as estimated."""
    if not has_gpu():
        step = make()
        step()
        with LiveBytes() as live:
            step()
        return lasting + live.most / 1e9
    before = torch.cuda.memory_allocated()
    step = make()
    step()
    wait_for(step.trainer.device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        step()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def nccl(tiny: bool, folder: Path) -> Finding:
    """A group of one process: gradients averaged through it, and networks shared out in it, are those of a process
    alone, and a checkpoint in parts is written through it."""
    num, backend = 2 if tiny else 4, "nccl" if has_gpu() else "gloo"
    if not dist.is_available() or (has_gpu() and not dist.is_nccl_available()):
        raise Skipped(f"this torch has no {backend}")
    (folder / "alone").mkdir()
    alone = _losses(cached_dit_step(folder / "alone"), num)
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        (folder / "group").mkdir()
        step = cached_dit_step(folder / "group")
        trainer, device = step.trainer, step.trainer.device
        summed = torch.ones(3, device=device)
        dist.all_reduce(summed)
        trainer.learners = {
            name: DistributedDataParallel(
                learner, device_ids=[0] if has_gpu() else None, broadcast_buffers=False
            )
            for name, learner in trainer.learners.items()
        }
        gap = _apart(_losses(step, num), alone)
        (folder / "shared").mkdir()
        step = cached_dit_step(folder / "shared", sharding="fsdp2")
        shared = _apart(_losses(step, num), alone)
        step.trainer.save()
        step.trainer.keeper.wait()
        step.trainer.keeper.close()
        holds = max(gap, shared) <= 1e-3 and bool((summed == 1).all())
        holds &= len(step.trainer.keeper.kept()) == 1
    finally:
        dist.destroy_process_group()
    line = f"{num} steps through {backend}: losses {gap:.4%} from those without"
    return judged(holds, f"{line}, {shared:.4%} where fsdp2 shares out the network")


def _release() -> None:
    """Gives memory back that nothing holds any more."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
