"""Files as strangers, bad disks and slips make them, and a guard that sees what reading one does."""

import contextlib
import copy
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

SECONDS = 10
"""Of processor time, after which reading one file counts as hanging."""
MEMORY = 6 * 2**30
"""Bytes that reading one file may ask for; a small file that asks for more meets a full memory."""

ODD_TEXTS = (
    "",
    " ",
    "../../x",
    "/etc/passwd",
    "a\nb",
    "\x1b[31m",
    "\u2028",
    "\ud800",
    "\x00",
    "\u202egnp.exe",
    "ｖａｅ",
    "x" * 3000,
    "nan",
    "1e-4",
    "${HOME}",
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 10**9, 2**63, -(2**64), 10**30),
    *(1e308, -0.0, 1e-320, float("nan"), float("inf")),
    *([], {}, [[]], [None], {"a": {}}, {"": 1}, [1, "a", {}], [0] * 40),
    *ODD_TEXTS,
)


class Hung(BaseException):
    """Reading took too long. No ``except Exception`` holds it up."""


class _Watch:
    """What the process does while it is watched: files written, programs started, connections."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.seen: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or "w" in str(mode)
            if writes and isinstance(path, str | bytes):
                self._written(event, path)
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
            self._written(event, arguments[0])
        elif event in ("os.rename", "os.link", "os.symlink"):
            self._written(event, arguments[1])
        elif event in ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork"):
            self.seen.append(f"{event} {arguments!r}")
        elif event in ("socket.connect", "socket.getaddrinfo"):
            self.seen.append(f"{event} {arguments[-1]!r}")

    def _written(self, event: str, path: Any) -> None:
        whole = os.path.abspath(os.fsdecode(path)) if not isinstance(path, int) else ""
        is_own = whole.startswith(f"{self.inside}{os.sep}") or whole == str(self.inside)
        if whole and not is_own and whole != os.devnull and "__pycache__" not in whole:
            self.seen.append(f"{event} {whole}")


_watch = _Watch()
_installed: list[bool] = []


@contextlib.contextmanager
def guarded(inside: Path) -> Iterator[None]:
    """Raises AssertionError where anything is written outside of a folder, a program is started, or a host is asked;
    raises ``Hung`` after ``SECONDS`` of processor time."""
    if not _installed:  # there is no way to take a hook back
        sys.addaudithook(_watch.hook)
        _installed.append(True)

    def hung(number: int, frame: Any) -> None:
        raise Hung(f"more than {SECONDS} s")

    _watch.seen.clear()
    handler = signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    begun, _watch.inside = time.process_time(), inside.resolve()
    try:
        yield
    finally:
        _watch.inside = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    assert not _watch.seen, f"while it was read: {_watch.seen}"
    assert time.process_time() - begun < SECONDS, "one call into a library was too long"


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """No more than ``MEMORY`` can be asked for, so that a bomb is an error here and not the machine's end."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Bytes --------------------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, content: bytes, head: int = 400) -> bytes:
    """Bytes flipped, cut, put in or doubled, as often in the first ``head`` as anywhere."""
    for _ in range(draw(st.integers(1, 3))):
        most = max(0, len(content) - 1)
        place = draw(st.integers(0, min(head, most)) | st.integers(0, most))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "drop", "double"]))
        if how == "cut" or not content:
            content = content[:place]
        elif how == "flip":
            bit = 1 << draw(st.integers(0, 7))
            content = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        elif how == "set":
            new = draw(st.sampled_from([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"9999"]))
            content = content[:place] + new + content[place + 4 :]
        elif how == "insert":
            content = content[:place] + draw(st.binary(min_size=1, max_size=16)) + content[place:]
        else:
            end = place + draw(st.integers(1, 64))
            again = content[place:end] if how == "double" else b""
            content = content[:place] + again * 2 + content[end:]
    return content


# Nested values ------------------------------------------------------------------------------------


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Each container in nested values, with each of its keys."""
    keys = list(content) if isinstance(content, dict) else range(len(content))
    found = [(content, key) for key in keys]
    for key in keys:
        if isinstance(content[key], dict | list):
            found += _places(content[key])
    return found


def values() -> SearchStrategy[Any]:
    """What no setting expects."""
    return st.sampled_from(ODD_VALUES).map(copy.deepcopy) | st.text(max_size=8)


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """Nested values with some taken out, renamed, replaced, nested deeper or exchanged."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(content)
        if not places:
            return content
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "remove", "rename", "nest", "move", "add"]))
        if how == "replace":
            holder[key] = draw(values())
        elif how == "remove":
            del holder[key]
        elif how == "nest":
            holder[key] = draw(st.sampled_from([{key: holder[key]}, [holder[key]], {"x": 1}]))
        elif how == "move":
            other, place = draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other.get(place) if isinstance(other, dict) else None)
        elif isinstance(holder, dict):
            name = draw(st.sampled_from(ODD_TEXTS) | st.text(max_size=6))
            holder[name] = holder.pop(key) if how == "rename" else draw(values())
    return content
