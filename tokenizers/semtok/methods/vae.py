"""The image VAE: what every method builds on, and the baseline of all.

The objective is that of latent diffusion's autoencoders (Rombach et al. 2022, section 3.1 and
appendix G; Esser et al. 2021, section 3.1): reconstruction, KL, perceptual distance, and a patch
discriminator with a weight adapted to the gradients at the decoder's last layer. What differs:
losses are means over pixels, so that weights keep their meaning across image sizes; the adversarial
weight can ramp and is capped.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.autoencoder import (
    PRESETS,
    Architecture,
    autoencoder_folder,
    build_autoencoder,
    load_autoencoder,
    load_texture,
)
from semtok.methods.decoder_noise import DecoderNoiseConfig, noise_for_decoder
from semtok.methods.equivariance import EquivarianceConfig, Views
from semtok.methods.image_losses import (
    ImageLossConfig,
    ImageLossLearner,
    ImageLossObjective,
)
from semtok.methods.texture_classes import autoencoder_stride, encode_texture, stated_statistics
from semtok.metrics import psnr, ssim
from semtok.objective import (
    Batch,
    Carry,
    Inputs,
    MethodContext,
    StepOutput,
    Term,
)
from semtok.pictures import Row, principal_components, rows_of_images
from semtok.registry import register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.storage import read_json, write_json
from semtok.teachers import TeacherFeatures
from semtok.tokenizer import Tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


def make_autoencoder(source: str | Architecture) -> "AutoencoderKL":
    """From scratch by preset or architecture, or with the weights that a reference names.

    Raises:
        UserError: the reference leads to no VAE.
    """
    if isinstance(source, Architecture):
        return build_autoencoder(source)
    return build_autoencoder(PRESETS[source]) if source in PRESETS else load_autoencoder(source)


HARMLESS_LEARNING_RATE = 1e-4
"""Above it, trained weights lose quality before they gain any: see ``recipes/vae_finetune.yaml``."""

# Settings ----------------------------------------------------------------------------------------


class VAEConfig(ImageLossConfig):
    """Settings of the image VAE. Weights are per mean over pixels, but the KL, which is a sum."""

    name: Literal["vae"] = "vae"
    vae: str | Architecture
    """A preset, from scratch (tiny, f8d4, f16d32); an architecture, from scratch; or weights to start
    from: a diffusers folder or Hub id, an export or a run of this library, ``demo``."""
    train: Literal["all", "decoder"] = "all"
    """``decoder`` keeps the encoder, and with it every latent, as it was, statistics included: what was trained on such
    latents goes on with the new decoder. Needs weights to start from."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    kl_weight: Annotated[float, Field(ge=0)] | None = None
    """Of the KL summed over the latent, in nats per image; None: 1e-6, and none where the decoder alone is trained,
    which it does not reach. Weights published beside losses that are sums over its numbers, as latent diffusion's, are
    to be divided by how many these are, and so is ``adversarial.max_adaptive``."""
    equivariance: EquivarianceConfig | None = None
    """Scaled and turned latents are to decode to the scaled and turned image (EQ-VAE); None: nothing is transformed."""
    decoder_noise: DecoderNoiseConfig | None = None
    """Noise on the raw latents that the decoder trains on; None: there is none."""

    @model_validator(mode="after")
    def _decoder_of_some_latents(self) -> "VAEConfig":
        if self.train == "decoder":
            if not self.starts_from_weights():
                raise ValueError(
                    "method.train: decoder needs weights to start from; pass method.vae=…"
                )
            if self.kl_weight is not None:
                raise ValueError(
                    "method.kl_weight takes no effect with method.train=decoder; pass method.kl_weight=null"
                )
        return self

    def starts_from_weights(self) -> bool:
        return isinstance(self.vae, str) and self.vae not in PRESETS

    def cells_per_token(self) -> int:
        """What the sides of every grid of latents that the encoder gives have to be a multiple of."""
        return 1

    def warnings(self, learning_rate: float) -> list[str]:
        if not self.starts_from_weights() or learning_rate <= HARMLESS_LEARNING_RATE:
            return []
        return [
            f"train.optimiser.learning_rate {learning_rate:g} is one for networks from scratch, and the weights of "
            f"'{self.vae}' may lose what they know in a few steps; recipes/vae_finetune.yaml has rates that do no harm"
        ]

    def check_references(self) -> None:
        if self.starts_from_weights():
            try:
                autoencoder_folder(self.vae)
            except UserError as error:
                raise UserError(f"method.vae: {error}") from None


