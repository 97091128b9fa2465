"""Commands as a user launches them: one process each, timed, its memory watched, its output kept."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

import semtok

_TOOLS = Path(__file__).parents[1]
_POLL_SECONDS = 0.05
_LAST_LINES = 15


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        shown: the command line, to be copied.
        code: exit code; negative: the signal that ended it.
        seconds: from start to end.
        peak_bytes: the largest resident memory seen, at readings 50 ms apart.
        last_lines: of what it printed.
    """

    shown: str
    code: int
    seconds: float
    peak_bytes: int
    last_lines: tuple[str, ...]


def command_line(command: str, words: Sequence[str], environment: Mapping[str, str]) -> str:
    """How the command is written in a shell."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, shlex.join(["python", str(_TOOLS / f"{command}.py"), *words])])


def run_command(
    command: str, words: Sequence[str], environment: Mapping[str, str], log: Path
) -> Outcome:
    """Runs ``python tools/COMMAND.py WORDS`` in the current folder and waits for it.

    It is killed where waiting is interrupted.

    Args:
        environment: variables beside this process's.
        log: takes what it prints, both streams.
    """
    package = str(Path(semtok.__file__).parents[1])  # the same, wherever the command starts
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    log.parent.mkdir(parents=True, exist_ok=True)
    start, peak = time.perf_counter(), 0
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(_TOOLS / f"{command}.py"), *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": path} | dict(environment),
        )
        try:
            while process.poll() is None:
                peak = max(peak, _resident_bytes(process.pid))
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    seconds = time.perf_counter() - start
    lines = [x.rstrip() for x in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = tuple([line for line in lines if line][-_LAST_LINES:])
    shown = command_line(command, words, environment)
    return Outcome(shown, process.returncode, seconds, peak, last)


def _resident_bytes(number: int) -> int:
    try:
        return psutil.Process(number).memory_info().rss
    except psutil.NoSuchProcess:  # it has just ended
        return 0
