"""Names of files and folders while they are written, and what becomes of those whose writer was killed.

Until it is whole, ``NAME`` is called ``.TOKEN.NAME``. The token tells which process of which machine writes it: whoever
writes something in that folder next removes what is of the dead.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import socket
import uuid
from pathlib import Path

_NAME = re.compile(
    r"\.(?P<machine>[0-9a-f]{12})(?P<pid>[0-9a-f]{8})[0-9a-f]{12}(?P<was>-was)?\.(?P<name>.+)",
    re.DOTALL,
)
_looked_at: set[Path] = set()


def beside(path: Path, *, was: bool = False) -> Path:
    """A new hidden name in the folder of ``path``, of the same ending.

    Args:
        was: for what was at ``path`` before, while something takes its place.
    """
    token = f"{_machine()}{os.getpid():08x}{uuid.uuid4().hex[:12]}"
    return path.with_name(f".{token}{'-was' if was else ''}.{path.name}")


def is_unfinished(name: str) -> bool:
    """Whether a file or folder of this name is being written, or was, by a process that was killed."""
    return _NAME.fullmatch(name) is not None


def as_finished(path: Path) -> Path:
    """The path with the names that hidden ones were to get."""
    return Path(*map(_finished_name, path.parts))


def _finished_name(name: str) -> str:
    while match := _NAME.fullmatch(name):  # what is being written may be written in steps
        name = match["name"]
    return name


def remove_unfinished(folder: Path, *names: str) -> None:
    """Removes what processes were writing there. Nobody else may be writing.

    What was to be replaced, and was not, is at its place again.

    Args:
        names: that it was to have; none: any.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match is not None and (not names or match["name"] in names):
            _remove(path, match)


def remove_of_the_dead(folder: Path) -> None:
    """Removes what processes of this machine that are no longer alive were writing there; looks once in each folder."""
    if folder.absolute() in _looked_at:
        return
    _looked_at.add(folder.absolute())
    with contextlib.suppress(OSError):  # whatever is wrong with the disk, writing tells of it
        for path in list(folder.iterdir()):
            match = _NAME.fullmatch(path.name)
            if match is None or match["machine"] != _machine():
                continue
            if not _is_alive(int(match["pid"], 16)):
                _remove(path, match)


def _remove(path: Path, match: re.Match[str]) -> None:
    place = path.with_name(match["name"])
    if match["was"] and not place.exists():
        path.rename(place)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_alive(number: int) -> bool:
    if os.name == "nt":  # where asking would end it
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


@functools.cache
def _machine() -> str:
    """Where process numbers mean what they mean here: this machine since its start, this container."""
    words = [socket.gethostname()]
    with contextlib.suppress(OSError):
        words.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        words.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.blake2b("\n".join(words).encode(), digest_size=6).hexdigest()
