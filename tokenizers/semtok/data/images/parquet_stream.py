"""Parquet files where they are: their footers are read at the start, and row groups when a row is asked for.

Nothing is open between two reads, so that sources can be handed to other processes, forked or not.
"""

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semtok.data.order import BLOCKS_AT_A_TIME
from semtok.data.remote import StoredFile, protocol, read_ranges, stored_files
from semtok.errors import UserError
from semtok.progress import progress
from semtok.storage import DAMAGE, as_damage, cache_folder, digest, first_line, new_file

BLOCK_BYTES = 2**24
"""Small row groups that are neighbours in a file are fetched together, up to so many bytes of images."""
KEPT = BLOCKS_AT_A_TIME
"""Blocks that each process keeps: the order draws from so many at a time, and never goes back within an epoch."""

_TAIL = 2**16  # bytes; most footers are shorter
_LAYOUT = "1"  # of the kept columns


@dataclass(frozen=True)
class Footer:
    """What the end of a Parquet file tells.

    Attributes:
        metadata: a ``pyarrow.parquet.FileMetaData``: row groups, their sizes and places, and the columns.
        digest: of the footer's bytes, which give the size of every part of the file.
    """

    file: StoredFile
    metadata: Any
    digest: str

    @property
    def state(self) -> str:
        """What changes when the content does."""
        return f"{self.file.state} {self.digest}"


def read_footers(places: Sequence[str], *, key: str = "data.path") -> list[Footer]:
    """The footers of files or URLs, many at once.

    Args:
        key: the setting, for messages about files that are not there.

    Raises:
        UserError: a file is missing or can't be read, is damaged, or no Parquet file.
    """
    files = stored_files(places, key=key, kind="Parquet")
    footers = []
    with (
        progress("reading footers of Parquet files", len(files), "files") as advance,
        ThreadPoolExecutor(16) as pool,
    ):
        for footer in pool.map(_footer, files):
            footers.append(footer)
            advance(1)
    return footers


def _footer(file: StoredFile) -> Footer:
    import pyarrow.parquet

    size = min(file.size, _TAIL)
    (tail,) = read_ranges([file.place], [file.size - size], [size])
    length = int.from_bytes(tail[-8:-4], "little") + 8  # the format's end: the footer's, and magic
    if tail.endswith(b"PAR1") and size < length <= file.size:
        (tail,) = read_ranges([file.place], [file.size - length], [length])
    try:
        metadata = pyarrow.parquet.read_metadata(pyarrow.BufferReader(tail))
    except (OSError, ValueError) as error:  # Arrow's own errors are such
        raise UserError(
            f"data.path: {file.place}: damaged, cut short, or no Parquet file ({first_line(error)})"
        ) from None
    return Footer(file, metadata, hashlib.blake2b(tail[-length:], digest_size=8).hexdigest())


