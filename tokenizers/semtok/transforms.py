"""Images and latents, scaled and turned alike."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def scaled(x: Tensor, factors: tuple[float, float]) -> Tensor:
    """Maps (B, C, h, w) with h and w times the factors, bilinear without antialiasing; both must come out whole."""
    size = tuple(round(f * n) for f, n in zip(factors, x.shape[-2:], strict=True))
    return x if size == tuple(x.shape[-2:]) else F.interpolate(x, size, mode="bilinear")


def turned(x: Tensor, quarters: int | Tensor) -> Tensor:
    """Maps (B, C, h, w) turned clockwise.

    Args:
        quarters: how many quarter turns, 0 to 3; where it is a tensor (B,), of each map, which is then square or
            turned by 0 and 2 alone.
    """
    if not isinstance(quarters, Tensor):
        return torch.rot90(x, quarters, dims=(-1, -2)) if quarters else x
    result = x
    for number in range(1, 4):
        if x.shape[-1] == x.shape[-2] or number == 2:
            chosen = (quarters == number)[:, None, None, None]
            result = torch.where(chosen, turned(x, number), result)
    return result


def whole_scales(scales: Sequence[float], *sides: int) -> tuple[float, ...]:
    """Those scales that give every one of the sides a whole length of at least 1."""
    return tuple(
        s for s in scales if all(s * n >= 1 and abs(s * n - round(s * n)) < 1e-6 for n in sides)
    )
