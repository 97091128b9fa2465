"""Parquet files where they are: their footers are read at the start, and row groups when a row is asked for.

Nothing is open between two reads, so that sources can be handed to other processes, forked or not.
"""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from semtok.data.images.encoded import announce
from semtok.data.images.parquet_store import Cells, ParquetStore, dataset_errors
from semtok.data.order import BLOCKS_AT_A_TIME
from semtok.data.remote import StoredFile, protocol, read_ranges, short_name, stored_files
from semtok.errors import UserError
from semtok.storage import DAMAGE, cache_folder, first_line, new_file

BLOCK_BYTES = 2**24
"""Small row groups that are neighbours in a file are fetched together, up to so many bytes of images."""
KEPT = BLOCKS_AT_A_TIME
"""Blocks that each process keeps: the order draws from so many at a time, and never goes back within an epoch."""

_TAIL = 2**16  # bytes; most footers are shorter
_GAP = 2**16  # bytes that are fetched in vain rather than by one more request
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
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(_footer, files))


def _footer(file: StoredFile) -> Footer:
    import pyarrow.parquet

    size = min(file.size, _TAIL)
    (tail,) = read_ranges([file.place], [file.size - size], [size])
    length = (
        int.from_bytes(tail[-8:-4], "little") + 8
    )  # the format's end: length of the footer, magic
    if tail.endswith(b"PAR1") and size < length <= file.size:
        (tail,) = read_ranges([file.place], [file.size - length], [length])
    try:
        parts = _Parts(file.size, {file.size - len(tail): tail})
        metadata = pyarrow.parquet.read_metadata(parts)
    except (OSError, ValueError) as error:  # Arrow's own errors are such
        raise UserError(
            f"data.path: {file.place}: damaged, cut short, or no Parquet file ({first_line(error)})"
        ) from None
    digest = hashlib.blake2b(tail[-length:], digest_size=8).hexdigest()
    return Footer(file, metadata, digest)


class StreamedStore(ParquetStore):
    """Parquet files that stay where they are.

    Args:
        splits: files of each split, in order.
        features: see ``ParquetStore``; never None.
    """

    def __init__(self, place: str, splits: Sequence[Sequence[Footer]], *, features: Any) -> None:
        self.footers = [footer for footers in splits for footer in footers]
        self._num_rows = tuple(sum(f.metadata.num_rows for f in footers) for footers in splits)
        super().__init__(
            place,
            parts=[(footer.file.place, footer.metadata.num_rows) for footer in self.footers],
            # The order differs from that of the converted set, so that what is chosen of it does too.
            states=["streamed", *(f"{short_name(f.file.place)} {f.state}" for f in self.footers)],
            features=features,
        )

    @property
    def file_states(self) -> dict[str, str]:
        states: dict[str, str] = {}
        for footer in self.footers:
            name = short_name(footer.file.place)
            # When a file on disk was written counts for nothing here: it may have been moved.
            on_disk = f"{footer.file.size} {footer.digest}"
            state = footer.state if protocol(footer.file.place) else on_disk
            states[name] = f"{states[name]}, {state}" if name in states else state
        return states

    def prepare(self) -> tuple[int, ...]:
        return self._num_rows

    def columns(self, names: Sequence[str]) -> Any:
        import pyarrow

        names = sorted(set(names))
        if not names:
            return None
        kept = {f.file.place: _kept_at(f, names) for f in self.footers if protocol(f.file.place)}
        todo = sum(not file.is_file() for file in kept.values())
        if todo:
            announce(
                f"reading {', '.join(names)} of {todo} Parquet files, once; kept in {cache_folder('parquet')}"
            )

        def read(footer: Footer) -> Any:
            file = kept.get(footer.file.place)
            table = _read_kept(file) if file is not None else None
            if table is None:
                table = _read_groups(footer, range(footer.metadata.num_row_groups), names)
                if file is not None:
                    _keep(table, file)
            return _cast(footer, table, {name: self.features[name] for name in names})

        with ThreadPoolExecutor(16) as pool:
            return pyarrow.concat_tables(list(pool.map(read, self.footers)))

    def images(self, column: str) -> Cells:
        return StreamedCells(self.footers, column)


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
        table = _read_groups(footer, groups, [self.column])
        undecoded = {self.column: datasets.Image(decode=False)}
        return _cast(footer, table, undecoded).column(self.column)


