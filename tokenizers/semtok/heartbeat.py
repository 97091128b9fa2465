"""Every process of a run says that it lives, and where one does no more, the others end with its name.

Collectives alone don't tell: over NCCL a process waits for a dead one until a time limit of hours, and gloo names an
address. So a thread of each process writes a number at the store where the processes have met, every two seconds, and
looks at the number of the next process and for a verdict. That is three small requests each time, whatever the number
of processes. It runs beside training and asks for no device.

Under torchrun and accelerate launch the launcher ends the others itself. Under SLURM nobody else does.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore

from semtok.errors import UserError

INTERVAL = 2.0
"""Seconds between two beats."""
DEAD_AFTER = 300.0
"""Seconds without one after which a process counts as dead. A shared disk that hangs may silence a process for minutes:
where a library is loaded from it, or a mapped file read, no thread of Python's goes on."""
SUSPECTED_AFTER = 8.0
"""The same where a collective has just failed, so that one of the processes must be dead."""
GRACE = 15.0
"""Seconds that a process has to end by itself before its thread ends it: it may wait for the dead one."""
ENDED = 2
"""The exit code then."""
_LEFT, _FINISHED = "left", "finished"


@dataclass
class Place:
    """How far this process is, for the others to compare: all of them pass the same marks in the same order."""

    marks: int = 0
    step: int = 0
    own_works: int = 0
    heard: str | None = None


_place = Place()
_beats: "_Beats | None" = None
_joins = 0


def mark(step: int | None = None) -> None:
    """This process has come to where all of them come: an exchange, or a part of a step."""
    _place.marks += 1
    if step is not None:
        _place.step = step


@contextlib.contextmanager
def own_work() -> Iterator[None]:
    """Within this context nothing waits for another process, so it is not ended where one is dead."""
    _place.own_works += 1
    try:
        yield
    finally:
        _place.own_works -= 1


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Within this context this process waits for others."""
    before, _place.own_works = _place.own_works, 0
    try:
        yield
    finally:
        _place.own_works = before


def dead() -> str | None:
    """After a collective has failed: which process has died, in a few words; None: nobody, or nobody knows."""
    return _beats.ask() if _beats is not None else _place.heard


def is_of_transport(error: BaseException) -> bool:
    """Whether a collective failed by what carries it, as where another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        word in text for word in ("gloo", "Connection closed by peer", "Connection reset by peer")
    )


def begin(patience: timedelta) -> bool:
    """From now on this process lives, and hears of those that don't. Where it is alone or does so already: nothing.

    Where one is dead, or has stood still for ``patience`` while others waited, each of the others gets ``GRACE``
    seconds to end by an error of its own; then it prints one line and ends with code ``ENDED``.

    Returns:
        whether ``end`` has to be called.
    """
    global _beats, _joins
    met = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    is_alone = not dist.is_initialized() or dist.get_world_size() == 1
    if is_alone or _beats is not None or None in met:
        return False
    _joins += 1
    _place.heard = None
    prefix = f"semtok/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{_joins}/"
    options = {"is_master": False, "wait_for_workers": False, "timeout": timedelta(seconds=20)}
    try:
        store = TCPStore(met[0], int(met[1]), **options)
    except RuntimeError as error:
        raise UserError(
            f"MASTER_ADDR, MASTER_PORT: processes have met, and no store answers at {':'.join(met)} ({error})"
        ) from None
    _beats = _Beats(store, prefix, dist.get_rank(), dist.get_world_size(), patience, _place)
    _beats.start()
    return True


def end(failure: str | None = None) -> None:
    """This process ends in order, or by what the others don't know of.

    Args:
        failure: what that was, in a line.
    """
    global _beats
    ended, _beats = _beats, None
    assert ended is not None, "see begin"
    ended.end(failure)


@dataclass
class _Seen:
    """What was last read of another process, and for how long."""

    value: str = ""
    seconds: float = 0.0
    looked: float = field(default_factory=time.monotonic)

    def look(self, value: str) -> float:
        """Notes what is read now. For how many seconds it has been that, as seen by this process: what it has slept
        through itself counts for little, as where a cluster suspends all processes."""
        now = time.monotonic()
        passed, self.looked = now - self.looked, now
        self.seconds = self.seconds + min(passed, 2 * INTERVAL) if value == self.value else 0.0
        self.value = value
        return self.seconds


