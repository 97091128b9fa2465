"""Settings of an optimiser."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from semtok.settings import Config

Beta = Annotated[float, Field(ge=0, lt=1)]
_OF_MUON = ("matrix_learning_rate", "momentum", "nesterov", "adjust_lr_fn")


class OptimiserConfig(Config):
    """AdamW, or Muon with AdamW. Nothing scales the learning rate by the batch or by the number of GPUs."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: the hidden matrices of transformers step by ``torch.optim.Muon``, all else by AdamW. Each of fused
    matrices, such as those of queries, keys and values, is a matrix of its own. A network without such matrices, such
    as a discriminator, has AdamW alone; an error where no network has one. Needs torch 2.9."""
    learning_rate: float = Field(gt=0)
    """The highest rate, which the warm-up rises to."""
    matrix_learning_rate: float | None = Field(None, gt=0)
    """The same of Muon's matrices; None: ``learning_rate``."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay, times the learning rate in each step, by Muon too."""
    momentum: Beta = 0.95
    """Decay of Muon's average of the gradient."""
    nesterov: bool = True
    """Whether Muon looks ahead along its average, as Nesterov does."""
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """What Muon's steps on a matrix of A x B are scaled by. ``match_rms_adamw``: 0.2 √max(A, B), so that they are
    about as large as AdamW's and one learning rate serves both. ``original``: √max(1, A / B)."""

    @model_validator(mode="after")
    def _consistent(self) -> "OptimiserConfig":
        fields = type(self).model_fields
        for name in _OF_MUON:
            if self.name != "muon" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} takes effect with name=muon only")
        return self
