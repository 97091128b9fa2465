"""What was computed from a source's images, once, as shards of rows on disk, read in any order.

A folder of safetensors files of ``shard_size`` images each, and an index with a checksum of each. A
column is a tensor with a row per image; mirrored images have columns of their own. Shards are written
by any number of processes, each file whole or not at all, so an interrupted writer goes on; they are
read by memory map, so a row costs one copy, in any order, and processes share the pages.
"""

import contextlib
import hashlib
import math
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from safetensors import SafetensorError, safe_open
from torch import Tensor

from semtok.data.passes import read_images
from semtok.data.source import ImageBatch, ImageSource, Key, Skipped
from semtok.errors import UserError, printable
from semtok.lock import LOCK_FILE, in_turn, only_one_in, remove_what_is_held_by_nobody
from semtok.privacy import without_secrets
from semtok.processes import gather, num_processes, process_index, together
from semtok.progress import progress
from semtok.settings import Config, parse
from semtok.storage import (
    disk_told_with,
    first_line,
    new_file,
    read_json,
    write_json,
    write_tensors,
)
from semtok.teachers import StoredFeatures
from semtok.unfinished import remove_unfinished

INDEX, _PLAN = "index.json", "plan.json"
_LABELS, _MIRRORED = "labels", "mirrored."
_FORMAT_VERSION = 1
_HASHED_ON_OPENING = 1 << 30
"""Bytes: caches up to this size are compared with their checksums whenever they are opened."""


_NAME = "shard-{:06d}.safetensors"
Shard = dict[str, tuple[Tensor, np.ndarray]]
"""Tensors by name, and as arrays that they share memory with."""
Compute = Callable[[ImageBatch], Mapping[str, Tensor]]
"""From a batch of images to a row of each column for each."""


class _Entry(Config):
    file: str
    bytes: int
    checksum: str


class _Index(Config):
    format_version: int
    about: dict[str, Any]
    num_images: int = Field(ge=1)
    shard_size: int = Field(ge=1)
    shards: tuple[_Entry, ...]
    skipped: dict[NonNegativeInt, str]


