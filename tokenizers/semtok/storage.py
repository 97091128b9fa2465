"""Files that are either whole or not there, and weights that are either sound or refused."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.unfinished import as_finished, beside, remove_of_the_dead

DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading a missing, foreign or damaged weights file can raise: the libraries that read one, or build what its
settings say, take much of it for granted. See ``as_damage`` for two more."""

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's numbers for a disk, or one's share of it, that takes no more."""
_DISK_FAILS = (errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN)
"""Those for a disk that takes nothing, or whose machine is gone."""
DISK_TROUBLE = _DISK_FULL + _DISK_FAILS


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """Within this context a TypeError or AttributeError is a ValueError: what a library raises that meets other content
    in a file than it takes for granted.

    For calls of such libraries alone: anywhere else these are faults of our own.
    """
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise ValueError(first_line(error)) from error


def cache_folder(what: str) -> Path:
    """Where things of one kind are kept that can be made again: in ``SEMTOK_CACHE``, or in ``semtok`` in the
    user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "semtok"
    return Path(os.environ.get("SEMTOK_CACHE") or default) / what


def digest(*words: str, size: int = 16) -> str:
    """A short name for what words say together; ``size`` in bytes."""
    return hashlib.blake2b(
        "\n".join(words).encode("utf-8", "surrogateescape"), digest_size=size
    ).hexdigest()


@contextlib.contextmanager
def new_folder(path: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` to fill; on success it takes ``path``'s place.

    A folder that was there before is removed only after the new one is complete.

    Args:
        replaces: a file that marks what may be replaced; None: whatever is there.

    Raises:
        UserError: there is something else at ``path``.
        OSError: of the disk; it names ``path``, which is as it was.
    """
    foreign = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if replaces is not None and foreign and not (path / replaces).is_file():
        raise UserError(f"{path}: holds other files (no {replaces}); choose another folder")
    with told_of_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_of_the_dead(path.parent)
        temporary = beside(path)
        temporary.mkdir()
        try:
            yield temporary
            put_in_place(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, path: Path) -> None:
    """Lets a folder that is complete take the place of another beside it, or a new one."""
    for file in temporary.rglob("*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors closes its files to others
    was = beside(path, was=True) if path.exists() else None
    if was is not None:
        path.rename(was)
    try:
        temporary.rename(path)
    except OSError:
        if was is not None:
            was.rename(path)
        raise
    if was is not None:
        shutil.rmtree(was)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file name beside ``path``, of the same ending; on success it is renamed.

    Raises:
        OSError: of the disk; it names ``path``, which is as it was.
    """
    with told_of_disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_of_the_dead(path.parent)
        # Whoever writes it makes it, so that it is open to others as the umask says, which mkstemp's files are not.
        temporary = beside(path)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # the disk's trouble is told already
                temporary.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Removes a folder, which is there whole or not at all, also for whoever looks meanwhile."""
    aside = beside(path)
    path.rename(aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def told_of_disk(path: Path) -> Iterator[None]:
    """What a disk that is full, or fails, raises where ``path`` is written is an OSError that names it.

    Of a failing write Python names no file, and safetensors tells the system's error in its text alone. Nobody
    knows the hidden names of what is being written.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    except OSError as error:
        if error.errno is None or isinstance(error.filename, int):
            raise
        named = (
            as_finished(Path(os.fsdecode(error.filename))) if error.filename is not None else path
        )
        named = path if named.is_relative_to(path) else named
        raise OSError(error.errno, error.strerror, str(named)) from None


def mend_of(error: OSError) -> str:
    """What to do about a disk before a command is given again."""
    return "make room" if error.errno in _DISK_FULL else "see to the disk"


@contextlib.contextmanager
def disk_told_with(way_on: str, *, place: Path, key: str | None = None) -> Iterator[None]:
    """Within this context a disk that is full or fails is a UserError that says how to go on, and so is whatever the
    system says of a file below ``place`` or of a folder above it.

    Args:
        way_on: in a few words, after "make room and".
        place: for the message, where the system names none.
        key: the setting that names the place, for the message.
    """
    try:
        yield
    except OSError as error:
        named = Path(error.filename) if isinstance(error.filename, str | Path) else None
        is_of = named is not None and (
            named.absolute().is_relative_to(place.absolute())
            or place.absolute().is_relative_to(named.absolute())
        )
        if error.errno is None or not (is_of or error.errno in DISK_TROUBLE):
            raise
        start = f"{key}: " if key is not None else ""
        told = f"{start}{named or place}: {error.strerror}; {mend_of(error)} and {way_on}"
        raise UserError(told) from None


def write_state(path: Path, state: Any) -> None:
    """Writes tensors and plain containers as ``torch.load(weights_only=True)`` reads them.

    Raises:
        OSError: of the disk; torch alone would say "unexpected pos" of a full one.
    """
    with path.open("wb") as file:
        noting = _Noting(file)
        try:
            torch.save(state, noting)
        except RuntimeError:
            if noting.failed is None:
                raise
            raise noting.failed from None


class _Noting:
    """A file that remembers why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.failed = file, None

    def write(self, content: Any) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failed = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_text(path: Path, text: str) -> None:
    """Writes text so that a reader sees the old or the new content, never a part."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes readable JSON, atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        UserError: the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        UserError: the file is missing, cut short, or not a safetensors file.
    """
    try:
        with as_damage():
            return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGE as error:
        raise UserError(f"{path}: cut short or damaged ({first_line(error)})") from None


def read_weights(path: Path) -> Any:
    """What a safetensors file holds, or a pickled one (``.pt``, ``.pth``, ``.ckpt``) of tensors and plain containers.

    No code in a pickle runs: one that holds anything else is refused.

    Raises:
        UserError: the file is missing, cut short, or holds something else.
    """
    if path.suffix == ".safetensors" or not path.is_file():
        return read_tensors(path)
    try:
        with as_damage():
            return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        if "weights_only" in str(error):  # torch's own advice is to trust the file
            raise UserError(
                f"{path}: holds more than tensors, and is refused as it could run code; save its tensors alone"
            ) from None
        raise UserError(f"{path}: cut short or damaged ({first_line(error)})") from None


def tensor_bytes(module: nn.Module) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    """A module's parameters and buffers, by name, each with its bytes as uint8 (N,): what digests are made of."""
    for name, tensor in sorted(module.state_dict().items()):
        yield name, tensor, tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def load_weights(module: nn.Module, path: Path) -> None:
    """Reads a safetensors file into a module, strictly.

    Raises:
        UserError: see ``read_tensors``; or tensors that do not fit the module.
    """
    tensors = read_tensors(path)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:  # of names and shapes
        raise UserError(f"{path}: does not fit the network ({first_line(error)})") from None


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file into a folder that is not in use yet; the same content gives the same bytes.

    Args:
        about: more of its header, for readers.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    # safetensors writes a hidden file of its own beside the one that it is asked for.
    folder = beside(path)
    folder.mkdir()
    try:
        file = folder / path.name
        safetensors.torch.save_file(contiguous, file, metadata={"format": "pt", **(about or {})})
        _sort_metadata(file)
        file.chmod(0o644)  # it closes its files to others
        file.replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sort_metadata(path: Path) -> None:
    """Of a safetensors file, which has it in an order that differs from call to call."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, (
            f"{path}: a header of {len(text)} bytes in the place of {length}"
        )
        file.seek(8)
        file.write(text.ljust(length))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for one-line errors."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
