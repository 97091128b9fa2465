"""What only a GPU can tell beside training: how batches reach it, and that exported pipelines run on it."""

import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.checks import compiled, memory, nccl, no_waiting, precision, synchronisation
from benchmarks.gpu.finding import Finding, Skipped, judged
from benchmarks.gpu.steps import awake
from benchmarks.timing import wait_for
from benchmarks.training import dit_step
from semtok.data.source import ImageBatch
from semtok.diffusion.diffusion_config import DiffusionConfig, build_network, resolve_defaults
from semtok.diffusion.generator import Generator
from semtok.references import DEMO
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.sampling import SamplerConfig
from semtok.speed import allow_tf32
from semtok.tokenizer import Tokenizer
from semtok.training.inputs import on_device

_SAME = 0.02
"""How far pixels in [-1, 1] of a pipeline may be from the generator's."""
_STEPS = 4
_CUDA = torch.device("cuda")


def transfer(tiny: bool, folder: Path) -> Finding:
    """Batches as the loop loads them lie in pinned memory and reach the GPU without the host waiting."""
    step, _ = dit_step("reglue", "SiT-T/8", 2 if tiny else 256, [], folder)
    batch = next(step.trainer._batches())
    tensors = tensors_of(batch)
    size = sum(tensor.nbytes for tensor in tensors)
    if not torch.cuda.is_available():
        raise Skipped(f"needs a GPU; a batch has {len(tensors)} tensors, {size / 1e6:.3g} MB")
    is_pinned = all(tensor.is_pinned() for tensor in tensors)
    with no_waiting():
        on_device(batch, _CUDA)
    pageable = [tensor.clone() for tensor in tensors]
    rates = [size / _seconds(own) / 1e9 for own in (tensors, pageable)]
    line = (
        f"all {len(tensors)} tensors of a batch are {'' if is_pinned else 'not '}pinned and sent without waiting: "
        f"{rates[0]:.3g} GB/s, {rates[1]:.3g} from memory that is not pinned ({size / 1e6:.3g} MB)"
    )
    return judged(is_pinned, line, pinned_gb_per_second=rates[0], pageable_gb_per_second=rates[1])


def tensors_of(batch: ImageBatch) -> list[Tensor]:
    """All that crosses to the device."""
    found = [batch.labels, *batch.attributes.values()]
    found += [batch.images] if batch.images is not None else []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    for held in (batch.features, batch.latents):
        if held is not None:
            held.map(note)
    return found


def _seconds(tensors: list[Tensor], rounds: int = 5) -> float:
    """Of bringing them to the GPU, at best."""
    seconds = []
    for _ in range(rounds):
        wait_for(_CUDA)
        start = time.perf_counter()
        moved = [tensor.to(_CUDA, non_blocking=True) for tensor in tensors]
        wait_for(_CUDA)
        seconds.append(time.perf_counter() - start)
        del moved
    return min(seconds)


def pipeline(tiny: bool, folder: Path) -> Finding:
    """The diffusers pipeline of a small generator makes the generator's images."""
    from diffusers import DiffusionPipeline  # late, as it may be missing

    from semtok.hub.export_pipeline import export_pipeline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allow_tf32("fp32")
    model = _generator()
    export_pipeline(model, folder / "pipeline")
    with torch.no_grad():
        ours = model.to(device).sample([0, 1], seed=5)
    loaded = DiffusionPipeline.from_pretrained(
        folder / "pipeline", trust_remote_code=True, local_files_only=True
    )
    loaded.set_progress_bar_config(disable=True)
    theirs = loaded.to(device)([0, 1], seed=5, output_type="pt").images
    gap = (theirs * 2 - 1 - ours).abs().max().item()
    holds = theirs.device.type == device.type and gap <= _SAME
    line = f"on {theirs.device.type}, pixels at most {gap:.2g} from the generator's"
    if holds and device.type == "cpu":
        raise Skipped(f"needs a GPU; {line}")
    return judged(holds, line)


def _generator() -> Generator:
    """On the embedded tokenizer's latents, with random weights on which every image depends."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(DEMO)
    shape = DiTArchitecture(depth=2, width=32, heads=2, patch_size=2)
    config = resolve_defaults(DiffusionConfig(network=shape, repa=False), tokenizer)
    network = build_network(config, tokenizer.spec, num_classes=3).eval()
    awake(network)
    sampler = SamplerConfig(method="euler", steps=_STEPS)
    return Generator(
        network, tokenizer, config, sampler, class_names=("a", "b", "c"), image_size=(32, 32)
    )


CHECKS = {
    "synchronisation": synchronisation,
    "precision": precision,
    "compile": compiled,
    "memory": memory,
    "nccl": nccl,
    "transfer": transfer,
    "pipeline": pipeline,
}
"""By the name of the part."""
