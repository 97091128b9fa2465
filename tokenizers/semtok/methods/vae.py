"""The image VAE: what every method builds on, and the baseline of all.

The objective is that of latent diffusion's autoencoders (Rombach et al. 2022, section 3.1 and
appendix G; Esser et al. 2021, section 3.1): reconstruction, KL, perceptual distance, and a patch
discriminator with a weight adapted to the gradients at the decoder's last layer. What differs:
losses are means over pixels, so that weights keep their meaning across image sizes; the adversarial
weight can ramp and is capped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import Field
from torch import Tensor, nn

from semtok.config import Config
from semtok.errors import UserError
from semtok.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.metrics import psnr, ssim
from semtok.nets.autoencoder import (
    PRESETS,
    Architecture,
    autoencoder_stride,
    build_autoencoder,
    load_autoencoder,
)
from semtok.nets.discriminator import PatchDiscriminator
from semtok.nets.perceptual import LPIPS, teacher_distance
from semtok.objective import (
    Batch,
    Draws,
    OptimiserConfig,
    Reference,
    StepOutput,
    Term,
    TokenizerObjective,
    frozen,
)
from semtok.pictures import principal_components, rows_of_images
from semtok.registry import MethodConfig, Stage, register_method
from semtok.teachers import TeacherFeatures
from semtok.tokenizer import Tokenizer

# Settings ----------------------------------------------------------------------------------------


class AdversarialConfig(Config):
    """The patch discriminator and its loss.

    Healthy training keeps the discriminator's real and fake logits apart but within a few units
    (both are logged); fake logits that stay at the real ones mean that it learns nothing.
    """

    weight: float = Field(0.5, ge=0)
    start_step: int = Field(ge=0)
    """Step from which the generator is paid for fooling the discriminator."""
    discriminator_start_step: int | None = Field(None, ge=0)
    """Step from which the discriminator trains; None: together with ``start_step``."""
    ramp_steps: int = Field(0, ge=0)
    """Steps over which the generator's weight rises from 0."""
    adaptive: bool = True
    """Scale the weight by the ratio of gradient norms at the decoder's last layer."""
    max_adaptive: float = Field(1e4, gt=0)
    """Cap of that ratio."""
    width: int = Field(64, ge=8, multiple_of=8)
    num_layers: int = Field(3, ge=1)
    norm: Literal["batch", "group", "none"] = "group"
    optimiser: OptimiserConfig | None = None
    """None: the same as ``train.optimiser``."""


class VAEConfig(MethodConfig):
    """Settings of the image VAE. Weights are per mean over pixels, but the KL, which is a sum."""

    name: Literal["vae"] = "vae"
    vae: str | Architecture
    """A preset, from scratch (tiny, f8d4, f16d32); an architecture, from scratch; or weights to start
    from: a diffusers folder or Hub id, an export or a run of this library."""
    gradient_checkpointing: bool = False
    reconstruction: Literal["l1", "mse"] = "l1"
    reconstruction_weight: float = Field(1.0, ge=0)
    kl_weight: float = Field(1e-6, ge=0)
    """Of the KL summed over the latent, in nats per image."""
    perceptual: Literal["lpips", "teacher", "none"] = "none"
    perceptual_weight: float = Field(1.0, ge=0)
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    adversarial: AdversarialConfig | None = None

    def needs_teacher(self) -> bool:
        return self.perceptual == "teacher"


# The tokenizer -----------------------------------------------------------------------------------


