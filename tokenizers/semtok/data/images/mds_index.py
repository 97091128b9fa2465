"""The index of a set in the MDS format of MosaicML Streaming: which shards there are, and what their columns hold.

The format is read and written here, and the library itself is asked only to decompress shards and for digests that
Python lacks. Streaming 0.13 needs numpy < 2.2, transformers < 5 and the clients of seven clouds (490 MB), takes seconds
to import, and fetches nothing by http. Its dataset draws an order of its own, and its reader takes names, places and
sizes as an index tells them. Here an index is a stranger's file.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from pydantic import ConfigDict, Field

from semtok.data.remote import read_if_there, stored_files, within
from semtok.errors import UserError, did_you_mean
from semtok.privacy import without_secrets
from semtok.settings import Config, parse
from semtok.storage import digest, first_line

INDEX = "index.json"
LABEL = "label"
"""The usual column of labels, and the one that ``convert`` writes."""
PICKLE = "pkl"
IMAGES = ("jpeg", "png", "pil", "bytes")
"""Encodings that hold an image: a file, or of ``pil`` its pixels."""
NUMBERS = {
    "int": "<i8",
    **{
        f"{sign}int{bits}": f"<{sign or 'i'}{bits // 8}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
    **{f"float{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
"""Encodings of one number, with numpy's name of its type."""
TEXTS = ("str", "str_int", "str_float", "str_decimal")
"""Encodings of text, and of numbers as text."""

_MOST_SAMPLES = 2**31
"""Of a set: a number for each stays in memory, so an index that tells of more would end in the machine's."""


class FileInfo(Config):
    """A file, as an index tells of it."""

    model_config = ConfigDict(extra="ignore")

    basename: str
    bytes: int = Field(ge=0, lt=2**32)
    hashes: dict[str, str]
    """Digests, in hexadecimal, by the names of their algorithms."""


class Shard(Config):
    """A shard, as an index tells of it."""

    model_config = ConfigDict(extra="ignore")

    version: Literal[2]
    format: Literal["mds"]
    samples: int = Field(ge=0)
    compression: str | None
    raw_data: FileInfo
    zip_data: FileInfo | None
    column_names: tuple[str, ...]
    column_encodings: tuple[str, ...]
    column_sizes: tuple[int | None, ...]

    @property
    def stored(self) -> FileInfo:
        """The file that lies in the store."""
        return self.zip_data or self.raw_data

    @property
    def state(self) -> str:
        """What changes when the content does."""
        hashes = [f"{name} {value}" for name, value in sorted(self.stored.hashes.items())]
        told = f" {digest(*hashes, size=8)}" if hashes else ""
        return f"{self.samples} images, {self.stored.bytes} bytes{told}"


class _Index(Config):
    model_config = ConfigDict(extra="ignore")

    version: Literal[2]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class MdsIndex:
    """The shards of one folder.

    Attributes:
        place: of the folder, a path or URL.
        state: what changes when the shards do.
    """

    place: str
    shards: tuple[Shard, ...]
    state: str

    @property
    def num_samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @staticmethod
    def state_of(shards: Sequence[Shard]) -> str:
        """What changes when these shards do."""
        return digest(*(shard.model_dump_json() for shard in shards))

    def encodings(self) -> dict[str, str]:
        """Of each column, by name; none where there is no shard."""
        if not self.shards:
            return {}
        first = self.shards[0]
        return dict(zip(first.column_names, first.column_encodings, strict=True))


def read_index(place: str) -> MdsIndex | None:
    """The index in a folder, on disk or behind a URL; None: there is none.

    Raises:
        UserError: it is damaged, of another format, names files outside of the folder, tells of sizes that can't be, or
            its shards differ in their columns.
    """
    file = within(place, INDEX)
    content = read_if_there(file)
    if content is None:
        return None
    where = f"data.path: {without_secrets(file)}"
    try:
        told = json.loads(content)
        if not isinstance(told, dict):
            raise ValueError("no index of shards")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: damaged ({first_line(error)}); fetch it again") from None
    index = parse(_Index, told, where)
    names: set[str] = set()
    for shard in index.shards:
        _check_shard(shard, index.shards[0], where)
        name = shard.stored.basename
        if name in names:
            raise UserError(f"{where}: names the file '{name}' twice; name each shard once")
        names.add(name)
    num_samples = sum(shard.samples for shard in index.shards)
    if num_samples > _MOST_SAMPLES:
        raise UserError(
            f"{where}: tells of {num_samples:,} samples, and {_MOST_SAMPLES:,} are the most; use fewer shards"
        )
    state = MdsIndex.state_of(index.shards)
    if not all(shard.stored.hashes for shard in index.shards):
        # Then nothing else tells one set from another of equal sizes.
        state = digest(state, stored_files([file], key="data.path", kind="JSON")[0].stamp)
    return MdsIndex(place, index.shards, state)


