"""ReDi: principal components of a teacher's features, the linear baseline of semantic latents.

"Boosting Generative Image Modeling via Joint Image-Feature Synthesis", arXiv 2504.16064. The last
layer's patch tokens are standardised and projected on their first principal components (8 in the
paper); the diffusion transformer denoises them together with the image latents. Components come
from one streaming pass over training images, exactly; nothing is learned by steps.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from einops import einsum
from pydantic import Field
from torch import Tensor

from semtok.methods.coders import CoderShape, StandardisedCoder
from semtok.methods.composite import (
    GLOBAL_WEIGHT,
    CompositeConfig,
    CompositeObjective,
    CompositeTokenizer,
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

    Raises:
        ValueError: more components than features.
    """

    def __init__(self, shape: CoderShape) -> None:
        super().__init__(shape)
        if shape.channels > shape.feature_channels:
            raise ValueError(
                f"method.channels: {shape.channels} components of features with "
                f"{shape.feature_channels} channels"
            )
        eye = torch.eye(shape.channels, shape.feature_channels)
        self.register_buffer("components", eye)  # rows

    def fit(self, moments: StreamingMoments) -> None:
        """What is minimised, in closed form: E‖s - WᵀW s‖² over orthonormal W (C, D), of standardised features s.

        The rows of W are the first eigenvectors of the correlation matrix, which ``moments`` hold.
        """
        self.take_statistics(moments)
        std = self.feature_std.double()
        correlation = moments.matrix / torch.outer(std, std)
        directions = torch.linalg.eigh(correlation.cpu()).eigenvectors.flip(1)  # largest first
        components = directions[:, : self.shape.channels].T
        # A direction's sign is arbitrary; its largest entry is made positive.
        largest = components.abs().argmax(dim=1, keepdim=True)
        self.components.copy_(components * components.gather(1, largest).sign())

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        code = einsum(self.components, self.standardise(features), "c d, b d h w -> b c h w")
        return code, torch.zeros_like(code)

    def decode(self, code: Tensor) -> Tensor:
        return self.destandardise(einsum(self.components, code, "c d, b c h w -> b d h w"))


class ReDiTokenizer(CompositeTokenizer):
    """Image latents and principal components."""

    coder_class = PrincipalComponents


class ReDiObjective(CompositeObjective):
    """Fits the components in the pass before the first step; there is no step."""

    def __init__(self, config: ReDiConfig, context: MethodContext) -> None:
        assert context.teacher is not None
        shape = CoderShape(feature_channels=sum(context.teacher.widths), channels=config.channels)
        super().__init__(config, context, PrincipalComponents(shape))

    def measure(self, batches: Iterable[Batch]) -> None:
        self.coder.fit(self.feature_moments(batches, covariance=True))

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
