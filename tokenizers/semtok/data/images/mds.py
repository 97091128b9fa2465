"""Images in the MDS format of MosaicML Streaming, on disk or in an object store: shards, each fetched whole.

The order is semtok's own, with shards as its blocks, and not that of Streaming's dataset. It is a function of the seed
and of the images seen, so that it is the same for any number of processes and after any kill, and flips and crops are
drawn as for every other source.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from semtok.data.images.attributes import ImageAttributes, image_attributes
from semtok.data.images.cells import Ambiguous
from semtok.data.images.encoded import StoredConfig, StoredImages, split_rows
from semtok.data.images.labels import LABEL_NAME, UNLABELLED, Labels, number_classes, plain_labels
from semtok.data.images.layout import TRAINING_NAMES, VALIDATION_NAMES
from semtok.data.images.mds_columns import Columns, joined_labels, load_columns
from semtok.data.images.mds_index import (
    INDEX,
    LABEL,
    NUMBERS,
    PICKLE,
    TEXTS,
    MdsIndex,
    checked_column,
    image_column,
    read_index,
)
from semtok.data.images.mds_shards import KEPT, MdsFiles, image_file, read_samples, sample_bounds
from semtok.data.images.states import joined
from semtok.data.left_out import LeftOut
from semtok.data.remote import protocol, short_name, within
from semtok.errors import UserError
from semtok.privacy import without_secrets

_AT_ONCE = 8  # shards that are fetched
_GIGABYTE = 10**9


class MdsConfig(StoredConfig):
    """Settings of images in the MDS format, as MosaicML Streaming and ``convert`` write it.

    A folder holds shards and their ``index.json``, or ``train/`` and where there is one ``val/`` with those. Training
    takes shards in random order and shuffles the images of 16 of them together.
    """

    kind: Literal["mds"] = "mds"
    path: str
    """A folder, or its URL (``https://``, ``s3://``, ``gs://``, ``hf://``)."""
    validation: str | None = None
    """A folder or URL of the held-out images; None: ``val/`` beside ``train/``, or else some of the images are held
    out."""
    image_column: str | None = None
    """None: the only column of a type of images, or ``image``, or ``img``."""
    label_column: str | None = None
    """Numbers or text; None: ``label``, where there is such a column."""
    attributes: tuple[str, ...] = ()
    """Columns of what the images show, for probes: numbers or text."""
    local_gigabytes: float = Field(50.0, gt=0)
    """So much of a set behind a URL stays on this machine's disk, in ``SEMTOK_CACHE``, for all its processes; the
    oldest shards make room. A smaller set is fetched once, a larger one anew in each epoch. 40 shards stay in any
    case."""


class _Place(NamedTuple):
    """Where an image lies: the number of its part, of its shard there, and of its sample in that."""

    part: int
    shard: int
    sample: int


class MdsStore:
    """The shards of a training set and, where there is one, of a held-out set; their samples are numbered throughout.

    Args:
        place: as the user named it.
        parts: their files.
        column: of the images.
    """

    def __init__(self, place: str, parts: Sequence[MdsFiles], column: str) -> None:
        self.place, self.parts, self.column = place, tuple(parts), column
        self._shards = [
            (p, s) for p, part in enumerate(parts) for s in range(len(part.index.shards))
        ]
        samples = [parts[p].index.shards[s].samples for p, s in self._shards]
        self._ends = np.cumsum(samples, dtype=np.int64)
        self._bounds: OrderedDict[int, np.ndarray] = OrderedDict()  # of the newest shards

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_bounds": OrderedDict()}  # another process reads its own

    def where(self, row: int) -> _Place:
        """Where a sample lies."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        return _Place(*self._shards[number], row - self._first(number))

    def block_sizes(self, rows: np.ndarray) -> tuple[int, ...]:
        """How many of these rows, sorted, lie in one shard each time."""
        blocks = np.searchsorted(self._ends, rows, side="right")
        return tuple(np.unique(blocks, return_counts=True)[1].tolist())

    def read(self, rows: np.ndarray) -> list[bytes]:
        """The images of these rows, as files; shards that have to be fetched are fetched at once.

        Raises:
            UserError: a shard can't be had, or is damaged.
        """
        numbers = np.searchsorted(self._ends, rows, side="right")
        needed = np.unique(numbers).tolist()
        own = [np.flatnonzero(numbers == number) for number in needed]
        wanted = [rows[at] - self._first(n) for n, at in zip(needed, own, strict=True)]
        if len(needed) == 1:
            found = [self._samples(needed[0], wanted[0])]
        else:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                found = list(pool.map(self._samples, needed, wanted))
        images = [b""] * len(rows)
        for at, samples in zip(own, found, strict=True):
            for position, image in zip(at.tolist(), samples, strict=True):
                images[position] = image
        return images

    def _first(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _samples(self, number: int, samples: np.ndarray) -> list[bytes]:
        part, own = self._shards[number]
        files = self.parts[part]
        shard = files.index.shards[own]
        place = f"data.path: {files.told(own)}"
        encoding = shard.column_encodings[shard.column_names.index(self.column)]

        def read(file: Path) -> list[bytes]:
            bounds = self._bounds.get(number)
            if bounds is None:
                bounds = sample_bounds(file, shard, place)
                self._bounds[number] = bounds
                while len(self._bounds) > KEPT:
                    self._bounds.popitem(last=False)
            return read_samples(file, samples.tolist(), bounds, shard, self.column, place)

        return [image_file(content, encoding) for content in files.opened(own, read)]

    def sample_name(self, row: int) -> str:
        """Where a sample comes from."""
        part, shard, sample = self.where(row)
        return f"{self.parts[part].told(shard)}, sample {sample}"


class Mds(StoredImages):
    """Samples of shards in the MDS format.

    Args:
        store: the shards.
        rows, labels, about: see ``StoredImages``; the rows are sorted.
    """

    expected = "shards with images"

    def __init__(
        self, store: MdsStore, rows: np.ndarray, labels: torch.Tensor, **about: Any
    ) -> None:
        place = store.place
        is_url = bool(protocol(place))
        title = (
            short_name(without_secrets(place).rstrip("/…"))
            if is_url
            else Path(place).absolute().name
        )
        super().__init__(rows, labels, place=title, title=title, **about)
        self.store = store
        self.block_size = store.block_sizes(rows)

    @property
    def identity(self) -> str:
        digest = hashlib.blake2b(self.rows.tobytes(), digest_size=8)
        digest.update("\n".join(part.index.state for part in self.store.parts).encode())
        return f"{self.name} {digest.hexdigest()}"

    @property
    def file_states(self) -> dict[str, str]:
        shards = [shard for part in self.store.parts for shard in part.index.shards]
        return joined((shard.stored.basename, shard.state) for shard in shards)

    @classmethod
    def open(cls, config: MdsConfig) -> tuple["Mds", "Mds"]:
        """The training and the held-out images.

        Raises:
            UserError: there is no index, or it is damaged; a shard on disk is missing or of another size; a column is
                missing, of another type, or of pickles; there is no readable image in either part.
        """
        indices = _find_parts(config)
        train = indices[0]
        if not train.num_samples:
            raise UserError(f"data.path: '{config.path}' holds no samples; expected {cls.expected}")
        encodings, left_out = train.encodings(), LeftOut()
        image, label = _used_columns(encodings, config)
        for index in indices[1:]:
            if index.encodings() and index.encodings() != encodings:
                raise UserError(
                    f"data.validation: the columns of '{index.place}' are {', '.join(index.encodings())}, those of "
                    f"'{train.place}' {', '.join(encodings)}, or of other types; use shards of one kind"
                )
        _note_columns(encodings, {image, label, *config.attributes}, label, left_out)
        files = [MdsFiles(index, config.local_gigabytes * _GIGABYTE) for index in indices]
        for each in files:
            each.check()
        store = MdsStore(config.path, files, image)
        num_samples = [index.num_samples for index in indices]
        parts = split_rows(sum(num_samples), num_samples[0] if len(indices) > 1 else None, config)
        names = [*([label] if label is not None else []), *config.attributes]
        columns = [load_columns(each, names) for each in files]
        known = parts[0] if len(indices) > 1 else None
        class_names, labels = UNLABELLED, torch.zeros(sum(num_samples), dtype=torch.int64)
        if label is not None:
            class_names, labels = _classes(columns, label, known, config.path)
        return cls.parts_of(
            (store,),
            parts,
            labels,
            config,
            class_names=class_names,
            attributes=_attributes(columns, config),
            left_out=left_out,
        )

    def contents(self, indices: Sequence[int]) -> list[bytes]:
        return self.store.read(self.rows[list(indices)])

    def image_name(self, index: int) -> str:
        return self.store.sample_name(int(self.rows[index]))


def _find_parts(config: MdsConfig) -> list[MdsIndex]:
    """The index of the training images, and where there is one of the held-out images."""
    train, beside = read_index(config.path), ()
    if train is None:
        folders = (within(config.path, name) for name in TRAINING_NAMES)
        train = next(filter(None, map(read_index, folders)), None)
        beside = VALIDATION_NAMES
    if train is None:
        raise UserError(
            f"data.path: no {INDEX} in '{config.path}' or in {TRAINING_NAMES[0]}/ there, or none that may be read; "
            "name the folder that holds it"
        )
    if config.validation is not None:
        held_out = read_index(config.validation)
        if held_out is None:
            raise UserError(
                f"data.validation: no {INDEX} in '{config.validation}'; name the folder that holds it"
            )
        if held_out.place.rstrip("/") == train.place.rstrip("/"):
            raise UserError(f"data.validation: '{held_out.place}' is trained on; hold out others")
        return [train, held_out]
    found = map(read_index, (within(config.path, name) for name in beside))
    return [train, *filter(None, [next(filter(None, found), None)])]


def _used_columns(encodings: dict[str, str], config: MdsConfig) -> tuple[str, str | None]:
    """The names of the column of images and, where there is one, of labels."""
    image = image_column(encodings, config.image_column, config.path)
    label = config.label_column
    if label is None and LABEL in encodings:
        label = LABEL
    columns = [("label_column", label)] if label is not None else []
    for key, name in (*columns, *(("attributes", name) for name in config.attributes)):
        checked_column(encodings, name, key, (*NUMBERS, *TEXTS), config.path)
    return image, label


def _note_columns(
    encodings: dict[str, str], used: set[str | None], label: str | None, left_out: LeftOut
) -> None:
    """Counts columns that are not read."""
    for name, encoding in encodings.items():
        if name not in used:
            kind = "columns of pickles, which are never read" if encoding == PICKLE else "columns"
            if label is None and LABEL_NAME.search(name) and encoding != PICKLE:
                kind = "columns that may hold labels (data.label_column=…)"
            left_out.add(kind, name)


def _classes(
    columns: Sequence[Columns], name: str, known: np.ndarray | None, place: str
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the class of each sample."""
    labels = joined_labels([part.labels[name] for part in columns])
    names = columns[0].class_names if name == LABEL else None
    if names is None or set(labels.values) - set(names):
        return number_classes(plain_labels(labels, place=place), known, place=place)
    numbers = {value: number for number, value in enumerate(names)}
    by_code = torch.tensor([numbers[value] for value in labels.values], dtype=torch.int64)
    return names, by_code[torch.from_numpy(labels.codes)]


def _attributes(columns: Sequence[Columns], config: MdsConfig) -> ImageAttributes | None:
    if not config.attributes:
        return None
    texts = []
    for name in config.attributes:
        labels: Labels = joined_labels([part.labels[name] for part in columns])
        texts.append([labels.values[code] for code in labels.codes])
    try:
        known = image_attributes(config.attributes, texts)
    except Ambiguous as problem:
        raise UserError(
            f"data.attributes: {config.path}: {problem}; mend it or leave the column out"
        ) from None
    if known is None:
        raise UserError(
            "data.attributes: each column is the same in all images; give one that differs"
        )
    return known
