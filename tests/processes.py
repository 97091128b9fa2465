"""Several fresh processes, as a launcher starts them: nothing of the test process is inherited but its environment.

``launch`` and ``succeed`` start some for one piece of work; ``Ranks`` keeps some, as starting takes seconds.
"""

import contextlib
import importlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semtok_cli import importing_much

_POLL_SECONDS = 0.02
# Killed by the system when the test process ends, however it does.
_BOUND = (
    "import ctypes, os, sys; libc = ctypes.CDLL(None); hasattr(libc, 'prctl') and libc.prctl(1, 9);"
    "parent, *words = sys.argv[1:]; os.getppid() == int(parent) and os.execv(words[0], words)"
)


@dataclass(frozen=True)
class Rank:
    """What became of one process.

    Attributes:
        code: its exit code; negative: the signal that ended it.
        output: what it printed, both streams.
    """

    code: int
    output: str


def launch(words: Sequence[str], logs: Path, *, num: int = 2, seconds: float = 180) -> list[Rank]:
    """Runs ``python WORDS`` in several gloo processes and waits for them.

    When one fails, the others get 20 seconds to notice it. None outlives ``seconds``, or the test process.

    Args:
        words: for Python: ``["-m", "semtok_cli", "train_dit", …]``, ``["-c", source, …]``, or a script.
        logs: a folder for what they print.
        num: of processes.
    """
    files = [logs / f"rank{rank}.log" for rank in range(num)]
    with contextlib.ExitStack() as stack:
        meeting = stack.enter_context(_meeting_point(num))
        running = [
            stack.enter_context(started(words, file, meeting | _place(rank, num)))
            for rank, file in enumerate(files)
        ]
        deadline = time.monotonic() + seconds
        while any(process.poll() is None for process in running):
            if any(process.poll() for process in running):
                deadline = min(deadline, time.monotonic() + 20)
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
    return [
        Rank(process.returncode, file.read_text(errors="replace"))
        for process, file in zip(running, files, strict=True)
    ]


def succeed(words: Sequence[str], logs: Path, *, num: int = 2, seconds: float = 180) -> list[str]:
    """As ``launch``; every process must end with exit code 0. Returns what they printed."""
    ranks = launch(words, logs, num=num, seconds=seconds)
    assert all(rank.code == 0 for rank in ranks), _shown(ranks)
    return [rank.output for rank in ranks]


@contextlib.contextmanager
def started(
    words: Sequence[str], log: Path, environment: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """One process, ``python WORDS``, that is killed where it still runs at the end, and waited for.

    Args:
        log: takes what it prints, both streams.
        environment: more of it than this process's, and other test modules' and tools' imports.
        options: of ``Popen``.
    """
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent / "tools"), *sys.path[1:]]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-ISc", _BOUND, str(os.getpid()), sys.executable, *words],
            **{"stdin": subprocess.DEVNULL} | options,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own | (environment or {}),
        )
    try:
        yield process
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.kill()
        process.wait()


