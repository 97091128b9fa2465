"""The autoencoders of diffusers whose latents can be a texture: how each encodes, and what it states of their scale.

A class is here if it encodes an image to one map, quantises nothing and decodes that map alone. Only AutoencoderKL is
trained; the others stay as somebody has published them.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from einops import reduce
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.statistics import are_sound

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

TRAINED_CLASS = "AutoencoderKL"
TEXTURE_CLASSES = (
    TRAINED_CLASS,
    "AutoencoderDC",
    "AutoencoderTiny",
    "AsymmetricAutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderKLHunyuanImage",
)
# Widths per resolution of an encoder. A class may have those of its decoder under a name that comes later here.
_WIDTHS = ("encoder_block_out_channels", "down_block_out_channels", "block_out_channels")


def trained_class() -> "type[AutoencoderKL]":
    """Diffusers' class of the autoencoders that can be trained."""
    # Late: it takes as long to import as all else together, and what fails a check or has no autoencoder needs it not.
    from diffusers import AutoencoderKL

    return AutoencoderKL


def texture_class(config: Mapping[str, Any], place: str) -> type[nn.Module]:
    """The class that a diffusers config names.

    Args:
        place: starts messages.

    Raises:
        UserError: its latents can be no texture, or the installed diffusers is older than it.
    """
    name = config.get("_class_name", TRAINED_CLASS)
    if name not in TEXTURE_CLASSES:
        way_out = f"can be loaded: {', '.join(TEXTURE_CLASSES)}"
        if name == "AutoencoderRAE":
            way_out = "semtok hub import auto FOLDER --output DIR makes a tokenizer of it"
        elif name == "SemtokDecoder":  # of a pipeline exported from here
            raise UserError(
                f"{place}: is a pipeline's decoder alone; give the tokenizer of the model that it was exported from"
            )
        raise UserError(f"{place}: is of diffusers' {name}; {way_out}")
    import diffusers  # late, as above

    if not hasattr(diffusers, name):
        raise UserError(
            f"{place}: is of {name}, which diffusers {diffusers.__version__} has not; pip install -U diffusers"
        )
    return getattr(diffusers, name)


def encode_texture(autoencoder: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) to mean and standard deviation of raw latents, two of (B, C, h, w). The deviation is 0 where
    the encoder has no posterior (AutoencoderDC, AutoencoderTiny)."""
    coded = autoencoder.encode(pixels)[0]
    if isinstance(coded, Tensor):
        return coded, torch.zeros_like(coded)
    return coded.mean, coded.std


def autoencoder_stride(autoencoder: nn.Module) -> int:
    """Image pixels per latent cell along each side."""
    config = autoencoder.config
    stated = config.get("spatial_compression_ratio")
    if stated is not None:
        return stated
    widths = next(config[name] for name in _WIDTHS if config.get(name) is not None)
    return 2 ** (len(widths) - 1)


@torch.no_grad()
def check_sizes(autoencoder: nn.Module, place: str) -> None:
    """Raises UserError where the decoder gives images of another size than the encoder takes."""
    side = 2 * autoencoder_stride(autoencoder)  # some norms refuse a map of one cell
    mean, _ = encode_texture(autoencoder, torch.zeros(1, 3, side, side))
    decoded = autoencoder.decode(mean).sample
    due = (autoencoder.config.latent_channels, 2, 2), (3, side, side)
    if (tuple(mean.shape[1:]), tuple(decoded.shape[1:])) != due:
        raise UserError(
            f"{place}: encodes {side}x{side} pixels to {tuple(mean.shape[1:])} and decodes that to "
            f"{tuple(decoded.shape[1:])}; only autoencoders that give {due[0]} and {due[1]} can be used"
        )


# Statistics --------------------------------------------------------------------------------------


def stated_statistics(autoencoder: nn.Module, place: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents per channel, two of (C,), as a diffusers autoencoder has them.

    They are ``latents_mean`` and ``latents_std`` of its config; else the moments in AutoencoderKLFlux2's batch norm;
    else ``shift_factor`` and ``scaling_factor``.

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
    if mean is None and hasattr(autoencoder, "bn"):
        return _sound(*_moments_of_patches(autoencoder.bn, channels), f"{place}: its batch norm")
    if mean is None:
        mean, std = _stated(config, "shift_factor", 1, place) or 0.0, 1.0
    scale = 1.0 if "scaling_factor" not in config else _stated(config, "scaling_factor", 1, place)
    if scale is None:
        raise UserError(f"{place}: scaling_factor is null; give a number, as 0.18215, or 1")
    mean, std = torch.as_tensor(mean), torch.as_tensor(std) / scale
    return _sound(mean.expand(channels), std.expand(channels), place)


def _sound(mean: Tensor, std: Tensor, place: str) -> tuple[Tensor, Tensor]:
    """Raises UserError where latents would become 0 or no numbers."""
    if not are_sound(mean, std):
        raise UserError(
            f"{place}: states a mean that is not finite, or a deviation not finite and positive; mend it there"
        )
    return mean, std


def _moments_of_patches(norm: nn.BatchNorm2d, channels: int) -> tuple[Tensor, Tensor]:
    """Those of each channel, where a batch norm has them for each position in a patch of latents too (FLUX.2)."""
    mean = reduce(norm.running_mean, "(c p) -> c", "mean", c=channels)
    second = norm.running_var + norm.eps + norm.running_mean.square()
    return mean, (reduce(second, "(c p) -> c", "mean", c=channels) - mean.square()).sqrt()


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
