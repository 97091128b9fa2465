"""Pictures of images, latents and features, for people to look at."""

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torchvision.io import encode_png
from torchvision.utils import make_grid

from semtok.images import to_uint8
from semtok.storage import new_file


def write_png(path: Path, picture: Tensor) -> None:
    """Writes a picture, uint8 (3, H, W), whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_bytes(encode_png(picture).numpy().tobytes())


def rows_of_images(rows: list[Tensor], min_height: int = 96) -> Tensor:
    """A grid with one row per list entry and one column per sample.

    Args:
        rows: pixels (B, 3, h, w) in [-1, 1]; each row is enlarged, without smoothing, to the first one's size.
        min_height: small images are enlarged by a whole factor to at least this many pixels.

    Returns:
        uint8 (3, H, W).
    """
    height, width = rows[0].shape[-2:]
    factor = max(1, -(-min_height // height))
    size = (height * factor, width * factor)
    scaled = [F.interpolate(row.float().cpu(), size=size, mode="nearest") for row in rows]
    return make_grid(to_uint8(torch.cat(scaled)), nrow=len(rows[0]), padding=4, pad_value=255)


def principal_components(features: Tensor, of: Tensor | None = None) -> Tensor:
    """The first three principal components of spatial features, as colours.

    Args:
        features: (B, C, h, w).
        of: (B', C, h', w'), over all of whose positions components are taken; None: the features'
            own. Features of one meaning get the same colours by the same ``of``.

    Returns:
        Pixels (B, 3, h, w) in [-1, 1]; two standard deviations span half the range.
    """
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
    components = F.pad(components, (0, 0, 0, 0, 0, 3 - components.shape[1]))
    return components.clamp(-1, 1)
