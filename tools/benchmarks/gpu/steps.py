"""Steps of a diffusion transformer as recipes and caches give them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from benchmarks.synthetic import PUBLISHED, SpecTokenizer, SyntheticLatents
from benchmarks.timing import TrainerStep
from benchmarks.training import TRAIN, make_objective, make_trainer
from semtok.data.caches.latent_cache import ensure_latent_cache
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.recipe import load_diffusion_recipe, parse_diffusion_recipe
from semtok.references import DEMO
from semtok.tokenizer import Tokenizer

_BATCH = 8


def cached_dit_step(folder: Path, **train: Any) -> TrainerStep:
    """Of a small transformer on the embedded tokenizer's latents, which are written to a cache first.

    Args:
        folder: for the cache; exists.
        train: more of the training's settings.
    """
    config = ShapesConfig(size=32, num_images=4 * _BATCH, num_validation_images=1)
    images = Shapes(config, train=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    tokenizer = Tokenizer.from_pretrained(DEMO).to(accelerator.device)
    cached, _ = ensure_latent_cache((images, images), tokenizer, folder / "cache", data=config)
    precision = "bf16" if torch.cuda.is_available() else "fp32"
    content = {
        "tokenizer": DEMO,
        "data": {"kind": "shapes", "size": 32},
        "diffusion": {"network": "LightningDiT-T/2", "repa": False},
        "train": {**TRAIN, "batch_size": _BATCH, "precision": precision, **train},
    }
    recipe = parse_diffusion_recipe(content, "benchmark")
    objective = make_objective(recipe, tokenizer, cached, cached.target_width)
    return TrainerStep(make_trainer(objective, recipe.train, cached, folder))


def recipe_step(file: Path, latents: str, overrides: list[str], folder: Path) -> TrainerStep:
    """Of a generator's recipe on synthetic latents of 256x256 images, as ``recipe_memory`` estimates it.

    Args:
        latents: one of ``PUBLISHED``.
    """
    recipe = load_diffusion_recipe(file, overrides, tokenizer=latents)
    published = PUBLISHED[latents]
    if not recipe.diffusion.repa:
        published = replace(published, target_width=None)
    source, tokenizer = SyntheticLatents(published), SpecTokenizer(published.spec)
    objective = make_objective(recipe, tokenizer, source, published.target_width)
    config = recipe.train.model_copy(update={"steps": 1_000_000})
    return TrainerStep(make_trainer(objective, config, source, folder))


def awake(network: nn.Module) -> None:
    """Gives zero-initialised layers weights, without which the output is zero whatever comes before."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.02 * drawn)
