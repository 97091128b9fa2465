"""A discriminator on a frozen network's features (StyleGAN-T, Sauer et al. 2023; VAR and RAE judge by the same)."""

import re
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils import spectral_norm  # RAE's: the newer one updates u and v in the other order

from semtok.errors import UserError, named_here
from semtok.methods.part_weights import read_part, take_part, unfit
from semtok.objective import Unregistered
from semtok.teachers import Teacher, TeacherConfig

_SIZE = 224
_PLACE = "method.adversarial.features"
_TEACHER = rf"(?<![\w./'-])teacher(?=\.(?:{'|'.join(TeacherConfig.model_fields)})\b| ')"  # and no file's name


class FeaturesConfig(TeacherConfig):
    """A frozen network, and the heads that judge its patch tokens. The last of its layers has two heads."""

    name: str = "vit_small_patch8_224.dino"
    """``demo``, or any vision transformer that timm knows; DINO-S/8 as in RAE."""
    input_size: int | None = Field(_SIZE, gt=0)
    """Side, in pixels, to which images are resized, whatever their aspect: two patches or more; None: the one it was
    trained at."""
    layers: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks whose patch tokens are judged; negative counts from the last."""
    resize: Literal["bicubic", "bilinear"] = "bilinear"
    """How images get to ``input_size``, without antialiasing; bilinear in RAE's code."""
    final_norm: Literal["affine", "plain", "none"] = "none"
    """As ``teacher.final_norm``; RAE judges tokens without a norm."""
    gelu: Literal["exact", "tanh"] = "tanh"
    """How the network's GELU is computed: as it was trained (timm's), or by the approximation that RAE's code has."""
    kernel: int = Field(9, ge=1)
    """Tokens that a head's convolution sees at once, along the rows of the image joined to a ring; an odd number, at
    most 1 more than twice the tokens of an image."""

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError(f"{kernel} is even; pass an odd number")
        return kernel


class _Residual(nn.Module):
    """(x + f(x)) / √2."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn  # called so in RAE's files

    def forward(self, x: Tensor) -> Tensor:
        return (self.fn(x) + x) * 2**-0.5


def _convolution(width: int, out: int, kernel: int) -> nn.Module:
    padding = {"padding": kernel // 2, "padding_mode": "circular"}
    return spectral_norm(nn.Conv1d(width, out, kernel, **padding), eps=1e-12)


def _block(width: int, kernel: int) -> nn.Sequential:
    # Each image and channel is normalised by its own tokens.
    norm = nn.InstanceNorm1d(width, eps=1e-6, affine=True)
    return nn.Sequential(_convolution(width, width, kernel), norm, nn.LeakyReLU(0.2))


class FeatureDiscriminator(nn.Module):
    """Judges images by the patch tokens of a frozen network.

    Heads have spectral norm, which takes a step of the power method in each call in training mode and rests in eval
    mode. The network stays out of the state.

    Raises:
        UserError: an unknown network, one that is no vision transformer, or one with too few tokens for the heads.
    """

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__()
        # The heads do not depend on how it is loaded.
        with torch.random.fork_rng(devices=[]), named_here(_TEACHER, _PLACE):
            network = Teacher(config)
        if not network.is_transformer:
            raise UserError(
                f"{_PLACE}: '{config.name}' is no vision transformer; choose one, as demo"
            )
        for layer in network.modules():
            if isinstance(layer, nn.GELU):
                layer.approximate = "tanh" if config.gelu == "tanh" else "none"
        self._network = Unregistered(network)
        side = network.input_size // network.patch_size * network.patch_size
        self._input_size = (side, side)
        _check_tokens(config, network, (side // network.patch_size) ** 2)
        widths = (network.widths[-1], *network.widths)
        self.heads = nn.ModuleList(
            nn.Sequential(
                _block(width, 1),
                _Residual(_block(width, config.kernel)),
                _convolution(width, 1, 1),
            )
            for width in widths
        )

    def frozen_modules(self) -> list[nn.Module]:
        """What it reads and nobody trains."""
        return [self._network.module]

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, heads, 1, tokens), above 0 for real, of pixels (B, 3, H, W) in [-1, 1]."""
        network = self._network.module
        if tuple(pixels.shape[-2:]) != self._input_size:
            pixels = F.interpolate(pixels, size=self._input_size, mode=network.config.resize)
        if network.config.normalise:
            pixels = network.normalise(pixels)
        features = network.features_of_input(pixels)
        tokens = [rearrange(patch, "b d h w -> b d (h w)") for patch in features.patches]
        judged = zip(self.heads, (tokens[-1], *tokens), strict=True)
        return torch.stack([head(x) for head, x in judged], dim=1)


def _check_tokens(config: FeaturesConfig, network: Teacher, tokens: int) -> None:
    """Raises UserError where images have too few tokens for the heads: they may judge the first ones late."""
    if tokens < 2:  # of which the norm takes the deviation
        raise UserError(
            f"{_PLACE}.input_size: {network.input_size} gives '{config.name}' {tokens or 'no'} token"
            f"{'' if tokens else 's'}, and heads judge at least 2; pass at least {2 * network.patch_size}"
        )
    if config.kernel // 2 > tokens:
        raise UserError(
            f"{_PLACE}.kernel: {config.kernel} is too large for the {tokens} tokens of images of "
            f"{_PLACE}.input_size {network.input_size}; pass at most {2 * tokens + 1}, or a larger input_size"
        )


_HEAD = re.compile(r".*?heads\.(.+)")


def load_heads(discriminator: FeatureDiscriminator, path: Path) -> None:
    """Reads the heads of a checkpoint of RAE's, under ``disc`` or alone, or of this library's.

    Raises:
        UserError: the file can't be read, or holds no such heads, or ones of another shape.
    """
    setting = "method.adversarial.weights"
    place = f"{setting}: {path}"
    found = {f"heads.{name}": t for name, t in read_part(path, _HEAD, setting, ("disc",)).items()}
    wrong = unfit(discriminator.state_dict(), found)
    if wrong:
        raise UserError(
            f"{place}: holds no heads of this shape ({wrong[0]} and {len(wrong) - 1} more); choose another file, or "
            "other method.adversarial.features"
        )
    take_part(discriminator, found, place)
