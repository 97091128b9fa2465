"""Samplers: from noise to latents along the learned velocity, one clock for all parts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from semtok.sampler.config import Config
from semtok.sampler.dit import DiT
from semtok.sampler.draws import SampleNoise
from semtok.sampler.guidance import GuidanceConfig, guided_velocity
from semtok.sampler.latents import Latents
from semtok.sampler.transport import PathName, Schedule, coefficients, scaled_score, shift_times

State = dict[str, Tensor]
Velocity = Callable[[State, float, float], State]
"""(state, clock, clock that decides whether guidance is on) to the velocity of every part."""
Watch = Callable[[float, State], None]
"""Told the clock and the state on the way."""


class SamplerConfig(Config):
    """How samples are drawn."""

    method: Literal["euler", "heun", "dopri5", "sde"] = "euler"
    """``sde`` is Euler-Maruyama with diffusion coefficient σ(t), as SiT and REPA sample."""
    steps: int = Field(50, ge=1)
    """Steps of the fixed-step methods; a lead adds one for each border that falls between two."""
    split_at_borders: bool = True
    """Steps end where a part starts or ends. False is how SFD was published: a part moves through a whole
    step if it is its turn where the step begins, which gives it more or less than its unit of time."""
    last_step: float = Field(0.04, gt=0, lt=1)
    """Length of ``sde``'s last step, which adds no noise."""
    shift: float | None = Field(None, gt=0)
    """Moves the fixed steps towards noise, see ``transport.shift_times``; None: as the training times
    were moved."""
    rtol: float = Field(1e-3, gt=0)
    atol: float = Field(1e-6, gt=0)
    """Tolerances of ``dopri5``."""
    guidance: GuidanceConfig = GuidanceConfig()

    @model_validator(mode="after")
    def _consistent(self) -> "SamplerConfig":
        if self.method == "sde" and not self.split_at_borders:
            raise ValueError("sampler.split_at_borders=false goes with euler, heun and dopri5")
        return self


@torch.no_grad()
def sample_latents(
    network: DiT,
    noise: SampleNoise,
    labels: Tensor,
    grid: tuple[int, int],
    config: SamplerConfig,
    *,
    schedule: Schedule,
    path: PathName = "linear",
    shift: float = 1.0,
    weak: DiT | None = None,
    start: Mapping[str, Tensor] | None = None,
    watch: Watch | None = None,
) -> Latents:
    """Draws latents, spatial parts on the texture's grid.

    ``dopri5`` chooses its steps by the error of all it is given, so samples go through it one by
    one: otherwise each would depend on its batch.

    Args:
        network: in eval mode.
        labels: int64 (B,), classes, or ``num_classes`` for none.
        grid: (rows, columns) of the texture.
        schedule: which part leads.
        shift: of the training times; ``config.shift`` goes before it.
        weak: the network of autoguidance.
        start: noise per part to start from, instead of drawn noise.
        watch: see ``integrate``.
    """
    drawn = {
        part.name: noise((part.channels, *grid) if part.is_spatial else (part.channels,))
        for part in network.spec.parts
    }
    begin = drawn if start is None else start  # ``sde`` draws on from the same place in both cases

    def draw(rows: slice) -> Latents:
        return integrate(
            velocity_function(network, labels[rows], schedule, config.guidance, weak=weak),
            {name: part[rows] for name, part in begin.items()},
            config,
            schedule=schedule,
            path=path,
            shift=shift if config.shift is None else config.shift,
            noise=noise,
            watch=watch,
        )

    if config.method != "dopri5":
        return draw(slice(None))
    singles = [draw(slice(row, row + 1)) for row in range(len(labels))]
    return Latents({name: torch.cat([single[name] for single in singles]) for name in begin})


def velocity_function(
    network: DiT,
    labels: Tensor,
    schedule: Schedule,
    guidance: GuidanceConfig,
    *,
    weak: DiT | None = None,
) -> Velocity:
    """The guided velocity of a network for samples with these labels (B,), as samplers call it."""

    def velocity(state: State, clock: float, decide: float) -> State:
        device = labels.device
        times = {
            name: torch.full((len(labels),), t, device=device)
            for name, t in schedule.times_at(clock).items()
        }
        scales = guidance.active(schedule.times_at(decide))
        return guided_velocity(
            network, state, times, labels, scales, num_channels=guidance.num_channels, weak=weak
        )

    return velocity


# Integration -------------------------------------------------------------------------------------


def integrate(
    velocity: Velocity,
    start: State,
    config: SamplerConfig,
    *,
    schedule: Schedule,
    path: PathName = "linear",
    shift: float = 1.0,
    noise: Callable[[tuple[int, ...]], Tensor] | None = None,
    watch: Watch | None = None,
) -> Latents:
    """Follows a velocity from noise to data. A part moves only between its own start and end.

    Args:
        velocity: see ``Velocity``.
        start: noise per part.
        noise: further noise for ``sde``, called with a part's shape without the batch axis.
        watch: told the clock and the state at the start and after each step (``dopri5``: after each
            stretch between borders).
    """
    watch = watch or (lambda clock, state: None)
    watch(0.0, start)
    if config.method == "dopri5":
        return Latents(_dopri5(velocity, start, config, schedule, watch))
    grid = clock_readings(config, schedule, shift)
    state = start
    for begin, end in zip(grid, grid[1:], strict=False):
        split = config.split_at_borders
        moved = schedule.moved(begin, end) if split else schedule.active(begin)
        step = Step(begin, end, is_last=end == grid[-1], moved=moved)
        if config.method == "euler":
            state = step.move(state, velocity(state, begin, begin))
        elif config.method == "heun":
            state = _heun(velocity, state, step)
        else:
            assert noise is not None, "sde needs a source of noise"
            state = _euler_maruyama(velocity, state, step, schedule.times_at(begin), path, noise)
        watch(end, state)
    return Latents(state)


