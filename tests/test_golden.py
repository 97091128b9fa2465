"""A transformer's step with all that it can have: its loss curve, what it draws, and that it waits for nothing.

The curve was measured once: a refactor leaves it as it is, and a change of the computation says so.

Renewed by ``PYTHONPATH=tokenizers python tests/test_golden.py``, Send-VAE's of ``test_run`` too.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from semtok import Tokenizer
from semtok.commands.around_training import start_trainer
from semtok.commands.train_dit import build_diffusion_objective, train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.commands.when_to_cache import cached_latents
from semtok.data.images.kinds import open_sources
from semtok.recipe import DiffusionRecipe, parse_diffusion_recipe, parse_recipe
from semtok.sampler.latents import on_texture_grid
from semtok.sampler.transport import interpolate
from semtok.training.inputs import on_device
from semtok.training.loop import Trainer
from semtok.training.process import make_accelerator

GOLDEN = Path(__file__).parent / "golden_dit.json"
GOLDEN_SEND_VAE = Path(__file__).parent / "golden_send_vae.json"
STEPS = 6


def recipe(folder: Path) -> DiffusionRecipe[Any]:
    """All that a transformer's step can have: three parts of which two lead, every loss, a cache.

    Args:
        folder: where the tokenizer ``tokenizer`` lies and the cache is made.
    """
    content = tiny.content(steps=STEPS, log_every=1)
    del content["method"], content["teacher"]
    content["train"]["optimiser"] = {"learning_rate": 1e-2}
    shape = {"depth": 2, "width": 32, "heads": 2, "rope": True, "swiglu": True}
    content["diffusion"] = {
        "network": shape | {"rms_norm": True, "qk_norm": True},
        "leads": {"semantic": 0.3, "global": 0.3},
        "loss_weights": {"texture": 1.0, "semantic": 2.0, "global": 0.5},
        "cosine_weight": 1.0,
        "time": {"law": "logit_normal", "shift": 1.5},
        "repa": {"depth": 1, "projector_width": 16, "with_global": True},
    }
    content["sampler"] = {"steps": 2}
    content["data"]["cache"] = str(folder / "cache")
    content["tokenizer"] = str(folder / "tokenizer")
    return parse_diffusion_recipe(content, "tiny")


def curves(folder: Path) -> dict[str, list[float]]:
    """Every loss and gradient norm of the steps, of a run in an empty folder."""
    tiny.tokenizer("vae", "semvae", True).save_pretrained(folder / "tokenizer")
    train_dit(recipe(folder), folder / "run")
    return _logged(folder / "run")


def trainer(folder: Path, **train: Any) -> Trainer:
    """Of the same recipe, from its cache, not yet started.

    Args:
        folder: empty.
        train: settings other than the recipe's.
    """
    tiny.tokenizer("vae", "semvae", True).save_pretrained(folder / "tokenizer")
    settings = recipe(folder)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=train)})
    accelerator = make_accelerator(settings.train, folder)
    tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
    images = open_sources(settings.data)
    objective = build_diffusion_objective(settings, tokenizer, images[0], None, place="test")
    sources = cached_latents(settings, images, objective, accelerator)
    objective = build_diffusion_objective(settings, tokenizer, sources[0], None, place="test")
    return start_trainer(
        objective, settings, accelerator, folder, sources, resume=False, what="a test"
    )


def send_vae_curves(folder: Path) -> dict[str, list[float]]:
    """The same of the run that ``test_run`` compares."""
    settings = {"perceptual": "teacher", "adversarial": tiny.ADVERSARIAL}
    train_tokenizer(parse_recipe(tiny.content(settings, log_every=1), "tiny"), folder)
    return _logged(folder)


def _logged(run: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    names = [name for name in rows[0] if name.startswith(("loss/", "grad_norm/"))]
    return {name: [row[name] for row in rows] for name in names}


def test_a_transformers_golden_loss_curve_does_not_move(tmp_path):
    measured, golden = curves(tmp_path), json.loads(GOLDEN.read_text())
    assert measured.keys() == golden.keys()
    for name, values in golden.items():
        assert measured[name] == pytest.approx(values, rel=2e-3), name


class HostReads(TorchDispatchMode):
    """Notes operations that would make the host wait for a GPU, by their names."""

    _WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name.startswith(self._WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_step_of_a_transformer_reads_from_the_device(tmp_path, monkeypatch):
    """On the CPU a read is cheap; on a GPU each would make the host wait. So count the ways to read."""
    quiet, reads = trainer(tmp_path, steps=8, log_every=8), HostReads()
    batches = quiet._batches()
    ready = [next(batches) for _ in range(4)]  # the data's order is made on the host
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            reads.found.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    with reads:
        for batch in ready:
            quiet.train_step(iter([batch]))
    assert not reads.found
    with reads:
        torch.ones(1).item()
    assert len(reads.found) == 2, "from Python and from within an operation"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ten_steps_of_a_transformer_on_a_gpu_without_synchronisation(tmp_path):
    never = {"log_every": 12, "checkpoint_every": 12, "sample_every": 12}
    quiet = trainer(tmp_path, steps=12, **never)
    tiny.ten_steps_without_synchronisation(quiet)


def test_steps_on_one_cached_image_see_latents_with_the_posteriors_spread(tmp_path, monkeypatch):
    """What the cache holds is a distribution; each step draws from it anew."""
    own = trainer(tmp_path)
    num, posterior = 400, own.source.load([3]).latents
    assert posterior.std.texture.min() > 0.01, "or there is nothing to see"
    inputs = own.objective.prepare(on_device(own.source.load([3] * num), own.device))
    learner, seen = own.objective.learners["dit"], []

    def see(path: str, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(data)
        return interpolate(path, data, noise, t)

    monkeypatch.setattr("semtok.diffusion.learner.interpolate", see)
    for step in range(2):
        learner(inputs, tiny.draws(step, num), step, {})
    mean, std = posterior.mean.map(Tensor.float), posterior.std.map(Tensor.float)
    for name, draws in zip(mean, zip(seen[:3], seen[3:], strict=True), strict=True):
        assert torch.equal(*draws) == (not std[name].any()), "another draw in each step"
        for draw in draws:
            if name == "texture":  # the others may be resampled
                scores = (draw - mean[name]) / std[name]
                assert scores.mean() == pytest.approx(0, abs=0.05)
                assert scores.std() == pytest.approx(1, abs=0.05)
            torch.testing.assert_close(
                draw.mean(dim=0), on_texture_grid(mean)[name][0], atol=0.3, rtol=0
            )


def _renew(full: Path | None) -> None:
    """Measures both curves anew; to ``full`` with every digit, to compare two states of the code."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measured = {GOLDEN: curves(folder), GOLDEN_SEND_VAE: send_vae_curves(folder / "send_vae")}
    if full is not None:
        full.write_text(json.dumps({file.stem: own for file, own in measured.items()}, indent=1))
        return
    for file, own in measured.items():
        rounded = {name: [float(f"{v:.7g}") for v in values] for name, values in own.items()}
        file.write_text(json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    _renew(Path(sys.argv[1]) if sys.argv[1:] else None)
