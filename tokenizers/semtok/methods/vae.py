"""The image VAE: what every method builds on, and the baseline of all.

The objective is that of latent diffusion's autoencoders (Rombach et al. 2022, section 3.1 and
appendix G; Esser et al. 2021, section 3.1): reconstruction, KL, perceptual distance, and a patch
discriminator with a weight adapted to the gradients at the decoder's last layer. What differs:
losses are means over pixels, so that weights keep their meaning across image sizes; the adversarial
weight can ramp and is capped.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import Field, model_validator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.adversarial import AdversarialConfig, DiscriminatorLearner, generator_term
from semtok.methods.autoencoder import (
    PRESETS,
    Architecture,
    autoencoder_folder,
    autoencoder_stride,
    build_autoencoder,
    load_autoencoder,
)
from semtok.metrics import psnr, ssim
from semtok.objective import (
    Batch,
    Carry,
    Inputs,
    MethodContext,
    StepOutput,
    Term,
    TokenizerObjective,
    Unregistered,
)
from semtok.optimiser import OptimiserConfig
from semtok.perceptual import LPIPS, teacher_distance
from semtok.pictures import Row, principal_components, rows_of_images
from semtok.registry import MethodConfig, register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.storage import read_json, write_json
from semtok.teachers import TeacherFeatures
from semtok.tokenizer import Tokenizer


def make_autoencoder(source: str | Architecture) -> AutoencoderKL:
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


class VAEConfig(MethodConfig):
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
    reconstruction: Literal["l1", "mse"] = "l1"
    """Distance between pixels: absolute or squared error."""
    reconstruction_weight: float = Field(1.0, ge=0)
    """Weight of that distance."""
    kl_weight: Annotated[float, Field(ge=0)] | None = None
    """Of the KL summed over the latent, in nats per image; None: 1e-6, and none where the decoder alone is trained,
    which it does not reach. Weights published beside losses that are sums over its numbers, as latent diffusion's, are
    to be divided by how many these are, and so is ``adversarial.max_adaptive``."""
    perceptual: Literal["lpips", "teacher", "none"] = "none"
    """Distance between images besides pixels: LPIPS, the teacher's features, or none."""
    perceptual_weight: float = Field(1.0, ge=0)
    """Weight of that distance."""
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Network of LPIPS."""
    adversarial: AdversarialConfig | None = None
    """A discriminator; None: there is none."""

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

    def needs_teacher(self) -> bool:
        return self.perceptual == "teacher"

    def starts_from_weights(self) -> bool:
        return isinstance(self.vae, str) and self.vae not in PRESETS

    def warnings(self, learning_rate: float) -> list[str]:
        if not self.starts_from_weights() or learning_rate <= HARMLESS_LEARNING_RATE:
            return []
        return [
            f"train.optimiser.learning_rate {learning_rate:g} is one for networks from scratch, and the weights of "
            f"'{self.vae}' may lose what they know in a few steps; recipes/vae_finetune.yaml has rates that do no harm"
        ]

    def check_references(self) -> None:
        if self.starts_from_weights():
            autoencoder_folder(self.vae)


# The tokenizer -----------------------------------------------------------------------------------


class KLTokenizer(Tokenizer):
    """A tokenizer whose only part is the texture, coded by a diffusers AutoencoderKL.

    Args:
        statistics: mean and standard deviation per channel (C,), which stay; None: they are measured.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
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
        gaussian = self.autoencoder.encode(pixels).latent_dist
        return Posterior(Latents({"texture": gaussian.mean}), Latents({"texture": gaussian.std}))

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
        autoencoder = load_autoencoder(str(folder / "vae"))
        return cls(autoencoder, method=config["method"])

    @classmethod
    def from_diffusers(cls, folder: Path) -> "KLTokenizer":
        """A tokenizer from a diffusers VAE, standardised as its config says: by ``latents_mean`` and
        ``latents_std``, or by ``shift_factor`` and ``scaling_factor``.

        Raises:
            UserError: see ``load_autoencoder`` and ``stated_statistics``.
        """
        autoencoder = load_autoencoder(str(folder))
        tokenizer = cls(autoencoder, method="vae")
        tokenizer._take(*stated_statistics(autoencoder, str(folder / "config.json")))
        return tokenizer


