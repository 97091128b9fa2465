"""What image files hold, decoded: which files are images, which way is up, modes, transparency, crops."""

import io
import os
import struct
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, PngImagePlugin

from semtok.data.remote import LASTING, persist
from semtok.errors import UserError
from semtok.images import as_rgb
from semtok.storage import as_damage

T = TypeVar("T")

NO_IMAGE = (
    OSError,  # Pillow's own, UnidentifiedImageError among them: what is decoded is in memory
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    # What its decoders raise of damage that they don't look for.
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    struct.error,
)
"""What decoding raises where a file is no image, cut short, or of a kind that has no one look."""

MAX_PIXELS_VARIABLE = "SEMTOK_MAX_PIXELS"
"""Environment variable: images of more pixels are unreadable, as they might fill the memory. Unset: Pillow's limit."""

_FORMATS = frozenset(
    (
        *(
            "AVIF",
            "BMP",
            "DDS",
            "DIB",
            "GIF",
            "ICNS",
            "ICO",
            "JPEG",
            "JPEG2000",
            "MPO",
            "PCX",
            "PNG",
            "PPM",
            "QOI",
            "SGI",
        ),
        *("TGA", "TIFF", "WEBP"),
    )
)

# Programs that draw images keep their settings in a PNG's text, which may pass Pillow's 1 MB.
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, 2**24)


class Unreadable(NamedTuple):
    """A file that no image can be had of, and why."""

    reason: str


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes, each with its dot, of the images that this Pillow reads, as ``.png``."""
    known = Image.registered_extensions()
    # What opens JPEG files opens several of them in one, too.
    return frozenset(
        suffix
        for suffix, form in known.items()
        if form in _FORMATS and ("JPEG" if form == "MPO" else form) in Image.OPEN
    )


def read_image(content: Path | bytes, turn: Callable[[bytes], T]) -> T | Unreadable:
    """What becomes of an image file, or of what it holds.

    Args:
        turn: what a file holds into what is wanted of it, such as ``decode``; may raise ``NO_IMAGE``.

    Raises:
        UserError: the disk fails, also when it is asked again; or ``MAX_PIXELS_VARIABLE`` is no number.
    """
    if isinstance(content, Path):
        try:
            content = persist(content.read_bytes, str(content))
        except LASTING as error:
            return Unreadable(error.strerror or type(error).__name__)
        except OSError as error:
            raise UserError(f"data.path: {content}: {error.strerror}; see to the disk") from None
    _set_limit()
    try:
        return turn(content)
    except NO_IMAGE as error:
        return Unreadable(_reason(content, error))


def decode(
    content: bytes, image_size: tuple[int, int], place: tuple[float, float] | None = None
) -> np.ndarray:
    """Reads an image as the camera held it, transparency on white, cropped.

    Args:
        content: what an image file holds.
        image_size: (height, width) in pixels.
        place: see ``random_crop``; None: cropped as ADM does.

    Returns:
        uint8 (H, W, 3).

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: see ``NO_IMAGE``.
    """
    if place is None:
        return np.array(adm_center_crop(whole_image(content, image_size), image_size))
    return random_crop(whole_image(content), image_size, place)


def whole_image(content: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The RGB image of a file, uncropped, the right way up, transparency on white.

    Args:
        at_least: (height, width) that an image which is much larger may be halved towards, as
            ``adm_center_crop`` does it; None: as large as it is.

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: see ``NO_IMAGE``.
    """
    smaller = partial(_halved, image_size=at_least) if at_least is not None else None
    quiet = warnings.catch_warnings(action="ignore")  # what is odd but readable is not worth one
    with quiet, as_damage(), Image.open(io.BytesIO(content)) as image:
        return as_rgb(image, smaller)


def _set_limit() -> None:
    """Lets Pillow open what the environment allows. (Pillow refuses at twice its number.)"""
    given = os.environ.get(MAX_PIXELS_VARIABLE)
    if given is None:
        return
    if not given.isdecimal() or not int(given):
        raise UserError(f"{MAX_PIXELS_VARIABLE}: expected a number of pixels, got '{given}'")
    Image.MAX_IMAGE_PIXELS = (int(given) + 1) // 2


def _reason(content: bytes, error: Exception) -> str:
    """Why, in a few words, with what can be done where that is not plain."""
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make it smaller, or set {MAX_PIXELS_VARIABLE} "
            "to a larger number"
        )
    if not content:
        return "the file is empty"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no format that Pillow knows here"
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _halved(image: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """Halved with a box filter while both sides are at least twice (height, width)."""
    height, width = image_size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    return image


def adm_center_crop(image: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """The crop of ADM (Dhariwal and Nichol 2021), for any target (height, width).

    Halved with a box filter while both sides are at least twice the target, resized bicubically so
    that it just covers the target, then cropped at the centre with offsets rounded down.
    """
    height, width = image_size
    image = _halved(image, image_size)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    _check_enlarged(size)
    image = image.resize(size, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _check_enlarged(size: tuple[int, int]) -> None:
    """Raises ValueError where an image that just covers the target has more pixels than an image may have: one of a
    single row of millions of pixels grows with its height."""
    if Image.MAX_IMAGE_PIXELS and size[0] * size[1] > 2 * Image.MAX_IMAGE_PIXELS:
        raise ValueError("too narrow for its length: resized it would fill the memory")


def random_crop(
    image: Image.Image, image_size: tuple[int, int], place: tuple[float, float]
) -> np.ndarray:
    """The crop that taming-transformers' ``ImagePaths`` draws (``taming/data/base.py``), on which LightningDiT's
    autoencoders are trained, for any target (height, width).

    Resized so that it just covers the target, then cropped. The resizing is OpenCV's bilinear one, which is used there:
    each pixel is read from four, however much the image shrinks.

    Args:
        image: RGB.
        place: (vertical, horizontal), each in [0, 1); where they are uniform, so are the places of the crop.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = image_size
    scale = max(width / image.width, height / image.height)
    size = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    _check_enlarged(size)
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float()
    resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False)
    top, left = (
        int((side - target + 1) * u)
        for side, target, u in zip(size, image_size, place, strict=True)
    )
    cropped = resized[0, :, top : top + height, left : left + width]
    return rearrange(cropped.round().to(torch.uint8), "c h w -> h w c").numpy()
