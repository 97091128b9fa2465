"""Commands without the seconds that imports take: a process that has imported the library forks one whenever it is
asked. It has one thread, which alone may fork."""

import importlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_COMMANDS = ("train_tokenizer", "train_dit", "cache_latents", "convert", "sample", "hub")
_SECONDS = 300


class Warm:
    """The process that forks.

    Args:
        environment: its own, beside which commands get variables of theirs.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-m", "soaking.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            cwd=Path(__file__).parents[1],
        )
        self.said(_SECONDS)

    def said(self, seconds: float) -> int | None:
        """The next number that it tells; None: none within the time."""
        if not select.select([self.server.stdout], [], [], seconds)[0]:
            return None
        return int(self.server.stdout.readline())

    def close(self) -> None:
        """Ends it."""
        self.server.kill()
        self.server.wait()
        self.server.stdin.close()
        self.server.stdout.close()


class Forked:
    """A command, as ``subprocess.Popen`` has one: the first of a process group of its own."""

    def __init__(
        self, warm: Warm, words: Sequence[str], folder: Path, log: Path, own: Mapping[str, str]
    ) -> None:
        self._warm, self.returncode = warm, None
        order = [list(words), str(folder), str(log), dict(own)]
        warm.server.stdin.write(json.dumps(order).encode() + b"\n")
        warm.server.stdin.flush()
        self.pid = warm.said(_SECONDS)

    def poll(self) -> int | None:
        """Its exit code, negative: the signal that ended it; None: it lives."""
        return self._ended(0)

    def wait(self) -> int:
        """As ``poll``, at its end."""
        code = self._ended(_SECONDS)
        assert code is not None, f"process {self.pid} does not end"
        return code

    def _ended(self, seconds: float) -> int | None:
        if self.returncode is None:
            self.returncode = self._warm.said(seconds)
        return self.returncode

    def kill(self) -> None:
        """Ends it, and not what it has started."""
        os.kill(self.pid, signal.SIGKILL)


def _serve() -> None:
    """Tells 0 when it is ready, then of each command its number, and its exit code."""
    modules = {name: importlib.import_module(f"semtok.commands.{name}") for name in _COMMANDS}
    from semtok.commands.cli import run

    assert len(os.listdir("/proc/self/task")) == 1, "what has threads can't fork"
    _tell(0)
    for line in iter(sys.stdin.readline, ""):
        words, folder, log, own = json.loads(line)
        number = os.fork()
        if not number:
            _become(folder, log, own)
            sys.exit(run(modules[words[0]].main, words[1:]))
        os.setpgid(number, number)
        _tell(number)
        _tell(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))


def _tell(number: int) -> None:
    print(number, flush=True)


def _become(folder: str, log: str, own: dict[str, str]) -> None:
    """What distinguishes a process from others of the same program."""
    import numpy as np
    import torch

    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.update(own)
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY)):
        os.dup2(
            os.open(path, flags | os.O_CREAT | os.O_TRUNC * (descriptor == 1), 0o644), descriptor
        )
    os.dup2(1, 2)
    tempfile.tempdir = None  # the variable is another one now
    random.seed()
    np.random.seed()
    torch.seed()


if __name__ == "__main__":
    _serve()