class Ranks:
    """Fresh gloo processes that wait for work, so that several tests share their start.

    They start with the first work where nobody started them, and anew after one failed.
    """

    def __init__(self, logs: Path, num: int = 2) -> None:
        self.logs, self.num = logs, num
        self._stack = contextlib.ExitStack()
        self._running: list[subprocess.Popen[bytes]] = []
        self._works = 0

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """Runs ``semtok NAME WORDS`` in each; as ``run``."""
        return self.run("processes:run_command", name, list(words))

    def run(
        self, work: str, *arguments: Any, seconds: float = 180, num: int | None = None
    ) -> list[str]:
        """Calls a function in each, with this process's environment as it is now.

        What fails or takes longer than ``seconds`` in one process ends all of them, and fails.

        Args:
            work: ``module:function``; to fail, it raises.
            arguments: as JSON holds them.
            num: how many are at it, and know of no others; None: as many as there always are. For more see ``more``.

        Returns:
            what each printed.
        """
        self.start()
        num = self.num if num is None else num
        assert num <= len(self._running), "see more"
        self._works += 1
        logs = [self.logs / f"rank{rank}.log" for rank in range(num)]
        before = [log.stat().st_size for log in logs]
        done = [self.logs / f"done.{self._works}.{rank}" for rank in range(num)]
        with _meeting_point(num) as meeting:
            for rank, process in enumerate(self._running[:num]):
                environment = os.environ | meeting | _place(rank, num)
                order = [work, arguments, dict(environment), str(done[rank])]
                process.stdin.write(json.dumps(order).encode() + b"\n")
                process.stdin.flush()
            deadline = time.monotonic() + seconds
            while (
                waiting := not all(file.exists() for file in done)
            ) and time.monotonic() < deadline:
                if any(process.poll() is not None for process in self._running):
                    break
                time.sleep(_POLL_SECONDS)
        ended = self._running[:num]
        if waiting:
            self.close()
        outputs = [
            log.read_bytes()[start:].decode(errors="replace")
            for log, start in zip(logs, before, strict=True)
        ]
        ranks = [Rank(p.returncode or 0, o) for p, o in zip(ended, outputs, strict=True)]
        assert not waiting, f"{work} did not end everywhere\n{_shown(ranks)}"
        return outputs

    def start(self) -> None:
        """Starts the processes where they do not run; the first work would."""
        if any(process.poll() is not None for process in self._running):
            self.close()
        if not self._running:
            self._start(range(self.num), self._stack)

    @contextlib.contextmanager
    def more(self, num: int) -> Iterator[None]:
        """Within this context there are so many of them."""
        self.start()
        with contextlib.ExitStack() as stack:
            self._start(range(self.num, num), stack)
            yield
            self._running = self._running[: self.num]

    def _start(self, ranks: Sequence[int], stack: contextlib.ExitStack) -> None:
        ready = [self.logs / f"ready{rank}" for rank in ranks]
        for rank, file in zip(ranks, ready, strict=True):
            file.unlink(missing_ok=True)
            words, log = ["-m", "processes", str(file)], self.logs / f"rank{rank}.log"
            self._running.append(stack.enter_context(started(words, log, stdin=subprocess.PIPE)))
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in ready):  # until then they have another name
            assert time.monotonic() < deadline, "processes did not start"
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        """Ends the processes."""
        self._running = []
        self._stack.close()


def run_command(name: str, words: Sequence[str]) -> None:
    """A command of semtok, in this process."""
    from semtok.commands.cli import run

    code = run(importlib.import_module(f"semtok.commands.{name}").main, words)
    assert code == 0, f"{name} ended with {code}"


def _shown(ranks: Sequence[Rank]) -> str:
    return "\n".join(f"--- rank {i}, exit code {r.code}\n{r.output}" for i, r in enumerate(ranks))


def _place(rank: int, num: int) -> dict[str, str]:
    sizes = {"WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank)} | sizes


@contextlib.contextmanager
def _meeting_point(num: int) -> Iterator[dict[str, str]]:
    """The environment by which processes find each other: at a store of this process, as torchrun has one.

    A port that was free a moment ago could be taken; this one is held.
    """
    from torch.distributed import TCPStore

    # libuv would keep two descriptors.
    options = {"is_master": True, "wait_for_workers": False, "use_libuv": False}
    store = TCPStore("127.0.0.1", 0, num, **options)
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # loopback
    }
    del store


def _serve() -> None:
    """Says that it is there, and does the work that comes line by line, until no more can come."""
    Path(sys.argv[1]).touch()
    for line in sys.stdin:
        work, arguments, environment, done = json.loads(line)
        os.environ.clear()
        os.environ.update(environment)
        module, name = work.split(":")
        with importing_much():
            function = getattr(importlib.import_module(module), name)
        function(*arguments)
        _forget_processes()
        sys.stdout.flush()
        Path(done).touch()


def _forget_processes() -> None:
    """Leaves the group of processes, so that the next work makes one."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)


if __name__ == "__main__":
    _serve()
