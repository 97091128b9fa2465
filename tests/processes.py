"""Several processes, as a launcher starts them: nothing of the test process is inherited but its environment.

``launch`` and ``succeed`` start some for one piece of work; ``Ranks`` keeps some for several. They are forks of one
process, which has imported semtok and done nothing else, as importing takes seconds. Strings hash alike in all of
them; processes in which they do not train together in test_launchers. ``forked`` is one of them alone; ``started``
begins with nothing, as a user's process does.
"""

import atexit
import contextlib
import ctypes
import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [f"semtok.commands.{name}" for name in ("train_tokenizer", "train_dit", "sample")]
    # Late imports of theirs.
    + ["diffusers.models.autoencoders.autoencoder_kl", "torchmetrics", "matplotlib.figure"]
)
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
            stack.enter_context(_forked(file, meeting | _place(rank, num), run_python, words))
            for rank, file in enumerate(files)
        ]
        deadline = time.monotonic() + seconds
        while any(process.code() is None for process in running):
            if any(process.code() for process in running):
                deadline = min(deadline, time.monotonic() + 20)
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
    return [
        Rank(process.code() or 0, file.read_text(errors="replace"))
        for process, file in zip(running, files, strict=True)
    ]


def succeed(words: Sequence[str], logs: Path, *, num: int = 2, seconds: float = 180) -> list[str]:
    """As ``launch``; every process must end with exit code 0. Returns what they printed."""
    ranks = launch(words, logs, num=num, seconds=seconds)
    assert all(rank.code == 0 for rank in ranks), _shown(ranks)
    return [rank.output for rank in ranks]


@contextlib.contextmanager
def started(words: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """One process, ``python WORDS``, that is killed where it still runs at the end, and waited for. It may import other
    test modules and tools.

    Args:
        log: takes what it prints, both streams.
    """
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent / "tools"), *sys.path[1:]]
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-ISc", _BOUND, str(os.getpid()), sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | own,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Fork:
    """A process that was forked."""

    def __init__(self, call: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._process = _FORKS.Process(target=call, args=arguments)
        self._code: int | None = None
        self._process.start()
        self.pid = self._process.pid

    def code(self) -> int | None:
        """Its exit code; None: it runs."""
        if self._code is None:
            self._code = self._process.exitcode
        return self._code

    def wait(self, seconds: float) -> int | None:
        """Its exit code; None: it still runs after that time."""
        self._process.join(seconds)
        return self.code()

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.code()
        self._process.close()


def forked(words: Sequence[str], log: Path) -> contextlib.AbstractContextManager[Fork]:
    """As ``started``, but by a fork."""
    return _forked(log, {}, run_python, words)


@contextlib.contextmanager
def _forked(
    log: Path, environment: dict[str, str], call: Callable[..., None], *arguments: Any
) -> Iterator[Fork]:
    """A process that calls a function of this module, and is killed where it still runs at the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    process = Fork(_begin, (log, os.environ | environment, call, arguments))
    try:
        yield process
    finally:
        process.end()


def _begin(
    log: Path, environment: dict[str, str], call: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """In a forked process: makes it like one that was started with this environment, and ends it as one ends."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(1, 9)  # as in _BOUND
    # Its parent ends when nothing holds this any more: with the test process.
    os.close(forkserver._forkserver._forkserver_alive_fd)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # found anew, by the environment
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        call(*arguments)
    finally:
        atexit._run_exitfuncs()  # which forks leave out


def run_python(words: Sequence[str]) -> None:
    """``python WORDS``, in this process."""
    match words:
        case ["-m", module, *rest]:
            sys.argv = [module, *rest]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", source, *rest]:
            sys.argv = ["-c", *rest]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(source, main.__dict__)
        case [script, *rest]:
            sys.argv = [script, *rest]
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")


class Ranks:
    """Gloo processes that wait for work, so that several tests share them.

    They start with the first work, and anew after one failed.
    """

    def __init__(self, logs: Path, num: int = 2) -> None:
        self.logs, self.num = logs, num
        self._stack = contextlib.ExitStack()
        self._running: list[Fork] = []
        self._orders: list[Connection] = []
        self._works = 0

    def command(self, name: str, words: Sequence[str]) -> list[str]:
        """Runs ``semtok NAME WORDS`` in each; as ``run``."""
        return self.run("processes:run_command", name, list(words))

    def run(self, work: str, *arguments: Any, seconds: float = 180) -> list[str]:
        """Calls a function in each, with this process's environment as it is now.

        What fails or takes longer than ``seconds`` in one process ends all of them, and fails.

        Args:
            work: ``module:function``; to fail, it raises.
            arguments: what can be pickled.

        Returns:
            what each printed.
        """
        if any(process.code() is not None for process in self._running):
            self.close()
        if not self._running:
            self._start()
        self._works += 1
        logs = [self.logs / f"rank{rank}.log" for rank in range(self.num)]
        before = [log.stat().st_size for log in logs]
        done = [self.logs / f"done.{self._works}.{rank}" for rank in range(self.num)]
        with _meeting_point(self.num) as meeting:
            for rank, orders in enumerate(self._orders):
                environment = os.environ | meeting | _place(rank, self.num)
                orders.send((work, arguments, environment, done[rank]))
            deadline = time.monotonic() + seconds
            while (
                waiting := not all(file.exists() for file in done)
            ) and time.monotonic() < deadline:
                if any(process.code() is not None for process in self._running):
                    break
                time.sleep(_POLL_SECONDS)
        ended = list(self._running)
        if waiting:
            self.close()
        outputs = [
            log.read_bytes()[start:].decode(errors="replace")
            for log, start in zip(logs, before, strict=True)
        ]
        ranks = [Rank(p.code() or 0, o) for p, o in zip(ended, outputs, strict=True)]
        assert not waiting, f"{work} did not end everywhere\n{_shown(ranks)}"
        return outputs

    def _start(self) -> None:
        for rank in range(self.num):
            ours, theirs = _FORKS.Pipe()
            self._orders.append(self._stack.enter_context(ours))
            log = self.logs / f"rank{rank}.log"
            with theirs:
                self._running.append(self._stack.enter_context(_forked(log, {}, serve, theirs)))

    def close(self) -> None:
        """Ends the processes."""
        self._running, self._orders = [], []
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


def serve(orders: Connection) -> None:
    """Does the work that comes, until no more can come."""
    while True:
        try:
            work, arguments, environment, done = orders.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        module, name = work.split(":")
        getattr(importlib.import_module(module), name)(*arguments)
        _forget_processes()
        sys.stdout.flush()
        done.touch()


def _forget_processes() -> None:
    """Leaves the group of processes, so that the next work makes one."""
    if "torch" in sys.modules:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
