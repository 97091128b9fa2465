"""How a stage is trained: the ``train:`` section of every recipe."""

import math
from typing import Literal

from pydantic import Field, model_validator

from semtok.config import Config
from semtok.objective import OptimiserConfig


class TrainConfig(Config):
    """How long, how fast, and what is written on the way."""

    steps: int = Field(ge=1)
    """Optimiser steps."""
    batch_size: int = Field(ge=1)
    """Images per optimiser step, over all processes and micro-batches."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step."""
    optimiser: OptimiserConfig
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    """Where the cosine ends, as a fraction of the learning rate."""
    clip_norm: float | None = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema_decay: float | None = Field(None, ge=0, lt=1)
    """None: no average; the trained weights are evaluated and exported."""
    compile: Literal["none", "inductor", "aot_eager"] = "none"
    """torch.compile's backend for the networks."""
    seed: int = Field(0, ge=0, lt=2**32)
    log_every: int = Field(50, ge=1)
    """Steps between readings of the metrics; the host waits for the device at no other step."""
    checkpoint_every: int = Field(1000, ge=1)
    keep_last: int = Field(2, ge=1)
    sample_every: int = Field(1000, ge=1)
    num_sample_images: int = Field(8, ge=1)
    num_validation_images: int = Field(512, ge=1)
    num_statistics_images: int = Field(2048, ge=1)
    """Training images that the latents' statistics are measured on."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.final_lr_fraction and self.schedule != "cosine":
            raise ValueError("train.final_lr_fraction takes effect with train.schedule=cosine only")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps {self.warmup_steps} is more than train.steps {self.steps}; "
                "pass train.warmup_steps=…"
            )
        return self

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step (0-based)."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "constant":
            return warmup
        progress = max(0, step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return warmup * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)
