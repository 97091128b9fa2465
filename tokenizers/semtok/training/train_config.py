"""How a stage is trained: the ``train:`` section of every recipe."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from semtok.optimiser import OptimiserConfig
from semtok.settings import Config
from semtok.speed import Compiler, Precision

SMALLEST, LARGEST = 0.01, 0.28
"""Widths of averages, σ_rel; 0.289 is that of the plain mean."""


class MemoryConfig(Config):
    """What a step needs of a GPU, in GB (10^9 bytes), as ``python tools/benchmark.py memory RECIPE`` estimates it."""

    gpu: float = Field(gt=0)
    """Memory of one GPU that the recipe is written for; one that has less counts as what it has."""
    fixed: float = Field(ge=0)
    """Of one process, whatever its images: networks, gradients, optimiser, average."""
    per_image: float = Field(gt=0)
    """Of each image of a micro-batch."""


class AveragesConfig(Config):
    """Averages from which, after the training, an average of any length is made (Karras et al. 2024, arXiv 2312.02696,
    section 3): ``hub checkpoint RUN --average 0.08``."""

    sigma_rel: tuple[Annotated[float, Field(ge=SMALLEST, le=LARGEST)], ...] = (0.05, 0.1)
    """Widths of the averages that are followed, as fractions of the training up to then. Each takes as much memory as
    the network, and so do its snapshots on disk."""
    every: int = Field(1000, ge=1)
    """Steps between snapshots, which go to ``averages/`` of the run."""
    keep: int = Field(16, ge=2)
    """How many snapshots stay at most: where there would be more, the distance between them is doubled."""

    @field_validator("sigma_rel")
    @classmethod
    def _some_distinct(cls, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        if not sigmas or len(set(sigmas)) != len(sigmas):
            raise ValueError(f"expected distinct widths, at least one, got {list(sigmas)}")
        return sigmas


class TrainConfig(Config):
    """How long, how fast, and what is written on the way."""

    steps: int = Field(ge=0)
    """Optimiser steps; 0 for methods that learn nothing by steps."""
    batch_size: int = Field(ge=1)
    """Images per optimiser step, over all processes and micro-batches."""
    accumulate: Annotated[int, Field(ge=1)] | Literal["auto"] = 1
    """Micro-batches per optimiser step. ``auto``: the fewest that ``memory`` and the number of processes
    allow. Losses do not depend on them but by rounding, except where a layer or a weight is made from what
    one micro-batch holds: batch norm, and the adaptive weight of a discriminator."""
    memory: MemoryConfig | None = None
    """What ``accumulate: auto`` goes by; a number of micro-batches that needs more than that is told of."""
    optimiser: OptimiserConfig | None = None
    """Needed wherever there are steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of the learning rate after the warm-up: it stays, or falls along a cosine or a straight line."""
    warmup_steps: int = Field(0, ge=0)
    """Over which the rate rises from 0."""
    constant_steps: int = Field(0, ge=0)
    """After them, at the full rate, before it begins to fall."""
    planned_before: tuple[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], ...] = ()
    """Pairs (until, steps): before step ``until`` the rate fell as over so many ``steps``. Written where a run is
    resumed with more steps, so that its recipe tells its learning rates, and makes the same run again."""
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Where it has fallen to, as a fraction of the learning rate."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients of each learner are scaled down to this norm; None: they are used as they are."""
    precision: Precision | Literal["auto"] = "fp32"
    """Of training: see ``semtok.speed.Precision``. ``auto``: bf16 where this machine is fast in it. A GPU is where
    its hardware computes it; on a CPU a short measurement tells, of matrix products and of convolutions. The
    run's recipe notes what was chosen, and a resumed run goes on with that. Frozen teachers compute in the
    precision wherever the loop asks them, in steps, validation and pictures alike, and their features are
    handed on in float32. Frozen tokenizers encode and decode in float32, and the averaged network is validated
    and pictured in float32, as its export is used (in TF32 where the precision allows that)."""
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """None: no average; the trained weights are evaluated and exported."""
    ema_warmup: bool = True
    """The decay after n updates is at most (1 + n) / (10 + n), so that short runs are not dominated by the
    first weights. False: the same decay from the first step, as the published training codes have it."""
    averages: AveragesConfig | None = None
    """Averages to choose from after the training, beside that of ``ema_decay``; None: none."""
    compile: Compiler = "none"
    """torch.compile's backend for the networks, the blocks of frozen teachers among them."""
    sharding: Literal["none", "fsdp2"] = "none"
    """What each process holds. ``none``: whole networks. ``fsdp2``: of a diffusion transformer its part of weights,
    gradients, optimiser and average, for networks that don't fit otherwise; other networks stay whole. Checkpoints
    are then written in parts, while training goes on. What is learned differs by rounding."""
    channels_last: bool = False
    """Keep the weights of convolutions channel by channel (NHWC), as tensor cores read them: cuDNN then
    need not transpose what goes in and out, which can pay for VAEs, discriminators and compressors,
    frozen ones too. Weights are saved as ever, and losses differ by rounding. Whether it pays:
    ``python tools/benchmark.py tokenizer RECIPE --random train.channels_last=true --against
    train.channels_last=false``. An error where no network has a convolution."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms for each shape of a convolution once and take the fastest; shapes
    are fixed in training. Which one that is may change from run to run, and with it the last bits.
    Without effect on a CPU. Whether it pays: as above, with ``train.cudnn_benchmark``."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of first weights, the order of images, and noise. A run repeats with the same seed."""
    log_every: int = Field(50, ge=1)
    """Steps between readings of the metrics; the host waits for the device at no other step."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints, from which ``--resume`` goes on."""
    keep_last: int = Field(2, ge=1)
    """How many checkpoints stay; earlier ones are removed as new ones are written."""
    export_at: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Steps after which the averaged network is exported on the way, to ``exports/0070000/`` of the run."""
    sample_every: int = Field(1000, ge=1)
    """Steps between pictures in ``samples/``."""
    num_sample_images: int = Field(8, ge=1)
    """Images in a picture."""
    num_validation_images: int = Field(512, ge=1)
    """Held-out images that scores are measured on."""
    num_statistics_images: int = Field(2048, ge=1)
    """Training images that the latents' statistics are measured on."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Where metrics go, besides ``metrics.jsonl``."""

    @field_validator("export_at")
    @classmethod
    def _distinct(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(steps)) != len(steps):
            raise ValueError(f"a step is named twice in {list(steps)}")
        return tuple(sorted(steps))

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        for name in ("final_lr_fraction", "constant_steps", "planned_before"):
            if getattr(self, name) and self.schedule == "constant":
                raise ValueError(
                    f"train.{name} takes effect with train.schedule=cosine or linear only"
                )
        if self.steps and self.warmup_steps + self.constant_steps > self.steps:
            what = "train.constant_steps" if self.constant_steps else "train.warmup_steps"
            told = f" and train.constant_steps {self.constant_steps}" if self.constant_steps else ""
            raise ValueError(
                f"train.warmup_steps {self.warmup_steps}{told} is more than train.steps {self.steps}; pass {what}=…"
            )
        untils = [until for until, _ in self.planned_before]
        if sorted(set(untils)) != untils or untils[-1:] > [self.steps]:
            raise ValueError(
                f"train.planned_before: expected rising steps up to train.steps {self.steps}, got {untils}"
            )
        if not self.ema_warmup and self.ema_decay is None:
            raise ValueError("train.ema_warmup takes effect with train.ema_decay only")
        if self.averages is not None and self.averages.every > self.steps:
            raise ValueError(
                f"train.averages.every: {self.averages.every} is more than train.steps {self.steps}; pass "
                "train.averages.every=…"
            )
        if self.sharding == "fsdp2":
            self._check_sharded()
        if self.accumulate == "auto" and self.memory is None:
            raise ValueError(
                "train.accumulate: auto needs train.memory={gpu: …, fixed: …, per_image: …}, in GB; or give a number"
            )
        if self.export_at and self.export_at[-1] > self.steps:
            raise ValueError(
                f"train.export_at: {self.export_at[-1]} is more than train.steps {self.steps}"
            )
        if self.steps and self.optimiser is None:
            raise ValueError("train.optimiser is missing; give train.optimiser.learning_rate=…")
        return self

    def _check_sharded(self) -> None:
        """Raises ValueError where settings need networks whole."""
        for setting, is_asked, way_out in (
            ("precision: fp16", self.precision == "fp16", "use bf16"),
            ("channels_last", self.channels_last, "leave it out"),
            ("averages", self.averages is not None, "use train.ema_decay"),
        ):
            if is_asked:
                raise ValueError(
                    f"train.{setting} does not go with train.sharding=fsdp2; {way_out}, or pass train.sharding=none"
                )

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step (0-based)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return warmup
        before = self.warmup_steps + self.constant_steps
        steps = next((n for until, n in self.planned_before if step < until), self.steps)
        progress = min(1.0, max(0, step - before) / max(1, steps - before))
        left = 0.5 * (1 + math.cos(math.pi * progress))
        if self.schedule == "linear":
            left = 1 - progress
        return warmup * (self.final_lr_fraction + (1 - self.final_lr_fraction) * left)
