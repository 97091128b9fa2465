"""Steps of every stage of training, as its own loop does them."""

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.random_inputs import RandomImages, random_weights
from benchmarks.synthetic import (
    PUBLISHED,
    SpecTokenizer,
    SyntheticLatents,
    transformer_inputs,
)
from benchmarks.timing import TrainerStep, counted_flops, forward_flops
from semtok.commands.train_tokenizer import build_objective
from semtok.data.images.kinds import open_sources
from semtok.data.source import ImageSource
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.training import DiffusionObjective
from semtok.errors import UserError
from semtok.objective import Objective
from semtok.recipe import load_recipe, parse_diffusion_recipe
from semtok.references import DEMO
from semtok.sampler.dit import DiT
from semtok.sampler.draws import Draws
from semtok.sampler.routing import DENSE, Route
from semtok.settings import apply_overrides
from semtok.tokenizer import Tokenizer
from semtok.training.loop import Trainer
from semtok.training.precision import settled
from semtok.training.process import make_accelerator
from semtok.training.train_config import TrainConfig

_HOST = torch.device("cpu")
TRAIN = {
    "steps": 1_000_000,
    "optimiser": {"learning_rate": 1e-4},
    "ema_decay": 0.9999,
    "sample_every": 1_000_000,
    "checkpoint_every": 1_000_000,
    "log_every": 1_000_000,
}


def dit_step(
    kind: str, network: str, batch_size: int, overrides: list[str], folder: Path
) -> tuple[TrainerStep, float]:
    """A step of a diffusion transformer on synthetic latents in a paper's shapes, and its FLOPs.

    Args:
        kind: one of ``PUBLISHED``.
        overrides: of the recipe: ``train.compile=inductor``, ``diffusion.checkpointing=true`` and so on.
        folder: where a run would lie.
    """
    refuse_sizes(overrides)
    published = PUBLISHED[kind]
    content = apply_overrides(
        {
            "tokenizer": kind,
            "data": {"kind": "shapes", "size": 256},
            "diffusion": {"network": network, **published.diffusion},
            "train": {**TRAIN, "batch_size": batch_size},
        },
        overrides,
    )
    recipe = parse_diffusion_recipe(content, "benchmark")
    source = SyntheticLatents(published)
    objective = make_objective(
        recipe, SpecTokenizer(published.spec), source, published.target_width
    )
    step = TrainerStep(make_trainer(objective, recipe.train, source, folder))
    learner = objective.learners["dit"]
    route = route_without_contents(recipe.diffusion, learner.network, batch_size)
    forward = dit_forward_flops(learner.network, batch_size, route)
    if learner.projector is not None:
        forward += _projector_flops(learner.projector, learner.network, batch_size)
    return step, 3 * forward


def refuse_sizes(overrides: list[str]) -> None:
    """Raises UserError for settings that are options of the benchmark, or that it needs."""
    for word in overrides:
        key = word.partition("=")[0]
        if key in ("train.batch_size", "train.steps", "diffusion.network") or key.startswith(
            "data"
        ):
            raise UserError(
                f"{key}: not here; sizes are --network, --batch-size and those of --latents"
            )


def tokenizer_step(
    recipe_file: Path, overrides: list[str], folder: Path, *, random: bool = False
) -> tuple[TrainerStep, float]:
    """A step of a tokenizer's recipe, and its FLOPs: forward and backward, frozen networks too.

    Args:
        random: on random images, and with random weights instead of fetched ones.
    """
    recipe = load_recipe(recipe_file, [*overrides, "train.tracker=none"])
    composite = recipe.method.texture_reference() is not None
    texture = Tokenizer.from_pretrained(DEMO) if composite else None
    with random_weights(recipe, folder) if random else nullcontext(recipe) as built:
        source = RandomImages(recipe.data.image_size) if random else open_sources(recipe.data)[0]
        objective = build_objective(
            built, texture, place=str(recipe_file), class_names=source.class_names
        )
    settings = recipe.train.model_copy(update={"steps": 1_000_000})
    step = TrainerStep(make_trainer(objective, settings, source, folder))
    return step, counted_flops(step)


def route_without_contents(config: DiffusionConfig, network: DiT, batch_size: int) -> Route:
    """What the blocks between see in the first step on 256x256 images, as shapes alone."""
    if config.routing is None:
        return DENSE
    rows, columns = network.spec.shape("texture", (256, 256))[1:]
    patch, draws = network.config.patch_size, Draws(0, 0, batch_size, 0, batch_size, _HOST)
    route = config.routing.route(draws, (rows // patch, columns // patch), len(network.vectors), 0)
    kept = route.kept.to("meta") if route.kept is not None else None
    return Route(kept, route.dropped.to("meta"))


def dit_forward_flops(network: DiT, batch_size: int, route: Route = DENSE) -> float:
    """Of the network's forward pass on 256x256 images, of all its heads, counted without computing it."""
    device = torch.device("meta")
    empty = DiT(
        network.config,
        network.spec,
        num_classes=network.num_classes,
        timed_parts=network.timed_parts,
    ).to(device)
    inputs = transformer_inputs(network.spec, batch_size, device)
    return forward_flops(empty, *inputs, route=route, inner=network.inner is not None)


def _projector_flops(projector: nn.Module, network: DiT, batch_size: int) -> float:
    """Of REPA's head on all tokens."""
    device = torch.device("meta")
    rows, columns = network.spec.shape("texture", (256, 256))[1:]
    tokens = rows * columns // network.config.patch_size**2 + len(network.vectors)
    x = torch.empty(batch_size, tokens, network.config.width, device=device)
    return forward_flops(copy.deepcopy(projector).to(device), x)


def make_objective(
    recipe: Any, tokenizer: Tokenizer, source: ImageSource, width: int | None
) -> DiffusionObjective:
    """The objective of a recipe, from its seed, on a source that holds latents.

    Args:
        width: D of REPA's targets that the source holds; None: it holds none.
    """
    torch.manual_seed(recipe.train.seed)
    return DiffusionObjective(
        recipe.diffusion,
        tokenizer,
        class_names=source.class_names,
        image_size=source.image_size,
        sampler=recipe.sampler,
        cached_width=width,
    )


def make_trainer(
    objective: Objective, config: TrainConfig, source: ImageSource, folder: Path
) -> Trainer:
    """A trainer whose steps are taken one by one."""
    config = settled(config)
    return Trainer(
        objective,
        config,
        accelerator=make_accelerator(config, folder),
        folder=folder,
        source=source,
        validation=source,
        num_workers=0,
        tracked={},
    )
