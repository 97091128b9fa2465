"""Dormand-Prince 5(4): a solver that chooses its steps, each sample its own or one for all.

Coefficients of Dormand and Prince (1980), interpolation between steps by Shampine (1986), first step and
control of the others as in Hairer, Nørsett and Wanner, Solving Ordinary Differential Equations I, section
II.4. These are the choices of torchdiffeq's ``dopri5``, which the code of SiT, LightningDiT and SFD calls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Slope = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(states (R, N), clocks (R,), which samples these are (R,)) to the states' derivatives (R, N). Clocks and
numbers of samples are on the CPU."""

_STAGES = (
    (1 / 5, (1 / 5,)),
    (3 / 10, (3 / 40, 9 / 40)),
    (4 / 5, (44 / 45, -56 / 15, 32 / 9)),
    (8 / 9, (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729)),
    (1.0, (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656)),
    (1.0, (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
)
"""Of each further slope: where it is taken, as a share of the step, and the weights of those before it. The
last is taken at the step's end."""
_ERROR = (
    35 / 384 - 1951 / 21600,
    0.0,
    500 / 1113 - 22642 / 50085,
    125 / 192 - 451 / 720,
    -2187 / 6784 + 12231 / 42400,
    11 / 84 - 649 / 6300,
    -1 / 60,
)
_MIDDLE = (
    6025192743 / 60171106304,
    0.0,
    51252292925 / 130801643196,
    -2691868925 / 90256659456,
    187940372067 / 3189068634112,
    -1776094331 / 39487288512,
    11237099 / 470086768,
)
_SAFETY, _LEAST_FACTOR, _MOST_FACTOR, _ORDER = 0.9, 0.2, 10.0, 5


class _Attempt(NamedTuple):
    """A step that was tried.

    Attributes:
        state: at its end, (R, N).
        slopes: of all stages, (R, N, 7); the first at its begin, the last at its end.
        error: over the tolerance, (R,), on the CPU.
    """

    state: Tensor
    slopes: Tensor
    error: Tensor


@dataclass(frozen=True)
class DormandPrince:
    """Solves dx/ds = slope(x, s).

    Attributes:
        rtol, atol: a step's error may be atol + rtol |x|, in the root mean square.
        together: over all samples, which then take the same steps; else over each sample's own numbers.
    """

    slope: Slope
    rtol: float
    atol: float
    together: bool = False

    def solve(self, start: Tensor, begin: float, end: float) -> Tensor:
        """The states (B, N) at ``end`` of those that are ``start`` (B, N) at ``begin``.

        Samples that have arrived drop out. The slope is asked for a little beyond the end, too.

        Raises:
            ValueError: a step shrank to nothing, as where the slope is not finite.
        """
        rows, state, solved = torch.arange(len(start)), start, torch.empty_like(start)
        clock = torch.full((len(start),), begin, dtype=torch.float64)
        slope = self.slope(state, clock, rows)
        step = self._first_step(state, slope, clock, rows)
        while len(rows):
            ahead = clock + step
            if not bool((ahead > clock).all()):
                raise ValueError(
                    f"dopri5's steps shrink to nothing at {clock.min():.4g} on the clock, as where a velocity is "
                    "not finite; another sampler.method takes steps of given size"
                )
            tried = self._attempt(state, slope, clock, step, rows)
            accepted = tried.error <= 1
            arrived = accepted & (ahead >= end)
            if bool(arrived.any()):
                share = ((end - clock) / step)[arrived]
                here = arrived.nonzero().squeeze(1).to(start.device)
                solved[rows[arrived].to(start.device)] = _between(
                    state[here], tried, here, _column(step[arrived], start), _column(share, start)
                )
            taken = _column(accepted, start).bool()
            state = torch.where(taken, tried.state, state)
            slope = torch.where(taken, tried.slopes[..., -1], slope)
            clock = torch.where(accepted, ahead, clock)
            least = torch.where(tried.error < 1, 1.0, _LEAST_FACTOR)
            factor = _SAFETY * tried.error.pow(-1 / _ORDER)
            step = step * torch.maximum(factor, least).clamp(max=_MOST_FACTOR)
            if bool(arrived.any()):
                left = (~arrived).nonzero().squeeze(1)
                rows, clock, step = rows[left], clock[left], step[left]
                state, slope = (x[left.to(start.device)] for x in (state, slope))
        return solved

    def _attempt(
        self, state: Tensor, slope: Tensor, clock: Tensor, step: Tensor, rows: Tensor
    ) -> _Attempt:
        # Times are of the state's precision, as the network is told them.
        begin, length, end = (t.to(state.dtype) for t in (clock, step, clock + step))
        just_before = torch.nextafter(end, begin)  # on this side of a jump at the end
        slopes, point, size = slope.new_empty(*slope.shape, 7), state, _column(step, state)
        slopes[..., 0] = slope
        for stage, (share, weights) in enumerate(_STAGES, start=1):
            point = state + _weighted(slopes[..., :stage], weights, size)
            now = just_before if share == 1 else begin + share * length
            slopes[..., stage] = self.slope(point, now.double(), rows)
        allowed = self.atol + self.rtol * torch.maximum(state.abs(), point.abs())
        error = self._norm(_weighted(slopes, _ERROR, size) / allowed).double()
        return _Attempt(point, slopes, error)

    def _first_step(self, state: Tensor, slope: Tensor, clock: Tensor, rows: Tensor) -> Tensor:
        allowed = self.atol + self.rtol * state.abs()
        size, pace = self._norm(state / allowed), self._norm(slope / allowed)
        tiny = torch.full_like(size, 1e-6)
        guess = torch.where(torch.minimum(size, pace) < 1e-5, tiny, 0.01 * size / pace)
        ahead = self.slope(state + _column(guess, state) * slope, clock + guess, rows)
        bend = self._norm((ahead - slope) / allowed) / guess
        most = torch.maximum(pace, bend)
        other = torch.where(
            most <= 1e-15, torch.maximum(tiny, guess * 1e-3), (0.01 / most).pow(1 / _ORDER)
        )
        return torch.minimum(100 * guess, other).double()

    def _norm(self, x: Tensor) -> Tensor:
        """The root mean square of each row (R,), or of all for each, on the CPU."""
        square = x.square()
        mean = square.mean().expand(len(x)) if self.together else square.mean(dim=1)
        return mean.sqrt().cpu()


def _between(state: Tensor, tried: _Attempt, here: Tensor, size: Tensor, share: Tensor) -> Tensor:
    """States (R, N) within a step, by the quartic through its ends, their slopes and its middle.

    Args:
        state: where the step begins.
        here: rows of what was tried that these are.
        size: of the step, (R, 1).
        share: of the step, (R, 1).
    """
    slopes, end = tried.slopes[here], tried.state[here]
    middle = state + _weighted(slopes, _MIDDLE, size)
    first, last = size * slopes[..., 0], size * slopes[..., -1]
    fourth = 2 * (last - first) - 8 * (end + state) + 16 * middle
    third = 5 * first - 3 * last + 18 * state + 14 * end - 32 * middle
    second = last - 4 * first - 11 * state - 5 * end + 16 * middle
    return state + share * (first + share * (second + share * (third + share * fourth)))


def _weighted(slopes: Tensor, weights: tuple[float, ...], size: Tensor) -> Tensor:
    """Slopes (R, N, n) times n weights and the step's size (R, 1), summed."""
    return (slopes * (slopes.new_tensor(weights) * size).unsqueeze(1)).sum(dim=-1)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Numbers on the CPU (R,) as a column (R, 1) of another tensor's type and device."""
    return values.to(like.device, like.dtype).unsqueeze(1)
