"""The Parquet files of a set of images: on disk, behind URLs, or of a dataset on the Hugging Face Hub."""

import bisect
import glob
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np

from semtok.data.images.encoded import StoredConfig
from semtok.data.images.layout import VALIDATION_NAMES
from semtok.data.images.parquet_stream import (
    Cells,
    Footer,
    StreamedCells,
    dataset_errors,
    kept_at,
    read_columns,
    read_footers,
)
from semtok.data.images.states import joined
from semtok.data.remote import named_files, protocol, short_name
from semtok.errors import UserError
from semtok.extras import need
from semtok.privacy import without_secrets
from semtok.progress import announce, progress, waiting
from semtok.references import is_hub_id
from semtok.storage import cache_folder

_TRAIN, _VALIDATION = "train", "validation"
_KEYS = {_TRAIN: "data.path", _VALIDATION: "data.validation"}


class ParquetConfig(StoredConfig):
    """Settings of images in Parquet files, or of a dataset on the Hugging Face Hub.

    The library ``datasets`` turns them once into an Arrow table in its own cache (``HF_HOME``), as large as the
    files, of which any row can be read at any time. Or they stay where they are, see ``streaming``.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file, a pattern of files (``*``, ``?``, ``[a-z]``), a folder, or a Hub id; where it streams, also a URL or
    several, named with ``{000..012}``, ``{a,b}``, ``*``, ``[a-z]``."""
    streaming: bool = False
    """Leave the files where they are and fetch row groups when they are needed. Training then takes them in random
    order and shuffles the images of 16 of them together; each process holds those 16, and a loader process its own."""
    subset: str | None = None
    """Which configuration of a dataset on the Hub."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the Hub."""
    split: str = "train"
    """Images to train on; files of a folder are told apart by their names."""
    validation: str | None = None
    """Held-out images: another split, or for local files other files; None: a split with a usual name (``validation``,
    ``test``), or else some images of the training split."""
    image_column: str | None = None
    """None: the only column of images, or ``image``."""
    label_column: str | None = None
    """Numbers or text; None: ``label``, where there is such a column."""
    attributes: tuple[str, ...] = ()
    """Columns of what the images show, for probes: numbers, truth values or text."""


class ParquetStore(ABC):
    """A training split and, where there is one, a held-out split; their rows are numbered throughout.

    Args:
        place: as the user named it.
        parts: what they are made of and its number of rows, in order.
        states: what changes when the content does.
        features: of the columns, as ``datasets`` has them.

    Attributes:
        file_states: see ``ImageSource.file_states``.
        other_splits: names of those that nobody asked for.
    """

    def __init__(
        self, place: str, *, parts: Sequence[tuple[str, int]], states: Sequence[str], features: Any
    ) -> None:
        self.place, self.features, self.states = place, features, tuple(states)
        is_local = parts and Path(parts[0][0]).is_file()
        self.title = (
            short_name(place) if protocol(place) else Path(place).name if is_local else place
        )
        self.file_states: dict[str, str] = {}
        self.other_splits: tuple[str, ...] = ()
        self._names = [without_secrets(name) for name, _ in parts]
        self._ends = list(accumulate(num_rows for _, num_rows in parts))

    @property
    def num_rows(self) -> int:
        """Of all splits."""
        return self._ends[-1] if self._ends else 0

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
        """The undecoded images of a column; after ``prepare``."""

    def row_name(self, row: int) -> str:
        """Where a row comes from."""
        part = bisect.bisect_right(self._ends, row)
        return f"{self._names[part]}, row {row - (self._ends[part - 1] if part else 0)}"


