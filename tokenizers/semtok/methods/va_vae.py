"""VA-VAE: a VAE whose latents are to have the similarities of a vision foundation model's tokens.

"Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models", arXiv 2501.01423.
The VAE is trained by its own losses and by one more, the VF loss: at each position a projection of the latents is
to point where the teacher's token points, and pairs of positions are to be as alike as they are to the teacher; both
up to a margin. Its weight adapts to the gradients at the encoder's last layer. What differs: latents may be noised
before they are compared, as Send-VAE does.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.adversarial import adaptive_ratio
from semtok.methods.part_weights import read_part, take_part, unfit
from semtok.methods.send_vae import (
    AlignedVAEConfig,
    LatentNoiseConfig,
    check_layers,
    noise_latents,
)
from semtok.methods.standardiser import RunningStandardiser
from semtok.methods.vae import (
    AutoencoderLearner,
    KLTokenizer,
    VAEObjective,
    reconstruct,
    reconstruction_metrics,
)
from semtok.objective import Carry, Inputs, MethodContext, StepOutput, Term
from semtok.registry import register_method
from semtok.sampler.draws import Draws
from semtok.settings import check_used
from semtok.teachers import on_grid

# Settings ----------------------------------------------------------------------------------------


class VFConfig(LatentNoiseConfig):
    """The VF loss: its two terms, their margins, its weight."""

    weight: float = Field(0.1, ge=0)
    """Weight of the VF loss, before the adaptive factor. With that factor a published weight stays as it is though the
    other losses are means here and sums there; without it, it is to be divided as ``method.kl_weight`` is."""
    adaptive: bool = True
    """Scale the weight by the ratio of gradient norms at the encoder's last layer: of what compares images to the VF
    loss."""
    max_adaptive: float = Field(1e8, gt=0)
    """Cap of that ratio; a published one beside sums is to be divided as ``method.kl_weight`` is."""
    projection: Literal["latents", "teacher"] = "latents"
    """What a 1x1 convolution brings to the width of the other: the latents, without bias, or the teacher's tokens, with
    a bias."""
    weights: str | None = None
    """A file (``.safetensors``, ``.pt``, ``.pth``, ``.ckpt``) with a projection of this shape to start from: of a
    published VA-VAE (``linear_proj.weight``), or a checkpoint's ``model.safetensors`` of a run of this library. None:
    random. A resumed run does not read it again."""
    distance_weight: float = Field(1.0, ge=0)
    """Of the loss of similarities. For an image it compares every pair of positions: 65,536 for latents of 16x16."""
    distance_margin: float = Field(0.25, ge=0, le=2)
    """How far the cosine of a pair may lie from the teacher's for nothing."""
    cosine_weight: float = Field(1.0, ge=0)
    """Of the loss of directions, 1 - cosine."""
    cosine_margin: float = Field(0.5, ge=0, le=2)
    """How far below 1 the cosine with the teacher's token may lie for nothing."""
    noise: Literal["uniform", "logit_normal", "fixed", "none"] = "none"
    """The law of t in z_t = (1 - t) z + t ε, drawn per image; ``none`` compares the latents as they are, others latents
    standardised by running statistics, as Send-VAE does."""

    @model_validator(mode="after")
    def _has_a_term(self) -> "VFConfig":
        if not self.distance_weight and not self.cosine_weight:
            raise ValueError("distance_weight and cosine_weight are both 0; give one of them more")
        return self


class VAVAEConfig(AlignedVAEConfig):
    """Settings of VA-VAE, on top of the VAE's."""

    name: Literal["va_vae"] = "va_vae"
    alignment: VFConfig = VFConfig()
    """What the latents learn from the teacher."""

    def check_use(self, image_size: tuple[int, int]) -> None:
        super().check_use(image_size)
        place, alignment = "method.alignment", self.alignment
        if alignment.adaptive and not self.compares_images:
            raise ValueError(
                f"{place}.adaptive: the weight adapts to what compares images, and nothing does; give "
                f"method.reconstruction_weight more, or pass {place}.adaptive=false"
            )
        if not alignment.adaptive:
            check_used(alignment, place, f"{place}.adaptive=false", "max_adaptive")
        if not alignment.distance_weight:
            check_used(alignment, place, f"{place}.distance_weight=0", "distance_margin")
        if not alignment.cosine_weight:
            check_used(alignment, place, f"{place}.cosine_weight=0", "cosine_margin")


# Losses ------------------------------------------------------------------------------------------


def similarities(maps: Tensor) -> Tensor:
    """Cosines of all pairs of positions: (B, C, h, w) to (B, h w, h w), rows and columns row by row."""
    unit = F.normalize(rearrange(maps.float(), "b c h w -> b (h w) c"), dim=2)
    return unit @ unit.mT


def distance_loss(z: Tensor, f: Tensor, margin: float) -> Tensor:
    """Mean over pairs of positions of how far their cosine lies from the teacher's, beyond a margin: (B,).

    Args:
        z, f: latents and the teacher's tokens, (B, C, h, w) and (B, D, h, w).
    """
    return F.relu((similarities(z) - similarities(f)).abs() - margin).mean(dim=(1, 2))


def direction_loss(z: Tensor, f: Tensor, margin: float) -> Tensor:
    """Mean over positions of 1 - cosine, beyond a margin: two maps (B, D, h, w) to (B,)."""
    cosine = F.cosine_similarity(z.float(), f.float(), dim=1)
    return F.relu(1 - margin - cosine).mean(dim=(1, 2))


