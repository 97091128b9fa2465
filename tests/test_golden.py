"""Short loss curves, measured once: a refactor leaves them as they are, and a change of the computation says so.

Renewed by ``PYTHONPATH=tokenizers python tests/test_golden.py``, Send-VAE's of ``test_run`` too.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

import tiny
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.recipe import DiffusionRecipe, parse_diffusion_recipe, parse_recipe

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
