"""Settings of an optimiser."""

from typing import Annotated

from pydantic import Field

from semtok.settings import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimiserConfig(Config):
    """AdamW. Nothing scales the learning rate by the batch or by the number of GPUs."""

    learning_rate: float = Field(gt=0)
    """The highest rate, which the warm-up rises to."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, times the learning rate in each step."""
