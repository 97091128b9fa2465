"""Files on disk or behind a URL, by fsspec: their state, and parts of them."""

import time
from collections.abc import Sequence
from typing import Any

from semtok.errors import UserError
from semtok.storage import first_line

_WAITS = (1.0, 5.0, 25.0)  # seconds before a server is asked again


def file_system(place: str) -> Any:
    """The fsspec file system of a path or URL; each process and thread has its own.

    Raises:
        UserError: no such protocol, or what it needs is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(place)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"data.path: {place}: {first_line(error)}") from None


def reading_errors(place: str) -> tuple[type[Exception], ...]:
    """What reading a path or URL can raise."""
    if not place.startswith("http"):
        return (OSError, ValueError)
    from aiohttp import ClientError

    return (OSError, ValueError, ClientError)


def reason(error: Exception) -> str:
    """A reading error in a few words."""
    if error.__cause__ is not None:  # fsspec takes a server that does not answer for a missing file
        return f"no such file, or no answer ({first_line(error.__cause__)})"
    return "no such file" if isinstance(error, FileNotFoundError) else first_line(error)


def protocol(place: str) -> str:
    """Of a URL; empty for a path."""
    return place.partition("://")[0] if "://" in place else ""


def read_ranges(places: Sequence[str], offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
    """Reads a part of each file; a server is asked for all parts at once, and again where it does not answer.

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
            parts = file_system(places[own[0]]).cat_ranges(
                [places[i] for i in own],
                [offsets[i] for i in own],
                [offsets[i] + sizes[i] for i in own],
                on_error="return",
            )
            for i, part in zip(own, parts, strict=True):
                contents[i] = part
        missing = [i for i in missing if isinstance(contents[i], Exception)]
        if wait is None or not any(protocol(places[i]) for i in missing):
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
