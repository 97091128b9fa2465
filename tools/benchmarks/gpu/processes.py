"""Processes that do one job each; the next one has its imports done when it is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from semtok.storage import read_json

WORKER = (sys.executable, "-m", "benchmarks.gpu.worker")


class Workers:
    """Gives each job a fresh process, which reads it as a line of JSON and writes its result to a file.

    A context, at whose end the process that waits for a job ends too.

    Args:
        command: of such a process.
    """

    def __init__(self, command: tuple[str, ...] = WORKER) -> None:
        self._command = command
        self._next = self._start()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self._next.kill()
        self._next.communicate()

    def _start(self) -> subprocess.Popen[str]:
        paths = os.pathsep.join(path for path in sys.path if path)
        # What a process has printed is seen also where it is stopped.
        changed = {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(
            self._command, stdin=subprocess.PIPE, text=True, env=os.environ | changed
        )

    def do(self, job: dict[str, Any], seconds: float) -> dict[str, Any] | str:
        """What the process wrote, or in a line why it wrote nothing.

        Args:
            job: with ``result``, the file.
            seconds: after which the process is stopped.
        """
        process, self._next = self._next, self._start()
        result = Path(job["result"])
        try:
            process.communicate(json.dumps(job) + "\n", timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            if not result.is_file():  # it may have been about to end
                return f"stopped after {seconds:.0f} s"
        except BaseException:
            process.kill()
            process.wait()
            raise
        if not result.is_file():
            return f"its process ended with exit code {process.returncode} and said nothing"
        return read_json(result)
