"""Several fresh processes, as a launcher starts them: nothing of the test process is inherited but its environment."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Rank:
    """What became of one process.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        output: what it printed, both streams.
    """

    code: int
    output: str


def launch(words: Sequence[str], logs: Path, *, num: int = 2, seconds: float = 240) -> list[Rank]:
    """Runs ``python WORDS`` in several gloo processes and waits for them.

    When one fails, the others get 20 seconds to notice it. None outlives ``seconds``.

    Args:
        words: for Python: ``["-m", "semtok_cli", "train_dit", …]``, ``["-c", source, …]``, or a script.
        logs: a folder for what they print.
        num: of processes.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent / "tools"), *sys.path[1:]]
    files = [logs / f"rank{rank}.log" for rank in range(num)]
    started = []
    for rank, file in enumerate(files):
        environment = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(num),
            "LOCAL_WORLD_SIZE": str(num),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        }
        with file.open("wb") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *words],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | environment,
                )
            )
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started):
                deadline = min(deadline, time.monotonic() + 20)
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
        codes = [process.wait() for process in started]
    return [Rank(c, f.read_text(errors="replace")) for c, f in zip(codes, files, strict=True)]


def succeed(words: Sequence[str], logs: Path, *, num: int = 2, seconds: float = 240) -> list[str]:
    """As ``launch``; every process must end with exit code 0. Returns what they printed."""
    ranks = launch(words, logs, num=num, seconds=seconds)
    shown = "\n".join(f"--- rank {i}, exit code {r.code}\n{r.output}" for i, r in enumerate(ranks))
    assert all(rank.code == 0 for rank in ranks), shown
    return [rank.output for rank in ranks]