# The projection ----------------------------------------------------------------------------------

_PROJECTION = re.compile(
    r"(?:(?:module|_orig_mod|learners|autoencoder|vae)\.)*(?:linear_proj|projection)\.(weight|bias)"
)


def load_projection(projection: nn.Conv2d, path: Path) -> None:
    """Reads a projection's weights: of a published VA-VAE, or of a checkpoint of this library.

    Raises:
        UserError: the file can't be read, or holds no projection, or one of another shape, or numbers that are not
            finite.
    """
    setting = "method.alignment.weights"
    place = f"{setting}: {path}"
    found, own = read_part(path, _PROJECTION, setting), projection.state_dict()
    if not found:
        raise UserError(f"{place}: holds no projection (linear_proj.weight)")
    if unfit(own, found):
        theirs, ours = (
            {name: tuple(t.shape) for name, t in sorted(state.items())} for state in (found, own)
        )
        raise UserError(
            f"{place}: its projection is of another shape ({theirs} instead of {ours}); choose the teacher, "
            "the latents and method.alignment.projection that it was trained with, or another file"
        )
    take_part(projection, found, place)


# The objective -----------------------------------------------------------------------------------


class VAVAELearner(AutoencoderLearner):
    """The autoencoder together with the projection."""

    def __init__(
        self, config: VAVAEConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        super().__init__(config, context, discriminator)
        assert context.teacher is not None, "VA-VAE needs a teacher"
        alignment = config.alignment
        channels, width = self.autoencoder.config.latent_channels, context.teacher.widths[-1]
        if alignment.projection == "latents":
            self.projection = nn.Conv2d(channels, width, 1, bias=False)
        else:
            self.projection = nn.Conv2d(width, channels, 1)
        if alignment.weights is not None and not context.resumes:
            load_projection(self.projection, Path(alignment.weights))
        noised = alignment.noise != "none"
        self.standardiser = RunningStandardiser(channels) if noised else nn.Identity()

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised (section 3.2):

            L = L_VAE + w L_VF,  w = λ |∇ L_rec| / |∇ L_VF|,  z ~ q(z|x)
            L_VF = λ_d E[max(0, |cos(z_i, z_j) - cos(f_i, f_j)| - m_d)] + λ_c E[max(0, 1 - m_c - cos(z_i, f_i))]

        with L_VAE that of ``vae``, z projected to the width of the teacher's tokens f, or these to its, i and j
        positions, and gradients those at the encoder's last layer.

        Args:
            inputs: ``pixels`` (B, 3, H, W) and the teacher's ``features``.
            carry: unused, this learner is first.
        """
        alignment = self.config.alignment
        q, z, x_hat = self.autoencode(inputs["pixels"], draws)
        terms = self.vae_terms(q, x_hat, inputs)
        z_t = noise_latents(self.standardiser(z), alignment, draws)
        z_t, f = self.comparable(z_t, inputs["features"].patches[-1])
        distance = distance_loss(z_t, f, alignment.distance_margin)
        direction = direction_loss(z_t, f, alignment.cosine_margin)
        value = alignment.distance_weight * distance + alignment.cosine_weight * direction
        terms["alignment"] = Term(value, self._weight(value, terms))
        terms |= self.adversarial_terms(x_hat, terms, step, draws)
        return StepOutput(
            terms,
            metrics={
                "alignment_distance": distance.detach().mean(),
                "alignment_direction": direction.detach().mean(),
            },
            carry={"reconstruction": x_hat.detach()},
        )

    def comparable(self, z: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) and the teacher's tokens (B, D, h', w') on one grid and of one width, in float32."""
        with torch.autocast(z.device.type, enabled=False):
            z, f = z.float(), on_grid(f, tuple(z.shape[-2:]))
            if self.config.alignment.projection == "latents":
                return self.projection(z), f
            return z, self.projection(f)

    def _weight(self, value: Tensor, terms: Mapping[str, Term]) -> float | Tensor:
        """Of the VF loss (B,), beside the other terms."""
        alignment = self.config.alignment
        if not alignment.adaptive:
            return alignment.weight
        last_layer = self.autoencoder.encoder.conv_out.weight
        wanted = self.images_compared(terms)
        ratio = adaptive_ratio(wanted, value.mean(), last_layer, alignment.max_adaptive)
        return alignment.weight * ratio


class VAVAEObjective(VAEObjective):
    """The VAE's objective with VA-VAE's learner."""

    def __init__(self, config: VAVAEConfig, context: MethodContext) -> None:
        super().__init__(config, context, VAVAELearner)
        check_layers(config, context)

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        """The VAE's metrics, and without noise and margins: the cosine with the teacher's tokens, and how far the
        similarities of positions lie from the teacher's."""
        q, x_hat = reconstruct(averaged, pixels)
        learner = self.learners["autoencoder"]
        features = inputs["features"].patches[-1]
        z, f = learner.comparable(learner.standardiser(q.mean), features)
        return {
            **reconstruction_metrics(q, x_hat, pixels),
            "alignment_cosine": 1 - direction_loss(z, f, margin=0),
            "alignment_distance": distance_loss(z, f, margin=0),
        }


register_method(
    "va_vae",
    config=VAVAEConfig,
    objective=VAVAEObjective,
    tokenizer=KLTokenizer,
    papers=("VA-VAE, arXiv 2501.01423",),
)