class Shards:
    """A finished folder of shards.

    Args:
        folder: the cache.
        place: starts every message.

    Raises:
        UserError: none there, damaged, cut short, or of a newer format.
    """

    _way_out = "remove it, and it is computed again"

    def __init__(self, folder: Path | str, place: str) -> None:
        self.folder, self._place = Path(folder), without_secrets(f"{place}: {folder}")
        self._held: OrderedDict[int, Shard] = OrderedDict()
        self._kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        try:
            content = self._read_index()
            version = content.get("format_version") if isinstance(content, dict) else None
            if isinstance(version, int) and version > _FORMAT_VERSION:
                raise UserError(f"{self._place} is of a newer format; upgrade semtok")
            index = parse(_Index, content, INDEX)
            self.about, self.skipped = index.about, index.skipped
            self.shard_size, self.num_images = index.shard_size, index.num_images
            self.entries = [entry.model_dump() for entry in index.shards]
            names = [entry.file for entry in index.shards]
            num_shards = math.ceil(self.num_images / self.shard_size)
            # Names become paths. Their number is compared first: a false one may be too many to list.
            if len(names) != num_shards or names != [_NAME.format(n) for n in range(num_shards)]:
                raise UserError(f"{INDEX} does not name the shards of {self.num_images} images")
            self._check_files()
        except (UserError, OSError, SafetensorError) as error:  # of what is read
            raise UserError(self._damaged(error)) from None
        if sum(entry["bytes"] for entry in self.entries) <= _HASHED_ON_OPENING:
            self.verify()

    def _read_index(self) -> Any:
        return read_json(self.folder / INDEX)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}  # another process maps its own

    def _check_files(self) -> None:
        for number, entry in enumerate(self.entries):
            file = self.folder / entry["file"]
            size = file.stat().st_size
            if size != entry["bytes"]:
                raise UserError(f"{file.name} has {size} bytes instead of {entry['bytes']}")
            self._shard(number)  # mapped at once, so that it stays readable

    def _shard(self, number: int) -> Shard:
        if number not in self._held:
            file = self.folder / self.entries[number]["file"]
            self._held[number] = self._like_others(open_shard(file, self._num_rows(number)), file)
        return self._held[number]

    def _like_others(self, shard: Shard, file: Path) -> Shard:
        """The shard that was read from a file.

        Raises:
            UserError: its rows are not as those of the shards that were read before, or its labels are no numbers.
        """
        own = {name: (tensor.dtype, tuple(tensor.shape[1:])) for name, (tensor, _) in shard.items()}
        mirrored = {name.removeprefix(_MIRRORED) for name in own if name.startswith(_MIRRORED)}
        if own.get(_LABELS) != (torch.int64, ()) or any(
            own.get(name) != own[_MIRRORED + name] for name in mirrored
        ):
            raise UserError(f"{file.name} has no labels, or other rows for mirrored images")
        self._kinds = self._kinds or own
        if own != self._kinds:
            raise UserError(f"{file.name} has other columns than the shards beside it")
        return shard

    def _num_rows(self, number: int) -> int:
        return min(self.shard_size, self.num_images - number * self.shard_size)

    def _damaged(self, error: BaseException) -> str:
        if str(error).startswith(self._place):
            return str(error)
        return f"{self._place} is damaged ({first_line(error)}); {self._way_out}"

    def verify(self) -> None:
        """Reads everything and compares it with the checksums.

        Raises:
            UserError: a shard is not what was written.
        """
        with progress(f"comparing {self.folder}", len(self.entries), "files") as advance:
            for entry in self.entries:
                if shard_checksum(self.folder / entry["file"]) != entry["checksum"]:
                    reason = ValueError(f"{entry['file']} has another checksum")
                    raise UserError(self._damaged(reason))
                advance(1)

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
        return self._column(_LABELS, [Key(key.index) for key in keys], torch.int64, ())

    def batch(self, keys: Sequence[Key], **computed: Any) -> ImageBatch:
        """A batch without pixels: labels, what was computed, and which images could not be read for that."""
        skipped = [
            Skipped(place, self.skipped[i])
            for place, (i, _, _) in enumerate(keys)
            if i in self.skipped
        ]
        return ImageBatch(None, self.labels(keys), skipped=tuple(skipped), **computed)

    def _column(
        self, name: str, keys: Sequence[Key], dtype: torch.dtype, shape: tuple[int, ...]
    ) -> Tensor:
        rows = torch.empty((len(keys), *shape), dtype=dtype)
        target, size = _as_numpy(rows), self.shard_size
        for place, (index, mirror, _) in enumerate(keys):
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
    features: Callable[[Sequence[Key]], StoredFeatures] | None = None,
    batch_size: int = 64,
    shard_size: int = 1024,
) -> Shards:
    """Opens the shards in a folder; where there are none, all processes write them first, together.

    Args:
        source: the images; its ``flip`` says whether mirrored ones are computed too.
        about: what has to agree for these rows to be those that would be computed.
        what: is computed, in a few words, for people.
        place: starts every message.
        features: of images of the source, by their keys, for ``compute`` to find in the batch; None: there are none.
        batch_size: images per call of ``compute``.

    Raises:
        UserError: the folder holds something else, or the disk has too little room; in all processes, where it
            is raised in one.
    """
    if source.crop == "random":
        raise UserError(
            f"{place}: {folder} would hold one crop of each image, and data.crop=random sees another in each epoch; "
            "pass data.crop=center"
        )
    wanted = {**about, "num_images": len(source), "flip": source.flip}
    disk = disk_told_with("give the same command again", place=folder, key=place)
    with together(), disk, contextlib.ExitStack() as stack:
        is_there = gather((folder / INDEX).is_file())[0]
        if is_there and not process_index():
            remove_what_is_held_by_nobody(folder)
        if not is_there and not process_index():
            _enter(stack, folder)
        # Nor was it written by who was there before.
        if not is_there and not gather((folder / INDEX).is_file())[0]:
            writer = _Writer(source, folder, compute, features, wanted, batch_size, shard_size)
            writer.claim(what, place)
            writer.write(what)
        shards = Shards(folder, place)
        for key, value in wanted.items():
            if shards.about.get(key) != value:
                raise UserError(
                    f"{place}: {folder} holds {what} of something else ({key}: {shards.about.get(key)}, "
                    f"here {value}); choose another folder"
                )
    return shards


def _enter(stack: contextlib.ExitStack, folder: Path) -> None:
    """Has the folder for itself, alone or after another command has written the same: runs that need one cache may be
    started together. Of several processes the others would wait for the first in vain, so these are refused."""
    here = only_one_in if num_processes() > 1 else in_turn
    stack.enter_context(here(folder, "a command that writes a cache"))


