"""One start of a command, which ends by itself or is killed at a moment."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import psutil

import semtok
from semtok.unfinished import is_unfinished
from soaking.warm import Forked, Warm

Process = subprocess.Popen[bytes] | Forked

_TOOLS = Path(__file__).parents[1]
_POLL_SECONDS = 0.01
_ORPHAN_SECONDS = 30.0
_AFTER_WRITE_SECONDS = 0.02
_SHARE = 0.6
"""Of the work of a whole run, in which a kill falls: one that goes on has less of it left, so all of it is met."""


class Moment(Enum):
    """When a command is killed."""

    START = "while it starts"
    WORK = "while it works"
    WRITE = "while it writes"


@dataclass(frozen=True)
class Pace:
    """What an uninterrupted run tells of when things happen.

    Attributes:
        start: seconds before it first changed a file.
        work: seconds from then to its end.
        writes: temporary files and folders that were seen.
    """

    start: float
    work: float
    writes: int


@dataclass(frozen=True)
class Kill:
    """One SIGKILL.

    Attributes:
        draw: uniform in [0, 1): the place within the moment.
        whole_group: whether it hits all processes of the command; else its first one, and the others have to end by
            themselves.
    """

    moment: Moment
    draw: float
    whole_group: bool


@dataclass
class Start:
    """What became of a start of a command.

    Attributes:
        killed: the moment of the SIGKILL that has hit it while it lived; None: it ended by itself.
        pace: None where it was killed.
        orphans: processes that went on after it was killed.
    """

    code: int
    killed: Moment | None
    pace: Pace | None
    orphans: int
    output: str


def run_once(
    words: Sequence[str],
    folder: Path,
    log: Path,
    *,
    kill: Kill | None,
    pace: Pace,
    seconds: float,
    warm: Warm | None,
) -> Start:
    """Starts ``python tools/COMMAND.py …`` in a folder and waits for its end.

    Args:
        log: takes what it prints, both streams.
        kill: what ends it, if it has not ended before.
        pace: of an uninterrupted run, by which the moment is found.
        seconds: after which it counts as hanging, and is ended.
        warm: forks it; None: it starts as users start it.
    """
    watch, begun = _Watch(folder), time.monotonic()
    is_due = _due(kill, pace, watch, begun) if kill is not None else lambda: False
    killed, orphans = False, 0
    log.touch()  # a process that is killed at once opens none
    process = _started(words, folder, log, warm)
    try:
        while process.poll() is None and time.monotonic() - begun < seconds:
            watch.look()
            if is_due():
                orphans, killed = _kill(process, kill.whole_group)
                break
            time.sleep(_POLL_SECONDS)
    finally:
        _end(process)
    took = time.monotonic() - begun
    first = (watch.first or begun + took) - begun
    return Start(
        process.returncode,
        kill.moment if kill is not None and killed else None,
        None if killed else Pace(first, took - first, watch.writes),
        orphans,
        log.read_text(encoding="utf-8", errors="replace"),
    )


def _started(words: Sequence[str], folder: Path, log: Path, warm: Warm | None) -> Process:
    own = _environment(folder)
    if warm is not None:
        return Forked(warm, words, folder, log, own)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(_TOOLS / f"{words[0]}.py"), *words[1:]],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | own,
            start_new_session=True,
        )


def draw_kill(chance: random.Random) -> Kill:
    """One of five falls into the start, two into the work, two into a write; one of four spares the other processes."""
    moment = chance.choice([Moment.START, *[Moment.WORK] * 2, *[Moment.WRITE] * 2])
    return Kill(moment, chance.random(), chance.random() < 0.75)


def _due(kill: Kill, pace: Pace, watch: "_Watch", begun: float) -> Callable[[], bool]:
    """Tells, asked again and again, when the moment has come."""
    if kill.moment is Moment.START:
        return lambda: time.monotonic() - begun >= kill.draw * pace.start
    if kill.moment is Moment.WORK:
        after = kill.draw * _SHARE * pace.work
        return lambda: watch.first is not None and time.monotonic() - watch.first >= after
    number = 1 + int(kill.draw * _SHARE * pace.writes)
    after = kill.draw * _AFTER_WRITE_SECONDS  # so that some fall on what follows the writing
    return lambda: watch.writes >= number and time.monotonic() - watch.last >= after


class _Watch:
    """Sees what changes below a folder.

    Attributes:
        first: time of the first change; None: there was none yet.
        last: time at which a temporary file was last seen to be new.
        writes: temporary files and folders that were seen.
    """

    first: float | None

    def __init__(self, folder: Path) -> None:
        self.folder, self.first, self.last, self.writes = folder, None, 0.0, 0
        self._before = self._state()
        self._temporary = set(filter(is_unfinished, self._names()))

    def _names(self) -> set[str]:
        return {name for _, names in self._before for name in names}

    def _state(self) -> set[tuple[str, frozenset[str]]]:
        return {
            (place, frozenset((*names, *files))) for place, names, files in os.walk(self.folder)
        }

    def look(self) -> None:
        """Notes the time of the first change, and temporary files that are new."""
        now = self._state()
        if now == self._before:
            return
        self._before = now
        self.first = self.first or time.monotonic()
        new = set(filter(is_unfinished, self._names())) - self._temporary
        if new:
            self._temporary |= new
            self.writes, self.last = self.writes + len(new), time.monotonic()


def _kill(process: Process, whole_group: bool) -> tuple[int, bool]:
    """The number of processes that outlived it for long, and whether it lived."""
    with contextlib.suppress(psutil.Error):
        others = psutil.Process(process.pid).children(recursive=True)
        if whole_group:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        killed = process.wait() == -signal.SIGKILL
        _, alive = psutil.wait_procs(others, _ORPHAN_SECONDS)
        return len(alive), killed
    return 0, False


def _end(process: Process) -> None:
    """Nothing of the command goes on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """Of all commands: this library, one thread, no host."""
    package = str(Path(semtok.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | one | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _environment(folder: Path) -> dict[str, str]:
    """Of a command in a folder: places for temporary files and for what is kept, beside it."""
    temporary = folder.with_name(f"{folder.name}_tmp")
    temporary.mkdir(exist_ok=True)
    kept = folder.with_name(f"{folder.name}_kept")
    return {"TMPDIR": str(temporary), "SEMTOK_CACHE": str(kept)}
