"""Send-VAE: a VAE whose latents are aligned to a vision foundation model.

"Boosting Latent Diffusion Models via Disentangled Representation Alignment", arXiv 2601.05823.
The VAE is trained by its own losses and by one more: noised latents pass a small mapper, and the
result is to resemble the teacher's patch tokens (eq. 1 and section 3). The paper leaves open how
latents are normalised before noise of unit variance is added, and the mapper's projector. Here they
are divided by running statistics, and the projector is REPA's three-layer MLP; both are the
choices of the closest published code.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from semtok.methods.standardiser import RunningStandardiser
from semtok.methods.vae import (
    AutoencoderLearner,
    KLTokenizer,
    VAEConfig,
    VAEObjective,
    reconstruct,
    reconstruction_metrics,
)
from semtok.objective import Carry, Inputs, MethodContext, StepOutput, Term
from semtok.registry import register_method
from semtok.sampler.blocks import init_xavier
from semtok.sampler.draws import Draws
from semtok.sampler.embeddings import sincos_positions
from semtok.sampler.roles import tagged_timm_block
from semtok.settings import Config
from semtok.teachers import alignment_loss, silu_mlp

# Settings ----------------------------------------------------------------------------------------


class MapperConfig(Config):
    """The mapper: patch embedding, ViT blocks, projector."""

    depth: int = Field(1, ge=0)
    """ViT blocks; the paper's ablation (table 2) finds 1 better than 0 and 2."""
    width: int | None = Field(None, ge=4, multiple_of=4)
    """None: the teacher's."""
    heads: int | None = Field(None, ge=1)
    """None: width / 64, which gives the paper's 12 for 768 and 16 for 1024."""
    patch_size: int = Field(1, ge=1)
    """Latent cells per token and side: 1 for f16 latents, 2 for f8."""
    projector_width: int = Field(2048, ge=1)
    """Hidden width of the MLP after the blocks."""


class LatentNoiseConfig(Config):
    """How latents are noised before they are compared."""

    noise: Literal["uniform", "logit_normal", "fixed", "none"] = "uniform"
    """The law of t in z_t = (1 - t) z + t ε, drawn per image; ``uniform`` is eq. 1."""
    noise_level: float | None = Field(None, ge=0, le=1)
    """t, where ``noise`` is ``fixed``."""

    @model_validator(mode="after")
    def _level_goes_with_fixed(self) -> "LatentNoiseConfig":
        if (self.noise == "fixed") != (self.noise_level is not None):
            raise ValueError("noise_level is given exactly when noise is 'fixed'")
        return self


class AlignmentConfig(LatentNoiseConfig):
    """How latents are noised and compared."""

    weight: float = Field(1.0, ge=0)
    """Weight of the alignment loss."""


class AlignedVAEConfig(VAEConfig):
    """Settings of a VAE whose latents are aligned to a teacher."""

    @model_validator(mode="after")
    def _decoder_of_some_latents(self) -> "AlignedVAEConfig":  # in the place of what a VAE asks for
        if self.train != "all":
            own = [
                f"method.{n}" for n in type(self).model_fields if n not in VAEConfig.model_fields
            ]
            raise ValueError(
                "method.train: the alignment is of latents, which method.train=decoder keeps as they are; pass "
                f"method.name=vae and leave {' and '.join(own)} out"
            )
        return self

    @model_validator(mode="after")
    def _aligns(self) -> "AlignedVAEConfig":
        alignment = getattr(self, "alignment", None)
        if alignment is not None and not alignment.weight:
            raise ValueError(
                "method.alignment.weight: 0 aligns nothing; give more, or pass method.name=vae and leave "
                "method.alignment out"
            )
        return self

    def needs_teacher(self) -> bool:
        return True


class SendVAEConfig(AlignedVAEConfig):
    """Settings of Send-VAE, on top of the VAE's."""

    name: Literal["send_vae"] = "send_vae"
    mapper: MapperConfig = MapperConfig()
    """The network from noised latents to the teacher's tokens."""
    alignment: AlignmentConfig = AlignmentConfig()
    """What the latents learn from the teacher."""

    def cells_per_token(self) -> int:
        return self.mapper.patch_size


# Noise -------------------------------------------------------------------------------------------


def noise_latents(z: Tensor, alignment: LatentNoiseConfig, draws: Draws) -> Tensor:
    """z_t = (1 - t) z + t ε of standardised latents z (B, C, h, w), with one t per image (eq. 1)."""
    if alignment.noise == "none":
        return z
    if alignment.noise == "fixed":
        t = torch.full((len(z), 1, 1, 1), alignment.noise_level, device=z.device)
    elif alignment.noise == "uniform":
        t = draws.uniform("alignment_time", (1, 1, 1))
    else:
        t = draws.normal("alignment_time", (1, 1, 1)).sigmoid()
    return (1 - t) * z + t * draws.normal("alignment_noise", tuple(z.shape[1:]))


# The mapper --------------------------------------------------------------------------------------


