"""ReDi: principal components of a teacher's features, the linear baseline of semantic latents.

"Boosting Generative Image Modeling via Joint Image-Feature Synthesis", arXiv 2504.16064. The last
layer's patch tokens are standardised and projected on their first principal components (8 in the
paper); the diffusion transformer denoises them together with the image latents. Components come
from one streaming pass over training images, exactly; nothing is learned by steps.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from einops import einsum
from pydantic import Field
from torch import Tensor

from semtok.methods.composite import (
    GLOBAL_WEIGHT,
    CompositeConfig,
    CompositeObjective,
    CompositeTokenizer,
    StandardisedCoder,
)
from semtok.objective import Batch, MethodContext
from semtok.registry import register_method
from semtok.sampler.latents import LatentSpec
from semtok.statistics import StreamingMoments
from semtok.tokenizer import DiffusionDefaults


class ReDiConfig(CompositeConfig):
    """Settings of ReDi. Its recipe has ``train.steps: 0``; ``train.num_statistics_images`` are read."""

    name: Literal["redi"] = "redi"
    global_token: bool = False
    channels: int = Field(8, ge=1)
    """Principal components kept."""

    def has_steps(self) -> bool:
        return False


class PrincipalComponents(StandardisedCoder):
    """Standardised features on their first principal components.

    Args:
        feature_channels: D.
        channels: components kept, at most D.
    """

    def __init__(self, feature_channels: int, channels: int) -> None:
        super().__init__(feature_channels, channels)
        if channels > feature_channels:
            raise ValueError(
                f"method.channels: {channels} components of features with {feature_channels} channels"
            )
        self.register_buffer("components", torch.eye(channels, feature_channels))  # rows

    def fit(self, moments: StreamingMoments) -> None:
        """Takes the components of the features whose mean and covariance these are."""
        self.take_statistics(moments)
        std = self.feature_std.double()
        correlation = moments.matrix / torch.outer(std, std)
        directions = torch.linalg.eigh(correlation.cpu()).eigenvectors.flip(1)  # largest first
        components = directions[:, : self.channels].T
        # A direction's sign is arbitrary; its largest entry is made positive.
        largest = components.abs().argmax(dim=1, keepdim=True)
        self.components.copy_(components * components.gather(1, largest).sign())

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        code = einsum(self.components, self.standardise(features), "c d, b d h w -> b c h w")
        return code, torch.zeros_like(code)

    def decode(self, code: Tensor) -> Tensor:
        return self.destandardise(einsum(self.components, code, "c d, b c h w -> b d h w"))

    def settings(self) -> dict[str, Any]:
        return {"feature_channels": self.feature_channels, "channels": self.channels}


class ReDiTokenizer(CompositeTokenizer):
    """Image latents and principal components."""

    coder_class = PrincipalComponents


class ReDiObjective(CompositeObjective):
    """Fits the components in the pass before the first step; there is no step."""

    tokenizer_class = ReDiTokenizer

    def __init__(self, config: ReDiConfig, context: MethodContext) -> None:
        assert context.teacher is not None
        coder = PrincipalComponents(sum(context.teacher.widths), config.channels)
        super().__init__(config, context, coder)

    def measure(self, batches: Iterable[Batch]) -> None:
        self.averaged_module().fit(self.feature_moments(batches, covariance=True))

    def diffusion_defaults(self, spec: LatentSpec) -> DiffusionDefaults:
        # Both spatial parts weigh the same; REPA is an option of the paper, not its default.
        weights = {"global": GLOBAL_WEIGHT} if "global" in spec.names else {}
        return DiffusionDefaults(loss_weights=weights)


register_method(
    "redi",
    config=ReDiConfig,
    objective=ReDiObjective,
    tokenizer=ReDiTokenizer,
    papers=("ReDi, arXiv 2504.16064",),
)