class _Beats(threading.Thread):
    """The thread of a process, and all that is asked of it. It alone uses the store, until it is over."""

    def __init__(
        self,
        store: TCPStore,
        prefix: str,
        rank: int,
        num: int,
        patience: timedelta,
        place: Place,
    ) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self.store, self.rank, self.num, self.patience = store, rank, num, patience
        self.place = place
        self._keys = [f"{prefix}{rank}" for rank in range(num)]
        self._verdict = f"{prefix}verdict"
        self._count = 0
        self._is_lost = False  # the store
        self._over, self._asked, self._answered = (threading.Event() for _ in range(3))
        self._suspects: dict[int, str] = {}
        self._next, self._stands = _Seen(), _Seen()

    # Asked by the process --------------------------------------------------------------------

    def ask(self) -> str | None:
        """See ``dead``. It takes up to ``SUSPECTED_AFTER`` seconds."""
        self._asked.set()
        self._answered.wait(SUSPECTED_AFTER + 5 * INTERVAL)
        return self.place.heard

    def end(self, failure: str | None) -> None:
        """See ``end``. The first process waits until the others have heard of it: the store may end with it."""
        self._over.set()
        self.join(60)
        if self._is_lost:
            return
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if failure is not None and self.place.heard is None:
                self._say(f"process {self.rank} of {self.num} has ended: {failure}")
            self.store.set(self._keys[self.rank], _LEFT)
            if self.rank == 0:
                self._say(_FINISHED)
                self._wait_for_others()

    def _wait_for_others(self) -> None:
        until = time.monotonic() + 3 * INTERVAL
        while time.monotonic() < until:
            if self.store.check(self._keys) and all(
                value.decode() == _LEFT for value in self.store.multi_get(self._keys)
            ):
                return
            time.sleep(0.02)

    def _say(self, verdict: str) -> str:
        """The verdict is what was said first."""
        return self.store.compare_set(self._verdict, "", verdict).decode()

    # The thread ------------------------------------------------------------------------------

    def run(self) -> None:
        heard = None
        try:
            while heard is None:
                self._count += 1
                own = f"{self._count} {self.place.marks} {self.place.step}"
                self.store.set(self._keys[self.rank], own)
                heard = self._listen()
                if heard is None and self._over.wait(INTERVAL):
                    return
        except RuntimeError:  # the store has gone with the process or the launcher that had it
            self._is_lost = True
            heard = f"process 0 of {self.num} has ended, or the launcher of its machine"
        if heard != _FINISHED:
            self.place.heard = heard
            self._answered.set()
            self._end_process(heard)

    def _listen(self) -> str | None:
        """What there is to be heard: a verdict, which this thread may find itself."""
        if self.store.check([self._verdict]):
            return self.store.get(self._verdict).decode()
        found = self._look_at_next()
        if found is None and self._asked.is_set():
            found = self._look_at_all()
        return self._say(found) if found is not None else None

    def _look_at_next(self) -> str | None:
        index = (self.rank + 1) % self.num
        value = self._read(index)
        if value == _LEFT:
            return None
        if self._next.look(value) > DEAD_AFTER:
            return f"process {index} of {self.num} has ended, or its machine"
        _, marks, step = value.split() if value else ("0", "0", "0")
        seconds = self._stands.look(marks)
        if int(marks) < self.place.marks and seconds > self.patience.total_seconds():
            return (
                f"process {index} of {self.num} has fallen behind: the others have waited for it for "
                f"{self.patience.total_seconds() / 60:.3g} minutes, at step {step}"
            )
        return None

    def _look_at_all(self) -> str | None:
        """Some time after it was asked for: those of which nothing was heard since."""
        now = {index: self._read(index) for index in range(self.num) if index != self.rank}
        if not self._suspects:
            self._suspects, self._suspected = now, time.monotonic()
        if time.monotonic() - self._suspected < SUSPECTED_AFTER:
            return None
        silent = [n for n, value in now.items() if value != _LEFT and value == self._suspects[n]]
        self._suspects = {}
        if not silent:
            self._asked.clear()
            self._answered.set()
            return None
        what = f"process {silent[0]}" if len(silent) == 1 else f"processes {_listed(silent)}"
        return f"{what} of {self.num} {'has' if len(silent) == 1 else 'have'} ended"

    def _read(self, index: int) -> str:
        key = self._keys[index]
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _end_process(self, heard: str) -> None:
        """Ends the process where it does not end itself."""
        since = time.monotonic()
        while not self._over.wait(0.1):
            if self.place.own_works:
                since = time.monotonic()
            if time.monotonic() - since > GRACE:
                print(f"error: {heard}; the same command goes on", file=sys.stderr, flush=True)
                sys.stdout.flush()
                os._exit(ENDED)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    return shown + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
