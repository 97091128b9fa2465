"""How a run does beside what it learns: jumps of losses and of gradients, and what each process spends its time on.

In a step nothing is read from the device: events and values are kept, and read where the log is written.
"""

import contextlib
import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from semtok import heartbeat

_WATCHED = ("loss/", "grad_norm/")
_HISTORY = 200
"""Steps that say what is usual; a value is judged by those before it."""
_ENOUGH = 50
"""Steps without which nothing is judged."""
_AGAIN = 25
"""Steps after which what is usual is found anew."""
_TIMES, _SPREADS = 3.0, 8.0
"""A jump is to so many times the usual size at least, and so many times the usual spread of its logarithm."""
_WAITS, _SLOW = 0.5, 1.5
"""The share of waiting for data, and the ratio to the median process, that are worth a line."""
_LONG_ENOUGH = 5.0
"""Seconds between two logs without which neither is judged."""
_MOST_LISTED = 64
"""Processes whose figures are listed one by one."""
_MOST_KEPT = 1000
"""Micro-batches whose times are kept where nobody reads them."""


class Jump(NamedTuple):
    """A value far above its usual size."""

    step: int
    value: float
    ratio: float


@dataclass
class _Usual:
    """What is usual of one value: the median and the spread of the logarithm of its size."""

    seen: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    since: int = _AGAIN
    median: float = math.inf
    spread: float = 0.0
    streak: int = 0
    """Jumps in a row until now."""
    told: float = 0.0
    """The ratio of the one among them that was told of."""

    def add(self, size: float) -> None:
        if size > 0:  # what has not begun is zero
            self.seen.append(math.log(size))
            self.since += 1

    def ratio(self, size: float) -> float | None:
        """How many times its usual size a jump is; None: it is none, or too little is known."""
        if len(self.seen) < _ENOUGH or size <= 0:
            return None
        if self.since >= _AGAIN:
            self.since = 0
            self.median = statistics.median(self.seen)
            away = statistics.median(abs(value - self.median) for value in self.seen)
            self.spread = 1.4826 * away  # the standard deviation of a normal distribution
        over = math.log(size) - self.median
        is_jump = over > max(math.log(_TIMES), _SPREADS * self.spread)
        return math.exp(min(over, 700.0)) if is_jump else None