def stated_statistics(autoencoder: AutoencoderKL, place: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents per channel, two of (C,), as the config of a diffusers VAE has them.

    Args:
        place: starts messages.

    Raises:
        UserError: the config states what no latents have.
    """
    config = autoencoder.config
    channels = config.latent_channels
    mean, std = (_stated(config, key, channels, place) for key in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        there, missing = ("latents_std", "latents_mean")[:: 1 if mean is None else -1]
        raise UserError(
            f"{place}: states {there} and no {missing}; give both, or neither (scaling_factor stands for them then)"
        )
    if mean is None:
        mean, std = _stated(config, "shift_factor", 1, place) or 0.0, 1.0
    scale = _stated(config, "scaling_factor", 1, place)
    if scale is None:
        raise UserError(f"{place}: scaling_factor is null; give a number, as 0.18215, or 1")
    mean, std = torch.as_tensor(mean), torch.as_tensor(std) / scale
    return mean.expand(channels), std.expand(channels)


def _stated(config: Mapping[str, Any], key: str, channels: int, place: str) -> Any:
    """What a config of diffusers states under a key: a number, of several channels also a list of them; or None."""
    value = config.get(key)
    numbers = list(value) if isinstance(value, list | tuple) and channels > 1 else [value]
    if value is None:
        return None
    if not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise UserError(f"{place}: {key} {value!r} is not finite numbers; mend it there")
    if len(numbers) not in (1, channels):
        raise UserError(f"{place}: {key} has {len(numbers)} numbers for {channels} channels")
    if key in ("latents_std", "scaling_factor") and min(numbers) <= 0:
        raise UserError(f"{place}: {key} {value!r}: expected more than 0; mend it there")
    return value


_BEFORE_LATENTS = ("encoder.", "quant_conv.")


def _encoder_weights(autoencoder: AutoencoderKL) -> dict[str, Tensor]:
    """All that latents depend on."""
    return {n: v for n, v in autoencoder.state_dict().items() if n.startswith(_BEFORE_LATENTS)}


# Losses ------------------------------------------------------------------------------------------


def reconstruction_loss(
    reconstruction: Tensor, pixels: Tensor, kind: Literal["l1", "mse"]
) -> Tensor:
    """Mean absolute or squared difference over pixels, (B,)."""
    difference = reconstruction.float() - pixels.float()
    return (difference.abs() if kind == "l1" else difference.square()).mean(dim=(1, 2, 3))


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(logvar)) from N(0, I), summed over the latent, in nats (B,)."""
    mean, logvar = mean.float(), logvar.float()
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3))


# The objective: two learners ----------------------------------------------------------------------