class Cells(ABC):
    """The undecoded images of a column."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> list[dict[str, Any] | None]:
        """``bytes`` and ``path`` of each row; None where a cell is empty.

        Raises:
            UserError: a file can't be read.
        """

    def block_sizes(self, rows: np.ndarray) -> tuple[int, ...] | None:
        """How many of these rows, sorted, lie together each time; None: reading any costs the same."""
        return None


class StreamedCells(Cells):
    """A column of images, of which the newest blocks that were asked for are kept in memory.

    A block is a row group, or neighbours that are small, see ``BLOCK_BYTES``.
    """

    def __init__(self, footers: Sequence[Footer], column: str) -> None:
        self.footers, self.column = list(footers), column
        self._blocks: list[tuple[int, range]] = []
        """Number of the file, its row groups."""
        ends, end = [], 0
        for number, footer in enumerate(footers):
            for groups, num_rows in _blocks(footer, column):
                self._blocks.append((number, groups))
                ends.append(end := end + num_rows)
        self._ends = np.array(ends, dtype=np.int64)
        self._held: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}  # another process fetches its own

    def read(self, rows: np.ndarray) -> list[dict[str, Any] | None]:
        blocks = np.searchsorted(self._ends, rows, side="right").tolist()
        cells = []
        for block, row in zip(blocks, rows.tolist(), strict=True):
            column = self._block(block)
            cells.append(column[row - int(self._ends[block])].as_py())  # from the block's end
        return cells

    def block_sizes(self, rows: np.ndarray) -> tuple[int, ...]:
        blocks = np.searchsorted(self._ends, rows, side="right")
        return tuple(np.unique(blocks, return_counts=True)[1].tolist())

    def _block(self, number: int) -> Any:
        if number not in self._held:
            while len(self._held) >= KEPT:
                self._held.popitem(last=False)
            self._held[number] = self._fetched(number)
        self._held.move_to_end(number)
        return self._held[number]

    def _fetched(self, number: int) -> Any:
        import datasets

        file, groups = self._blocks[number]
        footer = self.footers[file]
        table = read_groups(footer, groups, [self.column])
        undecoded = {self.column: datasets.Image(decode=False)}
        return cast(footer, without_view(table, self.column), undecoded).column(self.column)


# One file -----------------------------------------------------------------------------------------


def _blocks(footer: Footer, column: str) -> list[tuple[range, int]]:
    """Row groups that are fetched together, and their number of rows."""
    blocks: list[tuple[range, int]] = []
    filled = BLOCK_BYTES
    for group in range(footer.metadata.num_row_groups):
        about = footer.metadata.row_group(group)
        chunks = map(about.column, range(about.num_columns))
        size = sum(
            chunk.total_compressed_size
            for chunk in chunks
            if f"{chunk.path_in_schema}.".startswith(f"{column}.")
        )
        if filled + size <= BLOCK_BYTES:
            groups, own = blocks.pop()
            blocks.append((range(groups.start, group + 1), own + about.num_rows))
            filled += size
        elif about.num_rows:
            blocks.append((range(group, group + 1), about.num_rows))
            filled = size
    return blocks


def read_groups(footer: Footer, groups: Sequence[int], columns: Sequence[str]) -> Any:
    """Columns of row groups as a ``pyarrow.Table``; of the file no more is fetched, neighbours at once."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(_file(footer), metadata=footer.metadata, pre_buffer=True)
    try:
        table = file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        return table.select(list(columns))
    except UserError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"data.path: {footer.file.place}: damaged, or changed since this run began ({first_line(error)})"
        ) from None


def without_view(table: Any, column: str) -> Any:
    """The table, of which a column of views of bytes is one of bytes, from which images are made."""
    import pyarrow

    field = table.schema.field(column)
    if not pyarrow.types.is_binary_view(field.type):
        return table
    place, plain = table.schema.get_field_index(column), pyarrow.binary()
    return table.set_column(place, field.with_type(plain), table.column(column).cast(plain))


def cast(footer: Footer, table: Any, features: Mapping[str, Any]) -> Any:
    """As ``datasets`` does where it makes one table of several files."""
    import datasets
    from datasets.table import table_cast

    with dataset_errors(footer.file.place):
        return table_cast(table, datasets.Features(features).arrow_schema)


@contextlib.contextmanager
def dataset_errors(place: str) -> Iterator[None]:
    """What ``datasets`` raises where data or the network can't work, in one line."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error  # of a failed conversion
        raise UserError(f"data.path: {place}: {first_line(cause)}") from None


def _file(footer: Footer) -> Any:
    """The file to read from; every read is a request of its own, repeated where it fails."""
    from fsspec.spec import AbstractBufferedFile

    place, size = footer.file.place, footer.file.size

    class Fetched(AbstractBufferedFile):
        def _fetch_range(self, start: int, end: int) -> bytes:
            return read_ranges([place], [start], [min(end, size) - start])[0]

    return Fetched(None, place, size=size, cache_type="none")


# Columns of files behind URLs, kept ---------------------------------------------------------------


def kept_at(footer: Footer, names: Sequence[str]) -> Path | None:
    """Where columns are kept; None: the file is on disk itself."""
    if not protocol(footer.file.place):
        return None
    key = digest(_LAYOUT, footer.file.place, footer.state, *names)
    return cache_folder("parquet") / f"{key}.parquet"


def read_columns(footer: Footer, names: Sequence[str], features: Mapping[str, Any]) -> Any:
    """Whole columns of a file as a ``pyarrow.Table``.

    Raises:
        UserError: the file can't be read, or differs in its columns.
    """
    import pyarrow.parquet

    kept, table = kept_at(footer, names), None
    with contextlib.suppress(*DAMAGE), as_damage():  # then they are read anew
        table = pyarrow.parquet.read_table(kept) if kept is not None else None
    if table is None:
        table = read_groups(footer, range(footer.metadata.num_row_groups), names)
        if kept is not None:
            with new_file(kept) as temporary:
                pyarrow.parquet.write_table(table, temporary)
    return cast(footer, table, {name: features[name] for name in names})
