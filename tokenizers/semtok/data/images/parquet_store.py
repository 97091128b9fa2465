"""A set of Parquet files, whichever way its rows are reached, and the set as a table of the library ``datasets``."""

import bisect
import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from semtok.data.images.encoded import announce
from semtok.data.remote import protocol, short_name
from semtok.errors import UserError
from semtok.storage import first_line


class Cells(ABC):
    """The undecoded images of a column, by their row: see ``ParquetStore``."""

    @abstractmethod
    def read(self, rows: np.ndarray) -> list[dict[str, Any] | None]:
        """``bytes`` and ``path`` of each; None where a cell is empty.

        Raises:
            UserError: a file can't be read.
        """

    def block_sizes(self, rows: np.ndarray) -> tuple[int, ...] | None:
        """How many of these rows, sorted, lie together each time; None: reading any costs the same."""
        return None


class ParquetStore(ABC):
    """A training split and, where there is one, a held-out split; their rows are numbered throughout.

    Args:
        place: as the user named it.
        parts: what they are made of and its number of rows, in order.
        states: what changes when the content does.
        features: of the columns; None where ``prepare`` finds them.
    """

    def __init__(
        self, place: str, *, parts: Sequence[tuple[str, int]], states: Sequence[str], features: Any
    ) -> None:
        self.place, self.features, self.states = place, features, tuple(states)
        is_local = parts and Path(parts[0][0]).is_file()
        self.title = (
            Path(place).name if is_local else short_name(place) if protocol(place) else place
        )
        self._names = [name for name, _ in parts]
        self._ends = list(accumulate(num_rows for _, num_rows in parts))

    @abstractmethod
    def prepare(self) -> tuple[int, ...]:
        """Number of rows of each split; what has to be made first is made.

        Raises:
            UserError: files can't be fetched, are damaged, or differ in their columns.
        """

    @abstractmethod
    def columns(self, names: Sequence[str]) -> Any:
        """These columns of all rows, as something with Arrow's ``column(name)``; after ``prepare``.

        Raises:
            UserError: a file can't be read, or differs in its columns.
        """

    @abstractmethod
    def images(self, column: str) -> Cells:
        """The images of a column; after ``prepare``."""

    @property
    def file_states(self) -> dict[str, str]:
        """See ``ImageSource.file_states``."""
        return {}

    def row_name(self, row: int) -> str:
        """Where a row comes from."""
        part = bisect.bisect_right(self._ends, row)
        return f"{self._names[part]}, row {row - (self._ends[part - 1] if part else 0)}"


class ConvertedStore(ParquetStore):
    """Files that the library ``datasets`` turns into a table once.

    Args:
        builder: of ``datasets``.
        splits: their names in the builder.
    """

    def __init__(self, place: str, builder: Any, splits: Sequence[str], **about: Any) -> None:
        super().__init__(place, **about)
        self.builder, self.splits = builder, tuple(splits)

    def prepare(self) -> tuple[int, ...]:
        import datasets

        if not Path(self.builder.cache_dir).is_dir():
            announce(f"converting '{self.place}', once; kept in {self.builder.cache_dir}")
        with dataset_errors(self.place):
            self.builder.download_and_prepare()
            tables = [self.builder.as_dataset(split=split) for split in self.splits]
        self.table = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        self.features = self.table.features
        return tuple(len(table) for table in tables)

    def columns(self, names: Sequence[str]) -> Any:
        return self.table.data

    def images(self, column: str) -> Cells:
        import datasets

        undecoded = datasets.Image(decode=False)
        return _TableCells(self.table.select_columns([column]).cast_column(column, undecoded))


class _TableCells(Cells):
    """Of a ``datasets.Dataset`` of one column."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def read(self, rows: np.ndarray) -> list[dict[str, Any] | None]:
        (column,) = self.table[rows.tolist()].values()
        return list(column)


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
