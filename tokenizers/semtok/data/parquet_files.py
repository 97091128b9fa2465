"""The files that a table of images is made of, and the table, by the library ``datasets``."""

import bisect
import contextlib
import glob
import sys
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from semtok.data.stored import VALIDATION_NAMES, announce
from semtok.errors import UserError
from semtok.references import is_hub_id
from semtok.storage import first_line

_TRAIN, _VALIDATION = "train", "validation"


class ParquetStore:
    """A training split and, where there is one, a held-out split.

    Args:
        place: as the user named it.
        builder: of ``datasets``.
        splits: their names in the builder.
        parts: what they are made of and its number of rows, in order.
        states: what changes when the content does.

    Attributes:
        features: of the columns; None where they are known only after the download.
    """

    def __init__(
        self,
        place: str,
        builder: Any,
        splits: Sequence[str],
        *,
        parts: Sequence[tuple[str, int]],
        states: Sequence[str],
        features: Any,
    ) -> None:
        self.place, self.builder, self.splits = place, builder, tuple(splits)
        self.features, self.states = features, tuple(states)
        self.title = place if not parts or not Path(parts[0][0]).is_file() else Path(place).name
        self._names = [name for name, _ in parts]
        self._ends = list(accumulate(num_rows for _, num_rows in parts))

    def tables(self) -> list[Any]:
        """A ``datasets.Dataset`` for each split; they are made first where that was not done before.

        Raises:
            UserError: files can't be fetched, are damaged, or differ in their columns.
        """
        if not Path(self.builder.cache_dir).is_dir():
            announce(f"converting '{self.place}', once; kept in {self.builder.cache_dir}")
        with _user_errors(self.place):
            self.builder.download_and_prepare()
            return [self.builder.as_dataset(split=split) for split in self.splits]

    def row_name(self, row: int) -> str:
        """Where a row of the tables, joined in their order, comes from."""
        part = bisect.bisect_right(self._ends, row)
        return f"{self._names[part]}, row {row - (self._ends[part - 1] if part else 0)}"


def find_store(
    path: str, *, split: str, validation: str | None, subset: str | None, revision: str | None
) -> ParquetStore:
    """Finds files and looks at their columns, or finds a dataset on the Hub; nothing is converted yet.

    Args:
        path: a file, a pattern, a folder, or a Hub id.
        split: to train on.
        validation: to hold out: a split, or files as ``path``; None: a split of a usual name where there is one.
        subset: which configuration of a dataset on the Hub.
        revision: of a dataset on the Hub.

    Raises:
        UserError: nothing is there, it has no such split, or a file is damaged.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    local = _local_splits(path, "data.path")
    if local is None:
        if not is_hub_id(path) or path.endswith(".parquet"):
            raise UserError(
                f"data.path: no file or folder '{path}'; pass data.path=…, or the id of a dataset on the Hub (org/name)"
            )
        return _hub_store(
            path, split=split, validation=validation, subset=subset, revision=revision
        )
    for key, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise UserError(f"data.{key}: only datasets on the Hub have one; '{path}' is local")
    files = {_TRAIN: local.get(split)}
    if files[_TRAIN] is None:
        raise UserError(f"data.split: '{path}' has no '{split}'; it has: {', '.join(local)}")
    held_out = _held_out_files(path, local, split=split, validation=validation)
    both = {Path(file).resolve() for file in files[_TRAIN]} & {Path(f).resolve() for f in held_out}
    if both:
        raise UserError(f"data.validation: '{min(both)}' is trained on; hold out other files")
    if held_out:
        files[_VALIDATION] = held_out
    return _local_store(path, files)


def _held_out_files(
    path: str, local: dict[str, list[str]], *, split: str, validation: str | None
) -> list[str]:
    if validation is None:
        usual = next((name for name in VALIDATION_NAMES if name in local and name != split), None)
        return [] if usual is None else local[usual]
    if validation in local:
        return local[validation]
    others = _local_splits(validation, "data.validation")
    if others is None:
        raise UserError(
            f"data.validation: no file or folder '{validation}', nor such a split in '{path}', which has: "
            f"{', '.join(local)}"
        )
    return sorted(file for files in others.values() for file in files)


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


def _local_store(path: str, splits: dict[str, list[str]]) -> ParquetStore:
    import datasets
    import pyarrow.parquet

    parts, states, features = [], [], None
    for file in (file for files in splits.values() for file in files):
        try:
            about = pyarrow.parquet.read_metadata(file)
            state = Path(file).stat()
        except (OSError, ValueError) as error:
            raise UserError(
                f"data.path: {file}: damaged, cut short, or no Parquet file ({first_line(error)})"
            ) from None
        with _user_errors(file):
            own = datasets.Features.from_arrow_schema(about.schema.to_arrow_schema())
        features = own if features is None else features
        _check_alike(own, features, file, other=parts[0][0] if parts else file)
        parts.append((file, about.num_rows))
        states.append(f"{Path(file).name} {state.st_size} {state.st_mtime_ns}")
    with _user_errors(path):
        builder = datasets.load_dataset_builder("parquet", data_files=splits)
    return ParquetStore(path, builder, list(splits), parts=parts, states=states, features=features)


def _check_alike(own: Any, others: Any, file: str, *, other: str) -> None:
    """Raises UserError where the columns of two files differ in their names, or their classes in names or order."""
    import datasets

    if set(own) != set(others):
        raise UserError(
            f"data.path: {file}: its columns are {', '.join(own)}, those of {other} {', '.join(others)}; "
            "use files of one kind"
        )
    for name, feature in own.items():
        known = [
            f.names if isinstance(f, datasets.ClassLabel) else None for f in (feature, others[name])
        ]
        if known[0] != known[1]:
            raise UserError(
                f"data.path: {file}: the classes in column '{name}' are not those of {other}; use files of one kind"
            )


def _hub_store(
    path: str, *, split: str, validation: str | None, subset: str | None, revision: str | None
) -> ParquetStore:
    import datasets

    announce(
        f"opening the dataset {path} of the Hugging Face Hub; kept in {datasets.config.HF_DATASETS_CACHE}"
    )
    with _user_errors(f"no file or folder '{path}', and as a dataset on the Hub"):
        builder = datasets.load_dataset_builder(path, name=subset, revision=revision)
        if builder.info.splits is None:  # the dataset's card does not tell
            builder.download_and_prepare()
    known = builder.info.splits
    for key, name in (("split", split), ("validation", validation)):
        if name is not None and name not in known:
            raise UserError(f"data.{key}: {path} has no '{name}'; it has: {', '.join(known)}")
    if validation is None:
        validation = next(
            (name for name in VALIDATION_NAMES if name in known and name != split), None
        )
    splits = [split] if validation is None else [split, validation]
    return ParquetStore(
        path,
        builder,
        splits,
        parts=[(f"{path}, {name}", known[name].num_examples) for name in splits],
        states=[path, builder.config_id, builder.hash or ""],
        features=builder.info.features,
    )


@contextlib.contextmanager
def _user_errors(place: str) -> Iterator[None]:
    """What ``datasets`` raises where data or the network can't work, in one line."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error  # of a failed conversion
        raise UserError(f"data.path: {place}: {first_line(cause)}") from None
