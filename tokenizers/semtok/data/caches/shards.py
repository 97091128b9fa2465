"""What was computed from a source's images, once, as shards of rows on disk, read in any order.

A folder of safetensors files of ``shard_size`` images each, and an index with a checksum of each. A
column is a tensor with a row per image; mirrored images have columns of their own. Shards are written
by any number of processes, each file whole or not at all, so an interrupted writer goes on; they are
read by memory map, so a row costs one copy, in any order, and processes share the pages.
"""

import hashlib
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.errors import UserError
from semtok.storage import DAMAGE, first_line, new_file, read_json, write_json, write_tensors

INDEX, _PLAN = "index.json", "plan.json"
_LABELS, _MIRRORED = "labels", "mirrored."
_FORMAT_VERSION = 1
_HASHED_ON_OPENING = 1 << 30
"""Bytes: caches up to this size are compared with their checksums whenever they are opened."""

_PLAIN_NAME = re.compile(r"\w[\w.-]*")

Shard = dict[str, tuple[Tensor, np.ndarray]]
"""Tensors by name, and as arrays that they share memory with."""
Compute = Callable[[ImageBatch], Mapping[str, Tensor]]
"""From a batch of images to a row of each column for each."""


class Shards:
    """A finished folder of shards.

    Args:
        folder: the cache.
        place: starts every message.

    Raises:
        UserError: none there, damaged, cut short, or of a newer format.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self.folder = folder
        self._place = f"{place}: {self._named()}"
        try:
            self.index = self._read_index()
            if self.index["format_version"] > _FORMAT_VERSION:
                raise UserError(f"{self._place} is of a newer format; upgrade semtok")
            self.about: dict[str, Any] = self.index["about"]
            self.shard_size = int(self.index["shard_size"])
            self.num_images = int(self.index["num_images"])
            self.skipped = {int(i): name for i, name in self.index["skipped"].items()}
            self.entries: list[dict[str, Any]] = self.index["shards"]
            num_shards = math.ceil(self.num_images / self.shard_size)
            if len(self.entries) != num_shards:
                raise ValueError(
                    f"{INDEX} names {len(self.entries)} shards instead of {num_shards}"
                )
            for entry in self.entries:
                if not _PLAIN_NAME.fullmatch(entry["file"]):  # it becomes a path
                    raise ValueError(f"{INDEX} names {entry['file']!r}, which is no file's name")
            self._check_files()
        except UserError as error:
            raise UserError(self._damaged(error)) from None
        except (*DAMAGE, TypeError, AttributeError, ZeroDivisionError) as error:
            raise UserError(self._damaged(error)) from None
        if sum(entry["bytes"] for entry in self.entries) <= _HASHED_ON_OPENING:
            self.verify()

    def _named(self) -> str:
        return str(self.folder)

    def _read_index(self) -> Any:
        return read_json(self.folder / INDEX)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": None}  # another process maps its own

    def _check_files(self) -> None:
        for entry in self.entries:
            file = self.folder / entry["file"]
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise ValueError(f"{file.name} has {size} bytes instead of {entry['bytes']}")
        self._open_all()

    def _open_all(self) -> list[Shard]:
        self._shards = [open_shard(self.folder / entry["file"]) for entry in self.entries]
        return self._shards

    def _shard(self, number: int) -> Shard:
        return (self._shards or self._open_all())[number]

    def _damaged(self, error: BaseException) -> str:
        if str(error).startswith(self._place):
            return str(error)
        return (
            f"{self._place} is damaged ({first_line(error)}); remove it, and it is computed again"
        )

    def verify(self) -> None:
        """Reads everything and compares it with the checksums.

        Raises:
            UserError: a shard is not what was written.
        """
        for entry in self.entries:
            if shard_checksum(self.folder / entry["file"]) != entry["checksum"]:
                raise UserError(self._damaged(ValueError(f"{entry['file']} has another checksum")))

    @cached_property
    def columns(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of a row of each column, labels aside."""
        first = self._shard(0)
        return {
            name: (tensor.dtype, tuple(tensor.shape[1:]))
            for name, (tensor, _) in first.items()
            if name != _LABELS and not name.startswith(_MIRRORED)
        }

    @property
    def bytes_per_image(self) -> float:
        """On disk, mirrored rows included."""
        return sum(entry["bytes"] for entry in self.entries) / max(1, self.num_images)

    def rows(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        """The rows of these images: (B, ...) per column, in the type that they are stored in."""
        return {
            name: self._column(name, keys, dtype, shape)
            for name, (dtype, shape) in self.columns.items()
        }

    def labels(self, keys: Sequence[Key]) -> Tensor:
        """int64 (B,)."""
        return self._column(_LABELS, [(index, False) for index, _ in keys], torch.int64, ())

    def skipped_among(self, keys: Sequence[Key]) -> tuple[str, ...]:
        """Names of files that could not be read when the rows of these images were computed."""
        return tuple(self.skipped[index] for index, _ in keys if index in self.skipped)

    def _column(
        self, name: str, keys: Sequence[Key], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        rows = torch.empty((len(keys), *shape), dtype=dtype)
        target, size = _as_numpy(rows), self.shard_size
        for place, (index, mirror) in enumerate(keys):
            shard = self._shard(index // size)
            target[place] = shard[_MIRRORED + name if mirror else name][1][index % size]
        return rows


def ensure_shards(
    source: ImageSource,
    folder: Path,
    compute: Compute,
    *,
    about: Mapping[str, Any],
    what: str,
    place: str,
    accelerator: Accelerator,
    batch_size: int = 64,
    shard_size: int = 1024,
) -> Shards:
    """Opens the shards in a folder; where there are none, all processes write them first, together.

    Args:
        source: the images; its ``flip`` says whether mirrored ones are computed too.
        about: what has to agree for these rows to be those that would be computed.
        what: is computed, in a few words, for people.
        place: starts every message.
        batch_size: images per call of ``compute``.

    Raises:
        UserError: the folder holds something else, or the disk has too little room.
    """
    wanted = {**about, "num_images": len(source), "flip": source.flip}
    if not (folder / INDEX).is_file():
        try:
            writer = _Writer(source, folder, compute, wanted, batch_size, shard_size)
            writer.claim(what, place, accelerator)
            writer.write(what, accelerator)
        except OSError as error:
            raise UserError(f"{place}: {folder}: {first_line(error)}") from None
    shards = Shards(folder, place)
    for key, value in wanted.items():
        if shards.about.get(key) != value:
            raise UserError(
                f"{place}: {folder} holds {what} of something else ({key}: {shards.about.get(key)}, "
                f"here {value}); choose another folder"
            )
    return shards


class _Writer:
    """Writes what is missing of a folder of shards."""

    def __init__(
        self,
        source: ImageSource,
        folder: Path,
        compute: Compute,
        about: Mapping[str, Any],
        batch_size: int,
        shard_size: int,
    ) -> None:
        self.source, self.folder, self.compute = source, folder, compute
        self.about, self.batch_size, self.shard_size = dict(about), batch_size, shard_size
        # Computed ahead, so that what can't work is found before the folder is there.
        first = self._batch([(0, False)])
        self.bytes = len(source) * sum(t[0].numel() * t.element_size() for t in first.values())
        self.bytes *= 2 if source.flip else 1

    def claim(self, what: str, place: str, accelerator: Accelerator) -> None:
        """Takes the folder, or goes on in it; looks whether the result will have room."""
        plan = {"about": self.about, "shard_size": self.shard_size}
        problem = None
        if accelerator.is_main_process:
            file = self.folder / _PLAN
            if file.is_file():
                if read_json(file) != plan:
                    problem = "was begun with something else; choose another folder"
            elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                problem = "holds other files; choose another folder"
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.folder).free
                if self.bytes > free:
                    self.folder.rmdir()
                    problem = (
                        f"needs {self.bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; "
                        "leave it out"
                    )
                else:
                    write_json(file, plan)
            if problem is None:
                print(
                    f"computing {what} once: {self.bytes / 1e9:.2f} GB in {self.folder}", flush=True
                )
        problem = next((p for p in gather_object([problem]) if p), None)
        if problem:
            raise UserError(f"{place}: {self.folder} {problem}")

    def write(self, what: str, accelerator: Accelerator) -> None:
        """Writes each process's share of the shards that are missing, then the index."""
        num_shards = math.ceil(len(self.source) / self.shard_size)
        own = range(accelerator.process_index, num_shards, accelerator.num_processes)
        entries, skipped = [], {}
        for number in tqdm(own, desc=what, unit="shard", disable=not sys.stderr.isatty()):
            file = self.folder / f"shard-{number:06d}.safetensors"
            notes = file.with_suffix(".json")  # written after its shard, which it vouches for
            if not notes.is_file():
                write_json(notes, {"skipped": self._write_shard(number, file)})
            skipped |= read_json(notes)["skipped"]
            entries.append(
                {"file": file.name, "bytes": file.stat().st_size, "checksum": shard_checksum(file)}
            )
        everywhere = [entry for entry in gather_object(entries)]
        skipped = {k: v for part in gather_object([skipped]) for k, v in part.items()}
        if accelerator.is_main_process:
            index = {
                "format_version": _FORMAT_VERSION,
                "about": self.about,
                "num_images": len(self.source),
                "shard_size": self.shard_size,
                "shards": sorted(everywhere, key=lambda entry: entry["file"]),
                "skipped": skipped,
            }
            write_json(self.folder / INDEX, index)
        accelerator.wait_for_everyone()

    def _write_shard(self, number: int, file: Path) -> dict[str, str]:
        indices = range(
            number * self.shard_size, min((number + 1) * self.shard_size, len(self.source))
        )
        columns: dict[str, list[Tensor]] = {}
        skipped: dict[str, str] = {}
        for mirror in (False, True) if self.source.flip else (False,):
            for first in range(0, len(indices), self.batch_size):
                keys = [(i, mirror) for i in indices[first : first + self.batch_size]]
                for name, rows in self._batch(keys, skipped).items():
                    if not mirror or name != _LABELS:
                        columns.setdefault(_MIRRORED + name if mirror else name, []).append(rows)
        with new_file(file) as temporary:
            write_tensors(temporary, {name: torch.cat(rows) for name, rows in columns.items()})
        return skipped

    def _batch(
        self, keys: Sequence[Key], skipped: dict[str, str] | None = None
    ) -> dict[str, Tensor]:
        batch = self.source.load_keys(keys)
        if skipped is not None:
            # Which of the batch they were, no batch tells; it counts that they are named.
            indices = (str(index) for index, _ in keys)
            skipped |= dict(zip(indices, batch.skipped, strict=False))
        rows = {name: value.cpu() for name, value in self.compute(batch).items()}
        return rows | {_LABELS: batch.labels}


def open_shard(file: Path) -> Shard:
    """Each tensor of a file, mapped into memory, and as an array that it shares memory with."""
    with safe_open(file, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    return {name: (tensor, _as_numpy(tensor)) for name, tensor in tensors.items()}


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Shares memory; numpy has no bfloat16, so its bits stand for it."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def shard_checksum(file: Path) -> str:
    """What the index says of a file, to know it by."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
