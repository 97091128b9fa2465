"""A disk that fails from some write on, below one folder. Not a mounted one, which would need rights."""

import builtins
import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Takes nothing more, but lets go of what it has."""
READ_ONLY = (errno.EROFS, errno.EIO)
"""Takes no change, and shows what it has."""
GONE = (errno.ESTALE,)
"""A server that is not there any longer: shows nothing either."""


class FailingDisk:
    """What is below a folder, from the outside.

    Attributes:
        writes: folders that were made, files that were opened for writing, and pieces that were written to them.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.number, self.writes, self._at = str(folder), 0, 0, 0
        self._open = io.open
        monkeypatch.setattr(builtins, "open", self._opened)
        monkeypatch.setattr(io, "open", self._opened)
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "utime"):
            monkeypatch.setattr(os, name, self._checked(name, getattr(os, name)))
        for name in ("listdir", "scandir", "stat"):
            monkeypatch.setattr(os, name, self._shown(getattr(os, name)))
        write = safetensors.torch.serialize_file
        monkeypatch.setattr(safetensors.torch, "serialize_file", self._tensors(write))

    def fail(self, number: int, at: int = 1) -> None:
        """From the write with this number on, counted from now, the system answers with an error; 0: it is mended."""
        self.number, self.writes, self._at = number, 0, at

    def _is_bad(self) -> bool:
        return bool(self.number) and self.writes >= self._at

    def _is_below(self, path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):
            return False
        whole = os.path.abspath(os.fspath(path))
        return whole == self.folder or whole.startswith(f"{self.folder}{os.sep}")

    def _error(self, path: Any = None) -> OSError:
        words = (self.number, os.strerror(self.number))
        return OSError(*words, os.fspath(path)) if path is not None else OSError(*words)

    def written(self) -> None:
        """A piece of an open file; of a failing one the system tells no name."""
        self.writes += 1
        if self._is_bad():
            raise self._error()

    def _opened(self, file: Any, mode: str = "r", *words: Any, **options: Any) -> Any:
        if not self._is_below(file):
            return self._open(file, mode, *words, **options)
        writes = bool(set(mode) & set("wax+"))
        self.writes += writes
        if self._is_bad() and (writes or self.number in GONE):
            raise self._error(file)
        opened = self._open(file, mode, *words, **options)
        return _Written(opened, self, has_number="a" in mode) if writes else opened

    def _checked(self, name: str, call: Any) -> Any:
        def checked(path: Any, *words: Any, **options: Any) -> Any:
            if self._is_below(path):
                self.writes += name == "mkdir"
                is_refused = name == "mkdir" or self.number not in FULL
                if self._is_bad() and is_refused:
                    raise self._error(path)
            return call(path, *words, **options)

        return checked

    def _shown(self, call: Any) -> Any:
        def shown(path: Any = ".", *words: Any, **options: Any) -> Any:
            if self.number in GONE and self._is_below(path) and self._is_bad():
                raise self._error(path)
            return call(path, *words, **options)

        return shown

    def _tensors(self, write: Any) -> Any:
        def written(tensors: Any, path: Any, *words: Any, **options: Any) -> Any:
            if self._is_below(path):
                try:
                    self.written()
                except OSError as error:  # as safetensors tells it
                    told = f"I/O error: {error.strerror} (os error {error.errno})"
                    raise SafetensorError(f"Error while serializing: {told}") from None
            return write(tensors, path, *words, **options)

        return written


class _Written:
    """A file that is open for writing."""

    def __init__(self, file: Any, disk: FailingDisk, *, has_number: bool) -> None:
        self.__dict__.update(_file=file, _disk=disk, _has_number=has_number)

    def write(self, content: Any) -> int:
        self._disk.written()
        return self._file.write(content)

    def fileno(self) -> int:
        if not self._has_number:  # Pillow would write past this
            raise io.UnsupportedOperation("fileno")
        return self._file.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __iter__(self) -> Any:
        return iter(self._file)
