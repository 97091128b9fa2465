"""Files on disk or behind a URL, by fsspec: which there are, their state, and parts of them."""

import functools
import importlib.util
import json
import os
import re
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from semtok.errors import UserError
from semtok.extras import need
from semtok.progress import progress
from semtok.storage import first_line

T = TypeVar("T")
LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What asking again does not change: no such file, or none that may be read."""
_NOT_THERE = (403, 404, 410)
"""What web servers answer for a file that is not there; object stores answer 403 where nobody may list them."""
_WAITS = (1.0, 5.0, 25.0)  # seconds before a disk or a server is asked again


def file_system(place: str) -> Any:
    """The fsspec file system of a path or URL; each process has its own, also a forked one.

    Raises:
        UserError: no such protocol, or what it needs is not installed.
    """
    import fsspec

    _make_forks_safe()
    try:
        return fsspec.core.url_to_fs(place)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"data.path: {place}: {first_line(error)}") from None


@functools.cache
def _make_forks_safe() -> None:
    """From now on, a forked process forgets the connections that it inherits, and closes none of them.

    They are its parent's, and so is the epoll descriptor of fsspec's thread, in which both see the same sockets:
    where a child closes an inherited connection, its parent no longer hears of it and waits for ever.
    """
    os.register_at_fork(before=_hold, after_in_parent=_HELD.clear, after_in_child=_forget)


_HELD: list[Any] = []  # while a process forks
_FORGOTTEN: list[Any] = []  # of parents, for good


def _hold() -> None:
    """Keeps alive what fsspec drops in a child, which would close it."""
    from fsspec import AbstractFileSystem, asyn

    kinds: list[Any] = [AbstractFileSystem]
    for kind in kinds:  # grows meanwhile
        kinds += kind.__subclasses__()
        _HELD.extend(list(kind._cache.values()))
    _HELD.extend((asyn.loop[0], asyn.iothread[0]))


def _forget() -> None:
    _FORGOTTEN.extend(_HELD)
    _HELD.clear()
    for finalizer in list(weakref.finalize._registry):  # they close sessions at a process's end
        about = finalizer.peek()
        if about is not None and any(about[0] is held for held in _FORGOTTEN):
            _FORGOTTEN.append(finalizer.detach())


def reading_errors(place: str) -> tuple[type[Exception], ...]:
    """What reading a path or URL can raise."""
    kind = protocol(place)
    if kind.startswith("http"):
        from aiohttp import ClientError

        return (OSError, ValueError, ClientError)
    if kind == "hf" and importlib.util.find_spec("httpx") is not None:  # of newer huggingface_hub
        from httpx import HTTPError

        return (OSError, ValueError, HTTPError)
    return (OSError, ValueError)


def reason(error: Exception) -> str:
    """A reading error in a few words."""
    if error.__cause__ is not None:  # fsspec takes a server that does not answer for a missing file
        return f"no such file, or no answer ({first_line(error.__cause__)})"
    return "no such file" if isinstance(error, FileNotFoundError) else first_line(error)


def protocol(place: str) -> str:
    """Of a URL; empty for a path."""
    return place.partition("://")[0] if "://" in place else ""


@dataclass(frozen=True)
class StoredFile:
    """A file on disk or behind a URL.

    Attributes:
        place: a path or a URL.
        size: bytes.
        stamp: what its store tells of its version: an ETag, or when it was last changed; empty where it tells nothing.
    """

    place: str
    size: int
    stamp: str

    @property
    def state(self) -> str:
        """What changes when the file does."""
        return f"{self.size} {self.stamp}"


def short_name(place: str) -> str:
    """The last part of a path or URL, without a query, which may hold secrets."""
    return (place.partition("?")[0] if protocol(place) else place).rpartition("/")[2]


def named_files(patterns: Sequence[str], *, key: str) -> list[str]:
    """The files that paths and URLs name, with ``{000..012}``, ``{a,b}``, ``*``, ``[a-z]``, and in paths ``?``.

    Args:
        key: the setting, for messages.

    Returns:
        absolute paths, and URLs; those without ``*`` or ``[a-z]`` need not exist.

    Raises:
        UserError: no file is named, one is named twice, or a pattern fits none.
    """
    from braceexpand import UnbalancedBracesError, braceexpand

    places: list[str] = []
    for pattern in patterns:
        try:
            named = list(braceexpand(pattern))
        except UnbalancedBracesError:
            raise UserError(f"{key}: '{pattern}': a brace has no partner") from None
        for name in named:
            magic = r"[*[]" if protocol(name) else r"[*?[]"  # in a URL, ? begins the query
            found = _matching(name, key) if re.search(magic, name) else [name]
            places += [place if protocol(place) else os.path.abspath(place) for place in found]
    if not places:
        raise UserError(f"{key}: names no file; give {key}=…")
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise UserError(f"{key}: '{twice}' is named twice; name each file once")
    return places


def _matching(pattern: str, key: str) -> list[str]:
    system = file_system(pattern)
    try:
        found = sorted(system.unstrip_protocol(path) for path in system.glob(pattern))
    except reading_errors(pattern) as error:
        raise UserError(f"{key}: '{pattern}': {reason(error)}") from None
    if not found:
        raise UserError(f"{key}: no file is named like '{pattern}'")
    return [place.removeprefix("file://") for place in found]


def stored_files(places: Sequence[str], *, key: str, kind: str) -> list[StoredFile]:
    """Looks files up; servers are asked for many at once.

    Args:
        key: the setting, for messages.
        kind: what files are expected, and their ending, for messages: ``tar``.

    Raises:
        UserError: one is missing, is a folder, or its size is not told.
    """

    def look_up(place: str) -> StoredFile:
        system = file_system(place)
        try:
            about = system.info(place)
        except reading_errors(place) as error:
            raise UserError(f"{key}: '{place}': {reason(error)}") from None
        if about["type"] != "file":
            raise UserError(
                f"{key}: '{place}' is a folder; name {kind} files, such as '{place}/*.{kind.lower()}'"
            )
        if about["size"] is None:
            raise UserError(
                f"{key}: '{place}': its server does not tell its size; download it first"
            )
        stamps = (about.get(name) for name in ("ETag", "Last-Modified", "LastModified", "mtime"))
        return StoredFile(place, about["size"], str(next(filter(None, stamps), "")))

    found = []
    with (
        progress(f"looking up {kind} files", len(places), "files") as advance,
        ThreadPoolExecutor(16) as pool,
    ):
        for file in pool.map(look_up, places):
            found.append(file)
            advance(1)
    return found


def persist(ask: Callable[[], T], place: str) -> T:
    """What a disk or a server answers; it is asked again where it does not.

    Args:
        ask: for something of a path or URL.
        place: that path or URL.

    Raises:
        Exception: the last of ``reading_errors``; one of ``LASTING`` at once.
    """
    for wait in _WAITS:
        try:
            return ask()
        except LASTING:
            raise
        except reading_errors(place):
            time.sleep(wait)
    return ask()


def answered(ask: Callable[[], T], url: str, *, place: str) -> T:
    """As ``persist``; the error is a line that starts with ``place``.

    Raises:
        UserError: there is nothing, or no answer.
    """
    try:
        return persist(ask, url)
    except reading_errors(url) as error:
        raise UserError(f"{place}: {reason(error)}") from None


def read_if_there(place: str) -> bytes | None:
    """What a small file on disk or behind a URL holds; None: there is none. A server that fails is asked again.

    Raises:
        UserError: it can't be read, or there is no answer.
    """
    system = file_system(place)

    def ask() -> bytes:
        try:
            return system.cat_file(place)
        except reading_errors(place) as error:
            if getattr(error, "status", None) in _NOT_THERE:
                raise FileNotFoundError(place) from None
            raise

    try:
        return persist(ask, place)
    except LASTING:
        return None
    except reading_errors(place) as error:
        raise UserError(f"data.path: {place}: {reason(error)}") from None


def within(folder: str, name: str) -> str:
    """The path or URL of a file in a folder; a URL's query, which may be what opens it, stays at the end."""
    if not protocol(folder):
        return os.path.join(folder, name)
    place, mark, query = folder.partition("?")
    return f"{place.rstrip('/')}/{name}{mark}{query}"


