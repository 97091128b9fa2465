"""Embeddings of a diffusion transformer: positions, added and rotary, and times. Positions are for any grid."""

import math
from collections.abc import Callable
from functools import lru_cache, partial, wraps
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_FREQUENCIES = 256  # sines and cosines of the time embedding


_Build = TypeVar("_Build", bound=Callable[..., Any])


def _kept(build: _Build) -> _Build:
    """Keeps what is built, per arguments, so that no step builds it anew and copies it to the device.

    Kept are tensors that any later computation can use, whatever mode the first to ask is in.
    """
    keep = lru_cache(maxsize=16)(build)

    @wraps(build)
    def table(*args: Any, **kwargs: Any) -> Any:
        # Compiled code contains the building; tensors of FakeTensorMode and the like are of that mode.
        if torch.compiler.is_compiling() or type(torch.empty(0, device="cpu")) is not Tensor:
            return build(*args, **kwargs)
        with torch.inference_mode(False):
            return keep(*args, **kwargs)

    return table


def _place(device: torch.device | None) -> torch.device | None:
    """Where to build: on the host, for the same bits everywhere; in compiled code, where a copy in each
    step would make the host wait, on the device."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")


@_kept
def sincos_positions(
    grid: tuple[int, int], width: int, *, device: torch.device | None = None
) -> Tensor:
    """Fixed two-dimensional sine-cosine position codes, computed for any grid.

    The first half of the width encodes the column, the second the row; each half is [sin | cos]
    with frequencies 10000^(-k / (width/4)) and integer coordinates from 0, as in MAE (He et al.
    2021) and DiT (Peebles and Xie 2022).

    Args:
        grid: (rows, columns).
        width: a multiple of 4.

    Returns:
        float32 (rows * columns, width), row-major.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    count = partial(torch.arange, dtype=torch.float64, device=_place(device))
    frequency = 10_000 ** (-count(width // 4) / (width / 4))
    row, column = torch.meshgrid(*(count(n) for n in grid), indexing="ij")
    angle = torch.stack([column.flatten(), row.flatten()], dim=1)[:, :, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1).float().to(device)


def positions_on(table: Tensor, of: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Learned position codes (rows * columns, D) of one grid on another, resampled bilinearly."""
    if of == grid:
        return table
    maps = rearrange(table, "(h w) d -> 1 d h w", h=of[0])
    return rearrange(F.interpolate(maps, size=grid, mode="bilinear"), "1 d h w -> (h w) d")


class _TimeMLP(nn.Module):
    """Two layers on features of the time."""

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class TimeEmbedding(_TimeMLP):
    """Sinusoids of the raw time in [0, 1], cosines first, through two layers.

    Args:
        period: see ``time_frequencies``.
    """

    def __init__(self, width: int, period: float = 10_000.0) -> None:
        super().__init__(_FREQUENCIES, width)
        self.period = period

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to (B, width)."""
        angle = t.float()[:, None] * time_frequencies(t.device, self.period)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


class FourierTimeEmbedding(_TimeMLP):
    """Sinusoids of the noise's time 1 - t at learned frequencies, sines first, through two layers (DiT^DH)."""

    def __init__(self, width: int) -> None:
        super().__init__(2 * _FREQUENCIES, width)
        self.frequencies = nn.Parameter(torch.randn(_FREQUENCIES))

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to (B, width)."""
        angle = (2 * math.pi) * (1 - t.float())[:, None] * self.frequencies.float()
        return self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1).to(self.mlp[0].weight.dtype))


@_kept
def time_frequencies(device: torch.device, period: float = 10_000.0) -> Tensor:
    """period^(-k / 128) for k = 0 ... 127, float32."""
    half, place = _FREQUENCIES // 2, _place(device)
    exponent = torch.arange(half, dtype=torch.float32, device=place) / half
    return torch.exp(-torch.full((), period, device=place).log() * exponent).to(device)


@_kept
def rotary_table(
    grid: tuple[int, int],
    head_width: int,
    num_prefix: int,
    device: torch.device,
    span: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of two-dimensional rotary positions (LightningDiT's, after EVA-02).

    The first half of the head turns by the row, the second by the column; neighbours (2i, 2i + 1)
    form a pair. Prefix tokens do not turn.

    Args:
        span: places along each side run from 0 to this; None: from 0 by 1.

    Returns:
        Two float32 tensors (num_prefix + rows * columns, head_width).
    """
    place = _place(device)
    count = partial(torch.arange, dtype=torch.float32, device=place)
    frequency = 10_000 ** (-count(0, head_width // 2, 2) / (head_width // 2))
    sides = [count(n) if span is None else torch.linspace(0, span, n, device=place) for n in grid]
    row, column = torch.meshgrid(*sides, indexing="ij")
    angles = [(p.flatten()[:, None] * frequency).repeat_interleave(2, 1) for p in (row, column)]
    angle = F.pad(torch.cat(angles, dim=1), (0, 0, num_prefix, 0))
    return angle.cos().to(device), angle.sin().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of the last axis: (x0, x1) by 90 degrees is (-x1, x0)."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)
