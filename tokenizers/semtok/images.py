"""Pixels: the one range used inside the library, and the ways in and out of it.

Inside, images are float (B, 3, H, W) in [-1, 1], called *pixels*. The public surface also takes
files, PIL images, NumPy arrays, and tensors of other ranges.
"""

import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from semtok.errors import UserError, printable

OneImage = str | PathLike[str] | Image.Image | np.ndarray | Tensor
Images = OneImage | Sequence[OneImage]
ValueRange = tuple[float, float]
Uint8Rule = Literal["round", "truncate"]
"""How pixels become uint8: to the nearest level, or to the next lower one."""
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")
_ORIENTATION, _NUM_BITS, _PHOTOMETRIC = 274, 258, 262  # numbers of tags in EXIF and TIFF
_FARTHEST = 1.5
"""Bicubic resizing overshoots [-1, 1] by less; images in [0, 255], or standardised for a classifier, by more."""


def to_pixels(
    images: Images,
    device: torch.device | str | None = None,
    *,
    value_range: ValueRange | None = None,
) -> Tensor:
    """Turns what users have into pixels.

    Args:
        images: one of the following, or a list of them of one size. A file's path; a PIL image (transparency is
            over white, and a camera's note of which way is up is followed); a NumPy array (H, W, 3) or
            (B, H, W, 3); a tensor (3, H, W) or (B, 3, H, W). uint8 is in [0, 255].
        device: where the result shall lie; None leaves tensors where they are.
        value_range: (black, white) of float images; None: they are in [-1, 1] and returned as they are.

    Returns:
        float (B, 3, H, W) in [-1, 1].

    Raises:
        UserError: a file that is not there or is no image.
        ValueError: the shape or the kind of number fits none of these.
    """
    several = list(images) if isinstance(images, list | tuple) else [images]
    if not several:
        raise ValueError("no images given")
    batches = [_batch(each) for each in several]
    sizes = {tuple(batch.shape[2:]) for batch in batches}
    if len(sizes) != 1:
        told = ", ".join(f"{width}x{height}" for height, width in sorted(sizes))
        raise ValueError(f"images of several sizes ({told}) can't be one batch; resize them first")
    kinds = {batch.dtype for batch in batches}
    if len(kinds) != 1:
        raise ValueError(f"images of several kinds of numbers ({', '.join(map(str, kinds))})")
    result = batches[0] if len(batches) == 1 else torch.cat(batches)
    result = result.to(device) if device is not None else result
    if result.dtype == torch.uint8:
        if value_range is not None:
            raise ValueError("value_range: goes with floats; these images are uint8, in [0, 255]")
        return result.float() / 127.5 - 1
    if value_range is None:
        return result
    black, white = _ends(value_range)
    return result if (black, white) == (-1, 1) else (result - black) * (2 / (white - black)) - 1


def _ends(value_range: Any) -> ValueRange:
    """Black and white of a ``value_range``; raises ValueError where it is none."""
    try:
        black, white = (float(end) for end in value_range)
        is_range = not isinstance(value_range, str) and black < white
    except (TypeError, ValueError):
        is_range = False
    if not is_range:
        raise ValueError(
            f"value_range: expected (black, white) with black < white, got {value_range!r}"
        )
    return black, white


def check_unit_range(pixels: Tensor) -> None:
    """Raises ValueError where images of a stated range do not lie in it; half a level beyond is rounding."""
    low, high = (value.item() for value in pixels.detach().float().aminmax())
    if not (low >= -1 - 1 / 255 and high <= 1 + 1 / 255):
        raise ValueError(
            f"image: floats lie from {(low + 1) / 2:g} to {(high + 1) / 2:g}, where 0 is black and 1 is white; "
            "pass value_range=(black, white), as (-1, 1)"
        )


def are_floats(images: Images) -> bool:
    """Whether images are arrays or tensors of floats, which do not say themselves what black and white are."""
    one = images[0] if isinstance(images, list | tuple) and images else images
    if isinstance(one, np.ndarray):
        return one.dtype.kind == "f"
    return isinstance(one, Tensor) and one.is_floating_point()


def check_range(pixels: Tensor, value_range: ValueRange | None = None) -> None:
    """Looks whether float images can be pixels in [-1, 1]; reads them, so that the host waits for a GPU.

    Images in [0, 1] could be bright ones: there is one warning where no value_range was given.

    Args:
        value_range: what the pixels were brought to [-1, 1] from.

    Raises:
        ValueError: they are certainly of another range, or not finite.
    """
    if not pixels.numel():
        return
    low, high = (value.item() for value in pixels.detach().float().aminmax())
    is_within = low >= -_FARTHEST and high <= _FARTHEST
    if value_range is not None:
        if not is_within:
            black, white = value_range
            low, high = (black + (end + 1) / 2 * (white - black) for end in (low, high))
            raise ValueError(
                f"value_range: black and white are ({black:g}, {white:g}); these images lie in [{low:g}, {high:g}]; "
                "pass the range that they are of"
            )
        return
    if not is_within:
        likely = (0, 255) if low >= 0 else (low, high)
        way_out = f"pass value_range=({likely[0]:g}, {likely[1]:g}) if black and white are so"
        if not np.isfinite([low, high]).all():
            way_out = "mend what made them so"
        raise ValueError(
            f"float images are in [-1, 1]; these lie in [{low:g}, {high:g}]; {way_out}"
        )
    if 0 <= low < high <= 1:
        warnings.warn(
            "float images are in [-1, 1], and all values of these lie in [0, 1]; pass value_range=(0, 1) if black is "
            "0, or value_range=(-1, 1) if they are just bright",
            stacklevel=3,
        )


