"""SemVAE: a transformer VAE over a teacher's patch tokens, for Semantic-First Diffusion.

"Semantics Lead the Way: Harmonizing Semantic and Texture Modeling with Asynchronous Latent
Diffusion", arXiv 2512.04926. The last layer's patch tokens are coded to a few channels by a VAE
made of transformer blocks (section 3.2, eq. 8). The diffusion transformer then denoises the
semantics ahead of the texture by a lead of 0.3 (section 3.3): semantics alone, both, texture alone.
"""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from semtok.methods.coders import CoderShape, FeatureCoder, feature_cosine
from semtok.methods.composite import (
    GLOBAL_WEIGHT,
    CompositeConfig,
    CompositeObjective,
    CompositeTokenizer,
)
from semtok.methods.vae import kl_loss
from semtok.objective import Carry, Inputs, MethodContext, StepOutput, Term
from semtok.registry import register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import LatentSpec
from semtok.sampler.roles import hidden_matrix
from semtok.tokenizer import DiffusionDefaults

LEAD = 0.3
"""By how much of the time axis semantics lead, best of those that the paper tries."""
SEMANTIC_WEIGHT = 2.0
"""β, the weight of the semantic channels in the velocity's mean over all channels (table 18)."""

# Settings ----------------------------------------------------------------------------------------


class SemVAEConfig(CompositeConfig):
    """Settings of SemVAE."""

    name: Literal["semvae"] = "semvae"
    global_token: bool = False
    channels: int = Field(16, ge=1)
    """Of the code; the paper's table 17 finds 16 best of 2 to 16."""
    width: int | None = Field(None, ge=1)
    """Of the transformer; None: the features'."""
    heads: int = Field(6, ge=1)
    """Attention heads."""
    blocks: int = Field(4, ge=1)
    """In the encoder, and again in the decoder."""
    mse_weight: float = Field(1.0, ge=0)
    """Weight of the squared error of the features."""
    cosine_weight: float = Field(1.0, ge=0)
    """Weight of 1 - cosine of the features."""
    cosine_axis: Literal["features", "tokens"] = "features"
    """``features`` compares tokens, as eq. 8 says; ``tokens`` compares channels over the positions of an
    image, which is what the published weights were trained with."""
    kl_weight: float = Field(1e-7, ge=0)
    """Of the KL summed over the code, in nats per image."""


# The VAE -----------------------------------------------------------------------------------------


