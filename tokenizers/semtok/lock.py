"""One at a time in a folder: a run, a set of images or a cache that is written has it for itself.

Where the disk knows locks (flock), they decide, and end with the process, however it ends. On a disk that several
machines share they may be missing, or be known on each machine alone. So who holds a folder also touches a file
there every few seconds, and one of another machine that is not touched any longer is of a process that has ended.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from semtok.errors import UserError
from semtok.unfinished import is_unfinished

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

T = TypeVar("T")
LOCK_FILE = ".lock"
"""Is there while somebody works in the folder, or was killed there."""
BEAT_SECONDS = 5.0
_WAIT_SECONDS = 1.0
_WATCHED_BEATS = 3
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
_held: set[int] = set()


class InUse(UserError):
    """Another process works in a folder."""


def _release_copies() -> None:
    """A process that is forked, as a loader, would hold the locks after this one has ended."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_copies)


@contextlib.contextmanager
def only_one_in(
    folder: Path, what: str, *, way_out: str = "wait, or stop it", lock_file: str = LOCK_FILE
) -> Iterator[None]:
    """Has a folder for itself, made if need be; what was made and stayed empty goes again.

    Args:
        what: works there, for the message of who comes second: "a run", "a command that writes a cache".
        way_out: for that message.
        lock_file: its name; of another name, something in the folder is had, not all of it.

    Raises:
        InUse: somebody works there.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / lock_file
    file = _taken(place, what, way_out)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(place, stop), name="semtok lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        _held.discard(file.fileno())
        # Its folder may be gone: what it was for is done. Or the disk fails, which is told already.
        with contextlib.suppress(OSError):
            place.unlink()
        with contextlib.suppress(OSError):
            file.close()
        with contextlib.suppress(OSError):  # not empty
            for empty in made:
                empty.rmdir()


@contextlib.contextmanager
def in_turn(folder: Path, what: str, *, lock_file: str = LOCK_FILE) -> Iterator[None]:
    """``only_one_in``, after whoever is there: what they write may be what is wanted. A line says that this waits."""
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            here = only_one_in(folder, what, way_out="waiting for it", lock_file=lock_file)
            try:
                stack.enter_context(here)
                break
            except InUse as error:
                if not told:
                    print(error, flush=True)
                told = True
                time.sleep(_WAIT_SECONDS)
        yield


def made_once(
    file: Path, what: str, *, read: Callable[[Path], T | None], make: Callable[[], T]
) -> T:
    """What a cache's file holds; where it is not there, or damaged, it is made. Where another process makes it, this
    one waits for that.

    Args:
        what: makes it, for the message of who waits: "a command that trains this judge".
        read: the file, which is there; UserError: it is damaged; None: there is nothing of use.
        make: writes the file too.
    """

    def kept() -> T | None:
        if not file.is_file():
            return None
        try:
            return read(file)
        except UserError:
            file.unlink(missing_ok=True)
            return None

    found = kept()
    if found is not None:
        return found
    with in_turn(file.parent, what, lock_file=f".{file.stem}.lock"):
        found = kept()  # by who was there before
        return make() if found is None else found


@contextlib.contextmanager
def one_by_one(file: Path) -> Iterator[None]:
    """Has a lock for a moment, after whoever has it, as the system queues them; where the disk has no locks, at once.

    Args:
        file: of the lock, made if need be. It stays: if it were removed, two could have it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        if fcntl is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
        _held.add(lock.fileno())
        try:
            yield
        finally:
            _held.discard(lock.fileno())


def is_of_the_killed(name: str) -> bool:
    """Whether a process that was killed before it had written anything leaves a file of this name."""
    return name == LOCK_FILE or is_unfinished(name)


def remove_what_is_held_by_nobody(folder: Path) -> None:
    """Removes the lock file of a process of this machine that was killed when its work was done."""
    place = folder / LOCK_FILE
    with contextlib.suppress(OSError), place.open("r+", encoding="utf-8") as file:
        owner = _owner(file)
        is_of_here = owner is not None and owner["host"] == socket.gethostname()
        if is_of_here and _lock(file) and _is_at(file, place):
            place.unlink()


def _taken(place: Path, what: str, way_out: str) -> IO[str]:
    """The file, locked and written anew.

    Raises:
        InUse: it is another's.
    """
    while True:
        file = place.open("a+", encoding="utf-8")
        try:
            is_locked = _lock(file)
            owner = _owner(file)
            if is_locked is False:
                raise InUse(_told(place, what, owner, way_out))
            if is_locked and not _is_at(file, place):  # who held it has removed it meanwhile
                file.close()
                continue
            if owner and (is_locked is None or owner["host"] != socket.gethostname()):
                _watch(place, what, owner, way_out)
            file.truncate(0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            json.dump({"host": socket.gethostname(), "pid": os.getpid(), "since": since}, file)
            file.flush()
        except BaseException:
            file.close()
            raise
        _held.add(file.fileno())
        return file


def _lock(file: IO[str]) -> bool | None:
    """Whether the lock is now this process's; None: the disk, or the system, has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _owner(file: IO[str]) -> dict[str, Any] | None:
    """What who holds the file, or held it, says there; None: nothing yet."""
    file.seek(0)
    try:
        owner = json.loads(file.read())
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"host", "pid", "since"} <= owner.keys() else None


def _is_at(file: IO[str], place: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), place.stat())
    except FileNotFoundError:
        return False


def _watch(place: Path, what: str, owner: dict[str, Any], way_out: str) -> None:
    """Raises InUse where the file is touched; takes some seconds."""
    seconds = _WATCHED_BEATS * BEAT_SECONDS
    print(
        f"{place.parent}: process {owner['pid']} on {owner['host']} worked there; looking for {seconds:.0f} s whether "
        "it still does",
        flush=True,
    )
    before = _touched(place)
    for _ in range(_WATCHED_BEATS):
        time.sleep(BEAT_SECONDS)
        if _touched(place) != before:
            raise InUse(_told(place, what, owner, way_out))


def _touched(place: Path) -> int:
    with contextlib.suppress(FileNotFoundError), place.open("rb") as file:
        return os.fstat(
            file.fileno()
        ).st_mtime_ns  # opened, as network disks remember what stat said
    return 0


def _beat(place: Path, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(place)


def _told(place: Path, what: str, owner: dict[str, Any] | None, way_out: str) -> str:
    who = f" (process {owner['pid']} on {owner['host']}, since {owner['since']})" if owner else ""
    return f"{place.parent}: {what} is at work there{who}; {way_out}"
