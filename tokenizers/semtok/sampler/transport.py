"""Transport between noise and data: paths, the law of time, and parts that lead.

Time runs from t = 0 (noise, x0) to t = 1 (data, x1) everywhere in this library. A path mixes both,
x_t = α(t) x1 + σ(t) x0, and networks predict its velocity, dx_t/dt (SiT, Ma et al. 2024, section 2;
there with the same direction of time).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from semtok.sampler.config import Config
from semtok.sampler.draws import Draws

PathName = Literal["linear", "cosine"]
Times = Mapping[str, Tensor]
"""Per part of the latents its time (B,) in [0, 1]."""


# Paths -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Coefficients:
    """α, σ and their derivatives at given times, of any one shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


def coefficients(path: PathName, t: Tensor) -> Coefficients:
    """A path at times t in [0, 1].

    ``linear``: α = t, σ = 1 - t. ``cosine`` (SiT's GVP, which preserves variance): α = sin(πt/2),
    σ = cos(πt/2).
    """
    if path == "linear":
        one = torch.ones_like(t)
        return Coefficients(t, 1 - t, one, -one)
    angle = t * (math.pi / 2)
    sin, cos = angle.sin(), angle.cos()
    return Coefficients(sin, cos, cos * (math.pi / 2), sin * (-math.pi / 2))


def interpolate(path: PathName, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The point x_t on the path and its velocity, both shaped as ``data``.

    Args:
        data, noise: (B, ...).
        t: (B,).
    """
    c = coefficients(path, _like(t, data))
    return c.alpha * data + c.sigma * noise, c.d_alpha * data + c.d_sigma * noise


def scaled_score(path: PathName, velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """σ(t) times the score ∇ log p_t(x) that a velocity implies (SiT, eq. 9), finite at all times.

    It equals minus the noise that the velocity points back to.

    Args:
        velocity, x: (B, ...).
        t: (B,), or (1,) for all.
    """
    c = coefficients(path, _like(t, x))
    return (c.alpha * velocity - c.d_alpha * x) / (c.d_alpha * c.sigma - c.alpha * c.d_sigma)


Diffusion = Literal["sigma", "linear", "constant", "decreasing", "increasing-decreasing"]
"""Forms of an SDE's diffusion coefficient, see ``diffusion_coefficient``."""


def diffusion_coefficient(form: Diffusion, path: PathName, t: Tensor) -> Tensor:
    """D(t) in dx = (v + D score) dt + sqrt(2 D) dw, which has the same distributions for every D >= 0.

    ``sigma``: σ(t), as SiT's published figures. ``linear``: 1 - t whatever the path, as REPA, REG, REGLUE and
    REPA-E sample; their w is 2 D. ``constant``: 1. ``decreasing``: (1 + cos πt)² / 4.
    ``increasing-decreasing``: sin² πt. All are SiT's, with its norm of 1 (its w is 2 D as well).

    Args:
        t: in [0, 1], of any shape.
    """
    if form == "sigma":
        return coefficients(path, t).sigma
    if form == "linear":
        return 1 - t
    if form == "constant":
        return torch.ones_like(t)
    if form == "decreasing":
        return (1 + (math.pi * t).cos()).square() / 4
    return (math.pi * t).sin().square()


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *(1,) * (x.ndim - 1))


# The law of time ---------------------------------------------------------------------------------

_REFERENCE_DIMENSION = 4096