class StreamedStore(ParquetStore):
    """Parquet files that stay where they are.

    Args:
        splits: files of each split, in order.
        features: of a dataset's card, which has the say over what the files tell of their columns.
    """

    def __init__(self, place: str, splits: dict[str, list[str]], features: Any = None) -> None:
        footers = _footers(splits)
        self.footers = [footer for split in footers for footer in split]
        own = _common_features(self.footers)
        if features is not None and set(features) != set(own):
            raise UserError(
                f"data.path: {place}: its columns are {', '.join(own)}, and {', '.join(features)} as its card has it; "
                "mend its card"
            )
        self._num_rows = tuple(sum(f.metadata.num_rows for f in split) for split in footers)
        super().__init__(
            place,
            parts=[(footer.file.place, footer.metadata.num_rows) for footer in self.footers],
            # The order differs from that of the converted set, so that what is chosen of it does too.
            states=["streamed", *(f"{short_name(f.file.place)} {f.state}" for f in self.footers)],
            features=features or own,
        )
        self.file_states = _file_states(self.footers)

    def prepare(self) -> tuple[int, ...]:
        return self._num_rows

    def columns(self, names: Sequence[str]) -> Any:
        import pyarrow

        names = sorted(set(names))
        if not names:
            return None
        kept = [kept_at(footer, names) for footer in self.footers]
        todo = sum(file is not None and not file.is_file() for file in kept)
        if todo:
            announce(
                f"reading {', '.join(names)} of {todo} Parquet files, once; kept in {cache_folder('parquet')}"
            )
        what, tables = f"reading {', '.join(names)}", []
        with (
            progress(what, len(self.footers), "files") as advance,
            ThreadPoolExecutor(64) as pool,  # of a file, a row group is asked for after the other
        ):
            for table in pool.map(lambda f: read_columns(f, names, self.features), self.footers):
                tables.append(table)
                advance(1)
        return pyarrow.concat_tables(tables)

    def images(self, column: str) -> Cells:
        return StreamedCells(self.footers, column)


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
        with dataset_errors(self.place), waiting(f"converting '{self.place}'"):
            self.builder.download_and_prepare()
            tables = [self.builder.as_dataset(split=split) for split in self.splits]
        self.table = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        self.features = self.table.features
        return tuple(len(table) for table in tables)

    def columns(self, names: Sequence[str]) -> Any:
        return self.table.data

    def images(self, column: str) -> Cells:
        import datasets

        images = self.table.select_columns([column])
        if getattr(images.features[column], "dtype", None) == "binary_view":
            images = images.cast_column(column, datasets.Value("binary"))
        return _TableCells(images.cast_column(column, datasets.Image(decode=False)))


class _TableCells(Cells):
    """Of a ``datasets.Dataset`` of one column."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def read(self, rows: np.ndarray) -> list[dict[str, Any] | None]:
        (column,) = self.table[rows.tolist()].values()
        return list(column)


# Which files there are ----------------------------------------------------------------------------


def find_store(config: ParquetConfig) -> ParquetStore:
    """Finds files and looks at their columns, or finds a dataset on the Hub; nothing is converted yet.

    Raises:
        UserError: nothing is there, it has no such split, or a file is damaged.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = config.path
    named = _named_splits(path, "data.path", config.streaming)
    if named is None:
        if not is_hub_id(path) or path.endswith(".parquet"):
            raise UserError(
                f"data.path: no file or folder '{path}'; pass data.path=…, or the id of a dataset on the Hub (org/name)"
            )
        return _hub_store(config)
    for key in ("subset", "revision"):
        if getattr(config, key) is not None:
            kind = "a URL" if protocol(path) else "local"
            raise UserError(f"data.{key}: only datasets on the Hub have one; '{path}' is {kind}")
    if config.split not in named:
        raise UserError(f"data.split: '{path}' has no '{config.split}'; it has: {', '.join(named)}")
    files = {_TRAIN: named[config.split]}
    held_out = _held_out_files(config, named)
    both = {_resolved(file) for file in files[_TRAIN]} & {_resolved(file) for file in held_out}
    if both:
        raise UserError(f"data.validation: '{min(both)}' is trained on; hold out other files")
    if held_out:
        files[_VALIDATION] = held_out
    store = StreamedStore(path, files) if config.streaming else _converted_store(path, files)
    used = {file for own in files.values() for file in own}
    store.other_splits = tuple(name for name, own in named.items() if not used & set(own))
    return store


def _resolved(file: str) -> str:
    return file if protocol(file) else str(Path(file).resolve())


def _usual_held_out(named: Sequence[str], split: str) -> str | None:
    return next((name for name in VALIDATION_NAMES if name in named and name != split), None)


def _held_out_files(config: ParquetConfig, named: dict[str, list[str]]) -> list[str]:
    validation = config.validation
    if validation is None:
        validation = _usual_held_out(list(named), config.split)
        return [] if validation is None else named[validation]
    if validation in named:
        return named[validation]
    others = _named_splits(validation, "data.validation", config.streaming)
    if others is None:
        raise UserError(
            f"data.validation: no file or folder '{validation}', nor such a split in '{config.path}', which has: "
            f"{', '.join(named)}"
        )
    return sorted(file for files in others.values() for file in files)


def _named_splits(path: str, key: str, streaming: bool) -> dict[str, list[str]] | None:
    """Files by split, or None where no file is named."""
    if not protocol(path):
        return _local_splits(path, key)
    if not streaming:
        raise UserError(f"{key}: '{path}' is a URL, which only data.streaming=true reads")
    for package in ("fsspec", "braceexpand"):
        need(package, package, extra="data", place=f"{key}: {path} ")
    return {_TRAIN: named_files([path], key=key)}