class KLTokenizer(Tokenizer):
    """A tokenizer whose only part is the texture, coded by a diffusers AutoencoderKL."""

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        *,
        method: str,
        training_info: dict[str, Any] | None = None,
    ) -> None:
        part = PartSpec(
            "texture", autoencoder.config.latent_channels, autoencoder_stride(autoencoder)
        )
        super().__init__(LatentSpec((part,)), method=method, training_info=training_info)
        self.autoencoder = autoencoder

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
        )
        self.autoencoder.save_pretrained(folder / "vae")
        return {}

    @classmethod
    def load_networks(cls, folder: Path, config: Mapping[str, Any]) -> "KLTokenizer":
        if not (folder / "vae").is_dir():
            raise UserError(f"{folder}: its folder vae/ is missing; export again")
        autoencoder = load_autoencoder(str(folder / "vae"))
        return cls(autoencoder, method=config["method"], training_info=config["trained"])

    @classmethod
    def from_diffusers(cls, folder: Path) -> "KLTokenizer":
        """A tokenizer from a diffusers VAE, standardised as its config says: by ``latents_mean`` and
        ``latents_std``, or by ``shift_factor`` and ``scaling_factor``."""
        autoencoder = load_autoencoder(str(folder))
        config, tokenizer = autoencoder.config, cls(autoencoder, method="vae")
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            mean, std = config.get("shift_factor") or 0.0, 1.0
        tokenizer.texture_mean.copy_(torch.as_tensor(mean))
        tokenizer.texture_std.copy_(torch.as_tensor(std) / config.scaling_factor)
        tokenizer.num_measured_images.fill_(1)  # measured by whoever published it
        return tokenizer


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


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim and Ye 2017), (B,)."""
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return 0.5 * (real.mean(dim=(1, 2, 3)) + fake.mean(dim=(1, 2, 3)))


def adaptive_ratio(
    reconstruction_term: Tensor, adversarial_term: Tensor, last_layer: Tensor, cap: float
) -> Tensor:
    """Ratio of both terms' gradient norms at the decoder's last layer (Esser et al. 2021, eq. 7).

    Several processes average the gradients first, so that they agree with one process on the
    whole batch.

    Args:
        reconstruction_term, adversarial_term: scalars of which ``last_layer`` is an ancestor.
        cap: largest ratio.
    """
    gradients = [
        torch.autograd.grad(term, last_layer, retain_graph=True)[0].float()
        for term in (reconstruction_term, adversarial_term)
    ]
    if dist.is_initialized() and dist.get_world_size() > 1:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    wanted, adversarial = (gradient.norm() for gradient in gradients)
    return (wanted / (adversarial + 1e-4)).clamp(0, cap).detach()


# The objective: two players ----------------------------------------------------------------------


class AutoencoderPlayer(nn.Module):
    """Trains encoder and decoder. Methods that align the latents add their terms in ``extra_terms``."""

    def __init__(self, config: VAEConfig, stage: Stage, discriminator: nn.Module | None) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = make_autoencoder(config.vae)
        if config.gradient_checkpointing:
            self.autoencoder.enable_gradient_checkpointing()
        self._perceptual = (
            Reference(LPIPS(config.lpips_net)) if config.perceptual == "lpips" else None
        )
        self._teacher = Reference(stage.teacher) if stage.teacher is not None else None
        self._discriminator = Reference(discriminator) if discriminator is not None else None

    def forward(
        self, inputs: Mapping[str, Any], draws: Draws, step: int, carry: Mapping[str, Tensor]
    ) -> StepOutput:
        """Losses of one micro-batch.

        Args:
            inputs: ``pixels`` (B, 3, H, W) and ``features``, the teacher's or None.
            carry: unused, this player is first.
        """
        config, pixels = self.config, inputs["pixels"]
        posterior = self.autoencoder.encode(pixels).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        z = mean + std * draws.normal("posterior", tuple(mean.shape[1:]))
        reconstruction = self.autoencoder.decode(z).sample

        terms = {
            config.reconstruction: Term(
                reconstruction_loss(reconstruction, pixels, config.reconstruction),
                config.reconstruction_weight,
            ),
            "kl": Term(kl_loss(mean, posterior.logvar), config.kl_weight),
        }
        if config.perceptual != "none":
            terms["perceptual"] = Term(
                self._perceptual_loss(reconstruction, pixels, inputs), config.perceptual_weight
            )
        terms |= self.extra_terms(z, inputs, draws)
        if config.adversarial is not None and step >= config.adversarial.start_step:
            terms["adversarial"] = self._adversarial_term(reconstruction, terms, step)
        return StepOutput(terms, carry={"reconstruction": reconstruction.detach()})

    def frozen_modules(self) -> list[nn.Module]:
        """What this player reads and nobody trains."""
        return [held.module for held in (self._teacher, self._perceptual) if held is not None]

    def extra_terms(self, z: Tensor, inputs: Mapping[str, Any], draws: Draws) -> dict[str, Term]:
        """Further losses on the sampled raw latents z (B, C, h, w)."""
        return {}

    def extra_metrics(self, z: Tensor, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Further held-out metrics, one value per sample, of the posterior's mean z (B, C, h, w)."""
        return {}

    def _perceptual_loss(
        self, reconstruction: Tensor, pixels: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        if self._perceptual is not None:
            return self._perceptual.module(reconstruction, pixels)
        assert self._teacher is not None, "perceptual: teacher needs a teacher"
        return teacher_distance(self._teacher.module, reconstruction, inputs["features"])

    def _adversarial_term(
        self, reconstruction: Tensor, terms: Mapping[str, Term], step: int
    ) -> Term:
        config = self.config.adversarial
        assert config is not None and self._discriminator is not None
        with frozen(self._discriminator.module):
            value = -self._discriminator.module(reconstruction).float().mean(dim=(1, 2, 3))
        weight = config.weight * min(
            1.0, (step - config.start_step + 1) / max(1, config.ramp_steps)
        )
        if not config.adaptive:
            return Term(value, weight)
        wanted = sum(
            terms[name].weight * terms[name].value.mean()
            for name in (self.config.reconstruction, "perceptual")
            if name in terms
        )
        last_layer = self.autoencoder.decoder.conv_out.weight
        return Term(
            value, weight * adaptive_ratio(wanted, value.mean(), last_layer, config.max_adaptive)
        )


class DiscriminatorPlayer(nn.Module):
    """Trains the discriminator on images and the reconstructions that the first player left."""

    def __init__(self, config: AdversarialConfig) -> None:
        super().__init__()
        self.discriminator = PatchDiscriminator(
            width=config.width, num_layers=config.num_layers, norm=config.norm
        )

    def forward(
        self, inputs: Mapping[str, Any], draws: Draws, step: int, carry: Mapping[str, Tensor]
    ) -> StepOutput:
        """Hinge loss of ``inputs['pixels']`` against ``carry['reconstruction']``."""
        real, fake = (
            self.discriminator(inputs["pixels"]),
            self.discriminator(carry["reconstruction"]),
        )
        return StepOutput(
            {"discriminator": Term(hinge_loss(real, fake), 1.0)},
            metrics={
                "logits_real": real.detach().float().mean(),
                "logits_fake": fake.detach().float().mean(),
            },
        )


class VAEObjective(TokenizerObjective):
    """The autoencoder and, where the recipe has an adversarial loss, the discriminator."""

    player_class: type[AutoencoderPlayer] = AutoencoderPlayer

    def __init__(self, config: VAEConfig, stage: Stage) -> None:
        super().__init__()
        self.config, self.stage = config, stage
        self.teacher = Reference(stage.teacher) if stage.teacher is not None else None
        players: dict[str, nn.Module] = {}
        if config.adversarial is not None:
            players["discriminator"] = DiscriminatorPlayer(config.adversarial)
        discriminator = players["discriminator"].discriminator if players else None
        players = {"autoencoder": self.player_class(config, stage, discriminator), **players}
        self.players = nn.ModuleDict(players)
        if min(stage.image_size) < 8:
            raise ValueError(
                f"image size {stage.image_size} is too small to measure SSIM; at least 8"
            )
        self.tokenizer(self.averaged_module()).spec.check_image_size(stage.image_size)
        self._check_discriminator()

    def _check_discriminator(self) -> None:
        """It may start late; that its kernels fit the image is known now."""
        if "discriminator" not in self.players:
            return
        height, width = self.stage.image_size
        try:
            with torch.no_grad():
                self.players["discriminator"].discriminator.eval()(torch.zeros(1, 3, height, width))
        except RuntimeError:
            raise ValueError(
                f"method.adversarial.num_layers: too many for images of {height}x{width}"
            ) from None
        self.players["discriminator"].train()

    def active_players(self, step: int) -> list[str]:
        config = self.config.adversarial
        if config is None:
            return ["autoencoder"]
        start = (
            config.start_step
            if config.discriminator_start_step is None
            else config.discriminator_start_step
        )
        return ["autoencoder", "discriminator"] if step >= start else ["autoencoder"]

    def optimiser_config(self, player: str, default: OptimiserConfig) -> OptimiserConfig:
        own = (
            self.config.adversarial.optimiser
            if player == "discriminator" and self.config.adversarial
            else None
        )
        return own or default

    def compiled_modules(self) -> list[nn.Module]:
        autoencoder = self.averaged_module()
        nets = [autoencoder.encoder, autoencoder.decoder]
        return (
            nets + [self.players["discriminator"].discriminator]
            if "discriminator" in self.players
            else nets
        )

    def frozen_modules(self) -> list[nn.Module]:
        return self.players["autoencoder"].frozen_modules()

    def averaged_module(self) -> nn.Module:
        return self.players["autoencoder"].autoencoder

    def prepare(self, batch: Batch) -> dict[str, Any]:
        features = self.teacher.module.features(batch.pixels) if self.teacher is not None else None
        return {"pixels": batch.pixels, "features": features}

    def tokenizer(self, averaged: nn.Module) -> KLTokenizer:
        return KLTokenizer(averaged, method=self.config.name)

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        posterior, reconstruction = _reconstruct(averaged, pixels)
        mean = posterior.mean
        return {
            "psnr": psnr(reconstruction, pixels),
            "ssim": ssim(reconstruction, pixels),
            "kl_per_dim": kl_loss(mean, posterior.logvar) / mean[0].numel(),
            **self.players["autoencoder"].extra_metrics(mean, inputs),
        }

    def picture(self, averaged: nn.Module, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        posterior, reconstruction = _reconstruct(averaged, pixels)
        rows = [pixels, reconstruction, principal_components(posterior.mean)]
        features: TeacherFeatures | None = inputs["features"]
        if features is not None:
            rows.append(principal_components(features.patches[-1]))
        return rows_of_images(rows)


def _reconstruct(
    autoencoder: AutoencoderKL, pixels: Tensor
) -> tuple[DiagonalGaussianDistribution, Tensor]:
    """The posterior, and the decoding of its mean, clamped to [-1, 1]."""
    posterior = autoencoder.encode(pixels).latent_dist
    return posterior, autoencoder.decode(posterior.mode()).sample.clamp(-1, 1)


def make_autoencoder(source: str | Architecture) -> AutoencoderKL:
    """From scratch by preset or architecture, or with the weights that a reference names.

    Raises:
        UserError: the reference leads to no VAE.
    """
    if isinstance(source, Architecture):
        return build_autoencoder(source)
    return build_autoencoder(PRESETS[source]) if source in PRESETS else load_autoencoder(source)


register_method(
    "vae",
    config=VAEConfig,
    objective=VAEObjective,
    tokenizer=KLTokenizer,
    papers=("Latent diffusion, arXiv 2112.10752",),
)
