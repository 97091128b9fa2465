"""The adversarial part of a decoder's training: the patch discriminator, the losses, any discriminator's learner."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.augment import AugmentConfig, augment
from semtok.methods.feature_discriminator import FeatureDiscriminator, FeaturesConfig, load_heads
from semtok.methods.part_weights import read_part, take_part, unfit
from semtok.objective import Carry, Inputs, StepOutput, Term, without_gradients
from semtok.optimiser import OptimiserConfig
from semtok.sampler.draws import Draws
from semtok.settings import Config, check_used

# Settings ----------------------------------------------------------------------------------------


class AdversarialConfig(Config):
    """The discriminator and its loss.

    Healthy training keeps the discriminator's real and fake logits apart but within a few units
    (both are logged); fake logits that stay at the real ones mean that it learns nothing.
    """

    weight: float = Field(0.5, ge=0)
    """Weight of the generator's loss, before the adaptive factor."""
    start_step: int = Field(ge=0)
    """Step from which the generator is paid for fooling the discriminator."""
    discriminator_start_step: int | None = Field(None, ge=0)
    """Step from which the discriminator trains, at most ``start_step``; None: ``start_step``."""
    ramp_steps: int = Field(0, ge=0)
    """Steps over which the generator's weight rises from 0."""
    adaptive: bool = True
    """Scale the weight by the ratio of gradient norms at the decoder's last layer."""
    max_adaptive: float = Field(1e4, gt=0)
    """Cap of that ratio."""
    adaptive_eps: float = Field(1e-4, gt=0)
    """Added to the ratio's denominator: 1e-4 in latent diffusion's code, 1e-6 in RAE's."""
    fresh: bool = False
    """Whether the discriminator judges what the decoder makes of the images in use, after its step: without noise, in
    eval mode, rounded to 8 bits; else the reconstruction that the decoder was trained by."""
    augment: AugmentConfig | None = None
    """How images are changed before they are judged, drawn anew for each; None: not at all."""
    features: FeaturesConfig | None = None
    """A frozen network by whose features images are judged; None: by patches of their pixels, and the next three
    settings are of that network."""
    width: int = Field(64, ge=8, multiple_of=8)
    """Channels of the patch discriminator's first layer."""
    num_layers: int = Field(3, ge=1)
    """Layers of the patch discriminator that halve the resolution."""
    norm: Literal["batch", "group", "none"] = "group"
    """Normalisation in the patch discriminator."""
    lecam_weight: float = Field(0.0, ge=0)
    """Weight of the discriminator's LeCam regularisation (Tseng et al. 2021, arXiv 2104.03310): its mean logit of real
    images stays below the running mean of that of reconstructions, and the other way round (decay 0.999)."""
    weights: str | None = None
    """A file (``.safetensors``, ``.pt``, ``.pth``, ``.ckpt``) with a discriminator of this shape to start from: one of
    taming-transformers' layout (``main.0.weight`` …), alone or within the loss of a checkpoint, or a checkpoint's
    ``model.safetensors`` of a run of this library; with ``features`` the heads of RAE's files. None: from scratch. A
    resumed run does not read it again."""
    optimiser: OptimiserConfig | None = None
    """None: the same as ``train.optimiser``. AdamW in any case: a discriminator has no matrix for Muon."""

    def check_use(self, image_size: tuple[int, int]) -> None:
        """As ``MethodConfig.check_use``."""
        if not self.weight:
            raise ValueError(
                "method.adversarial.weight: 0 trains a discriminator for nothing; give more, or pass "
                "method.adversarial=null"
            )
        if not self.adaptive:
            because = "method.adversarial.adaptive=false"
            check_used(self, "method.adversarial", because, "max_adaptive", "adaptive_eps")
        if self.augment is not None and not self.augment.changes(image_size):
            height, width = image_size
            raise ValueError(
                f"method.adversarial.augment: changes nothing, as shares of {height}x{width} images round to 0 pixels; "
                "give more translation or cutout, or pass method.adversarial.augment=null"
            )

    @property
    def first_step(self) -> int:
        """From which the discriminator trains."""
        own = self.discriminator_start_step
        return self.start_step if own is None else own

    @model_validator(mode="after")
    def _discriminator_first(self) -> "AdversarialConfig":
        own = self.discriminator_start_step
        if own is not None and own > self.start_step:
            raise ValueError(
                f"discriminator_start_step {own} is after start_step {self.start_step}: until then the "
                f"generator would be paid for fooling an untrained network; at most {self.start_step}"
            )
        return self

    @model_validator(mode="after")
    def _of_one_network(self) -> "AdversarialConfig":
        fields = type(self).model_fields
        of_patches = [
            name
            for name in ("width", "num_layers", "norm")
            if getattr(self, name) != fields[name].default
        ]
        if self.features is not None and of_patches:
            raise ValueError(
                f"{', '.join(of_patches)}: of the patch discriminator, which takes no effect with features; leave out "
                "one or the other"
            )
        return self

    @field_validator("optimiser")
    @classmethod
    def _without_matrices(cls, optimiser: OptimiserConfig | None) -> OptimiserConfig | None:
        if optimiser is not None and optimiser.name == "muon":
            raise ValueError("name: a discriminator has no matrix for muon; use adamw")
        return optimiser


