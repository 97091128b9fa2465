"""What a training stage plugs into the one training loop: a batch becomes named losses."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from semtok.data.source import ImageSource
from semtok.optimiser import OptimiserConfig
from semtok.sampler.latents import Posterior, as_pytree
from semtok.teachers import Teacher, TeacherFeatures
from semtok.tokenizer import Tokenizer

Inputs = Mapping[str, Any]
"""What an objective's ``prepare`` makes of a batch: names to tensors, features, or None."""
Carry = Mapping[str, Tensor]
"""What the learners before have left of a micro-batch, detached."""


@dataclass(frozen=True)
class Term:
    """One named loss.

    Attributes:
        value: float32 (B,), one value per sample, or a scalar where it has no per-sample meaning.
        weight: what the loop multiplies the mean of ``value`` by; a tensor where it is adaptive.
    """

    value: Tensor
    weight: float | Tensor


@dataclass(frozen=True)
class StepOutput:
    """What a learner's forward gives the loop.

    Attributes:
        terms: the losses that this learner minimises.
        metrics: detached tensors to log.
        carry: what the next learner of the same micro-batch needs, detached.
    """

    terms: dict[str, Term]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


# So that what shares out learners finds the losses whose backward pass it waits for.
as_pytree(Term, lambda term: ([term.value, term.weight], None), lambda members, _: Term(*members))
as_pytree(
    StepOutput,
    lambda output: ([output.terms, output.metrics, output.carry], None),
    lambda members, _: StepOutput(*members),
)


@dataclass(frozen=True)
class Batch:
    """One micro-batch as the loop gives it, on the device.

    Attributes:
        pixels: (B, 3, H, W) in [-1, 1]; None where cached features or latents stand for the images.
        labels: int64 (B,).
        attributes: int64 (B,) each, by name.
        features: what a teacher saw in the images, where it is cached.
        latents: a tokenizer's posterior of the images, in float32, where it is cached.
    """

    pixels: Tensor | None
    labels: Tensor
    attributes: Mapping[str, Tensor] = field(default_factory=dict)
    features: TeacherFeatures | None = None
    latents: Posterior | None = None

    def __len__(self) -> int:
        return len(self.labels)


PREVIOUS = "previous"
"""Of inputs: the posterior (1, ...) of the image before the micro-batch's first one, where that is asked for."""


class Objective(nn.Module, ABC):
    """One stage of training.

    ``learners`` are the modules that train. Each has its own optimiser, is wrapped for several
    processes on its own, and contains the parameters that it trains, and others only where these
    need no gradient; it may read others' through ``Unregistered``. In a step each runs in turn, on
    the same micro-batch.
    """

    learners: nn.ModuleDict
    """Name to module; ``forward(inputs, draws, step, carry) -> StepOutput``."""

    def active_learners(self, step: int) -> list[str]:
        """Which learners train in this step (0-based)."""
        return list(self.learners)

    def steps_in_turn(self) -> bool:
        """Whether each learner's optimiser steps before the next learner's forward, so that this one sees the new
        weights; else all step at the end."""
        return False

    def optimiser_config(self, learner: str, default: OptimiserConfig) -> OptimiserConfig:
        """A learner's optimiser settings; the recipe's ``train.optimiser`` unless it has its own."""
        return default

    def compares_neighbours(self) -> bool:
        """Whether learners compare each image with the one before it in the global batch. Their inputs then have
        ``PREVIOUS``, and ``posterior`` has to be among what ``prepare`` gives."""
        return False

    def notes(self) -> list[str]:
        """What to tell before the first step, a line each."""
        return []

    def compiled_modules(self) -> list[nn.Module]:
        """The networks that ``train.compile`` compiles."""
        return []

    def sharded_blocks(self) -> Mapping[str, list[nn.Module]]:
        """By learner the blocks in which ``train.sharding`` shares it out among processes: one at a time is whole.
        A learner's other weights are whole within its forward, and in those methods that its attribute
        ``called_by_others`` names. Learners that are not named here stay whole in each process."""
        return {}

    def frozen_modules(self) -> list[nn.Module]:
        """Networks outside the learners that the loop moves to the device: teachers and the like."""
        return []

    @abstractmethod
    def averaged_module(self) -> nn.Module:
        """The part of a learner that the EMA follows, and that evaluation and export use."""

    def measure(self, batches: Iterable[Batch]) -> None:
        """Takes in, before the first step, what is measured on training data instead of learned.

        Called once in a run, on each process with its share of the batches, which are read only
        where they are iterated. Where there are steps, what it finds has to stand in the learners'
        buffers, which checkpoints keep.
        """

    @abstractmethod
    def prepare(self, batch: Batch) -> dict[str, Any]:
        """Inputs that all learners share, without gradient: one teacher forward for every consumer."""

    @abstractmethod
    def validate(
        self, averaged: nn.Module, pixels: Tensor | None, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        """Held-out metrics, one value per sample (B,), by the given weights of ``averaged_module``.

        Args:
            pixels: as ``Batch`` has them.
            inputs: what ``prepare`` made of the batch.
            indices: which of the held-out images these are, counted in the order that the source's ``chosen``
                gives: an image's own number, whatever batch and process it is in.
        """

    def picture(self, averaged: nn.Module, pixels: Tensor | None, inputs: Inputs) -> Tensor | None:
        """A picture for ``samples/``: uint8 (3, H, W); None draws none."""
        return None


@dataclass(frozen=True)
class MethodContext:
    """What a method is given beside its own settings when training starts.

    Attributes:
        image_size: (height, width) of the training images.
        texture: the tokenizer that ``MethodConfig.texture_reference`` names.
        resumes: a checkpoint's weights will take the place of the first ones, so that files of these need not be there.
        class_names: of the training images, in the order of their labels.
    """

    image_size: tuple[int, int]
    teacher: Teacher | None
    steps: int
    texture: Tokenizer | None = None
    resumes: bool = False
    class_names: tuple[str, ...] = ()


class TokenizerObjective(Objective):
    """A stage that makes a tokenizer."""

    measures = "the teacher's features"
    """What ``measure`` takes in, for a line of progress."""

    def training_source(
        self, source: ImageSource, accelerator: Accelerator, *, pays: bool
    ) -> ImageSource:
        """What training reads, given the images: a cache of them where the settings ask for one.

        Args:
            pays: whether training sees each image often enough for a cache that is made by itself.
        """
        return source

    @abstractmethod
    def tokenizer(self, averaged: nn.Module) -> Tokenizer:
        """The tokenizer to export, on the given weights of ``averaged_module``."""

    def generator(self, averaged: nn.Module) -> Any:
        """The ``Generator`` that was trained with it, on those weights; None: there is none."""
        return None


class Unregistered:
    """Holds a module, or None, without registering it, so that a learner reads what another one trains."""

    def __init__(self, module: nn.Module | None) -> None:
        self.module = module


@contextlib.contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Within this context a module's parameters collect no gradient, though gradients pass through."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