class AutoencoderLearner(nn.Module):
    """Trains encoder and decoder, or the decoder alone.

    A method that adds a loss to the VAE's subclasses this with a ``forward`` of its own, made of the same three calls
    and its own terms between them: see ``send_vae``.
    """

    on_draw: Callable[[Tensor], None] | None = None
    """Is told the draw z of each ``autoencode``, with its gradient, by a stage that adds terms on it: see ``repae``."""

    def __init__(
        self, config: VAEConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = make_autoencoder(config.vae)
        if config.train == "decoder":
            for name, parameter in self.autoencoder.named_parameters():
                parameter.requires_grad_(not name.startswith(_BEFORE_LATENTS))
            # Buffers, so that a resumed run has them whatever became of the weights that it began with.
            mean, std = stated_statistics(self.autoencoder, f"VAE '{config.vae}'")
            self.register_buffer("latents_mean", mean.clone())
            self.register_buffer("latents_std", std.clone())
        if config.gradient_checkpointing:
            self.autoencoder.enable_gradient_checkpointing()
        lpips = LPIPS(config.lpips_net) if config.perceptual == "lpips" else None
        self._lpips, self._teacher = Unregistered(lpips), Unregistered(context.teacher)
        self._discriminator = Unregistered(discriminator)

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """Losses of one micro-batch.

        Args:
            inputs: ``pixels`` (B, 3, H, W) and ``features``, the teacher's or None.
            carry: unused, this learner is first.
        """
        q, z, x_hat = self.autoencode(inputs["pixels"], draws)
        terms = self.vae_terms(q, x_hat, inputs)
        terms |= self.adversarial_terms(x_hat, terms, step)
        return StepOutput(terms, carry={"reconstruction": x_hat.detach()})

    def autoencode(
        self, x: Tensor, draws: Draws
    ) -> tuple[DiagonalGaussianDistribution, Tensor, Tensor]:
        """The posterior q(z|x), a draw z from it (B, C, h, w), and the image x̂ that it decodes to."""
        q = self.autoencoder.encode(x).latent_dist
        z = q.mean.float() + q.std.float() * draws.normal("posterior", tuple(q.mean.shape[1:]))
        if self.on_draw is not None:
            self.on_draw(z)
        return q, z, self.autoencoder.decode(z).sample

    def vae_terms(
        self, q: DiagonalGaussianDistribution, x_hat: Tensor, inputs: Inputs
    ) -> dict[str, Term]:
        """What is minimised, but for the adversarial part (Rombach et al. 2022, eq. 25):

            L = λ_r L_rec(x, x̂) + λ KL(q(z|x) ‖ N(0, I)) + λ_p d(x, x̂),  x̂ = decode(z),  z ~ q(z|x)

        with L_rec the mean absolute or squared error, d LPIPS or a distance in the teacher's features. Where the
        decoder alone is trained there is no KL, which does not depend on it.
        """
        config, x = self.config, inputs["pixels"]
        terms = {
            config.reconstruction: Term(
                reconstruction_loss(x_hat, x, config.reconstruction), config.reconstruction_weight
            )
        }
        if config.train == "all":
            weight = 1e-6 if config.kl_weight is None else config.kl_weight
            terms["kl"] = Term(kl_loss(q.mean, q.logvar), weight)
        if config.perceptual == "lpips":
            terms["perceptual"] = Term(self._lpips.module(x_hat, x), config.perceptual_weight)
        elif config.perceptual == "teacher":
            distance = teacher_distance(self._teacher.module, x_hat, inputs["features"])
            terms["perceptual"] = Term(distance, config.perceptual_weight)
        return terms

    def adversarial_terms(
        self, x_hat: Tensor, terms: Mapping[str, Term], step: int
    ) -> dict[str, Term]:
        """The generator's side of the adversarial part, from its first step on.

        Args:
            terms: the others; the weight adapts to those that compare images.
        """
        config = self.config.adversarial
        if config is None or step < config.start_step:
            return {}
        compared = [terms[n] for n in (self.config.reconstruction, "perceptual") if n in terms]
        wanted = sum(term.weight * term.value.mean() for term in compared)
        last_layer = self.autoencoder.decoder.conv_out.weight
        discriminator = self._discriminator.module
        return {
            "adversarial": generator_term(config, discriminator, x_hat, wanted, last_layer, step)
        }

    def frozen_modules(self) -> list[nn.Module]:
        """What this learner reads and nobody trains."""
        return [held.module for held in (self._teacher, self._lpips) if held.module is not None]


class VAEObjective(TokenizerObjective):
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
        super().__init__()
        self.config, self.context = config, context
        self.teacher = Unregistered(context.teacher) if context.teacher is not None else None
        adversary = None
        if config.adversarial is not None:
            adversary = DiscriminatorLearner(config.adversarial, resumes=context.resumes)
            adversary.check_image_size(context.image_size)
        autoencoder = learner_class(config, context, adversary and adversary.discriminator)
        self.learners = nn.ModuleDict({"autoencoder": autoencoder})
        if adversary is not None:
            self.learners["discriminator"] = adversary
        if min(context.image_size) < 8:
            raise ValueError(
                f"image size {context.image_size} is too small to measure SSIM; at least 8"
            )
        self.tokenizer(self.averaged_module()).spec.check_image_size(context.image_size)

    def active_learners(self, step: int) -> list[str]:
        config = self.config.adversarial
        if config is None or step < config.first_step:
            return ["autoencoder"]
        return ["autoencoder", "discriminator"]

    def optimiser_config(self, learner: str, default: OptimiserConfig) -> OptimiserConfig:
        config = self.config.adversarial
        own = config.optimiser if config is not None and learner == "discriminator" else None
        return own or default

    def compiled_modules(self) -> list[nn.Module]:
        autoencoder = self.averaged_module()
        adversary = [n.discriminator for name, n in self.learners.items() if name != "autoencoder"]
        return [autoencoder.encoder, autoencoder.decoder, *adversary]

    def frozen_modules(self) -> list[nn.Module]:
        return self.learners["autoencoder"].frozen_modules()

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
    autoencoder: AutoencoderKL, x: Tensor
) -> tuple[DiagonalGaussianDistribution, Tensor]:
    """The posterior q(z|x), and the image x̂ that its mean decodes to, clamped to [-1, 1]."""
    q = autoencoder.encode(x).latent_dist
    return q, autoencoder.decode(q.mode()).sample.clamp(-1, 1)


def reconstruction_metrics(
    q: DiagonalGaussianDistribution, x_hat: Tensor, x: Tensor
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
