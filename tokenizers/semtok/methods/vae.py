"""The image VAE: what every method builds on, and the baseline of all.

The objective is that of latent diffusion's autoencoders (Rombach et al. 2022, section 3.1 and
appendix G; Esser et al. 2021, section 3.1): reconstruction, KL, perceptual distance, and a patch
discriminator with a weight adapted to the gradients at the decoder's last layer. What differs:
losses are means over pixels, so that weights keep their meaning across image sizes; the adversarial
weight can ramp and is capped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from pydantic import Field, model_validator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.adversarial import AdversarialConfig, DiscriminatorLearner, generator_term
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
from semtok.references import from_a_file
from semtok.registry import MethodConfig, register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.settings import Config
from semtok.storage import DAMAGE, first_line, read_json, write_json
from semtok.teachers import TeacherFeatures
from semtok.tokenizer import Tokenizer

# The network -------------------------------------------------------------------------------------


class Architecture(Config):
    """Shape of an AutoencoderKL. Its stride is 2 to the power of (number of blocks - 1)."""

    block_channels: tuple[int, ...]
    """Channels per resolution, finest first."""
    layers_per_block: int = Field(2, ge=1)
    latent_channels: int = Field(ge=1)
    norm_groups: int = Field(32, ge=1)
    attention: tuple[bool, ...] | None = None
    """Which resolutions have self-attention, beside the middle one; None: none of them."""

    @model_validator(mode="after")
    def _consistent(self) -> "Architecture":
        channels = self.block_channels
        if not channels or any(c < 1 or c % self.norm_groups for c in channels):
            raise ValueError(
                f"block_channels {self.block_channels} must be multiples of norm_groups {self.norm_groups}"
            )
        if self.attention is not None and len(self.attention) != len(self.block_channels):
            raise ValueError("attention and block_channels must have the same length")
        return self


PRESETS: dict[str, Architecture] = {
    # For the embedded recipes: 32x32 images to 8x8x8 latents.
    "tiny": Architecture(
        block_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_groups=8
    ),
    # Stable Diffusion's VAE (Rombach et al. 2022): 256x256 to 32x32x4.
    "f8d4": Architecture(block_channels=(128, 256, 512, 512), latent_channels=4),
    # LightningDiT's f16d32 (Yao et al. 2025), an LDM autoencoder: ch 128, mult 1,1,2,2,4,
    # attention at the coarsest resolution: 256x256 to 16x16x32.
    "f16d32": Architecture(
        block_channels=(128, 128, 256, 256, 512),
        latent_channels=32,
        attention=(False, False, False, False, True),
    ),
}


_WEIGHTS = "diffusion_pytorch_model"


def build_autoencoder(architecture: Architecture) -> AutoencoderKL:
    """A randomly initialised AutoencoderKL."""
    attention = architecture.attention or (False,) * len(architecture.block_channels)
    return AutoencoderKL(
        down_block_types=tuple(
            "AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention
        ),
        up_block_types=tuple(
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)
        ),
        block_out_channels=architecture.block_channels,
        layers_per_block=architecture.layers_per_block,
        latent_channels=architecture.latent_channels,
        norm_num_groups=architecture.norm_groups,
    )


def load_autoencoder(reference: str) -> AutoencoderKL:
    """Loads a VAE's weights from a folder that diffusers can read, or from a Hub id.

    A folder may be a diffusers VAE, a diffusers pipeline (its ``vae`` is taken), a tokenizer that
    this library exported, or one of its run folders. Weights may be a variant of diffusers (``fp16``) or an older
    ``.bin``, of which tensors alone are read; whole safetensors go first.

    Raises:
        UserError: nothing there that AutoencoderKL can load, or the weights are damaged.
    """
    source, files = str(_autoencoder_folder(reference) or reference), {"use_safetensors": True}
    if Path(source).is_dir():
        files = _which_weights(Path(source))
    try:
        autoencoder, report = AutoencoderKL.from_pretrained(
            source, output_loading_info=True, **files
        )
    except DAMAGE as error:
        raise UserError(f"VAE '{reference}' can't be loaded: {first_line(error)}") from None
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"VAE '{reference}': its weights do not fit its config.json ({len(wrong)} tensors, such as {wrong[0]})"
        )
    return autoencoder


def _autoencoder_folder(reference: str) -> Path | None:
    """The folder of diffusers that a reference means; None: it is a Hub id.

    Raises:
        UserError: it is neither.
    """
    folder = Path(reference)
    if folder.is_file():
        raise UserError(f"{folder}: {from_a_file(folder)}")
    if folder.is_dir():
        candidates = [folder, folder / "vae", folder / "export" / "vae"]
        found = next((c for c in candidates if any(c.glob(f"{_WEIGHTS}*"))), None)
        if found is None:
            raise UserError(
                f"{folder}: holds no diffusers VAE (config.json with {_WEIGHTS}.safetensors)"
            )
        name = read_json(found / "config.json").get("_class_name", "AutoencoderKL")
        if name != "AutoencoderKL":
            raise UserError(f"{found}: is of diffusers' {name}; only AutoencoderKL can be loaded")
        return found
    if reference.count("/") != 1 or reference.startswith((".", "/")):
        raise UserError(
            f"'{reference}' is neither a preset ({', '.join(PRESETS)}), a folder with a VAE, nor a Hub id "
            "(org/name); of a published file, semtok hub import makes such a folder"
        )
    return None


def _which_weights(folder: Path) -> dict[str, Any]:
    """Which of a folder's weights are loaded, as arguments of diffusers: of several variants the first by name."""
    for suffix in ("safetensors", "bin"):
        use = {"use_safetensors": suffix == "safetensors"}
        if any(folder.glob(f"{_WEIGHTS}.{suffix}*")):
            return use
        for file in sorted(folder.glob(f"{_WEIGHTS}.*.{suffix}")):
            return use | {
                "variant": file.name.removeprefix(f"{_WEIGHTS}.").removesuffix(f".{suffix}")
            }
    return {"use_safetensors": True}


