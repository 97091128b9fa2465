"""Images in tar files, in WebDataset's layout: on disk, or behind a URL. Any of them can be read at any time."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib.recfunctions import append_fields

from semtok.data.images.attributes import read_attributes
from semtok.data.images.encoded import StoredConfig, StoredImages, split_rows
from semtok.data.images.labels import UNLABELLED, Labels, number_classes, plain_labels
from semtok.data.images.states import index_state, joined
from semtok.data.images.tar_index import FIELDS, index_shards
from semtok.data.left_out import LeftOut
from semtok.data.remote import (
    StoredFile,
    named_files,
    protocol,
    read_ranges,
    short_name,
    stored_files,
)
from semtok.errors import UserError
from semtok.extras import need
from semtok.privacy import without_secrets


class TarsConfig(StoredConfig):
    """Settings of images in tar files.

    A sample is what neighbours in a file hold whose names are equal up to the first dot, as WebDataset has it:
    ``0001.jpg`` with ``0001.cls`` (a number or a name), or ``0001.json`` with a ``label``.
    """

    kind: Literal["tars"] = "tars"
    path: str | tuple[str, ...]
    """Files or URLs, with ``{000..012}``, ``{a,b}``, ``*``, ``[a-z]``, and in paths ``?``."""
    validation: str | tuple[str, ...] | None = None
    """Files or URLs of the held-out images; None: some of ``path`` are held out."""
    image_key: str | None = None
    """Ending of the images, as ``jpg``; to be given where samples hold several."""
    attributes: str | None = None
    """A CSV table of what the images show, for probes, as for folders; it names them as the tar files do."""


class Tars(StoredImages):
    """Images of tar files, in the order of the files and of their members.

    Args:
        shards: tar files.
        table: where the images of all shards lie, as ``index_shards`` tells, with the number of the ``shard``.
        title, rows, labels, about: see ``StoredImages``.
    """

    expected = "members such as 0001.jpg (for other endings, data.image_key=…)"

    def __init__(
        self,
        title: str,
        shards: Sequence[StoredFile],
        table: np.ndarray,
        rows: np.ndarray,
        labels: torch.Tensor,
        **about: Any,
    ) -> None:
        super().__init__(rows, labels, place=title, title=title, **about)
        self.shards, self.table = list(shards), table

    @property
    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(f"{shard.place.rpartition('/')[2]} {shard.state}\n".encode())
        digest.update(self.rows.tobytes())
        return f"{self.name} {digest.hexdigest()}"

    @property
    def file_states(self) -> dict[str, str]:
        ends = np.searchsorted(self.table["shard"], np.arange(len(self.shards) + 1))
        states = []
        for number, shard in enumerate(self.shards):
            own = self.table[ends[number] : ends[number + 1]][list(FIELDS)]
            # When a file on disk was written counts for nothing here: it may have been moved.
            stamp = f" {shard.stamp}" if protocol(shard.place) else ""
            states.append((short_name(shard.place), index_state(own) + stamp))
        return joined(states)

    @classmethod
    def open(cls, config: TarsConfig) -> tuple["Tars", "Tars"]:
        """The training and the held-out images.

        Raises:
            UserError: a file is missing, damaged or cut short, there is no readable image in either part, some images
                have labels and others have none, or a table of attributes does not fit.
        """
        need("webdataset", "webdataset", extra="data", place="data.kind: tars ")
        train = _found(config.path, "data.path")
        validation = []
        if config.validation is not None:
            validation = _found(config.validation, "data.validation")
        both = {shard.place for shard in train} & {shard.place for shard in validation}
        if both:
            raise UserError(
                f"data.validation: '{min(both)}' is in data.path too; leave it out of one"
            )
        shards = [*train, *validation]
        left_out = LeftOut()
        indices = index_shards(shards, config.image_key, left_out)
        numbers = np.arange(len(shards), dtype=np.int32)
        shard = np.repeat(numbers, [len(index) for index in indices])
        table = append_fields(np.concatenate(indices), "shard", shard, usemask=False)
        num_train, num_images = sum(map(len, indices[: len(train)])), len(table)
        title = _title(config.path)
        parts = split_rows(num_images, num_train if validation else None, config)
        class_names, labels = _classes(table, parts[0] if validation else None, title)
        if class_names == UNLABELLED:
            _note_folders(table, left_out)
        attributes = None
        if config.attributes is not None:
            members = [_text(member) for member in table["member"].tolist()]
            attributes = read_attributes(Path(config.attributes), members, left_out)
        return cls.parts_of(
            (title, shards, table),
            parts,
            labels,
            config,
            class_names=class_names,
            attributes=attributes,
            left_out=left_out,
        )

    def contents(self, indices: Sequence[int]) -> list[bytes]:
        found = self.table[self.rows[list(indices)]]
        places = [self.shards[shard].place for shard in found["shard"]]
        return read_ranges(places, found["offset"].tolist(), found["size"].tolist())

    def image_name(self, index: int) -> str:
        found = self.table[self.rows[index]]
        return f"{without_secrets(self.shards[found['shard']].place)}: {_text(found['member'])}"


def _note_folders(table: np.ndarray, left_out: LeftOut) -> None:
    """Counts folders in the archives, which nobody takes for classes."""
    folders = {member.rpartition(b"/")[0]: member for member in table["member"].tolist()}
    if len(folders) > 1:
        for folder in sorted(folders):
            left_out.add(
                "folders that are not taken for classes, as tar files label by .cls or .json",
                _text(folder),
            )


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def _listed(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def _found(patterns: str | tuple[str, ...], key: str) -> list[StoredFile]:
    return stored_files(named_files(_listed(patterns), key=key), key=key, kind="tar")


def _title(patterns: str | tuple[str, ...]) -> str:
    first, *others = _listed(patterns)
    return f"{short_name(first)} and {len(others)} more" if others else short_name(first)


def _classes(
    table: np.ndarray, known: np.ndarray | None, title: str
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the class of each image."""
    unlabelled = np.flatnonzero(table["label"] == b"")
    if len(unlabelled) == len(table):
        return UNLABELLED, torch.zeros(len(table), dtype=torch.int64)
    if len(unlabelled):
        raise UserError(
            f"data.path: {title}: {len(unlabelled)} of {len(table)} images have no label, the first of them "
            f"{_text(table['member'][unlabelled[0]])}; label all or none"
        )
    values, codes = np.unique(table["label"], return_inverse=True)
    labels = Labels(tuple(value.decode() for value in values.tolist()), codes.astype(np.int64))
    return number_classes(plain_labels(labels, place=title), known, place=title)
