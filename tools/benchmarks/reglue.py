"""REGLUE's step from cached latents beside the same step as its published script takes it."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from benchmarks.plain import PlainREGLUEStep, PlainSiT
from benchmarks.random_inputs import random_teacher
from benchmarks.timing import (
    Step,
    Timing,
    TrainerStep,
    counted_flops,
    time_in_turns,
    wait_for,
)
from benchmarks.training import TRAIN, make_objective, make_trainer, refuse_sizes
from semtok.data.caches.latent_cache import CachedLatents, ensure_latent_cache
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.order import DataOrder
from semtok.errors import UserError
from semtok.images import to_pixels
from semtok.methods.reglue import Compressor, CompressorShape, REGLUETokenizer
from semtok.methods.vae import PRESETS, KLTokenizer, build_autoencoder
from semtok.recipe import DiffusionRecipe, parse_diffusion_recipe
from semtok.sampler.architecture import architecture
from semtok.sampler.latents import Latents, Posterior
from semtok.settings import apply_overrides
from semtok.teachers import Teacher, TeacherConfig

_TEACHER = "vit_base_patch14_reg4_dinov2.lvd142m"
_LAYERS = (8, 9, 10, 11)
_SIZE, _DEPTH = 256, 4


@dataclass(frozen=True)
class Paired:
    """Both steps, in turns.

    Attributes:
        losses: mean relative difference of each loss over the steps.
    """

    ours: Timing
    plain: Timing
    losses: dict[str, float]

    @property
    def saved(self) -> float:
        """How many times the operations of our step the published one takes: what being fast comes on top of."""
        assert self.plain.flops is not None and self.ours.flops is not None
        return self.plain.flops / self.ours.flops


def reglue_steps(
    network: str, batch_size: int, rounds: int, overrides: list[str], folder: Path
) -> Paired:
    """Times both on the same images, from the same weights and random numbers.

    All networks have their published sizes and random weights, which cost the same as trained ones.

    Args:
        overrides: of the library's own step, as ``train.compile=inductor``.
        folder: for the cache.

    Raises:
        UserError: a network whose tokens are not the teacher's, which the published step can't train.
    """
    refuse_sizes(overrides)
    if not network.startswith("SiT") or architecture(network).patch_size != 2:
        raise UserError(
            f"--network {network}: the published step is of a SiT with a token for each of the teacher's: SiT-…/2"
        )
    torch.manual_seed(0)
    tokenizer = random_reglue(folder)
    recipe = _recipe(network, batch_size, overrides)
    images, cached = _images_and_latents(2 * batch_size, tokenizer, folder / "cache")
    objective = make_objective(recipe, tokenizer, cached, cached.target_width)
    learner = objective.learners["dit"]
    trainer = make_trainer(objective, recipe.train, cached, folder)
    plain = PlainREGLUEStep(
        PlainSiT(learner.network, learner.projector, _DEPTH).to(trainer.device),
        tokenizer.to(trainer.device),
        seed=recipe.train.seed,
    )
    step = TrainerStep(trainer)
    curves: list[dict[str, float]] = []

    def ours() -> None:
        step()
        curves.append(trainer.metrics.read(lambda values: values))
        trainer.metrics.clear()

    steps = {"ours": ours, "plain": _plain_step(plain, batch_size, images, cached)}
    flops = {name: counted_flops(taken) for name, taken in steps.items()}
    seconds = time_in_turns(steps, rounds)
    return Paired(
        Timing(
            "semtok, from the cache",
            seconds["ours"],
            batch_size,
            flops=flops["ours"],
            waits=step.waits[-rounds:],
            precision=step.precision,
        ),
        Timing(
            "as published, in plain PyTorch",
            seconds["plain"],
            batch_size,
            flops=flops["plain"],
            precision=plain.precision,
        ),
        _differences(curves, plain.losses),
    )


def _images_and_latents(
    num_images: int, tokenizer: REGLUETokenizer, folder: Path
) -> tuple[Shapes, CachedLatents]:
    config = ShapesConfig(kind="shapes", size=_SIZE, num_images=num_images, num_validation_images=1)
    images = Shapes(config, train=True)
    cached, _ = ensure_latent_cache(
        (images, images),
        tokenizer.to(Accelerator().device),
        folder,
        data=config,
        targets=tokenizer.teacher,
    )
    return images, cached


def _recipe(network: str, batch_size: int, overrides: list[str]) -> DiffusionRecipe[Any]:
    content = apply_overrides(
        {
            "tokenizer": "reglue",
            "data": {"kind": "shapes", "size": _SIZE},
            "diffusion": {
                "network": network,
                "loss_weights": {"global": 0.03},
                "repa": {"weight": 0.5, "depth": _DEPTH, "with_global": True},
            },
            "train": {**TRAIN, "batch_size": batch_size},
        },
        overrides,
    )
    return parse_diffusion_recipe(content, "benchmark")


def random_reglue(folder: Path) -> REGLUETokenizer:
    """REGLUE's tokenizer in its published sizes: SD's autoencoder, DINOv2-B with registers, compressor."""
    teacher = Teacher(
        random_teacher(TeacherConfig(name=_TEACHER, input_size=224, layers=_LAYERS), folder)
    )
    texture = KLTokenizer(build_autoencoder(PRESETS["f8d4"]), method="vae")
    texture.num_measured_images.fill_(1)
    coder = Compressor(
        CompressorShape(feature_channels=sum(teacher.widths), hidden=(256,), channels=16)
    )
    tokenizer = REGLUETokenizer(
        texture,
        coder,
        teacher,
        feature_stride=16,
        global_width=teacher.pooled_width,
        scaled=False,
        method="reglue",
    )
    return tokenizer.eval().requires_grad_(False)


def _plain_step(
    plain: PlainREGLUEStep, batch_size: int, images: Shapes, cached: CachedLatents
) -> Step:
    """Takes image latents from disk and images from memory, and makes a step of them.

    The published loader's processes decode images while the step runs; that none of it counts here is for its good.
    """
    decoded = images.load(range(len(images))).images

    def step() -> None:
        order = DataOrder(len(images), batch_size, plain.seed, False)
        keys = order.keys(plain.step)
        batch = cached.load_keys(keys)
        assert batch.latents is not None
        texture = Posterior(
            *(
                Latents({"texture": p.texture.float().to(plain.device)})
                for p in (batch.latents.mean, batch.latents.std)
            )
        )
        pixels = to_pixels(decoded[[key.index for key in keys]].to(plain.device))
        plain(pixels, texture, batch.labels.to(plain.device))
        wait_for(plain.device)

    return step


def _differences(ours: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    names = {
        "texture": "loss/velocity/texture",
        "semantic": "loss/velocity/semantic",
        "global": "loss/velocity/global",
        "alignment": "loss/alignment",
    }
    return {
        name: statistics.mean(
            abs(a[key] - b[name]) / abs(b[name]) for a, b in zip(ours, plain, strict=True)
        )
        for name, key in names.items()
    }