def as_rgb(
    image: Image.Image, smaller: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """A PIL image as RGB, the way up that its camera has noted, transparency over white.

    Args:
        smaller: makes a large image of mode L or RGB smaller; asked before copies of it are made.

    Raises:
        ValueError: its numbers have no known range.
    """
    # Pillow brings grey images of these formats to 16 bits, whatever their mode.
    is_sixteen_bits = image.mode.startswith("I;16") or image.format in _SIXTEEN_BITS
    tags = getattr(
        image, "tag_v2", {}
    )  # of TIFF, whose grey may be of fewer bits, or white at zero
    num_bits, zero_is_white = int(tags.get(_NUM_BITS, (16,))[0]), tags.get(_PHOTOMETRIC) == 0
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or (image.mode == "I" and not is_sixteen_bits):
        kind = "signed or 32-bit whole numbers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(
            f"pixels are {kind} of no known range; save it with 8 or 16 bits, or give a tensor with value_range"
        )
    if image.mode.startswith("I"):  # Pillow would clip where 8 bits need the upper byte
        grey = (np.asarray(image) >> (num_bits - 8)).astype(np.uint8)
        image = Image.fromarray(255 - grey if zero_is_white else grey)
    if smaller is not None and image.mode in ("L", "RGB") and "transparency" not in image.info:
        image = smaller(image)
    if image.mode in ("P", "LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _batch(image: Any) -> Tensor:
    """One image, or a batch of them, as uint8 or float (B, 3, H, W)."""
    if isinstance(image, str | PathLike):
        return _from_pil(_read(Path(image)))
    if isinstance(image, Image.Image):
        return _from_pil(as_rgb(image))
    if isinstance(image, np.ndarray):
        return _checked(_from_array(image))
    if isinstance(image, Tensor):
        return _checked(image[None] if image.ndim == 3 else image)
    raise ValueError(
        f"expected images as paths, PIL images, NumPy arrays or tensors, got {type(image).__name__}"
    )


def _read(path: Path) -> Image.Image:
    place = printable(str(path))
    try:
        with Image.open(path) as image:
            return as_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{place}: no such image") from None
    except IsADirectoryError:
        raise UserError(f"{place}: is a folder; give the images in it, as a list") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{place}: can't be read as an image ({error})") from None


def _from_pil(image: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").contiguous()


def _from_array(array: np.ndarray) -> Tensor:
    """A NumPy array, channels last as Pillow, OpenCV and Matplotlib have them."""
    if array.ndim not in (3, 4) or array.shape[-1] != 3:
        is_first = array.ndim in (3, 4) and array.shape[-3] == 3
        way_out = "; channels come first in tensors: torch.from_numpy(…)" if is_first else ""
        if array.ndim == 2:
            way_out = "; grey images become three channels by np.stack([array] * 3, axis=-1)"
        elif array.ndim in (3, 4) and array.shape[-1] == 4:
            way_out = "; leave transparency out: array[..., :3]"
        raise ValueError(
            f"expected images (height, width, 3) or (B, height, width, 3) as a NumPy array, got {array.shape}"
            f"{way_out}"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"expected images of numbers, got a NumPy array of {array.dtype}")
    # A copy, as others may be read-only, in this machine's order of bytes.
    batch = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
    batch = batch.float() if batch.dtype == torch.float64 else batch
    return rearrange(batch[None] if batch.ndim == 3 else batch, "b h w c -> b c h w")


def _checked(images: Tensor) -> Tensor:
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != 3:
        way_out = ""
        if images.ndim == 4 and shape[3] == 3:
            way_out = "; channels come first: images.movedim(-1, -3)"
        elif images.ndim == 4 and shape[1] == 1:
            way_out = "; grey images become three channels by images.expand(-1, 3, -1, -1)"
        elif images.ndim == 4 and shape[1] == 4:
            way_out = "; leave transparency out: images[:, :3]"
        raise ValueError(f"expected images (B, 3, height, width), got {shape}{way_out}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        way_out = "values in [0, 255] become uint8 by .to(torch.uint8)"
        if images.dtype == torch.bool:
            way_out = "black and white become uint8 by .to(torch.uint8) * 255"
        raise ValueError(
            f"expected uint8 images in [0, 255] or float images in [-1, 1], got {images.dtype}; {way_out}"
        )
    return images


def to_uint8(pixels: Tensor, rule: Uint8Rule = "round") -> Tensor:
    """Turns pixels in [-1, 1] into uint8 in [0, 255]; values outside are clamped.

    Args:
        rule: ``round`` as SiT, SFD and LightningDiT write samples (127.5 x + 128, cut off); ``truncate`` as
            REPA, REG and REGLUE do (255 (x + 1) / 2, cut off), half a level darker on average.
    """
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255)
    return (levels.round() if rule == "round" else levels).to(torch.uint8)


def to_pil(pixels: Tensor) -> list[Image.Image]:
    """One PIL image for each of pixels (B, 3, H, W) in [-1, 1]."""
    return [Image.fromarray(array) for array in to_uint8(pixels).permute(0, 2, 3, 1).cpu().numpy()]