# One file -----------------------------------------------------------------------------------------


def _blocks(footer: Footer, column: str) -> list[tuple[range, int]]:
    """Row groups that are fetched together, and their number of rows."""
    blocks: list[tuple[range, int]] = []
    filled = BLOCK_BYTES
    for group in range(footer.metadata.num_row_groups):
        num_rows = footer.metadata.row_group(group).num_rows
        size = sum(num_bytes for _, num_bytes in _chunks(footer, group, [column]))
        if filled + size <= BLOCK_BYTES:
            groups, own = blocks.pop()
            blocks.append((range(groups.start, group + 1), own + num_rows))
            filled += size
        elif num_rows:
            blocks.append((range(group, group + 1), num_rows))
            filled = size
    return blocks


def _chunks(footer: Footer, group: int, columns: Sequence[str]) -> list[tuple[int, int]]:
    """Where columns of a row group lie: (offset, size) of each of their parts."""
    about, found = footer.metadata.row_group(group), []
    for number in range(about.num_columns):
        chunk = about.column(number)
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in columns):
            first = chunk.data_page_offset
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                first = min(first, chunk.dictionary_page_offset)
            found.append((first, chunk.total_compressed_size))
    return found


def _read_groups(footer: Footer, groups: Sequence[int], columns: Sequence[str]) -> Any:
    """Columns of row groups as a ``pyarrow.Table``; of the file no more is fetched."""
    import pyarrow.parquet

    place = footer.file.place
    spans: list[list[int]] = []
    for offset, size in sorted(c for g in groups for c in _chunks(footer, g, columns)):
        if spans and offset - sum(spans[-1]) <= _GAP:
            spans[-1][1] = offset + size - spans[-1][0]
        else:
            spans.append([offset, size])
    offsets, sizes = [offset for offset, _ in spans], [size for _, size in spans]
    found = read_ranges([place] * len(spans), offsets, sizes)
    parts = _Parts(footer.file.size, dict(zip(offsets, found, strict=True)))
    try:
        file = pyarrow.parquet.ParquetFile(parts, metadata=footer.metadata)
        table = file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
        return table.select(list(columns))
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(
            f"data.path: {place}: damaged, or changed since this run began ({first_line(error)})"
        ) from None


def _cast(footer: Footer, table: Any, features: Mapping[str, Any]) -> Any:
    """As ``datasets`` does where it makes one table of several files."""
    import datasets
    from datasets.table import table_cast

    with dataset_errors(footer.file.place):
        return table_cast(table, datasets.Features(features).arrow_schema)


class _Parts(io.RawIOBase):
    """A file of which only some parts are at hand.

    Args:
        size: of the whole file, in bytes.
        parts: by their offsets.
    """

    def __init__(self, size: int, parts: Mapping[int, bytes]) -> None:
        self._size, self._parts, self._position = size, parts, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        for offset, part in self._parts.items():
            if offset <= self._position < offset + len(part):
                first = self._position - offset
                found = part[first : first + size if size >= 0 else None]
                self._position += len(found)
                return found
        raise ValueError(f"its footer names bytes {self._position} and on, which are no part of it")


# Columns of files behind URLs, kept ---------------------------------------------------------------


def _kept_at(footer: Footer, names: Sequence[str]) -> Path:
    key = "\n".join((_LAYOUT, footer.file.place, footer.state, *names))
    digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return cache_folder("parquet") / f"{digest}.parquet"


def _keep(table: Any, file: Path) -> None:
    import pyarrow.parquet

    with new_file(file) as temporary:
        pyarrow.parquet.write_table(table, temporary)


def _read_kept(file: Path) -> Any:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file)
    except DAMAGE:  # made anew
        return None