# The network -------------------------------------------------------------------------------------


_NORMS = {
    "batch": nn.BatchNorm2d,
    "group": lambda channels: nn.GroupNorm(min(32, channels // 4), channels),
    "none": nn.Identity,
}


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017, section 3.2.2): judges overlapping patches of an image.

    Convolutions 4x4, LeakyReLU 0.2, weights N(0, 0.02) as there and in taming-transformers.

    Args:
        width: channels of the first layer; they double per layer up to eight times as many.
        num_layers: strided layers; 3 gives patches of 70x70 pixels.
        norm: ``batch`` is the papers'; ``group`` does not depend on what else is in the batch, so
            several processes compute what one would.
    """

    def __init__(
        self, *, width: int, num_layers: int, norm: Literal["batch", "group", "none"]
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = width
        for layer in range(1, num_layers + 1):
            following = width * min(2**layer, 8)
            layers += [
                nn.Conv2d(
                    channels,
                    following,
                    4,
                    stride=2 if layer < num_layers else 1,
                    padding=1,
                    bias=norm == "none",
                ),
                _NORMS[norm](following),
                nn.LeakyReLU(0.2),
            ]
            channels = following
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 4, padding=1))
        self.apply(_init)

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, 1, h, w), above 0 for real, of pixels (B, 3, H, W) in [-1, 1]."""
        return self.layers(pixels)

    def frozen_modules(self) -> list[nn.Module]:
        """What it reads and nobody trains."""
        return []


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# Weights to start from ---------------------------------------------------------------------------

_LAYER = re.compile(
    r"(?:(?:module|_orig_mod|learners|loss|discriminator)\.)*(?:main|layers)\.(\d+\..+)"
)


def load_discriminator(discriminator: PatchDiscriminator, path: Path) -> None:
    """Reads a discriminator's weights: taming-transformers' layout, or this library's.

    Raises:
        UserError: the file can't be read, or holds no discriminator, or one of another shape, or numbers that are not
            finite.
    """
    setting = "method.adversarial.weights"
    place = f"{setting}: {path}"
    layers = read_part(path, _LAYER, setting, ("discriminator", "state_dict"))
    found = {f"layers.{name}": tensor for name, tensor in layers.items()}
    if not found:
        raise UserError(
            f"{place}: holds no discriminator (tensors named main.0.weight, main.2.weight, …, also behind "
            "discriminator. or loss.discriminator.)"
        )
    own = discriminator.state_dict()
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    found = counters | found  # which some files leave out
    wrong = unfit(own, found)
    if wrong:
        raise UserError(
            f"{place}: its discriminator is of another shape ({wrong[0].replace('layers.', 'main.')}"
            f"{f' and {len(wrong) - 1} more' if len(wrong) > 1 else ''}); pass {_shape(found)}, or another file"
        )
    take_part(discriminator, found, place)


def _shape(found: Mapping[str, Tensor]) -> str:
    """The settings that give a network of these tensors' shape."""
    kernels = [t for name, t in found.items() if name.endswith(".weight") and t.ndim == 4]
    if any(name.endswith("running_mean") for name in found):
        norm = "batch"
    else:
        norm = (
            "group"
            if any(t.ndim == 1 for n, t in found.items() if n.endswith("weight"))
            else "none"
        )
    settings = {"norm": norm, "num_layers": len(kernels) - 2}
    first = found.get("layers.0.weight")
    settings |= {"width": len(first)} if first is not None and first.ndim else {}
    return " ".join(f"method.adversarial.{key}={value}" for key, value in settings.items())


# Losses ------------------------------------------------------------------------------------------

_GRADIENT_SCALE = 2.0**10
"""A mean over 256 images of 256x256 moves each output by 2e-8, which float16 rounds to 0. Times this it
keeps its value, and the last layer's gradients may still be 64 before float16 overflows."""


_LECAM_DECAY = 0.999


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's hinge loss (Lim and Ye 2017), (B,)."""
    real, fake = F.relu(1 - real_logits.float()), F.relu(1 + fake_logits.float())
    return 0.5 * (real.mean(dim=(1, 2, 3)) + fake.mean(dim=(1, 2, 3)))


def lecam_loss(real: Tensor, fake: Tensor, ema_real: Tensor, ema_fake: Tensor) -> Tensor:
    """How far mean logits, all scalars, are beyond the running means of the other kind's: of squares the sum."""
    return F.relu(real - ema_fake).square() + F.relu(ema_real - fake).square()


def _over_processes(values: Tensor) -> Tensor:
    """Their mean over all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / dist.get_world_size()


def adaptive_ratio(
    wanted: Tensor, other: Tensor, last_layer: Tensor, cap: float, eps: float = 1e-4
) -> Tensor:
    """Ratio of both terms' gradient norms at a layer: of a discriminator's term at the decoder's last (Esser et al.
    2021, eq. 7), of an alignment's at the encoder's last.

    Several processes average the gradients first, so that they agree with one process on the
    whole batch. In half precision gradients are scaled by a power of two on the way.

    Args:
        wanted, other: scalars of which ``last_layer`` is an ancestor.
        cap: largest ratio.
        eps: added to the adversarial term's norm.
    """
    gradients = []
    for term in (wanted, other):
        scale = torch.full_like(term, _GRADIENT_SCALE)
        (gradient,) = torch.autograd.grad(term, last_layer, scale, retain_graph=True)
        gradients.append(_over_processes(gradient.float() / _GRADIENT_SCALE))
    above, below = (gradient.norm() for gradient in gradients)
    return (above / (below + eps)).clamp(0, cap).detach()


def generator_term(
    config: AdversarialConfig,
    discriminator: nn.Module,
    x_hat: Tensor,
    wanted: Tensor,
    last_layer: Tensor,
    step: int,
    draws: Draws | None,
) -> Term:
    """What a decoder minimises to fool the discriminator: -D(x̂), with its ramped, adapted weight.

    Args:
        x_hat: reconstructions (B, 3, H, W).
        wanted: the sum of the other losses on them, a scalar.
        last_layer: of the decoder; see ``adaptive_ratio``.
        step: 0-based.
        draws: of the step; only ``augment`` needs them.

    Raises:
        ValueError: ``augment`` without draws.
    """
    if config.augment is not None:
        if draws is None:
            raise ValueError("method.adversarial.augment: call adversarial_terms with draws=draws")
        x_hat = augment(x_hat, config.augment, draws, "augment_generator")
    # A patch discriminator's batch norm has its statistics of these too; a head's spectral norm rests, as in RAE.
    was_training = discriminator.training
    discriminator.train(was_training and config.features is None)
    with without_gradients(discriminator):
        value = -discriminator(x_hat).float().mean(dim=(1, 2, 3))
    discriminator.train(was_training)
    ramp = min(1.0, (step - config.start_step + 1) / max(1, config.ramp_steps))
    weight = config.weight * ramp
    if not config.adaptive:
        return Term(value, weight)
    ratio = adaptive_ratio(
        wanted, value.mean(), last_layer, config.max_adaptive, config.adaptive_eps
    )
    return Term(value, weight * ratio)


# The learner -------------------------------------------------------------------------------------


class DiscriminatorLearner(nn.Module):
    """Trains the discriminator on images and the reconstructions that the autoencoder's learner left.

    Attributes:
        target: of (pixels, draws): the images that reconstructions are compared with; the pixels themselves unless
            somebody sets another one.

    Args:
        resumes: a checkpoint's weights will take the place of the first ones.

    Raises:
        UserError: see ``load_discriminator``.
    """

    reconstruct: Callable[[Inputs], Tensor]
    """Makes the images that are judged where ``config.fresh`` asks for them."""

    def __init__(self, config: AdversarialConfig, *, resumes: bool = False) -> None:
        super().__init__()
        self.config = config
        self.target: Callable[[Tensor, Draws], Tensor] = lambda pixels, draws: pixels
        self.discriminator: PatchDiscriminator | FeatureDiscriminator
        if config.features is not None:
            self.discriminator = FeatureDiscriminator(config.features)
        else:
            self.discriminator = PatchDiscriminator(
                width=config.width, num_layers=config.num_layers, norm=config.norm
            )
        if config.weights is not None and not resumes:
            load = load_discriminator if config.features is None else load_heads
            load(self.discriminator, Path(config.weights))
        if config.lecam_weight:
            self.register_buffer("ema_logits", torch.zeros(2))  # real, fake

    @torch.no_grad()
    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError where images of (height, width) are too small for its kernels: it may start late."""
        if self.config.features is not None:  # which resizes images, and was built for that size
            return
        self.discriminator.eval()
        try:
            self.discriminator(torch.zeros(1, 3, *image_size))
        except RuntimeError:
            raise ValueError(
                f"method.adversarial.num_layers: too many for images of {image_size[0]}x{image_size[1]}"
            ) from None
        self.discriminator.train()

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised: the hinge loss of ``inputs['pixels']`` against ``carry['reconstruction']``, both as
        ``target`` says, or of the images as they are against a fresh reconstruction; and LeCam's."""
        real, fake = self._judged(inputs, draws, carry)
        terms = {"discriminator": Term(hinge_loss(real, fake), 1.0)}
        means = torch.stack([real.float().mean(), fake.float().mean()])
        if self.config.lecam_weight:
            terms["lecam"] = Term(self._lecam(means), self.config.lecam_weight)
        logits = {"logits_real": means[0].detach(), "logits_fake": means[1].detach()}
        return StepOutput(terms, metrics=logits)

    def _judged(self, inputs: Inputs, draws: Draws, carry: Carry) -> tuple[Tensor, Tensor]:
        """Logits of real images and of reconstructions."""
        if self.config.fresh:
            real, fake = inputs["pixels"], self._rounded(inputs)
        else:
            real, fake = self.target(inputs["pixels"], draws), carry["reconstruction"]
        if self.config.augment is not None:
            fake = augment(fake, self.config.augment, draws, "augment_fake")
            real = augment(real, self.config.augment, draws, "augment_real")
        if self.config.features is not None:
            # Its spectral norm moves with each call, and RAE's begins here.
            fake = self.discriminator(fake)
            return self.discriminator(real), fake
        real = self.discriminator(real)
        return real, self.discriminator(fake)

    def _lecam(self, means: Tensor) -> Tensor:
        """LeCam's loss of the mean logits (real, fake), which the running ones then follow."""
        everyones = _over_processes(means.detach())
        # The value of all processes, whose gradients are averaged: each has its own share of it.
        shared = means + (everyones - means.detach())
        value = lecam_loss(*shared, *self.ema_logits.clone())
        with torch.no_grad():
            self.ema_logits.lerp_(everyones, 1 - _LECAM_DECAY)
        return value

    @torch.no_grad()
    def _rounded(self, inputs: Inputs) -> Tensor:
        """A fresh reconstruction as a file of 8 bits would hold it."""
        pixels = self.reconstruct(inputs).float().clamp(-1, 1)
        return ((pixels + 1) * 127.5).round() / 127.5 - 1