def _local_splits(path: str, key: str) -> dict[str, list[str]] | None:
    """Files by split, or None where nothing local is named."""
    import datasets
    from datasets.exceptions import DatasetsError

    if not Path(path).is_dir():
        found = [path] if Path(path).is_file() else sorted(glob.glob(path, recursive=True))
        if not found and glob.has_magic(path):
            raise UserError(f"{key}: no file is named like '{path}'")
        return {_TRAIN: found} if found else None
    try:  # it knows how the files of the splits are called
        named = datasets.load_dataset_builder("parquet", data_dir=path).config.data_files
    except (DatasetsError, OSError, ValueError):
        named = {}
    splits = {
        str(split): sorted(str(file) for file in files if str(file).endswith(".parquet"))
        for split, files in named.items()
    }
    splits = {split: files for split, files in splits.items() if files}
    if not splits:
        raise UserError(f"{key}: no .parquet files in '{path}'")
    return splits


def _converted_store(path: str, splits: dict[str, list[str]]) -> ParquetStore:
    import datasets

    footers = [footer for own in _footers(splits) for footer in own]
    features = _common_features(footers)
    parts = [(footer.file.place, footer.metadata.num_rows) for footer in footers]
    files = [Path(file) for own in splits.values() for file in own]
    states = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    with dataset_errors(path):
        builder = datasets.load_dataset_builder("parquet", data_files=splits)
    store = ConvertedStore(
        path, builder, list(splits), parts=parts, states=states, features=features
    )
    store.file_states = _file_states(footers)
    return store


def _file_states(footers: Sequence[Footer]) -> dict[str, str]:
    """See ``ImageSource.file_states``."""
    # When a file on disk was written counts for nothing here: it may have been moved.
    return joined(
        (
            short_name(footer.file.place),
            footer.state if protocol(footer.file.place) else f"{footer.file.size} {footer.digest}",
        )
        for footer in footers
    )


def _footers(splits: dict[str, list[str]]) -> list[list[Footer]]:
    return [read_footers(files, key=_KEYS[name]) for name, files in splits.items()]


def _common_features(footers: Sequence[Footer]) -> Any:
    """The columns of files, as the first has them.

    Raises:
        UserError: in another their names differ, or their classes in names or order.
    """
    import datasets

    def classes(feature: Any) -> list[str] | None:
        return feature.names if isinstance(feature, datasets.ClassLabel) else None

    features, first = None, footers[0].file.place
    for footer in footers:
        place = footer.file.place
        with dataset_errors(place):
            own = datasets.Features.from_arrow_schema(footer.metadata.schema.to_arrow_schema())
        features = features or own
        if set(own) != set(features):
            raise UserError(
                f"data.path: {place}: its columns are {', '.join(own)}, those of {first} {', '.join(features)}; "
                "use files of one kind"
            )
        for name, feature in own.items():
            if classes(feature) != classes(features[name]):
                raise UserError(
                    f"data.path: {place}: the classes in column '{name}' are not those of {first}; "
                    "use files of one kind"
                )
    return features


def _hub_store(config: ParquetConfig) -> ParquetStore:
    import datasets

    path, streaming = config.path, config.streaming
    kept = "" if streaming else f"; kept in {datasets.config.HF_DATASETS_CACHE}"
    announce(f"opening the dataset {path} of the Hugging Face Hub{kept}")
    with dataset_errors(f"no file or folder '{path}', and as a dataset on the Hub"):
        builder = datasets.load_dataset_builder(path, name=config.subset, revision=config.revision)
        about = (builder.info.splits, builder.info.features)
        if not streaming and None in about:  # the dataset's card does not tell
            builder.download_and_prepare()
    files = {str(name): list(own) for name, own in (builder.config.data_files or {}).items()}
    known = files if streaming else builder.info.splits
    for key, name in (("split", config.split), ("validation", config.validation)):
        if name is not None and name not in known:
            raise UserError(f"data.{key}: {path} has no '{name}'; it has: {', '.join(known)}")
    validation = config.validation or _usual_held_out(list(known), config.split)
    splits = [config.split] if validation is None else [config.split, validation]
    if streaming:
        foreign = [f for name in splits for f in files[name] if not f.endswith(".parquet")]
        if foreign:
            raise UserError(
                f"data.path: {foreign[0]} is no Parquet file; leave data.streaming out, and it is converted"
            )
        named = {key: files[n] for key, n in zip((_TRAIN, _VALIDATION), splits, strict=False)}
        return StreamedStore(path, named, builder.info.features)
    return ConvertedStore(
        path,
        builder,
        splits,
        parts=[(f"{path}, {name}", known[name].num_examples) for name in splits],
        states=[path, builder.config_id, builder.hash or ""],
        features=builder.info.features,
    )