class Jumps:
    """Finds steps at which a loss or the norm of a gradient is far above its usual size.

    Usual is the median of the last 200 steps, where there are 50. A jump is to three times that at least, and eight
    times the spread of its logarithm, a median too, so that what is noisy by nature is not told of.
    """

    def __init__(self) -> None:
        self._usual: dict[str, _Usual] = {}

    def state_dict(self) -> dict[str, Any]:
        return {n: vars(usual) | {"seen": list(usual.seen)} for n, usual in self._usual.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint kept; older ones kept nothing."""
        self._usual = {
            name: _Usual(**{**own, "seen": deque(own["seen"], maxlen=_HISTORY)})
            for name, own in state.items()
        }

    def find(self, steps: dict[int, dict[str, float]]) -> dict[str, Jump]:
        """Of each value that has jumped the worst step.

        Args:
            steps: the values of each step since the last call.
        """
        worst: dict[str, Jump] = {}
        counts: dict[str, int] = {}
        for step, values in sorted(steps.items()):
            for name, value in values.items():
                if not name.startswith(_WATCHED):
                    continue
                usual = self._usual.setdefault(name, _Usual())
                ratio = usual.ratio(abs(value))
                if ratio is None:
                    usual.streak, usual.told = 0, 0.0
                else:
                    usual.streak += 1
                    counts[name] = counts.get(name, 0) + 1
                    known = max(usual.told * _TIMES, worst[name].ratio if name in worst else 0.0)
                    if ratio > known:
                        worst[name] = Jump(step, value, ratio)
                usual.add(abs(value))
        for name, jump in worst.items():
            usual = self._usual[name]
            usual.told = jump.ratio if usual.streak else 0.0
        for name, count in counts.items():
            stays = 2 * count > len(steps) > 1 or self._usual[name].streak >= _AGAIN
            if stays:  # and is usual from now on
                self._usual[name] = _Usual()
        return worst


class StepClock:
    """Where the time of this process goes: seconds of waiting for data, and of computing forward, since last read.

    Forward, no process waits for another one, where each holds whole networks. So this time is its own, which that of
    a whole step is not: all of them step together.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._waited = self._computed = 0.0
        self._events: deque[tuple[Any, Any]] = deque(maxlen=_MOST_KEPT)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Within this context the next images are waited for."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        heartbeat.mark()

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Within this context the process computes by itself."""
        if self._on_device:
            events = tuple(torch.cuda.Event(enable_timing=True) for _ in range(2))
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
        else:
            start = time.perf_counter()
            yield
            self._computed += time.perf_counter() - start
        heartbeat.mark()

    def read(self) -> tuple[float, float]:
        """Both, after the device was waited for; they begin anew."""
        done = [start.elapsed_time(end) / 1000 for start, end in self._events if end.query()]
        waited, computed = self._waited, self._computed + sum(done)
        self._waited = self._computed = 0.0
        self._events.clear()
        return waited, computed


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has had, of the GPU or else of the machine, in GB (10^9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Processes:
    """What processes spend their time on, told of where it is worth a line: twice in a row, and once of each."""

    def __init__(self) -> None:
        self._before: set[tuple[str, int]] = set()
        self._told: set[tuple[str, int]] = set()

    def lines(self, figures: dict[str, list[float]], seconds: float) -> list[str]:
        """
        Args:
            figures: ``data_wait`` as a share, ``own_seconds`` of each process.
            seconds: that they are of.
        """
        if seconds < _LONG_ENOUGH:
            return []
        num = len(figures["data_wait"])
        found: dict[tuple[str, int], str] = {}
        for index, share in enumerate(figures["data_wait"]):
            if share > _WAITS:
                told = f"process {index} of {num}" if num > 1 else "training"
                found["wait", index] = (
                    f"{told} waits for data {share:.0%} of its time; more data.num_workers may help"
                )
        usual = statistics.median(figures["own_seconds"])
        for index, own in enumerate(figures["own_seconds"]):
            if num > 1 and own > _SLOW * usual:
                found["slow", index] = (
                    f"process {index} of {num} takes {own / usual:.1f} times as long as the median process, without "
                    "what it waits for others"
                )
        again = found.keys() & self._before - self._told
        self._before, self._told = set(found), self._told | again
        return [found[key] for key in sorted(again)]


class Health:
    """All of it, of one process of a run.

    Args:
        batch_size: images of a step, over all processes.
        gather: of a tensor (1, N), those of all processes, (processes, N).

    Attributes:
        jumps: what is usual, which a checkpoint keeps.
    """

    def __init__(
        self, device: torch.device, batch_size: int, gather: Callable[[Tensor], Tensor]
    ) -> None:
        self.device, self.batch_size, self._gather = device, batch_size, gather
        self.clock = StepClock(device)
        self.jumps, self._processes = Jumps(), Processes()

    def report(
        self, steps: dict[int, dict[str, float]], *, num_steps: int, seconds: float
    ) -> tuple[dict[str, float], dict[str, Any], list[str]]:
        """What is to be said where the log is written; all processes have to ask.

        Args:
            steps: metrics of each step since the last one, means over processes.
            num_steps, seconds: of training since the last one.

        Returns:
            numbers for the log and the tracker; what the log alone has; lines for people.
        """
        waited, computed = self.clock.read()
        own = [
            *(seconds / num_steps, waited / seconds, computed / num_steps),
            *((waited + computed) / num_steps, peak_memory_gb(self.device)),
        ]
        rows = self._gather(torch.tensor([own], device=self.device)).T.tolist()
        names = ("step_seconds", "data_wait", "forward_seconds", "own_seconds", "memory_gb")
        figures = dict(zip(names, rows, strict=True))
        numbers = {
            "health/step_seconds": statistics.median(figures["step_seconds"]),
            "health/forward_seconds": statistics.median(figures["forward_seconds"]),
            "health/data_wait": max(figures["data_wait"]),
            "health/memory_gb": max(figures["memory_gb"]),
        }
        jumps = self.jumps.find(steps)
        details: dict[str, Any] = {"jumps": {n: list(j) for n, j in jumps.items()}} if jumps else {}
        num = len(rows[0])
        if num > 1:
            slowest = max(range(num), key=figures["own_seconds"].__getitem__)
            numbers["health/forward_seconds_slowest"] = max(figures["forward_seconds"])
            numbers["health/slowest_process"] = slowest
            share = self.batch_size / num
            figures["images_per_second"] = [share / s for s in figures["step_seconds"]]
            if num <= _MOST_LISTED:
                details["processes"] = {n: [_short(v) for v in f] for n, f in figures.items()}
        lines = _lines_of_jumps(jumps) + self._processes.lines(figures, seconds)
        return {name: _short(value) for name, value in numbers.items()}, details, lines


def _lines_of_jumps(jumps: dict[str, Jump]) -> list[str]:
    """A line for each step, of the values that have jumped most there."""
    by_step: dict[int, list[str]] = {}
    for name, jump in sorted(jumps.items(), key=lambda item: -item[1].ratio):
        told = f"{name} {jump.value:.3g} is {jump.ratio:.3g} times its usual size"
        by_step.setdefault(jump.step, []).append(told)
    return [f"step {step}: {', '.join(told[:3])}" for step, told in sorted(by_step.items())]


def _short(value: float) -> float:
    return float(f"{value:.3g}")
