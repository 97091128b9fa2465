"""Runs commands as processes, as many at a time as the machine bears, each after those it needs."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from semtok.errors import UserError

_POLL_SECONDS = 0.2
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
    """

    name: str
    command: Callable[[], Sequence[str]]
    is_done: Callable[[], bool]
    log: Path
    after: tuple[str, ...] = ()


class Stopped(Exception):
    """A signal came; the running jobs were asked to stop and have done so."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


LOCK = ".lock"


@contextlib.contextmanager
def only_one_in(folder: Path) -> Iterator[int]:
    """Keeps others from working in a folder, made if need be, at the same time; gives a descriptor that
    holds it.

    Processes that inherit the descriptor hold the folder too, so that jobs whose parent was killed are not joined
    by the same ones again.

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
    at_once: int,
    held: int,
    environments: Sequence[dict[str, str]],
    say: Callable[[str], object] = print,
) -> None:
    """Runs what is not done yet.

    Args:
        at_once: processes.
        held: a descriptor that jobs inherit, see ``only_one_in``.
        environments: variables for each of them; one process has the first, the next the second, and so on.
        say: is told what begins and ends.

    Raises:
        UserError: a job failed; those that ran beside it were let finish.
        Stopped: SIGTERM, SIGINT or SIGHUP came.
    """
    waiting = [job for job in jobs if not job.is_done()]
    total, begun = len(waiting), 0
    pending = {job.name for job in waiting}
    running: dict[int, tuple[Job, subprocess.Popen[bytes], float]] = {}
    failed: UserError | None = None
    with _signals() as received, _none_left_behind(running, received):
        while (waiting and failed is None) or running:
            for slot in range(at_once):
                ready = next((j for j in waiting if not pending & set(j.after)), None)
                if slot in running or ready is None or failed is not None:
                    continue
                waiting.remove(ready)
                begun += 1
                say(f"[{begun}/{total}] {ready.name}")
                running[slot] = (
                    ready,
                    _start(ready, environments[slot], held),
                    time.perf_counter(),
                )
            time.sleep(_POLL_SECONDS)
            for slot, (job, process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[slot]
                if process.returncode == 0 and job.is_done():
                    pending.discard(job.name)
                    say(f"        {job.name}: done in {time.perf_counter() - start:.0f} s")
                elif not received:
                    failed = failed or UserError(f"{job.name} failed: {_last_line(job.log)}")
                    say(f"        {job.name}: failed; waiting for what runs beside it")
            if received:
                raise Stopped(received[0])
    if failed is not None:
        raise failed


def _start(job: Job, environment: dict[str, str], held: int) -> "subprocess.Popen[bytes]":
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as log:
        # A session of its own: Ctrl-C reaches it once, from here.
        return subprocess.Popen(
            list(job.command()),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | environment,
            start_new_session=True,
            pass_fds=(held,),
        )


@contextlib.contextmanager
def _none_left_behind(
    running: dict[int, tuple[Job, "subprocess.Popen[bytes]", float]], received: list[int]
) -> Iterator[None]:
    """However this ends, the jobs end with it: trainings write a checkpoint on SIGTERM; a second signal, or
    a minute, kills."""
    try:
        yield
    finally:
        processes = [process for _, process, _ in running.values()]
        for process in processes:
            process.terminate()
        deadline, asked = time.monotonic() + _STOP_SECONDS, len(received)
        while any(process.poll() is None for process in processes):
            if time.monotonic() > deadline or len(received) > asked:
                for process in processes:
                    process.kill()
            time.sleep(_POLL_SECONDS)


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'it said nothing'} (see {log})"


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Gives a list that signals which ask to stop are noted in."""
    received: list[int] = []
    old = {
        number: signal.signal(number, lambda n, _: received.append(n))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