def read_remote_json(url: str, place: str) -> Any:
    """What a JSON file at a URL holds.

    Raises:
        UserError: it can't be read.
    """
    need("fsspec", "fsspec", extra="data", place=f"{place}: {url} ")
    system = file_system(url)
    content = answered(lambda: system.cat_file(url), url, place=f"{place}: {url}")
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{place}: {url}: {first_line(error)}") from None


def read_ranges(places: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Reads a part of each file; a server is asked for all parts at once, and as a disk again where it does not answer.

    Args:
        places: paths or URLs; one may stand there several times.
        offsets: bytes.
        sizes: bytes.

    Raises:
        UserError: a file can't be read, has become shorter, or its server gives no parts of files.
    """
    contents: list[bytes | Exception] = [b""] * len(places)
    missing = list(range(len(places)))
    for wait in (*_WAITS, None):
        for kind in {protocol(places[i]) for i in missing}:
            own = [i for i in missing if protocol(places[i]) == kind]
            # Of the Hub's files, fsspec would read on by 5 MB after each part.
            unbuffered = {"cache_type": "none"} if kind == "hf" else {}
            parts = file_system(places[own[0]]).cat_ranges(
                [places[i] for i in own],
                [offsets[i] for i in own],
                [offsets[i] + sizes[i] for i in own],
                on_error="return",
                **unbuffered,
            )
            for i, part in zip(own, parts, strict=True):
                contents[i] = part
        missing = [i for i in missing if isinstance(contents[i], Exception)]
        if wait is None or not missing or any(isinstance(contents[i], LASTING) for i in missing):
            break
        time.sleep(wait)
    for place, size, content in zip(places, sizes, contents, strict=True):
        if isinstance(content, Exception):
            raise UserError(f"data.path: {place}: {reason(content)}")
        if len(content) != size:
            raise UserError(
                f"data.path: {place}: gave {len(content)} bytes for {size}; it has changed since this run "
                "began, or its server gives no parts of files: then download it first"
            )
    return contents