class Mapper(nn.Module):
    """Noised latents to the teacher's patch tokens. Used in training only, left out of exports.

    Args:
        channels: C of the latents.
        teacher_width: D of the teacher's tokens.
    """

    def __init__(self, config: MapperConfig, *, channels: int, teacher_width: int) -> None:
        super().__init__()
        width = config.width or teacher_width
        heads = config.heads or max(1, width // 64)
        if width % heads or width % 4:
            raise ValueError(
                f"method.mapper: width {width} must be a multiple of 4 and of heads {heads}"
            )
        self.embed = nn.Conv2d(channels, width, config.patch_size, stride=config.patch_size)
        blocks = (Block(width, heads, mlp_ratio=4, qkv_bias=True) for _ in range(config.depth))
        self.blocks = nn.Sequential(*map(tagged_timm_block, blocks))
        self.projector = silu_mlp(width, config.projector_width, teacher_width)
        self.apply(init_xavier)
        nn.init.xavier_uniform_(self.embed.weight.view(width, -1))
        nn.init.zeros_(self.embed.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Standardised latents (B, C, h, w) to tokens (B, D, h / patch, w / patch)."""
        x = self.embed(z)
        height, width = x.shape[-2:]
        x = rearrange(x, "b d h w -> b (h w) d")
        x = x + sincos_positions((height, width), x.shape[-1], device=x.device)
        x = self.projector(self.blocks(x))
        return rearrange(x, "b (h w) d -> b d h w", h=height)


# The objective -----------------------------------------------------------------------------------


def check_layers(config: VAEConfig, context: MethodContext) -> None:
    """Raises ValueError where a new run asks for layers of the teacher that nothing reads: an alignment reads the last
    one that is asked for, a perceptual distance reads all."""
    layers = list(context.teacher.config.layers) if context.teacher is not None else []
    if len(layers) > 1 and config.perceptual != "teacher" and not context.resumes:
        raise ValueError(
            f"teacher.layers: {layers} are several, and the alignment is to one; pass teacher.layers=[{layers[-1]}]"
        )


class SendVAELearner(AutoencoderLearner):
    """The autoencoder together with the mapper."""

    def __init__(
        self, config: SendVAEConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        super().__init__(config, context, discriminator)
        assert context.teacher is not None, "Send-VAE needs a teacher"
        channels = self.autoencoder.config.latent_channels
        self.standardiser = RunningStandardiser(channels)
        self.mapper = Mapper(
            config.mapper, channels=channels, teacher_width=context.teacher.widths[-1]
        )

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised (section 3.2):

            L = L_VAE + λ E[1 - cos(m(z_t), f(x))],  z_t = (1 - t) z + t ε,  z ~ q(z|x)

        with L_VAE that of ``vae``, m the mapper, f(x) the teacher's patch tokens; z is standardised before the noise.
        With ``method.equivariance`` z is as the encoder gave it, of a scaled image where that is scaled before; f(x)
        is of the whole image, resampled to that grid.

        Args:
            inputs: ``pixels`` (B, 3, H, W) and the teacher's ``features``.
            carry: unused, this learner is first.
        """
        alignment, f = self.config.alignment, inputs["features"].patches[-1]
        q, z, x_hat = self.autoencode(inputs["pixels"], draws)
        terms = self.vae_terms(q, x_hat, inputs)
        z_t = noise_latents(self.standardiser(z), alignment, draws)
        terms["alignment"] = Term(alignment_loss(self.mapper(z_t), f), alignment.weight)
        terms |= self.adversarial_terms(x_hat, terms, step, draws)
        return StepOutput(terms, carry={"reconstruction": x_hat.detach()})


class SendVAEObjective(VAEObjective):
    """The VAE's objective with Send-VAE's learner."""

    def __init__(self, config: SendVAEConfig, context: MethodContext) -> None:
        super().__init__(config, context, SendVAELearner)
        check_layers(config, context)
        patch = config.mapper.patch_size
        grid = self.tokenizer(self.averaged_module()).spec.shape("texture", context.image_size)[1:]
        if grid[0] % patch or grid[1] % patch:
            raise ValueError(
                f"method.mapper.patch_size: {patch} does not divide the latent grid {grid[0]}x{grid[1]}"
            )

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        """The VAE's metrics, and the cosine between mapped latents, without noise, and the teacher's tokens."""
        q, x_hat = reconstruct(averaged, pixels)
        learner = self.learners["autoencoder"]
        mapped = learner.mapper(learner.standardiser(q.mean))
        cosine = 1 - alignment_loss(mapped, inputs["features"].patches[-1])
        return {**reconstruction_metrics(q, x_hat, pixels), "alignment_cosine": cosine}

    def compiled_modules(self) -> list[nn.Module]:
        return [*super().compiled_modules(), self.learners["autoencoder"].mapper]


register_method(
    "send_vae",
    config=SendVAEConfig,
    objective=SendVAEObjective,
    tokenizer=KLTokenizer,
    papers=("Send-VAE, arXiv 2601.05823",),
)
