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
import tempfile
import uuid
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

DAMAGE = (
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    LookupError,
    ArithmeticError,
    TypeError,
    AttributeError,
    AssertionError,
    MemoryError,
    SafetensorError,
    pickle.UnpicklingError,
    struct.error,
    zipfile.BadZipFile,
)
"""What reading a missing, foreign or damaged weights file can raise: the libraries that read one, or build what its
settings say, take much of it for granted."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The system's numbers for a disk, or one's share of it, that takes no more."""


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
    """
    foreign = path.is_file() or (path.is_dir() and any(path.iterdir()))
    if replaces is not None and foreign and not (path / replaces).is_file():
        raise UserError(f"{path}: holds other files (no {replaces}); choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp's folders are closed to others
    try:
        with _told_of_disk(path):
            yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # safetensors closes its files to others
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Gives a temporary file name beside ``path``, of the same ending; on success it is renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of no process number: on a shared disk, containers have equal ones. Whoever writes it makes it, so that it
    # is open to others as the umask says, which mkstemp's files are not.
    temporary = path.with_name(f".{uuid.uuid4().hex}.{path.name}")
    try:
        with _told_of_disk(path):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _told_of_disk(path: Path) -> Iterator[None]:
    """What a disk that is full, or fails, raises where ``path`` is written is an OSError that names it.

    Of a failing write Python names no file, and safetensors tells the system's error in its text alone.
    """
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


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
    safetensors.torch.save_file(contiguous, path, metadata={"format": "pt", **(about or {})})
    with path.open(
        "r+b"
    ) as file:  # safetensors writes metadata in an order that differs from call to call
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
