"""Runs commands as processes, one at a time in each environment, each after those that it needs."""

import asyncio
import contextlib
import fcntl
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.time_left import TimeLeft
from semtok.errors import UserError
from semtok.progress import duration

LOCK = ".lock"
_STOP_SECONDS = 60


@dataclass(frozen=True)
class Job:
    """A command that leaves a result.

    Attributes:
        name: in a few words, for people.
        command: program and arguments.
        is_done: whether its result is there already.
        log: where its output goes, after what earlier runs of it left.
        after: names of the jobs whose results it reads.
        kind: what it does, for ``estimate``; empty: nothing is known of it.
        of: the name of the recipe or row.
        saves: whether it may write something when it is asked to stop; others are not asked, but killed.
    """

    name: str
    command: Callable[[], Sequence[str]]
    is_done: Callable[[], bool]
    log: Path
    after: tuple[str, ...] = ()
    kind: str = ""
    of: str = ""
    saves: bool = True


class Stopped(Exception):
    """A signal came; the running jobs were asked to stop and have done so."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[int]:
    """Locks a folder, made if need be; gives the lock's descriptor.

    Processes that inherit the descriptor hold the lock too, so that jobs whose parent was killed are not joined
    by the same ones again. (filelock keeps its descriptor to itself.)

    Raises:
        UserError: somebody works there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another comparison, or a job of it, still runs here; wait or stop it"
            ) from None
        yield file.fileno()


def run_jobs(
    jobs: Sequence[Job],
    *,
    held: int,
    environments: Sequence[dict[str, str]],
    say: Callable[[str], object] = print,
    expected: Callable[[Job], float] | None = None,
) -> None:
    """Runs what is not done yet. However this ends, no job goes on running.

    Jobs that are stopped are sent SIGTERM, at which trainings write a checkpoint, and after a minute SIGKILL. Those
    that save nothing are killed at once.

    Args:
        held: a descriptor that jobs inherit, see ``only_one_in``.
        environments: variables; each is of one process at a time, so there are as many processes as these.
        say: is told what begins and ends.
        expected: seconds of a job, by which it is told how long the others will take; None: it is not.

    Raises:
        UserError: a job failed; those that ran beside it were stopped.
        Stopped: SIGTERM, SIGINT or SIGHUP came. A second one kills the jobs.
    """
    waiting = [job for job in jobs if not job.is_done()]
    time_left = None
    if expected is not None:
        time_left = TimeLeft({job.name: expected(job) for job in waiting}, len(environments))
    asyncio.run(_run_all(waiting, held, environments, _Teller(len(waiting), say, time_left)))


class _Teller:
    """Says which job begins and ends, and how long the others will take."""

    def __init__(
        self, num_jobs: int, say: Callable[[str], object], time_left: TimeLeft | None
    ) -> None:
        self._num_jobs, self._say, self._time_left = num_jobs, say, time_left
        self._turns = itertools.count(1)

    def begin(self, job: Job) -> None:
        self._say(f"[{next(self._turns)}/{self._num_jobs}] {job.name}")
        if self._time_left is not None:
            self._time_left.begin(job.name)

    def end(self, job: Job, seconds: float) -> None:
        left = ""
        if self._time_left is not None:
            self._time_left.end(job.name)
            if number := self._time_left.num_left:
                jobs = f"{number} job{'s' if number > 1 else ''}"
                left = f"; {jobs} left, about {duration(self._time_left.seconds())}"
        self._say(f"        {job.name}: done in {duration(seconds)}{left}")


async def _run_all(
    waiting: Sequence[Job],
    held: int,
    environments: Sequence[dict[str, str]],
    teller: _Teller,
) -> None:
    tasks: dict[str, asyncio.Task[None]] = {}
    left, free = list(waiting), list(environments)
    received: list[int] = []
    changed = asyncio.Event()

    async def run(job: Job, environment: dict[str, str]) -> None:
        teller.begin(job)
        start = time.perf_counter()
        await _run(job, environment, held)
        teller.end(job, time.perf_counter() - start)
        free.append(environment)
        left.remove(job)
        changed.set()

    def stop(number: int) -> None:
        received.append(number)
        for task in tasks.values():
            task.cancel()
        changed.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        async with asyncio.TaskGroup() as group:
            while left and not received:
                missing = {job.name for job in left}
                ready = [j for j in left if j.name not in tasks and not missing & set(j.after)]
                for job in ready[
                    : len(free)
                ]:  # the first of all that can begin, so that seeds end one by one
                    tasks[job.name] = group.create_task(run(job, free.pop(0)))
                changed.clear()
                await changed.wait()
    except ExceptionGroup as errors:
        if not received:
            raise errors.exceptions[0] from None
    if received:
        raise Stopped(received[0])


async def _run(job: Job, environment: dict[str, str], held: int) -> None:
    """Raises UserError with the last line of the log where there is no result afterwards."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *job.command(),
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,  # Ctrl-C reaches it once, from here
            pass_fds=(held,),
        )
    try:
        code = await process.wait()
    except asyncio.CancelledError:  # and once more, where that takes too long
        if job.saves:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        raise
    finally:
        if process.returncode is None:
            process.kill()
    if code != 0 or not job.is_done():
        lines = [line.strip() for line in job.log.read_text(errors="replace").splitlines()]
        last = next(filter(None, reversed(lines)), "it said nothing")
        raise UserError(f"{job.name} failed: {last} (see {job.log})")
