"""The plan check at full size, without the memory that a transformer of full size takes."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.random_inputs import RandomImages, random_teacher, random_weights, vae_of
from rehearsal.plan import Run, transformer_of
from semtok.commands.train_dit import build_diffusion_objective, needs_teacher
from semtok.commands.train_tokenizer import check_tokenizer
from semtok.recipe import DiffusionRecipe, TokenizerRecipe
from semtok.sampler.architecture import architecture
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

WEIGHTS = Path("weights")
_BYTES_A_PARAMETER = 20  # weights, gradients, two moments of AdamW and the average, in float32
_RESERVED_BYTES = 5e9  # Python, teacher, autoencoder, and activations of a few images


@dataclass(frozen=True)
class Size:
    """What a run trains.

    Attributes:
        parameters: that get gradients, at full size.
        in_block: those of one block of the transformer; 0: there is none.
        depth: blocks of the transformer at full size; 0: there is none.
    """

    parameters: int
    in_block: int = 0
    depth: int = 0

    def depth_within(self, num_bytes: float) -> int:
        """Most blocks that a step in float32 has memory for; at least one."""
        others = self.parameters - self.depth * self.in_block
        room = (num_bytes - _RESERVED_BYTES) / _BYTES_A_PARAMETER - others
        return min(self.depth, max(1, int(room / self.in_block)))

    def parameters_at(self, depth: int) -> int:
        """Those of a transformer of so many blocks."""
        return self.parameters - (self.depth - depth) * self.in_block


def check_at_full_size(run: Run) -> tuple[Size, list[str]]:
    """Builds what the recipe describes, as its command would before the first step; the transformer without memory,
    for the thousand classes of ImageNet.

    What it is built on must be there. Random weights of a teacher and of LPIPS' backbone are written.

    Returns:
        the size, and the settings that name the files of random weights.

    Raises:
        UserError: as the command's checks raise it.
    """
    WEIGHTS.mkdir(exist_ok=True)
    torch.manual_seed(0)
    if isinstance(run.recipe, DiffusionRecipe):
        return _check_generator(run.recipe, str(run.file))
    with random_weights(run.recipe, WEIGHTS) as recipe:
        return _check_tokenizer(recipe, run)


def _check_tokenizer(recipe: TokenizerRecipe[Any, Any], run: Run) -> tuple[Size, list[str]]:
    train = recipe.train.model_copy(update={"precision": "fp32"})  # others may need a GPU
    plan = check_tokenizer(
        recipe.model_copy(update={"train": train}), Path(run.output), place=str(run.file)
    )
    trained, transformer = _trained(plan.objective.learners.values()), transformer_of(recipe)
    if transformer is None:
        return Size(trained), _files(recipe)
    blocks = plan.objective.averaged_module().network.blocks
    return Size(trained, _trained([blocks[0]]), len(blocks)), _files(recipe)


def _check_generator(recipe: DiffusionRecipe[Any], place: str) -> tuple[Size, list[str]]:
    if recipe.teacher is not None:
        recipe = recipe.model_copy(update={"teacher": random_teacher(recipe.teacher, WEIGHTS)})
    tokenizer = Tokenizer.from_pretrained(recipe.tokenizer)
    if tokenizer.teacher_config is not None:
        tokenizer.teacher  # noqa: B018  it is read when first asked for, which must not be without memory
    teacher = Teacher(recipe.teacher) if needs_teacher(recipe) else None
    thousand_classes = RandomImages(recipe.data.image_size)
    with torch.device("meta"):
        objective = build_diffusion_objective(
            recipe, tokenizer, thousand_classes, teacher, place=place
        )
    network = objective.learners["dit"].network
    size = Size(
        _trained(objective.learners.values()),
        _trained([network.blocks[0]]),
        architecture(recipe.diffusion.network).depth,
    )
    return size, _files(recipe)


def _files(recipe: TokenizerRecipe[Any, Any] | DiffusionRecipe[Any]) -> list[str]:
    networks = {"teacher": recipe.teacher}
    place, vae = vae_of(recipe.method) if isinstance(recipe, TokenizerRecipe) else ("", None)
    adversarial = getattr(vae, "adversarial", None)
    if adversarial is not None:
        networks[f"{place}.adversarial.features"] = adversarial.features
    named = {name: network.checkpoint for name, network in networks.items() if network is not None}
    return [f"{name}.checkpoint={file}" for name, file in named.items() if file is not None]


def _trained(modules: Iterable[nn.Module]) -> int:
    return sum(p.numel() for m in modules for p in m.parameters() if p.requires_grad)
