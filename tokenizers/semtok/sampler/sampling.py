"""Samplers: from noise to latents along the learned velocity, one clock for all parts."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import einops
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.config import Config
from semtok.sampler.dit import DiT
from semtok.sampler.dormand_prince import DormandPrince
from semtok.sampler.draws import SampleNoise
from semtok.sampler.guidance import Encoded, GuidanceConfig, guided_velocity
from semtok.sampler.latents import Latents
from semtok.sampler.transport import (
    Diffusion,
    PathName,
    Schedule,
    coefficients,
    diffusion_coefficient,
    interpolate,
    scaled_score,
    shift_times,
)

State = dict[str, Tensor]
Clock = float | Tensor
"""A reading for all samples, or one for each of them: (R,), on the CPU."""
Method = Literal["euler", "heun", "heun2", "midpoint", "dopri5", "sde"]
METHODS_OF: Mapping[str, tuple[Method, ...]] = {
    "split_at_borders": ("euler", "heun", "heun2", "midpoint", "dopri5"),
    "end": ("euler", "heun", "heun2", "midpoint", "dopri5"),
    "euler_last_step": ("euler",),
    "state_refresh_rate": ("euler", "sde"),
}
"""Which methods take a setting of ``SamplerConfig`` other than its default, where not all do."""
ErrorOver = Literal["image", "batch"]


class Velocity(Protocol):
    """The velocity of every part."""

    def __call__(
        self, state: State, clock: Clock, decide: Clock, rows: Tensor | None = None, /
    ) -> State:
        """The velocity at a state.

        Args:
            decide: the reading that decides whether guidance is on, and whose turn it is.
            rows: which samples of the batch the state holds (R,), on the CPU; None: all.
        """
        ...


Watch = Callable[[float, State], State | None]
"""Told the clock and the state on the way; a state that it returns is gone on from."""


class SamplerConfig(Config):
    """How samples are drawn."""

    method: Method = "euler"
    """``heun`` is EDM's and REPA's: its last step is Euler's, and guidance is on or off for a whole step.
    ``heun2`` and ``midpoint`` are torchdiffeq's, by which the code of SiT, LightningDiT and SFD goes: every step
    has both evaluations, each guided by its own time. ``dopri5`` chooses its steps. ``sde`` is Euler-Maruyama."""
    steps: int = Field(50, ge=1)
    """Steps of the fixed-step methods, one less than the points of published grids; a lead adds one for each
    border that falls between two."""
    split_at_borders: bool = True
    """Steps end where a part starts or ends. False is how SFD was published (with ``euler``, ``heun2``,
    ``midpoint`` and ``dopri5``): whose turn it is is asked at every evaluation, so that a part moves for more or
    less than its unit of time. ``heun`` asks where a step begins."""
    diffusion: Diffusion = "sigma"
    """Of ``sde``, see ``transport.diffusion_coefficient``: ``sigma`` is SiT's, ``linear`` REPA's. On the linear
    path both are the same."""
    last_step: float = Field(0.04, gt=0, lt=1)
    """Length of ``sde``'s last step, which adds no noise."""
    euler_last_step: float | None = Field(None, gt=0, lt=1)
    """Length of ``euler``'s last step, before the shift (DDT: 0.04); None: as the others."""
    end: float = Field(1.0, gt=0, le=1)
    """Where steps end, before the shift, as a share of the clock; what noise is left then stays (RAE: 0.999)."""
    state_refresh_rate: int = Field(1, ge=1)
    """The blocks before a head are run in every so many steps of ``euler`` or ``sde``; the head alone is run in the
    others, on what they have made last (DDT). 1: in all."""
    shift: float | None = Field(None, gt=0)
    """Moves the fixed steps towards noise, see ``transport.shift_times``; None: as the training times
    were moved."""
    rtol: float = Field(1e-3, gt=0)
    """Relative tolerance of ``dopri5``."""
    atol: float = Field(1e-6, gt=0)
    """Absolute tolerance of ``dopri5``."""
    error_over: ErrorOver = "image"
    """What ``dopri5`` takes a step's error over. ``image``: each goes by its own steps, whatever it shares a batch
    with. ``batch``: all that are drawn in one call share their steps, as torchdiffeq's do, so that an image depends
    on the others; SFD's figures come from batches of 4."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Classifier-free guidance, or guidance away from a weaker model."""

    @field_validator("diffusion", mode="before")
    @classmethod
    def _finite(cls, diffusion: Any) -> Any:
        if isinstance(diffusion, str) and diffusion.lower() == "sbdm":
            raise ValueError(
                "SBDM's is infinite at pure noise, where sampling starts; take sigma, as SiT's figures do"
            )
        return diffusion

    @model_validator(mode="after")
    def _consistent(self) -> "SamplerConfig":
        others = {name for name, methods in METHODS_OF.items() if self.method not in methods}
        if not self.split_at_borders and "split_at_borders" in others:
            raise ValueError(
                "sampler.split_at_borders=false goes with euler, heun, heun2, midpoint and dopri5"
            )
        if self.euler_last_step is not None and ("euler_last_step" in others or self.end != 1):
            raise ValueError(
                "sampler.euler_last_step goes with method: euler and without sampler.end"
            )
        if self.end != 1 and "end" in others:
            raise ValueError("sampler.end: sde ends by a step without noise; leave it out")
        if self.state_refresh_rate > 1:
            if "state_refresh_rate" in others:
                raise ValueError("sampler.state_refresh_rate goes with euler and sde; pass 1")
            if self.guidance.base == "inner_head":
                raise ValueError(
                    "sampler.state_refresh_rate: guidance.base: inner_head is read off the blocks that it leaves out; "
                    "pass null_label, or 1"
                )
        return self

    def check_network(self, network: DiTArchitecture) -> None:
        """Raises ValueError where a network has not what these settings ask for."""
        self.guidance.check_network(network)
        if self.state_refresh_rate > 1 and network.head is None:
            raise ValueError(
                "sampler.state_refresh_rate: the network has no head that could be run alone "
                "(diffusion.network.head); pass 1"
            )