# The tokenizer -----------------------------------------------------------------------------------


class KLTokenizer(Tokenizer):
    """A tokenizer whose only part is the texture, coded by a diffusers autoencoder: the AutoencoderKL that a method has
    trained, or one of ``TEXTURE_CLASSES`` as it was published.

    Args:
        statistics: mean and standard deviation per channel (C,), which stay; None: they are measured.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        *,
        method: str,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        part = PartSpec(
            "texture", autoencoder.config.latent_channels, autoencoder_stride(autoencoder)
        )
        super().__init__(LatentSpec((part,)), method=method)
        self.autoencoder = autoencoder
        self._keeps_statistics = statistics is not None
        if statistics is not None:
            self._take(*statistics)

    def _take(self, mean: Tensor, std: Tensor) -> None:
        self.texture_mean.copy_(mean)
        self.texture_std.copy_(std)
        self.num_measured_images.fill_(1)  # measured by whoever published it

    @property
    def measured_parts(self) -> tuple[str, ...]:
        return () if self._keeps_statistics else super().measured_parts

    def has_latents_of(self, other: Tokenizer) -> bool:
        if not self.means_the_same(other) or not isinstance(other, KLTokenizer):
            return False
        ours, theirs = (_encoder_weights(each.autoencoder) for each in (self, other))
        return ours.keys() == theirs.keys() and all(
            torch.equal(value.cpu(), theirs[name].cpu()) for name, value in ours.items()
        )

    def posterior_raw(self, pixels: Tensor, features: TeacherFeatures | None = None) -> Posterior:
        mean, std = encode_texture(self.autoencoder, pixels)
        return Posterior(Latents({"texture": mean}), Latents({"texture": std}))

    def decode_raw(self, raw: Latents) -> Tensor:
        return self.autoencoder.decode(raw.texture).sample

    def save_networks(self, folder: Path) -> dict[str, Any]:
        """Writes ``vae/``, which diffusers loads by itself; its config states the statistics too."""
        self.autoencoder.register_to_config(
            latents_mean=self.texture_mean.tolist(),
            latents_std=self.texture_std.tolist(),
            scaling_factor=1.0,  # diffusers divides by it as well
            # Of the VAE that training began with, as SD3's; its latents are no longer shifted by it.
            shift_factor=self.autoencoder.config.get("shift_factor") and 0.0,
        )
        self.autoencoder.save_pretrained(folder / "vae")
        place = folder / "vae" / "config.json"
        config = read_json(place)
        config.pop("_name_or_path", None)  # where diffusers has loaded it from
        write_json(place, config)
        return {}

    @classmethod
    def load_networks(cls, folder: Path, config: Mapping[str, Any]) -> "KLTokenizer":
        if not (folder / "vae").is_dir():
            raise UserError(f"{folder}: its folder vae/ is missing; export again")
        return cls(load_texture(folder / "vae"), method=config["method"])

    @classmethod
    def from_diffusers(cls, folder: Path) -> "KLTokenizer":
        """A tokenizer from a diffusers autoencoder of one of ``TEXTURE_CLASSES``, standardised as it says itself: see
        ``stated_statistics``.

        Raises:
            UserError: see ``load_texture`` and ``stated_statistics``.
        """
        autoencoder = load_texture(folder)
        tokenizer = cls(autoencoder, method="vae")
        tokenizer._take(*stated_statistics(autoencoder, str(folder / "config.json")))
        return tokenizer


_BEFORE_LATENTS = ("encoder.", "quant_conv.")


def _encoder_weights(autoencoder: nn.Module) -> dict[str, Tensor]:
    """All that latents depend on."""
    return {n: v for n, v in autoencoder.state_dict().items() if n.startswith(_BEFORE_LATENTS)}


# Losses ------------------------------------------------------------------------------------------


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, I), summed over the latent, in nats (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


# The objective: two learners ----------------------------------------------------------------------


class AutoencoderLearner(ImageLossLearner):
    """Trains encoder and decoder, or the decoder alone.

    A method that adds a loss to the VAE's subclasses this with a ``forward`` of its own, made of the same three calls
    and its own terms between them: see ``send_vae`` and ``va_vae``. Where ``method.equivariance`` transforms latents,
    that is between the z that ``autoencode`` gives and the decoder, so that a method's own terms see them as the
    encoder gave them.
    """

    on_draw: Callable[[Tensor], None] | None = None
    """Is told the draw z of each ``autoencode``, with its gradient, by a stage that adds terms on it: see ``repae``."""

    def __init__(
        self, config: VAEConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        autoencoder = make_autoencoder(config.vae)  # before LPIPS, whose layers draw numbers too
        super().__init__(config, context, discriminator)
        self.autoencoder = autoencoder
        if config.train == "decoder":
            for name, parameter in self.autoencoder.named_parameters():
                parameter.requires_grad_(not name.startswith(_BEFORE_LATENTS))
            # Buffers, so that a resumed run has them whatever became of the weights that it began with.
            mean, std = stated_statistics(self.autoencoder, f"VAE '{config.vae}'")
            self.register_buffer("latents_mean", mean.clone())
            self.register_buffer("latents_std", std.clone())
        if config.gradient_checkpointing:
            self.autoencoder.enable_gradient_checkpointing()
        stride = autoencoder_stride(self.autoencoder)
        self.views = Views(config.equivariance, stride, config.cells_per_token())
        self._target: Tensor | None = None  # what the x̂ of this micro-batch is compared with

    def smallest(self, image_size: tuple[int, int]) -> tuple[int, int]:
        self.views.check(image_size)
        return self.views.smallest(image_size)

    @property
    def last_layer(self) -> Tensor:
        return self.autoencoder.decoder.conv_out.weight

    @torch.no_grad()
    def fresh_reconstruction(self, inputs: Inputs) -> Tensor:
        was_training = self.autoencoder.training
        self.autoencoder.eval()
        _, x_hat = reconstruct(self.autoencoder, inputs["pixels"])
        self.autoencoder.train(was_training)
        return x_hat

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """Losses of one micro-batch.

        Args:
            inputs: ``pixels`` (B, 3, H, W) and ``features``, the teacher's or None.
            carry: unused, this learner is first.
        """
        q, z, x_hat = self.autoencode(inputs["pixels"], draws)
        terms = self.vae_terms(q, x_hat, inputs)
        terms |= self.adversarial_terms(x_hat, terms, step, draws)
        return StepOutput(terms, carry={"reconstruction": x_hat.detach()})

    def autoencode(
        self, x: Tensor, draws: Draws
    ) -> "tuple[DiagonalGaussianDistribution, Tensor, Tensor]":
        """The posterior q(z|x), a draw z from it (B, C, h, w), and the image x̂ that it decodes to.

        With ``method.equivariance`` x̂ is what z decodes to as the step transforms it, for ``vae_terms`` to compare with
        x transformed in the same way; with ``method.decoder_noise`` the decoder gets z with noise.
        """
        view = self.views(tuple(x.shape[-2:]), draws)
        q = self.autoencoder.encode(view.encoded(x)).latent_dist
        z = q.mean.float() + q.std.float() * draws.normal("posterior", tuple(q.mean.shape[1:]))
        if self.on_draw is not None:
            self.on_draw(z)
        decoded = view.decoded(z)
        if self.config.decoder_noise is not None:
            decoded = noise_for_decoder(decoded, self.config.decoder_noise, draws)
        self._target = view.target(x)
        return q, z, self.autoencoder.decode(decoded).sample

    def target(self, x: Tensor, draws: Draws) -> Tensor:
        """What the x̂ of images x is compared with in this step: x itself where nothing is transformed."""
        return self.views(tuple(x.shape[-2:]), draws).target(x)

    def vae_terms(
        self, q: "DiagonalGaussianDistribution", x_hat: Tensor, inputs: Inputs
    ) -> dict[str, Term]:
        """What is minimised, but for the adversarial part (Rombach et al. 2022, eq. 25):

            L = λ_r L_rec(x, x̂) + λ KL(q(z|x) ‖ N(0, I)) + λ_p d(x, x̂),  x̂ = decode(z),  z ~ q(z|x)

        with L_rec the mean absolute or squared error, d LPIPS or a distance in the teacher's features. Where the
        decoder alone is trained there is no KL, which does not depend on it. Where ``method.equivariance`` transforms
        x, L_rec and d are weighted by the share of the image's pixels that are left.

        Args:
            x_hat: of the last call of ``autoencode``.
        """
        kind, compared = (
            self.config.reconstruction,
            self.image_terms(x_hat, inputs, self._target),
        )
        terms = {kind: compared[kind]}
        if self.config.train == "all":
            weight = 1e-6 if self.config.kl_weight is None else self.config.kl_weight
            terms["kl"] = Term(kl_loss(q.mean, q.logvar), weight)
        return terms | compared


class VAEObjective(ImageLossObjective):
    """The autoencoder and, where the recipe has an adversarial loss, the discriminator.

    Args:
        learner_class: trains the autoencoder.

    Raises:
        ValueError: images that the networks do not fit.
    """

    def __init__(
        self,
        config: VAEConfig,
        context: MethodContext,
        learner_class: type[AutoencoderLearner] = AutoencoderLearner,
    ) -> None:
        super().__init__(config, context, "autoencoder", learner_class)

    def notes(self) -> list[str]:
        return self.learners["autoencoder"].views.notes(self.context.image_size)

    def compiled_modules(self) -> list[nn.Module]:
        autoencoder = self.averaged_module()
        return [autoencoder.encoder, autoencoder.decoder, *self.adversaries()]

    def averaged_module(self) -> nn.Module:
        return self.learners["autoencoder"].autoencoder

    def prepare(self, batch: Batch) -> dict[str, Any]:
        features = self.teacher.module.features(batch.pixels) if self.teacher is not None else None
        return {"pixels": batch.pixels, "features": features}

    def tokenizer(self, averaged: nn.Module) -> KLTokenizer:
        learner, statistics = self.learners["autoencoder"], None
        if self.config.train == "decoder":
            statistics = (learner.latents_mean, learner.latents_std)
        return KLTokenizer(averaged, method=self.config.name, statistics=statistics)

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        return reconstruction_metrics(*reconstruct(averaged, pixels), pixels)

    def picture(self, averaged: nn.Module, pixels: Tensor, inputs: Inputs) -> Tensor:
        q, x_hat = reconstruct(averaged, pixels)
        rows = [
            Row("image", pixels),
            Row("reconstruction", x_hat),
            Row("latents\n(PCA)", principal_components(q.mean)),
        ]
        features: TeacherFeatures | None = inputs["features"]
        if features is not None:
            rows.append(Row("teacher\n(PCA)", principal_components(features.patches[-1])))
        return rows_of_images(rows)


def reconstruct(
    autoencoder: "AutoencoderKL", x: Tensor
) -> "tuple[DiagonalGaussianDistribution, Tensor]":
    """The posterior q(z|x), and the image x̂ that its mean decodes to, clamped to [-1, 1]."""
    q = autoencoder.encode(x).latent_dist
    return q, autoencoder.decode(q.mode()).sample.clamp(-1, 1)


def reconstruction_metrics(
    q: "DiagonalGaussianDistribution", x_hat: Tensor, x: Tensor
) -> dict[str, Tensor]:
    """PSNR in dB, SSIM, and the KL in nats per number of the latent, one value per sample."""
    return {
        "psnr": psnr(x_hat, x),
        "ssim": ssim(x_hat, x),
        "kl_per_dim": kl_loss(q.mean, q.logvar) / q.mean[0].numel(),
    }


register_method(
    "vae",
    config=VAEConfig,
    objective=VAEObjective,
    tokenizer=KLTokenizer,
    papers=("Latent diffusion, arXiv 2112.10752",),
)
