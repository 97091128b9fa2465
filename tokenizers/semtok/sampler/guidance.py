"""Guidance: what is added to a network's velocity so that samples fit their class better.

Classifier-free guidance (Ho and Salimans 2022) moves away from the prediction without a class;
autoguidance (Karras et al. 2024) moves away from the prediction of a weaker network with the same
class. Both by a scale per part and in an interval of time (Kynkäänniemi et al. 2024).
"""

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field, field_validator
from torch import Tensor

from semtok.sampler.config import Config
from semtok.sampler.dit import DiT
from semtok.sampler.latents import LatentSpec
from semtok.sampler.transport import Times

Interval = tuple[float, float]


class GuidanceConfig(Config):
    """How strongly, when, and on which channels."""

    scale: float | dict[str, float] = 1.0
    """w in base + w (conditional - base), for all parts or per part (others 1). 1 is no guidance, and
    costs no second forward. Below 1 is nearer to the base; the published samplers take it for 1."""
    interval: Interval | dict[str, Interval] = (0.0, 1.0)
    """Times of the part, from noise 0 to data 1, between which it is guided; both ends belong to it.
    For all parts or per part (others always)."""
    num_channels: int | None = Field(None, ge=1)
    """Guide the first channels of the texture only. SiT's and LightningDiT's published figures come
    from 3; nobody else needs it."""

    @field_validator("interval")
    @classmethod
    def _ordered(cls, interval: Interval | dict[str, Interval]) -> Interval | dict[str, Interval]:
        for begin, end in interval.values() if isinstance(interval, dict) else (interval,):
            if not 0 <= begin <= end <= 1:
                raise ValueError(f"expected 0 <= begin <= end <= 1, got {[begin, end]}")
        return interval

    def scale_of(self, part: str) -> float:
        """The scale of one part."""
        return self.scale.get(part, 1.0) if isinstance(self.scale, dict) else self.scale

    def active(self, times: Mapping[str, float]) -> dict[str, float]:
        """The scales other than 1 of the parts that are guided at these times."""

        def guided(name: str, t: float) -> bool:
            per_part = isinstance(self.interval, dict)
            begin, end = self.interval.get(name, (0.0, 1.0)) if per_part else self.interval
            # Adaptive solvers look a little beyond the end of time.
            return begin <= min(max(t, 0.0), 1.0) <= end

        return {
            name: self.scale_of(name)
            for name, t in times.items()
            if self.scale_of(name) != 1 and guided(name, t)
        }

    def active_each(self, times: Sequence[Mapping[str, float]]) -> dict[str, float | Tensor]:
        """``active`` of several samples: one scale for all, or (R,), 1 where a sample isn't guided."""
        each = [self.active(own) for own in times]
        if all(own == each[0] for own in each):
            return dict(each[0])
        names = dict.fromkeys(name for own in each for name in own)
        return {name: torch.tensor([own.get(name, 1.0) for own in each]) for name in names}

    def check_fits(self, spec: LatentSpec) -> None:
        """Raises ValueError where a part or the number of channels is not one of these latents."""
        for key in ("scale", "interval"):
            value = getattr(self, key)
            unknown = sorted(value.keys() - set(spec.names)) if isinstance(value, dict) else []
            if unknown:
                raise ValueError(
                    f"sampler.guidance.{key}: no part {unknown}; the parts are {', '.join(spec.names)}"
                )
        channels = spec["texture"].channels
        if self.num_channels is not None and self.num_channels > channels:
            raise ValueError(
                f"sampler.guidance.num_channels: the texture has {channels} channels, not {self.num_channels}"
            )


def guided_velocity(
    network: DiT,
    x: Mapping[str, Tensor],
    times: Times,
    labels: Tensor,
    scales: Mapping[str, float | Tensor],
    *,
    num_channels: int | None = None,
    weak: DiT | None = None,
) -> dict[str, Tensor]:
    """The velocity per part, guided where ``scales`` names it.

    Without scales it is one forward with the labels, bit for bit. Otherwise it is one forward of
    twice the batch, or, with ``weak``, one forward of each network.

    Args:
        x: noised latents, (B, ...).
        labels: int64 (B,).
        scales: guidance scale per guided part, for all samples or (B,).
        num_channels: see ``GuidanceConfig``.
        weak: guides away from this network instead of from the null label.
    """
    if not scales:
        return _velocity(network, x, times, labels)
    if weak is not None:
        conditional = _velocity(network, x, times, labels)
        base = _velocity(weak, x, times, labels)
    else:
        null = torch.full_like(labels, network.num_classes)
        both = _velocity(network, _twice(x), _twice(times), torch.cat([labels, null]))
        conditional = {name: part.chunk(2)[0] for name, part in both.items()}
        base = {name: part.chunk(2)[1] for name, part in both.items()}
    guided = dict(conditional)
    for name, scale in scales.items():
        if isinstance(scale, Tensor):
            scale = scale.to(base[name]).view(-1, *(1,) * (base[name].ndim - 1))
        guided[name] = torch.lerp(base[name], conditional[name], scale)
        if name == "texture" and num_channels is not None:
            rest = conditional[name][:, num_channels:]
            guided[name] = torch.cat([guided[name][:, :num_channels], rest], dim=1)
    return guided


def _velocity(
    network: DiT, x: Mapping[str, Tensor], times: Times, labels: Tensor
) -> dict[str, Tensor]:
    """In the type of the state, so that a network in half precision does not make the state one."""
    velocity = network(x, times, labels).velocity
    return {name: part.to(x[name].dtype) for name, part in velocity.items()}


def _twice(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