@dataclass(frozen=True)
class Start:
    """Where sampling starts: from noise, or from data with noise added (SDEdit, Meng et al. 2022).

    Attributes:
        noise: per part (B, ...), instead of drawn noise.
        data: latents of the images to start from, per part (B, ...), on the texture's grid.
        strength: with ``data``, the share of the clock that is sampled, in (0, 1]; 1 keeps nothing of them.
    """

    noise: Mapping[str, Tensor] | None = None
    data: Mapping[str, Tensor] | None = None
    strength: float = 1.0

    def to(self, device: torch.device) -> "Start":
        """The same on a device."""
        noise, data = (
            {name: part.to(device) for name, part in parts.items()} if parts is not None else None
            for parts in (self.noise, self.data)
        )
        return Start(noise, data, self.strength)

    def clock(self, schedule: Schedule) -> float:
        """The reading of the clock at which sampling starts."""
        return 0.0 if self.data is None else (1 - self.strength) * schedule.length

    def state(self, drawn: State, schedule: Schedule, path: PathName) -> State:
        """The state to start from: each part on its path between noise and data, at its own time.

        Args:
            drawn: noise, for where none was given.
        """
        noise = drawn if self.noise is None else dict(self.noise)
        if self.data is None:
            return noise
        times = schedule.times_at(self.clock(schedule))
        return {
            name: interpolate(path, self.data[name], part, torch.full((1,), times[name]).to(part))[
                0
            ]
            for name, part in noise.items()
        }


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
    start: "Start | None" = None,
    watch: Watch | None = None,
) -> Latents:
    """Draws latents, spatial parts on the texture's grid.

    Args:
        network: in eval mode.
        labels: int64 (B,), classes, or ``num_classes`` for none.
        grid: (rows, columns) of the texture.
        schedule: which part leads.
        shift: of the training times; ``config.shift`` goes before it.
        weak: the network of autoguidance.
        start: where to start, instead of drawn noise.
        watch: see ``integrate``.
    """
    drawn = {name: noise(shape) for name, shape in network.spec.shapes_on(grid).items()}
    start = start or Start()  # ``sde`` draws on from the same place in all cases
    return integrate(
        velocity_function(
            network,
            labels,
            schedule,
            config.guidance,
            weak=weak,
            state_refresh_rate=config.state_refresh_rate,
        ),
        start.state(drawn, schedule, path),
        config,
        begin=start.clock(schedule),
        schedule=schedule,
        path=path,
        shift=shift if config.shift is None else config.shift,
        noise=noise,
        watch=watch,
    )


