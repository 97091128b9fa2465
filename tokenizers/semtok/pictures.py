"""Pictures of images, latents and features, for people to look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.io import encode_png

from semtok.errors import printable
from semtok.images import to_uint8
from semtok.storage import new_file

_GAP = 4
"""Pixels between images, and around them."""
_WIDEST_LABEL = 200
"""Pixels; what is longer is cut."""

Size = tuple[int, int]
"""(height, width) in pixels."""


def write_png(path: Path, picture: Tensor) -> None:
    """Writes a picture, uint8 (3, H, W), whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_bytes(encode_png(picture).numpy().tobytes())


# Labelled rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Images side by side, with what is written beside them.

    Attributes:
        label: left of the row; may have several lines. Empty: nothing.
        images: uint8 (B, 3, h, w) in [0, 255], or float (B, 3, h, w) in [-1, 1].
        captions: one over each image. Neighbours with the same caption share it. Empty: none.
    """

    label: str
    images: Tensor
    captions: Sequence[str] = ()


def rows_of_images(rows: Sequence[Row], *, min_height: int = 96, footer: str = "") -> Tensor:
    """A picture with labelled rows, one image of a row beside the other.

    Args:
        rows: each is enlarged, without smoothing, to the size of the first one's images. A row may be shorter than
            others.
        min_height: small images are enlarged by a whole factor to at least this many pixels.
        footer: a line below all rows.

    Returns:
        uint8 (3, H, W), black text on white.
    """
    height, width = rows[0].images.shape[-2:]
    factor = max(1, -(-min_height // height))
    height, width = height * factor, width * factor
    font = _font(min(24, max(12, height // 8)))
    line = sum(font.getmetrics()) + _GAP
    labels = ["\n".join(_fitted(t, font, _WIDEST_LABEL) for t in r.label.split("\n")) for r in rows]
    left = max(_text_width(label, font) for label in labels)
    left += _GAP if left else 0
    columns = max(len(row.images) for row in rows)
    heights = [height + _GAP + (line if any(row.captions) else 0) for row in rows]
    canvas = Image.new(
        "RGB",
        (
            left + _GAP + columns * (width + _GAP),
            _GAP + sum(heights) + (line if footer else 0),
        ),
        "white",
    )
    top = _GAP
    for row, label, taken in zip(rows, labels, heights, strict=True):
        below = top + taken - height - _GAP
        _draw_captions(canvas, row.captions, (left + _GAP, top), width, font)
        for column, image in enumerate(_enlarged(row.images, (height, width))):
            canvas.paste(Image.fromarray(image), (left + _GAP + column * (width + _GAP), below))
        if label:
            place = (left, below + height // 2)
            ImageDraw.Draw(canvas).text(place, label, "black", font, anchor="rm", align="right")
        top += taken
    if footer:
        text = _fitted(footer, font, canvas.width - 2 * _GAP)
        ImageDraw.Draw(canvas).text((canvas.width - _GAP, top), text, "black", font, anchor="ra")
    return rearrange(torch.from_numpy(np.array(canvas)), "h w c -> c h w").contiguous()


def grid_of_images(
    images: Tensor, captions: Sequence[str], columns: int, *, min_height: int = 96
) -> Tensor:
    """A picture of captioned images, row by row.

    Args:
        images: (N, 3, h, w), as in ``Row``.
        captions: one for each image.
        columns: images in a row.
        min_height: see ``rows_of_images``.

    Returns:
        uint8 (3, H, W).
    """
    starts = range(0, len(images), columns)
    rows = [Row("", images[i : i + columns], captions[i : i + columns]) for i in starts]
    return rows_of_images(rows, min_height=min_height)


def _enlarged(images: Tensor, size: Size) -> np.ndarray:
    """uint8 (B, height, width, 3)."""
    images = images if images.dtype == torch.uint8 else to_uint8(images)
    enlarged = F.interpolate(images.cpu(), size=size, mode="nearest")
    return rearrange(enlarged, "b c h w -> b h w c").numpy()


def _draw_captions(
    canvas: Image.Image,
    captions: Sequence[str],
    place: tuple[int, int],
    width: int,
    font: ImageFont.FreeTypeFont,
) -> None:
    """Writes captions from a place (x, y) on, each in the middle above its images of this width."""
    x, y = place
    for caption, same in groupby(captions):
        span = len(list(same)) * (width + _GAP)
        text = _fitted(caption, font, span - _GAP)
        middle = (x + (span - _GAP) // 2, y)
        ImageDraw.Draw(canvas).text(middle, text, "black", font, anchor="ma")
        x += span


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's font: Pillow's own has no letters but those of English."""
    import matplotlib  # late: slow to import, and most processes draw nothing

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Text as it can be drawn, cut with dots where it is wider than this many pixels."""
    text = printable(text)
    if font.getlength(text) <= width:
        return text
    fits = (n for n in range(len(text), 0, -1) if font.getlength(f"{text[:n]}…") <= width)
    return f"{text[: next(fits, 0)]}…"


def _text_width(text: str, font: ImageFont.FreeTypeFont) -> int:
    """Pixels of the longest line."""
    return max(round(font.getlength(line) + 0.5) for line in text.split("\n"))


# Principal components ----------------------------------------------------------------------------


def principal_components(features: Tensor, of: Tensor | None = None) -> Tensor:
    """The first three principal components of spatial features, as colours.

    Args:
        features: (B, C, h, w).
        of: (B', C, h', w'), over all of whose positions components are taken; None: the features'
            own. Features of one meaning get the same colours by the same ``of``.

    Returns:
        Pixels (B, 3, h, w) in [-1, 1]; two standard deviations span half the range.
    """
    return _components(features, of).clamp(-1, 1)


def components_in_colours_of(features: Tensor, others: Tensor) -> Tensor:
    """The first three principal components of features, in colours that compare with other features'.

    Which component is red, and with which sign, says nothing: each set of features has its own. So the three
    components are turned, and mirrored if need be, by the orthogonal matrix that brings them nearest to the
    others' in the sum of squares (orthogonal Procrustes, Schönemann 1966). No direction beyond the features' own
    three is looked at. Positions that differ in one picture still differ as much in the other.

    Args:
        features: (B, C, h, w).
        others: (B, D, h', w') of the same images, resampled bilinearly where the grids differ.

    Returns:
        Pixels (B, 3, h, w) in [-1, 1]; two standard deviations span half the range.
    """
    own, wanted = _components(features), _components(others)
    if wanted.shape[-2:] != own.shape[-2:]:
        wanted = F.interpolate(wanted, size=own.shape[-2:], mode="bilinear", antialias=True)
    product = torch.einsum("b i h w, b j h w -> j i", own.double(), wanted.double())
    left, _, right = torch.linalg.svd(product)
    turned = torch.einsum("j i, b i h w -> b j h w", (left @ right).to(own.dtype), own)
    return turned.clamp(-1, 1)


def parts_in_colours_of(latents: Mapping[str, Tensor], others: Tensor) -> dict[str, Tensor]:
    """Each spatial part of latents by its name, in colours that compare with other features' of the same images.

    Args:
        latents: parts (B, C, h, w); a part without places, as the global one (B, C), has no picture.
        others: see ``components_in_colours_of``.

    Returns:
        Pixels (B, 3, h, w) in [-1, 1].
    """
    return {part: components_in_colours_of(x, others) for part, x in latents.items() if x.ndim == 4}


def _components(features: Tensor, of: Tensor | None = None) -> Tensor:
    """(B, 3, h, w) with mean 0 and standard deviation 1/2 over all positions of ``of``; 0 where there are fewer."""
    source = rearrange((features if of is None else of).float(), "b c h w -> (b h w) c")
    mean = source.mean(dim=0)
    flat = source - mean
    _, strengths, directions = torch.linalg.svd(flat, full_matrices=False)
    # Directions that only rounding errors span would be scaled up to noise.
    size = strengths[0] + flat.numel() ** 0.5 * source.abs().max()
    rounding = 4 * torch.finfo(flat.dtype).eps * size
    directions = (directions * (strengths > rounding)[:, None])[:3]
    # A direction's sign is arbitrary; fixing it keeps colours alike from one picture to the next.
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    spread = (flat @ directions.T).square().sum(dim=0).div(max(1, len(flat) - 1)).sqrt()
    centred = features.float() - mean[:, None, None]
    components = torch.einsum("k c, b c h w -> b k h w", directions, centred)
    components = components / (2 * spread).where(spread > 0, 1)[:, None, None]
    return F.pad(components, (0, 0, 0, 0, 0, 3 - components.shape[1]))