class TransformerBlock(nn.Module):
    """Attention and MLP (exact GELU, four times the width), each behind a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        hidden_matrix(self.attn, weight="in_proj_weight", slices=3)
        hidden_matrix(self.attn.out_proj)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            hidden_matrix(nn.Linear(width, 4 * width)),
            nn.GELU(),
            hidden_matrix(nn.Linear(4 * width, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class SemVAEShape(CoderShape):
    """Shape of a SemVAE of tokens of D channels; see ``SemVAEConfig``."""

    width: int = Field(ge=1)
    heads: int = Field(ge=1)
    blocks: int = Field(ge=1)


class SemVAE(FeatureCoder):
    """Patch tokens to a Gaussian of a few channels and back; no position codes, so any grid.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    shape_class = SemVAEShape

    def __init__(self, shape: SemVAEShape) -> None:
        super().__init__()
        if shape.width % shape.heads:
            raise ValueError(f"method.heads: {shape.heads} does not divide the width {shape.width}")
        self.shape = shape
        self.encoder = _transformer(shape, shape.feature_channels, 2 * shape.channels)
        self.decoder = _transformer(shape, shape.channels, shape.feature_channels)

    def moments(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D, h, w) to mean and log-variance of the code (B, C, h, w)."""
        moments = _on_tokens(self.encoder, features)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # the bounds of diffusers' Gaussian

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.moments(features)
        return mean, (0.5 * logvar).exp()

    def decode(self, code: Tensor) -> Tensor:
        return _on_tokens(self.decoder, code)


def _transformer(shape: SemVAEShape, channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(channels_in, shape.width),
        *(TransformerBlock(shape.width, shape.heads) for _ in range(shape.blocks)),
        nn.LayerNorm(shape.width),
        nn.Linear(shape.width, channels_out),
    )


def _on_tokens(network: nn.Module, maps: Tensor) -> Tensor:
    tokens = network(rearrange(maps, "b d h w -> b (h w) d"))
    return rearrange(tokens, "b (h w) d -> b d h w", h=maps.shape[-2])


class SemVAETokenizer(CompositeTokenizer):
    """Image latents and coded features; a CLS token where it is asked for."""

    coder_class = SemVAE


# The objective -----------------------------------------------------------------------------------


def cosine_loss(
    restored: Tensor, features: Tensor, axis: Literal["features", "tokens"] = "features"
) -> Tensor:
    """1 - cosine of two (B, D, h, w), per sample (B,).

    Args:
        axis: along which vectors are read, see ``SemVAEConfig.cosine_axis``.
    """
    if axis == "features":
        return 1 - feature_cosine(restored, features)
    flat = (x.float().flatten(2) for x in (restored, features))  # (B, D, tokens)
    return 1 - F.cosine_similarity(*flat, dim=2).mean(dim=1)


class SemVAELearner(nn.Module):
    """Trains the VAE by squared error, cosine and a small KL divergence (eq. 8)."""

    def __init__(self, config: SemVAEConfig, coder: SemVAE) -> None:
        super().__init__()
        self.config, self.coder = config, coder

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised (eq. 8): L = λ_m ‖f - f̂‖² / (D h w) + λ_c (1 - cos(f, f̂)) + λ_KL KL(q(z|f) ‖ N(0, I)),

            f̂ = decoder(z),  z ~ q(z|f) = N(μ, σ²)

        Args:
            inputs: the teacher's ``features`` f.
            step, carry: unused.
        """
        config, f = self.config, inputs["features"].joined
        mean, logvar = self.coder.moments(f)
        noise = draws.normal("posterior", tuple(mean.shape[1:]))
        restored = self.coder.decode(mean + (0.5 * logvar).exp() * noise)
        error = (restored.float() - f.float()).square().mean(dim=(1, 2, 3))
        return StepOutput(
            {
                "mse": Term(error, config.mse_weight),
                "cosine": Term(cosine_loss(restored, f, config.cosine_axis), config.cosine_weight),
                "kl": Term(kl_loss(mean, logvar), config.kl_weight),
            }
        )


class SemVAEObjective(CompositeObjective):
    """Trains the VAE on raw features: the cosine and the final norm make scales alike."""

    def __init__(self, config: SemVAEConfig, context: MethodContext) -> None:
        assert context.teacher is not None
        features = sum(context.teacher.widths)
        shape = SemVAEShape(
            feature_channels=features,
            channels=config.channels,
            width=config.width or features,
            heads=config.heads,
            blocks=config.blocks,
        )
        coder = SemVAE(shape)
        super().__init__(config, context, coder)
        self.learners["semvae"] = SemVAELearner(config, coder)

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        mean, logvar = averaged.moments(inputs["features"].joined)
        return {
            **super().validate(averaged, pixels, inputs, indices=indices),
            "kl_per_dim": kl_loss(mean, logvar) / mean[0].numel(),
        }

    def diffusion_defaults(self, spec: LatentSpec) -> DiffusionDefaults:
        # The published loss is one mean over all channels; this library's is a mean per part.
        texture, semantic = spec["texture"].channels, spec["semantic"].channels
        weights = {
            "texture": texture / (texture + semantic),
            "semantic": SEMANTIC_WEIGHT * semantic / (texture + semantic),
        }
        if "global" in spec.names:
            weights["global"] = GLOBAL_WEIGHT
        return DiffusionDefaults(
            leads={"semantic": LEAD},
            loss_weights=weights,
            cosine_weight=1.0,
            repa={"weight": 1.0, "depth": 2, "with_global": "global" in spec.names},
        )


register_method(
    "semvae",
    config=SemVAEConfig,
    objective=SemVAEObjective,
    tokenizer=SemVAETokenizer,
    papers=("SemVAE and Semantic-First Diffusion, arXiv 2512.04926",),
)