def velocity_function(
    network: DiT,
    labels: Tensor,
    schedule: Schedule,
    guidance: GuidanceConfig,
    *,
    weak: DiT | None = None,
    state_refresh_rate: int = 1,
) -> Velocity:
    """The guided velocity of a network for samples with these labels (B,), as samplers call it.

    Args:
        state_refresh_rate: its calls are a sampler's steps, of which every so many run the blocks before a head.
    """
    calls, encoded = itertools.count(), None

    def velocity(state: State, clock: Clock, decide: Clock, rows: Tensor | None = None, /) -> State:
        nonlocal encoded
        own, device = labels if rows is None else labels[rows.to(labels.device)], labels.device
        if isinstance(clock, Tensor):
            each = [schedule.times_at(now) for now in clock.tolist()]
            times = {name: torch.tensor([t[name] for t in each]).to(device) for name in each[0]}
        else:
            times = {
                name: torch.full((len(own),), t, device=device)
                for name, t in schedule.times_at(clock).items()
            }
        readings = decide.tolist() if isinstance(decide, Tensor) else [decide]
        scales = guidance.active_each([schedule.times_at(now) for now in readings])
        if state_refresh_rate > 1:
            if next(calls) % state_refresh_rate == 0:
                encoded = Encoded(state, times)
            else:
                encoded.is_new = False
        return guided_velocity(
            network,
            state,
            times,
            own,
            scales,
            num_channels=guidance.num_channels,
            weak=weak,
            base=guidance.base,
            encoded=encoded,
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
    begin: float = 0.0,
    watch: Watch | None = None,
) -> Latents:
    """Follows a velocity from noise to data. A part moves only between its own start and end.

    Args:
        velocity: see ``Velocity``.
        start: the state at ``begin``, noise per part where that is 0.
        noise: further noise for ``sde``, called with a part's shape without the batch axis.
        begin: the clock's reading at the start; steps before it are left out.
        watch: told the clock and the state at the start and after each step (``dopri5``: after each
            stretch between borders).
    """
    watch = watch or (lambda clock, state: None)
    grid = clock_readings(config, schedule, shift, begin)
    state = watch(begin, start) or start
    if not config.split_at_borders:
        velocity = _in_turn(velocity, schedule)
    for begin, end in zip(grid, grid[1:], strict=False):
        split = config.split_at_borders
        moved = schedule.moved(begin, end) if split else dict.fromkeys(start, True)
        step = Step(begin, end, is_last=end == grid[-1], moved=moved)
        if config.method == "euler":
            state = step.move(state, velocity(state, begin, begin))
        elif config.method == "heun":
            state = _heun(velocity, state, step)
        elif config.method == "heun2":
            state = _heun2(velocity, state, step)
        elif config.method == "midpoint":
            state = _midpoint(velocity, state, step)
        elif config.method == "dopri5":
            state = _dopri5(velocity, state, step, config)
        else:
            assert noise is not None, "sde needs a source of noise"
            times = schedule.times_at(begin)
            state = _euler_maruyama(velocity, state, step, times, path, noise, config.diffusion)
        state = watch(end, state) or state
    return Latents(state)


def _in_turn(velocity: Velocity, schedule: Schedule) -> Velocity:
    """The velocity of the parts whose turn it is, the others' zero."""

    def masked(state: State, clock: Clock, decide: Clock, rows: Tensor | None = None, /) -> State:
        readings = decide.tolist() if isinstance(decide, Tensor) else [decide]
        turns = [schedule.active(now) for now in readings]
        speed = velocity(state, clock, decide, rows)
        for name, part in speed.items():
            own = torch.tensor([turn[name] for turn in turns]).to(part.device)
            speed[name] = torch.where(own.view(-1, *(1,) * (part.ndim - 1)), part, 0.0)
        return speed

    return masked


def clock_readings(
    config: SamplerConfig, schedule: Schedule, shift: float, begin: float = 0.0
) -> list[float]:
    """The times at which ``integrate`` tells its watcher the state, on the clock, from ``begin`` on."""
    split = config.split_at_borders
    if config.method == "dopri5":
        end = schedule.length
        if config.end != 1:
            end *= shift_times(torch.tensor(config.end, dtype=torch.float64), shift).item()
        borders = schedule.borders if split else ()
        grid = [0.0, *(border for border in borders if border < end), end]
    else:
        last_step = config.last_step if config.method == "sde" else config.euler_last_step
        grid = time_grid(
            config.steps, schedule, shift=shift, last_step=last_step, split=split, end=config.end
        )
    return grid if begin == 0 else [begin, *(reading for reading in grid if reading > begin + 1e-9)]


