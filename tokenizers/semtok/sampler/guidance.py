"""Guidance: what is added to a network's velocity so that samples fit their class better.

Classifier-free guidance (Ho and Salimans 2022) moves away from the prediction without a class;
path-drop guidance (SPRINT, arXiv 2510.21986) from that without a class and without most blocks;
internal guidance (RAEv2, arXiv 2605.18324) from that of a head in the middle of the network;
autoguidance (Karras et al. 2024) from that of a weaker network with the same class. All by a scale
per part and in an interval of time (Kynkäänniemi et al. 2024).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.config import Config, first_changed
from semtok.sampler.dit import DiT
from semtok.sampler.latents import LatentSpec
from semtok.sampler.routing import DENSE, Route
from semtok.sampler.transport import Times

Interval = tuple[float, float]
Base = Literal["null_label", "dropped_path", "inner_head"]
"""What guidance moves away from."""


class GuidanceConfig(Config):
    """How strongly, when, and on which channels."""

    scale: float | dict[str, float] = 1.0
    """w in base + w (conditional - base), for all parts or per part (others 1). 1 is no guidance, and
    costs no second forward. Below 1 is nearer to the base; the published samplers take it for 1."""
    base: Base = "null_label"
    """What samples are moved away from. ``null_label``: the prediction without a class. ``dropped_path``: without a
    class and without the blocks that token routing thins out, which are then not computed. ``inner_head``: the second
    head's prediction with the class, from the same forward pass. A weaker model takes the place of all of them."""
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

    @property
    def guides(self) -> bool:
        """Whether any part is guided at all."""
        scales = self.scale.values() if isinstance(self.scale, dict) else [self.scale]
        return any(scale != 1 for scale in scales)

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

    def check_use(self) -> None:
        """Raises ValueError where settings say how samples are guided, and the scale leaves them without guidance."""
        if self.guides:
            return
        name = first_changed(self, "base", "interval", "num_channels")
        if name is not None:
            raise ValueError(
                f"sampler.guidance.{name}: nothing is guided, as sampler.guidance.scale is 1; pass another scale, "
                "or sampler.guidance={scale: 1}"
            )

    def check_network(self, network: DiTArchitecture) -> None:
        """Raises ValueError where a network has not what ``base`` asks for."""
        if self.base == "dropped_path" and network.split is None:
            raise ValueError(
                "sampler.guidance.base: dropped_path needs a network with token routing (diffusion.routing); pass "
                "null_label"
            )
        if self.base == "inner_head" and network.inner_head is None:
            raise ValueError(
                "sampler.guidance.base: inner_head needs a network with a second head "
                "(diffusion.internal_guidance); pass null_label"
            )


@dataclass
class Encoded:
    """What the blocks before a head have made of one state of the latents, for further steps too.

    Attributes:
        x, times: that state.
        states: for each branch of guidance, as far as it was asked for.
        is_new: whether the step that made it is still going on.
    """

    x: Mapping[str, Tensor]
    times: Times
    states: dict[str, Tensor] = field(default_factory=dict)
    is_new: bool = True

    def of(self, branch: str, network: DiT, labels: Tensor, route: Route) -> Tensor:
        """Of one branch, which a step may be the first to ask for: its interval of guidance begins with it."""
        if branch not in self.states:
            self.states[branch] = network(self.x, self.times, labels, route=route).state
        return self.states[branch]


def guided_velocity(
    network: DiT,
    x: Mapping[str, Tensor],
    times: Times,
    labels: Tensor,
    scales: Mapping[str, float | Tensor],
    *,
    num_channels: int | None = None,
    weak: DiT | None = None,
    base: Base = "null_label",
    encoded: Encoded | None = None,
) -> dict[str, Tensor]:
    """The velocity per part, guided where ``scales`` names it.

    Without scales it is one forward with the labels, bit for bit. Otherwise it is one forward of
    twice the batch, of which half skips most blocks where ``base`` is ``dropped_path``; one forward where it is
    ``inner_head``; or, with ``weak``, one forward of each network.

    Args:
        x: noised latents, (B, ...).
        labels: int64 (B,).
        scales: guidance scale per guided part, for all samples or (B,).
        num_channels, base: see ``GuidanceConfig``.
        weak: guides away from this network instead.
        encoded: what the blocks before a head are not run for again; not with ``inner_head``.
    """
    if not scales:
        return _velocity(network, x, times, labels, encoded=encoded)
    if weak is not None:
        conditional = _velocity(network, x, times, labels, encoded=encoded)
        away = _velocity(weak, x, times, labels, encoded=encoded, branches=("weak",))
    elif base == "inner_head":
        output = network(x, times, labels, inner=True)
        conditional, away = _like_state(output.velocity, x), _like_state(output.inner, x)
    else:
        null = torch.full_like(labels, network.num_classes)
        route = Route(num_skipped=len(labels)) if base == "dropped_path" else DENSE
        twice = (_twice(x), _twice(times), torch.cat([labels, null]))
        both = _velocity(network, *twice, route, encoded, branches=("own", "null"))
        conditional = {name: part.chunk(2)[0] for name, part in both.items()}
        away = {name: part.chunk(2)[1] for name, part in both.items()}
    guided = dict(conditional)
    for name, scale in scales.items():
        if isinstance(scale, Tensor):
            scale = scale.to(away[name]).view(-1, *(1,) * (away[name].ndim - 1))
        guided[name] = torch.lerp(away[name], conditional[name], scale)
        if name == "texture" and num_channels is not None:
            rest = conditional[name][:, num_channels:]
            guided[name] = torch.cat([guided[name][:, :num_channels], rest], dim=1)
    return guided


def _velocity(
    network: DiT,
    x: Mapping[str, Tensor],
    times: Times,
    labels: Tensor,
    route: Route = DENSE,
    encoded: Encoded | None = None,
    branches: tuple[str, ...] = ("own",),
) -> dict[str, Tensor]:
    """Of a batch that is made of one or two branches of guidance."""
    if encoded is None or network.architecture.head is None:
        output = network(x, times, labels, route=route)
    elif encoded.is_new:
        output = network(x, times, labels, route=route)
        encoded.states |= zip(branches, output.state.chunk(len(branches)), strict=True)
    else:
        each = zip(branches, labels.chunk(len(branches)), strict=True)
        states = [encoded.of(branch, network, own, route) for branch, own in each]
        output = network(x, times, labels, state=torch.cat(states))
    return _like_state(output.velocity, x)


def _like_state(velocity: Mapping[str, Tensor], x: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the type of the state, so that a network in half precision does not make the state one."""
    return {name: part.to(x[name].dtype) for name, part in velocity.items()}


def _twice(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()}
