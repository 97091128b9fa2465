"""How far something long is: on a terminal one line that is rewritten, elsewhere now and then a line of its own.

What takes less than five seconds says nothing. Of the processes that a launcher started the first alone tells.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import torch.distributed as dist
from tqdm import tqdm

from semtok.errors import printable

QUIET_SECONDS = 5
LINE_SECONDS = 30
_UNITS_OF_TIME = ((1, "s"), (60, "min"), (3600, "h"))

Advance = Callable[[int], object]
"""Told the number of units that were done since the last call."""


def duration(seconds: float) -> str:
    """``01:30``, ``1:02:03``, ``49:00:00``: a day has no word of its own."""
    return tqdm.format_interval(max(0.0, seconds))


def rate(count: float, seconds: float, unit: str) -> str:
    """``31 images/s``; in minutes or hours where it is slower than one a second or minute.

    Args:
        unit: in the plural.
    """
    per_second = count / seconds if seconds > 0 else 0.0
    length, name = next((u for u in _UNITS_OF_TIME if per_second * u[0] >= 1), _UNITS_OF_TIME[-1])
    value = per_second * length
    return f"{value:,.0f} {unit}/{name}" if value >= 10 else f"{value:.2g} {unit}/{name}"


def is_first() -> bool:
    """Whether this is the process that speaks for all, also where a launcher's processes have not met yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def announce(message: str) -> None:
    """Prints what is about to take long, in the first process."""
    if is_first():
        print(printable(message), flush=True)


class ProgressLines:
    """Lines for a log: the first after five seconds, then one every thirty, and one at the end.

    A line comes with what is reported, never by itself: no thread runs beside loader processes that are forked.

    Args:
        what: is done, in a few words.
        total: of units; None: nobody knows yet.
        unit: in the plural.
        first: units that were there before, which tell nothing of the rate.
        clock: in seconds.
    """

    def __init__(
        self,
        what: str,
        total: int | None,
        unit: str = "images",
        *,
        first: int = 0,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], object] = announce,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self._first = self._done = first
        self._clock, self._say = clock, say
        self._start = clock()
        self._next = self._start + QUIET_SECONDS

    def advance(self, count: int) -> None:
        """Notes that so many more units are done, and says so where a line is due."""
        self._done += count
        if self._clock() >= self._next and self._done != self.total:
            self.postpone()
            self._say(self._line())

    def postpone(self) -> None:
        """The next line comes in thirty seconds: something else has just told how far it is."""
        self._next = self._clock() + LINE_SECONDS

    def close(self) -> None:
        """The line of the end."""
        seconds = self._clock() - self._start
        if seconds >= QUIET_SECONDS:
            done = self._done - self._first
            told = rate(done, seconds, self.unit)
            self._say(
                f"{self.what}: {self._done:,} {self.unit}, done in {duration(seconds)} ({told})"
            )

    def _line(self) -> str:
        seconds, done = self._clock() - self._start, self._done - self._first
        told = rate(done, seconds, self.unit)
        if self.total is None:
            return f"{self.what}: {self._done:,} {self.unit} so far, {told}"
        share = self._done / self.total if self.total else 1.0
        left = f"{duration((self.total - self._done) * seconds / done)} left" if done else "…"
        return f"{self.what}: {self._done:,} of {self.total:,} {self.unit} ({share:.0%}), {told}, {left}"


@contextlib.contextmanager
def progress(what: str | None, total: int | None, unit: str = "images") -> Iterator[Advance]:
    """Tells how far something is, with its rate and the time that is left.

    Args:
        what: is done, in a few words; None: nothing is told.
        total: of units, over all processes; None: nobody knows yet.
        unit: in the plural.

    Yields:
        To be called with the number of units that were done, over all processes.
    """
    if what is None or not is_first():
        yield lambda count: None
    elif sys.stderr.isatty():
        with tqdm(
            total=total,
            desc=printable(what),
            unit=f" {unit}",
            delay=QUIET_SECONDS,
            dynamic_ncols=True,
        ) as bar:
            yield bar.update
    else:
        lines = ProgressLines(what, total, unit)
        yield lines.advance
        lines.close()


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Says now and then that something still goes on that has no steps to count.

    A thread tells of it, so no process may be forked meanwhile.

    Args:
        what: is waited for, in a few words.
    """
    if not is_first():
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=tell_of_waiting, args=(what, is_over.wait), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def tell_of_waiting(
    what: str, wait: Callable[[float], bool], say: Callable[[str], object] = announce
) -> None:
    """The lines of ``waiting``: after five seconds, then every thirty.

    Args:
        wait: for so many seconds at most; whether what is waited for is over.
    """
    seconds = pause = QUIET_SECONDS
    while not wait(pause):
        say(f"{what}: {duration(seconds)} so far")
        pause = LINE_SECONDS
        seconds += pause
