"""Pixels: the one range used inside the library, and the ways in and out of it.

Inside, images are float (B, 3, H, W) in [-1, 1], called *pixels*. The public surface also takes
uint8 tensors in [0, 255] and PIL images.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Images = Tensor | Image.Image | Sequence[Image.Image]
Uint8Rule = Literal["round", "truncate"]
"""How pixels become uint8: to the nearest level, or to the next lower one."""


def to_pixels(images: Images, device: torch.device | str | None = None) -> Tensor:
    """Turns what users have into pixels.

    Args:
        images: uint8 (B, 3, H, W) in [0, 255], float (B, 3, H, W) in [-1, 1] (returned as it is),
            one PIL image, or several of one size. A missing batch axis is added.
        device: where the result shall lie; None leaves tensors where they are.

    Returns:
        float (B, 3, H, W) in [-1, 1].

    Raises:
        ValueError: the shape or the kind of number fits none of these.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if isinstance(images, np.ndarray):
        raise ValueError(
            "NumPy arrays have no agreed layout; give PIL images, or a tensor (B, 3, height, width)"
        )
    if not isinstance(images, Tensor):
        arrays = [np.asarray(image.convert("RGB")) for image in images]
        if not arrays:
            raise ValueError("no images given")
        if len({array.shape for array in arrays}) != 1:
            sizes = sorted({f"{a.shape[1]}x{a.shape[0]}" for a in arrays})
            raise ValueError(
                f"images of several sizes ({', '.join(sizes)}) can't be one batch; resize them first"
            )
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images (B, 3, height, width), got {tuple(images.shape)}")
    images = images.to(device) if device is not None else images
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point():
        raise ValueError(
            f"expected uint8 images in [0, 255] or float images in [-1, 1], got {images.dtype}"
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