def time_grid(
    steps: int,
    schedule: Schedule,
    *,
    shift: float,
    last_step: float | None,
    split: bool = True,
    end: float = 1.0,
) -> list[float]:
    """Clock readings from 0 to the schedule's length.

    Args:
        steps: intervals, before the schedule's borders split some.
        shift: moves readings towards noise, on the clock as a share of its length.
        last_step: length of the last interval before shifting; None makes it like the others.
        split: add the schedule's borders. Without them the grid is of float32, in which the
            published samplers decide whose turn it is.
        end: the last reading before the shift, as a share of the length; borders after it are none.
    """
    length = schedule.length
    if not split:
        share = torch.linspace(0, end * length, steps + 1, dtype=torch.float32) / length
        if last_step is not None and steps > 1:
            share[:-1] = torch.linspace(0, 1 - last_step / length, steps, dtype=torch.float32)
        return (shift_times(share, shift) * length).tolist()
    share = torch.linspace(0, end, steps + 1, dtype=torch.float64)
    if last_step is not None and steps > 1:
        share[:-1] = torch.linspace(0, 1 - last_step / length, steps, dtype=torch.float64)
    clock = (shift_times(share, shift) * length).tolist()
    borders = [b for b in schedule.borders if all(abs(b - c) > 1e-9 for c in clock)]
    borders = [b for b in borders if b < clock[-1]]
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

    def move(self, state: State, velocity: State, share: float = 1.0) -> State:
        """The state after this step, or a share of it, at constant velocity."""
        length = (self.end - self.begin) * share
        return {
            name: part + length * velocity[name] if self.moved[name] else part
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


def _heun2(velocity: Velocity, state: State, step: Step) -> State:
    """The explicit trapezoidal rule, in the last step too."""
    first = velocity(state, step.begin, step.begin)
    second = velocity(step.move(state, first), step.end, step.end)
    return step.move(state, {name: (first[name] + second[name]) / 2 for name in state})


def _midpoint(velocity: Velocity, state: State, step: Step) -> State:
    """The explicit midpoint rule."""
    middle = step.begin + 0.5 * (step.end - step.begin)
    halfway = step.move(state, velocity(state, step.begin, step.begin), share=0.5)
    return step.move(state, velocity(halfway, middle, middle))


def _euler_maruyama(
    velocity: Velocity,
    state: State,
    step: Step,
    times: dict[str, float],
    path: PathName,
    noise: Callable[[tuple[int, ...]], Tensor],
    form: Diffusion,
) -> State:
    """dx = (v + D score) dt + sqrt(2 D) dw (SiT, eq. 6 with w = 2 D).

    The last step has the same drift and adds no noise, as published.
    """
    drift, spread = velocity(state, step.begin, step.begin), {}
    for name, part in state.items():
        if step.moved[name]:
            t = torch.full((1,), times[name], device=part.device)
            amount = diffusion_coefficient(form, path, t)
            share = amount / coefficients(path, t).sigma  # as the score comes times σ
            drift[name] = drift[name] + share * scaled_score(path, drift[name], part, t)
            spread[name] = (2 * amount * (step.end - step.begin)).sqrt()
    state = step.move(state, drift)
    if step.is_last:
        return state
    return {
        name: part + spread[name] * noise(tuple(part.shape[1:])) if step.moved[name] else part
        for name, part in state.items()
    }


def _dopri5(velocity: Velocity, state: State, step: Step, config: SamplerConfig) -> State:
    """From one border to the next, in steps of the solver's own choice."""
    packed, shapes = einops.pack(list(state.values()), "b *")

    def parts(x: Tensor) -> State:
        return dict(zip(state, einops.unpack(x, shapes, "b *"), strict=True))

    def slope(x: Tensor, clock: Tensor, rows: Tensor) -> Tensor:
        speed = velocity(parts(x), clock, clock, rows)
        moving = [speed[n] if step.moved[n] else torch.zeros_like(speed[n]) for n in state]
        return einops.pack(moving, "b *")[0]

    together = config.error_over == "batch"
    solver = DormandPrince(slope, config.rtol, config.atol, together=together)
    solved = parts(solver.solve(packed, step.begin, step.end))
    # A part that stands still stays as it is; interpolation would round it.
    return {name: solved[name] if step.moved[name] else part for name, part in state.items()}