def clock_readings(config: SamplerConfig, schedule: Schedule, shift: float) -> list[float]:
    """The times at which ``integrate`` tells its watcher the state, on the clock."""
    split = config.split_at_borders
    if config.method == "dopri5":
        return [0.0, *(schedule.borders if split else ()), schedule.length]
    last_step = config.last_step if config.method == "sde" else None
    return time_grid(config.steps, schedule, shift=shift, last_step=last_step, split=split)


def time_grid(
    steps: int, schedule: Schedule, *, shift: float, last_step: float | None, split: bool = True
) -> list[float]:
    """Clock readings from 0 to the schedule's length.

    Args:
        steps: intervals, before the schedule's borders split some.
        shift: moves readings towards noise, on the clock as a share of its length.
        last_step: length of the last interval before shifting; None makes it like the others.
        split: add the schedule's borders. Without them the grid is of float32, in which the
            published samplers decide whose turn it is.
    """
    if not split:
        clock = torch.linspace(0, schedule.length, steps + 1, dtype=torch.float32)
        return (shift_times(clock / schedule.length, shift) * schedule.length).tolist()
    share = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if last_step is not None and steps > 1:
        share[:-1] = torch.linspace(0, 1 - last_step / schedule.length, steps, dtype=torch.float64)
    clock = (shift_times(share, shift) * schedule.length).tolist()
    borders = [b for b in schedule.borders if all(abs(b - c) > 1e-9 for c in clock)]
    return sorted([*clock, *borders])


@dataclass(frozen=True)
class Step:
    """One interval of the clock.

    Attributes:
        moved: which parts move in it.
    """

    begin: float
    end: float
    is_last: bool
    moved: dict[str, bool]

    def move(self, state: State, velocity: State) -> State:
        """The state after this step at constant velocity."""
        return {
            name: part + (self.end - self.begin) * velocity[name] if self.moved[name] else part
            for name, part in state.items()
        }


def _heun(velocity: Velocity, state: State, step: Step) -> State:
    """Heun's method; the last step is Euler's, as in EDM (Karras et al. 2022) and REPA.

    Guidance is on or off for a whole step, by where it begins.
    """
    first = velocity(state, step.begin, step.begin)
    ahead = step.move(state, first)
    if step.is_last:
        return ahead
    second = velocity(ahead, step.end, step.begin)
    return step.move(state, {name: (first[name] + second[name]) / 2 for name in state})


def _euler_maruyama(
    velocity: Velocity,
    state: State,
    step: Step,
    times: dict[str, float],
    path: PathName,
    noise: Callable[[tuple[int, ...]], Tensor],
) -> State:
    """dx = (v + σ score) dt + sqrt(2 σ) dw (SiT, eq. 6 with w = 2σ); the last step adds no noise."""
    drift, spread = velocity(state, step.begin, step.begin), {}
    for name, part in state.items():
        t = torch.full((1,), times[name], device=part.device)
        drift[name] = drift[name] + scaled_score(path, drift[name], part, t)
        spread[name] = (2 * coefficients(path, t).sigma * (step.end - step.begin)).sqrt()
    state = step.move(state, drift)
    if step.is_last:
        return state
    return {
        name: part + spread[name] * noise(tuple(part.shape[1:])) if step.moved[name] else part
        for name, part in state.items()
    }


def _root_mean_square(parts: tuple[Tensor, ...]) -> Tensor:
    """Over all numbers of all parts, so that the error of a step does not depend on their division."""
    return torch.cat([part.flatten() for part in parts]).square().mean().sqrt()


def _dopri5(
    velocity: Velocity, start: State, config: SamplerConfig, schedule: Schedule, watch: Watch
) -> State:
    """Dormand-Prince 5(4) by torchdiffeq, restarted where a part starts or ends."""
    names, state = list(start), tuple(start.values())
    edges = clock_readings(config, schedule, shift=1.0)
    for begin, end in zip(edges, edges[1:], strict=False):
        stretch = schedule.moved(begin, end) if config.split_at_borders else None

        def slope(
            clock: Tensor,
            parts: tuple[Tensor, ...],
            stretch: dict[str, bool] | None = stretch,
        ) -> tuple[Tensor, ...]:
            now = float(clock)
            moved = stretch if stretch is not None else schedule.active(now)
            speed = velocity(dict(zip(names, parts, strict=True)), now, now)
            return tuple(speed[n] if moved[n] else torch.zeros_like(speed[n]) for n in names)

        # It brings SciPy, which takes a second to import. diffusers takes an import statement in an
        # exported file, wherever it stands, for a requirement of loading it.
        odeint = import_module("torchdiffeq").odeint
        span = torch.tensor([begin, end], device=state[0].device)
        states = odeint(
            slope,
            state,
            span,
            method="dopri5",
            rtol=config.rtol,
            atol=config.atol,
            options={"norm": _root_mean_square},
        )
        # A part that stands still stays as it is; interpolation would round it.
        state = tuple(
            old if stretch is not None and not stretch[name] else part[-1]
            for name, old, part in zip(names, state, states, strict=True)
        )
        watch(end, dict(zip(names, state, strict=True)))
    return dict(zip(names, state, strict=True))
