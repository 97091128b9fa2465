"""How long jobs will take, corrected as they end."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass
class TimeLeft:
    """What is left of jobs, by what they were expected to take and what others then took.

    Args:
        expected: seconds of each job that is to run, by its name.
        at_once: jobs that run at a time.
        clock: in seconds.
    """

    expected: Mapping[str, float]
    at_once: int
    clock: Callable[[], float] = time.monotonic
    _begun: dict[str, float] = field(default_factory=dict)
    _taken: dict[str, float] = field(default_factory=dict)

    def begin(self, name: str) -> None:
        """A job begins now."""
        self._begun[name] = self.clock()

    def end(self, name: str) -> float:
        """A job has ended; the seconds that it took."""
        self._taken[name] = self.clock() - self._begun[name]
        return self._taken[name]

    @property
    def num_left(self) -> int:
        """Jobs that run or are to run."""
        return len(self.expected) - len(self._taken)

    def seconds(self) -> float:
        """Until the last ends."""
        expected = sum(self.expected[name] for name in self._taken)
        # Shared with others, or another machine than was thought of: so are the jobs to come.
        factor = sum(self._taken.values()) / expected if expected else 1.0
        left = [self._left_of(name, factor) for name in self.expected if name not in self._taken]
        return max(sum(left) / self.at_once, *left, 0.0) if left else 0.0

    def _left_of(self, name: str, factor: float) -> float:
        since = self.clock() - self._begun[name] if name in self._begun else 0.0
        return max(0.0, self.expected[name] * factor - since)
