"""What a training stage plugs into the one training loop: a batch becomes named losses."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from semtok.config import Config
from semtok.data.source import ImageSource
from semtok.latents import Posterior
from semtok.teachers import TeacherFeatures
from semtok.tokenizer import Tokenizer

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Config):
    """AdamW. The learning rate is used as it stands, whatever the batch or the number of GPUs."""

    learning_rate: float = Field(gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)


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
    """What a player's forward gives the loop.

    Attributes:
        terms: the losses that this player minimises.
        metrics: detached tensors to log.
        carry: what the next player of the same micro-batch needs, detached.
    """

    terms: dict[str, Term]
    metrics: dict[str, Tensor] = field(default_factory=dict)
    carry: dict[str, Tensor] = field(default_factory=dict)


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


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, as a function of (seed, step, position in the global batch).

    So they are the same whatever the number of processes or micro-batches, and resuming needs no
    saved generator. Each use has a name, and its own stream.

    Attributes:
        global_batch: images per optimiser step, over all processes and micro-batches.
        first, num: this micro-batch's slice of the global batch.
    """

    seed: int
    step: int
    global_batch: int
    first: int
    num: int
    device: torch.device

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        return self._slice(
            torch.randn(
                self.global_batch, *shape, generator=self._generator(name), device=self.device
            )
        )

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return self._slice(
            torch.rand(
                self.global_batch, *shape, generator=self._generator(name), device=self.device
            )
        )

    def _slice(self, values: Tensor) -> Tensor:
        return values[self.first : self.first + self.num]

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=8).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest) >> 1)


class Objective(nn.Module, ABC):
    """One stage of training.

    ``players`` are the modules that train. Each has its own optimiser, is wrapped for several
    processes on its own, and contains exactly the parameters that it trains; it may read others'
    through a ``Reference``. In a step they play in order, on the same micro-batch.
    """

    players: nn.ModuleDict
    """Name to module; ``forward(inputs, draws, step, carry) -> StepOutput``."""

    def active_players(self, step: int) -> list[str]:
        """Which players train in this step (0-based)."""
        return list(self.players)

    def optimiser_config(self, player: str, default: OptimiserConfig) -> OptimiserConfig:
        """A player's optimiser settings; the recipe's ``train.optimiser`` unless it has its own."""
        return default

    def compiled_modules(self) -> list[nn.Module]:
        """The networks that ``train.compile`` compiles."""
        return []

    def frozen_modules(self) -> list[nn.Module]:
        """Networks outside the players that the loop moves to the device: teachers and the like."""
        return []

    @abstractmethod
    def averaged_module(self) -> nn.Module:
        """The part of a player that the EMA follows, and that evaluation and export use."""

    def measure(self, batches: Iterable[Batch]) -> None:
        """Takes in, before the first step, what is measured on training data instead of learned.

        Called once in a run, on each process with its share of the batches, which are read only
        where they are iterated. Where there are steps, what it finds has to stand in the players'
        buffers, which checkpoints keep.
        """

    @abstractmethod
    def prepare(self, batch: Batch) -> dict[str, Any]:
        """Inputs that all players share, without gradient: one teacher forward for every consumer."""

    @abstractmethod
    def validate(
        self, averaged: nn.Module, pixels: Tensor | None, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Held-out metrics, one value per sample (B,), by the given weights of ``averaged_module``.

        Args:
            pixels: as ``Batch`` has them.
            inputs: what ``prepare`` made of the batch.
        """

    def picture(
        self, averaged: nn.Module, pixels: Tensor | None, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """A picture for ``samples/``: uint8 (3, H, W); None draws none."""
        return None


class TokenizerObjective(Objective):
    """A stage that makes a tokenizer."""

    def training_source(self, source: ImageSource, accelerator: Accelerator) -> ImageSource:
        """What training reads, given the images: a cache of them where the settings ask for one."""
        return source

    @abstractmethod
    def tokenizer(self, averaged: nn.Module) -> Tokenizer:
        """The tokenizer to export, on the given weights of ``averaged_module``."""


class Reference:
    """Holds a module without registering it, so that a player reads what another one trains."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class frozen:
    """Within this context a module's parameters collect no gradient, though gradients pass through."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for parameter in self.parameters:
            parameter.requires_grad_(True)