@dataclass
class _Writer:
    """Writes what is missing of a folder of shards; all processes call its methods."""

    source: ImageSource
    folder: Path
    compute: Compute
    features: Callable[[Sequence[Key]], StoredFeatures] | None
    about: dict[str, Any]
    batch_size: int
    shard_size: int

    def __post_init__(self) -> None:
        # Computed ahead, so that what can't work is found before the folder is there.
        source = self.source
        first = self._computed(source.load([0]), [Key(0)])
        self.bytes = len(source) * sum(t[0].numel() * t.element_size() for t in first.values())
        self.bytes *= 2 if source.flip else 1

    def claim(self, what: str, place: str) -> None:
        """Takes the folder, or goes on in it; looks whether the result will have room."""
        if not process_index():
            self._take_folder(f"{place}: {self.folder}")
            print(f"computing {what} once: {self.bytes / 1e9:.2f} GB in {self.folder}", flush=True)
        gather(None)  # nobody writes before

    def _take_folder(self, named: str) -> None:
        plan = {"about": self.about, "shard_size": self.shard_size}
        file = self.folder / _PLAN
        remove_unfinished(self.folder)
        if file.is_file():
            if read_json(file) != plan:
                raise UserError(f"{named} was begun with something else; choose another folder")
            return
        if any(path.name != LOCK_FILE for path in self.folder.iterdir()):
            raise UserError(f"{named} holds other files; choose another folder")
        free = shutil.disk_usage(self.folder).free
        if self.bytes > free:
            raise UserError(
                f"{named} needs {self.bytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; leave it out"
            )
        write_json(file, plan)

    def write(self, what: str) -> None:
        """Writes each process's share of the shards that are missing, then the index."""
        shards = range(math.ceil(len(self.source) / self.shard_size))
        # One process looks and says which: others may look when some are there.
        missing = None
        if not process_index():
            missing = [number for number in shards if not self._notes(number).is_file()]
        missing = gather(missing)[0] or []
        self._compute(missing, what)
        gather(None)  # all are written
        share, own = shards[process_index() :: num_processes()], []
        with progress(f"checksums of {what}", len(share), "files") as advance:
            for number in share:
                own.append(self._entry(number))
                advance(1)
        described = sorted((e for part in gather(own) for e in part), key=lambda e: e[0]["file"])
        if not process_index():
            index = {
                "format_version": _FORMAT_VERSION,
                "about": self.about,
                "num_images": len(self.source),
                "shard_size": self.shard_size,
                "shards": [entry for entry, _ in described],
                "skipped": {k: v for _, skipped in described for k, v in skipped.items()},
            }
            write_json(self.folder / INDEX, index)
        gather(None)

    def _compute(self, shards: Sequence[int], what: str) -> None:
        # Several are begun at a time, as loader processes take one each.
        begun: defaultdict[int, list[dict[str, Tensor]]] = defaultdict(list)
        skipped: defaultdict[int, dict[str, str]] = defaultdict(dict)
        keys = [Key(i) for number in shards for i in self._images(number)]
        for places, batch in read_images(
            self.source, keys, batch_size=self.batch_size, what=what, together=self.shard_size
        ):
            first = keys[places[0]].index
            number = first // self.shard_size
            begun[number].append(self._rows(batch, [keys[place] for place in places]))
            for position, name, _ in batch.skipped:  # first at a position is whose place it is
                skipped[number].setdefault(str(first + position), printable(name))
            if sum(len(rows[_LABELS]) for rows in begun[number]) == len(self._images(number)):
                own = begun.pop(number)
                columns = {name: torch.cat([rows[name] for rows in own]) for name in own[0]}
                with new_file(self._file(number)) as temporary:
                    write_tensors(temporary, columns)
                write_json(self._notes(number), {"skipped": skipped[number]})

    def _images(self, shard: int) -> range:
        return range(len(self.source))[shard * self.shard_size : (shard + 1) * self.shard_size]

    def _file(self, shard: int) -> Path:
        return self.folder / _NAME.format(shard)

    def _notes(self, shard: int) -> Path:
        """Written after its shard, which it vouches for."""
        return self._file(shard).with_suffix(".json")

    def _entry(self, shard: int) -> tuple[dict[str, Any], dict[str, str]]:
        """What the index says of a shard, and which of its images could not be read."""
        file = self._file(shard)
        about = {"bytes": file.stat().st_size, "checksum": shard_checksum(file)}
        return {"file": file.name} | about, read_json(self._notes(shard))["skipped"]

    def _rows(self, batch: ImageBatch, keys: Sequence[Key]) -> dict[str, Tensor]:
        rows = self._computed(batch, keys)
        if self.source.flip:
            assert batch.images is not None
            flipped = replace(batch, images=batch.images.flip(-1))
            mirrored = self._computed(flipped, [key._replace(mirrored=True) for key in keys])
            rows |= {_MIRRORED + name: value for name, value in mirrored.items()}
        rows[_LABELS] = batch.labels
        return rows

    def _computed(self, batch: ImageBatch, keys: Sequence[Key]) -> dict[str, Tensor]:
        if self.features is not None:
            batch = replace(batch, features=self.features(keys))
        return {name: value.cpu() for name, value in self.compute(batch).items()}


def open_shard(file: Path, num_rows: int) -> Shard:
    """Each tensor of a file, mapped into memory, and as an array that it shares memory with.

    Raises:
        UserError: one has not so many rows.
    """
    with safe_open(file, "pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    if any(tensor.shape[:1] != (num_rows,) for tensor in tensors.values()):
        raise UserError(f"{file.name} has other rows than the {num_rows} of its images")
    return {name: (tensor, _as_numpy(tensor)) for name, tensor in tensors.items()}


def _as_numpy(tensor: Tensor) -> np.ndarray:
    """Shares memory; numpy has no bfloat16, so its bits stand for it."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def shard_checksum(file: Path) -> str:
    """What the index says of a file, to know it by."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