def autoencoder_stride(autoencoder: AutoencoderKL) -> int:
    """Image pixels per latent cell along each side."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def make_autoencoder(source: str | Architecture) -> AutoencoderKL:
    """From scratch by preset or architecture, or with the weights that a reference names.

    Raises:
        UserError: the reference leads to no VAE.
    """
    if isinstance(source, Architecture):
        return build_autoencoder(source)
    return build_autoencoder(PRESETS[source]) if source in PRESETS else load_autoencoder(source)


# Settings ----------------------------------------------------------------------------------------


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
    """Of the KL summed over the latent, in nats per image. Weights published beside losses that are sums over its
    numbers, as latent diffusion's, are to be divided by how many these are, and so is ``adversarial.max_adaptive``."""
    perceptual: Literal["lpips", "teacher", "none"] = "none"
    perceptual_weight: float = Field(1.0, ge=0)
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    adversarial: AdversarialConfig | None = None

    def needs_teacher(self) -> bool:
        return self.perceptual == "teacher"

    def check_references(self) -> None:
        if isinstance(self.vae, str) and self.vae not in PRESETS:
            _autoencoder_folder(self.vae)


# The tokenizer -----------------------------------------------------------------------------------


class KLTokenizer(Tokenizer):
    """A tokenizer whose only part is the texture, coded by a diffusers AutoencoderKL."""

    def __init__(self, autoencoder: AutoencoderKL, *, method: str) -> None:
        part = PartSpec(
            "texture", autoencoder.config.latent_channels, autoencoder_stride(autoencoder)
        )
        super().__init__(LatentSpec((part,)), method=method)
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


# The objective: two learners ----------------------------------------------------------------------


class AutoencoderLearner(nn.Module):
    """Trains encoder and decoder.

    A method that adds a loss to the VAE's subclasses this with a ``forward`` of its own, made of the same three calls
    and its own terms between them: see ``send_vae``.
    """

    def __init__(
        self, config: VAEConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = make_autoencoder(config.vae)
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
        return q, z, self.autoencoder.decode(z).sample

    def vae_terms(
        self, q: DiagonalGaussianDistribution, x_hat: Tensor, inputs: Inputs
    ) -> dict[str, Term]:
        """What is minimised, but for the adversarial part (Rombach et al. 2022, eq. 25):

            L = λ_r L_rec(x, x̂) + λ KL(q(z|x) ‖ N(0, I)) + λ_p d(x, x̂),  x̂ = decode(z),  z ~ q(z|x)

        with L_rec the mean absolute or squared error, d LPIPS or a distance in the teacher's features.
        """
        config, x = self.config, inputs["pixels"]
        terms = {
            config.reconstruction: Term(
                reconstruction_loss(x_hat, x, config.reconstruction), config.reconstruction_weight
            ),
            "kl": Term(kl_loss(q.mean, q.logvar), config.kl_weight),
        }
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
        return KLTokenizer(averaged, method=self.config.name)

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