class TimeConfig(Config):
    """How training times are drawn."""

    law: Literal["uniform", "logit_normal"] = "uniform"
    """Times are drawn uniformly, or as the sigmoid of a normal."""
    mean: float = 0.0
    """Of the normal before the sigmoid, where ``law`` is ``logit_normal``; above 0 is nearer to data."""
    std: float = Field(1.0, gt=0)
    """Of that normal."""
    least: float = Field(0.0, ge=0, lt=1)
    """No time below this is drawn, before the shift: the law is cut off there (RAE: 0.001)."""
    shift: Annotated[float, Field(gt=0)] | Literal["dimension", "spatial_dimension"] = 1.0
    """Moves times towards noise by ``shift_times``, in training and in samplers; ``dimension`` takes
    sqrt(latent dimensions / 4096) (RAE, Zheng et al. 2025, after Esser et al. 2024), ``spatial_dimension`` the same
    of the spatial parts alone (SR-DiT)."""

    def shift_for(self, shapes: Mapping[str, Sequence[int]]) -> float:
        """The shift for latents whose parts have these shapes, spatial ones (C, H, W) on one grid, vectors (D,)."""
        if not isinstance(self.shift, str):
            return self.shift
        counted = [
            math.prod(shape)
            for shape in shapes.values()
            if self.shift == "dimension" or len(shape) == 3
        ]
        return math.sqrt(sum(counted) / _REFERENCE_DIMENSION)

    def draw(self, draws: Draws, shapes: Mapping[str, Sequence[int]]) -> Tensor:
        """Times (B,) in [0, 1] of one micro-batch of latents of these shapes, see ``shift_for``."""
        if self.law == "uniform":
            t = draws.uniform("time")
            t = t if not self.least else self.least + (1 - self.least) * t
        elif not self.least:
            t = (draws.normal("time", ()) * self.std + self.mean).sigmoid()
        else:
            t = self._cut_off(draws.uniform("time"))
        return shift_times(t, self.shift_for(shapes))

    def _cut_off(self, share: Tensor) -> Tensor:
        """Logit-normal times from ``least`` on: those below which this share (B,) of them lies."""
        left_out = NormalDist(self.mean, self.std).cdf(math.log(self.least / (1 - self.least)))
        normal = torch.special.ndtri(left_out + (1 - left_out) * share)
        return (normal * self.std + self.mean).sigmoid().clamp_min(self.least)


def shift_times(t: Tensor, shift: float) -> Tensor:
    """t / (a - (a - 1) t) with a the shift: 1 changes nothing, more stays longer at noise.

    In terms of the noise's time s = 1 - t it is s' = a s / (1 + (a - 1) s), the form of Esser et
    al. 2024 (eq. 23); LightningDiT's ``timestep_shift`` is 1 / a.
    """
    return t if shift == 1 else t / (shift - (shift - 1) * t)


# Parts that lead ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """When each part of the latents is denoised, on one clock s from 0 to ``length``.

    A part with a larger lead starts earlier by the difference: its time is
    clamp(s - start, 0, 1). With equal leads all parts share one time and the clock is that time.
    Semantic-First Diffusion (arXiv 2512.04926, section 3.3) is a lead of 0.3 for the semantics.
    """

    starts: Mapping[str, float]

    @classmethod
    def from_leads(cls, leads: Mapping[str, float]) -> "Schedule":
        """Leads per part, in units of time; only their differences matter."""
        first = max(leads.values())
        return cls({name: first - lead for name, lead in leads.items()})

    @property
    def length(self) -> float:
        """Where the clock ends, at least 1."""
        return 1 + max(self.starts.values())

    @property
    def is_synchronous(self) -> bool:
        return self.length == 1

    @property
    def borders(self) -> tuple[float, ...]:
        """Clock readings, inside the interval, where a part starts or ends."""
        edges = {edge for start in self.starts.values() for edge in (start, start + 1)}
        return tuple(sorted(edge for edge in edges if 0 < edge < self.length))

    def times(self, clock: Tensor) -> dict[str, Tensor]:
        """Each part's time (B,) at clock readings (B,) in [0, length]."""
        if self.is_synchronous:
            return dict.fromkeys(self.starts, clock)
        return {name: (clock - start).clamp(0, 1) for name, start in self.starts.items()}

    def times_at(self, clock: float) -> dict[str, float]:
        """Each part's time at one clock reading; a solver may look beyond the end, with the last parts."""
        return {
            name: max(clock - start, 0.0)
            if start + 1 == self.length
            else min(max(clock - start, 0.0), 1.0)
            for name, start in self.starts.items()
        }

    def moved(self, begin: float, end: float) -> dict[str, bool]:
        """Which parts move between two clock readings that no border separates."""
        middle = (begin + end) / 2
        return {name: start < middle < start + 1 for name, start in self.starts.items()}

    def active(self, clock: float) -> dict[str, bool]:
        """Whose turn it is at one clock reading, both ends included, in float32 as SFD's code decides."""
        now = torch.tensor(clock, dtype=torch.float32)
        return {
            name: bool(now >= start) and bool(now <= start + 1)
            for name, start in self.starts.items()
        }
