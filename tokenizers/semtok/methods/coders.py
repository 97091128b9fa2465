"""Coders: networks that compress a teacher's patch tokens into the semantic part, and restore them."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from semtok.settings import Config
from semtok.statistics import StreamingMoments


class CoderShape(Config):
    """What builds a coder of the same shape: the arguments of its class."""

    feature_channels: int = Field(ge=1)
    """D of the features."""
    channels: int = Field(ge=1)
    """C of the code, the semantic part."""


class FeatureCoder(nn.Module, ABC):
    """Compresses a teacher's patch tokens, all layers on one channel axis, and restores them."""

    shape_class: ClassVar[type[CoderShape]] = CoderShape
    shape: CoderShape

    @abstractmethod
    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D, h, w) to mean and standard deviation (0: deterministic) of the code
        (B, C, h, w)."""

    @abstractmethod
    def decode(self, code: Tensor) -> Tensor:
        """Codes (B, C, h, w) to features (B, D, h, w)."""

    def settings(self) -> dict[str, Any]:
        """Its shape as JSON."""
        return self.shape.model_dump(mode="json")


class StandardisedCoder(FeatureCoder):
    """A coder of features that are standardised per channel, by statistics measured on training data."""

    def __init__(self, shape: CoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("feature_mean", torch.zeros(shape.feature_channels))
        self.register_buffer("feature_std", torch.ones(shape.feature_channels))

    def take_statistics(self, moments: StreamingMoments) -> None:
        """Standardises by these moments from now on; channels that never vary are only centred."""
        self.feature_mean.copy_(moments.mean)
        self.feature_std.copy_(moments.std.where(moments.std > 0, 1.0))

    def standardise(self, features: Tensor) -> Tensor:
        """Features (B, D, h, w) to about zero mean and unit variance per channel."""
        return (features - self.feature_mean[:, None, None]) / self.feature_std[:, None, None]

    def destandardise(self, standardised: Tensor) -> Tensor:
        """The inverse of ``standardise``."""
        return standardised * self.feature_std[:, None, None] + self.feature_mean[:, None, None]


def feature_cosine(predicted: Tensor, features: Tensor) -> Tensor:
    """Cosine over channels, averaged over positions: two of (B, D, h, w) to (B,), in float32."""
    return F.cosine_similarity(predicted.float(), features.float(), dim=1).mean(dim=(1, 2))