def _check_shard(shard: Shard, first: Shard, where: str) -> None:
    info = shard.stored
    name = info.basename
    asked = unquote(name)  # as servers read it; behind :: fsspec sees another address
    if re.search(r"[\x00-\x1f\x7f\\?#]|::", asked) or {"", ".", ".."} & set(asked.split("/")):
        raise UserError(
            f"{where}: names the file '{name}'; a shard's name is a path within the folder"
        )
    place = f"{where}: {name}"
    if (shard.compression is None) != (shard.zip_data is None):
        raise UserError(
            f"{place}: tells of compression and of no compressed file, or the other way round"
        )
    if 4 * (shard.samples + 2) > shard.raw_data.bytes:
        raise UserError(
            f"{place}: {shard.samples} samples don't fit into {shard.raw_data.bytes} bytes"
        )
    columns = (shard.column_names, shard.column_encodings, shard.column_sizes)
    if len({len(each) for each in columns}) > 1 or len(set(columns[0])) < len(columns[0]):
        raise UserError(f"{place}: its columns have no names, types and sizes of their own")
    if columns != (first.column_names, first.column_encodings, first.column_sizes):
        raise UserError(
            f"{place}: its columns are {_listed(shard)}, those of {first.stored.basename} {_listed(first)}; "
            "use shards of one kind"
        )
    for column, encoding, size in zip(*columns, strict=True):
        known = int(NUMBERS[encoding][2:]) if encoding in NUMBERS else None
        can_be = (size or None) == known or encoding not in NUMBERS
        if not can_be or not 0 <= (size or 0) <= shard.raw_data.bytes:
            raise UserError(f"{place}: '{column}' has {size} bytes, which {encoding} has not")


def _listed(shard: Shard) -> str:
    return ", ".join(
        f"{n} ({e})" for n, e in zip(shard.column_names, shard.column_encodings, strict=True)
    )


# Which columns are used ---------------------------------------------------------------------------


def image_column(encodings: dict[str, str], wanted: str | None, place: str) -> str:
    """The name of the column of images: the one that is asked for, the only one of an image's type, ``image``, ``img``.

    Raises:
        UserError: there is none, there are several, or it holds something else.
    """
    typed = [name for name, encoding in encodings.items() if encoding in IMAGES[:-1]]
    usual = [name for name in ("image", "img") if encodings.get(name) in IMAGES]
    if wanted is not None:
        return checked_column(encodings, wanted, "image_column", IMAGES, place)
    if len(typed) == 1 or usual:
        return typed[0] if len(typed) == 1 else usual[0]
    pickled = next((n for n in ("image", "img") if encodings.get(n) == PICKLE), None)
    if pickled is not None:
        return checked_column(encodings, pickled, "image_column", IMAGES, place)
    raise UserError(
        f"data.image_column: {'several columns' if typed else 'no column'} of images in '{place}'; "
        f"choose of {', '.join(typed or encodings)}"
    )


def checked_column(
    encodings: dict[str, str], name: str, key: str, expected: Sequence[str], place: str
) -> str:
    """The name of a column.

    Args:
        key: the setting, for messages.
        expected: encodings that it may have.

    Raises:
        UserError: there is no such column, or it is of another type; pickles are never read.
    """
    if name not in encodings:
        hint = did_you_mean(name, encodings, f"choose of {', '.join(encodings)}")
        raise UserError(f"data.{key}: no column '{name}' in '{place}'; {hint}")
    if encodings[name] == PICKLE:
        raise UserError(
            f"data.{key}: '{name}' of '{place}' holds pickles ({PICKLE}), which can run code and are never read; write "
            f"it as {expected[0]}"
        )
    if encodings[name] not in expected:
        raise UserError(
            f"data.{key}: '{name}' of '{place}' holds {encodings[name]}; expected {', '.join(expected)}"
        )
    return name
