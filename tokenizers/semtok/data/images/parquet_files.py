"""The Parquet files of a set of images: on disk, behind URLs, or of a dataset on the Hugging Face Hub."""

import glob
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semtok.data.images.encoded import VALIDATION_NAMES, announce
from semtok.data.images.parquet_store import ConvertedStore, ParquetStore, dataset_errors
from semtok.data.images.parquet_stream import Footer, StreamedStore, read_footers
from semtok.data.remote import named_files, protocol
from semtok.errors import UserError
from semtok.extras import need
from semtok.references import is_hub_id

_TRAIN, _VALIDATION = "train", "validation"


def find_store(
    path: str,
    *,
    split: str,
    validation: str | None,
    subset: str | None,
    revision: str | None,
    streaming: bool,
) -> ParquetStore:
    """Finds files and looks at their columns, or finds a dataset on the Hub; nothing is converted yet.

    Args:
        path: a file, a pattern, a folder, or a Hub id; where it streams, also a URL or a pattern of URLs.
        split: to train on.
        validation: to hold out: a split, or files as ``path``; None: a split of a usual name where there is one.
        subset: which configuration of a dataset on the Hub.
        revision: of a dataset on the Hub.
        streaming: leave the files where they are.

    Raises:
        UserError: nothing is there, it has no such split, or a file is damaged.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    named = _named_splits(path, "data.path", streaming)
    if named is None:
        if not is_hub_id(path) or path.endswith(".parquet"):
            raise UserError(
                f"data.path: no file or folder '{path}'; pass data.path=…, or the id of a dataset on the Hub (org/name)"
            )
        return _hub_store(
            path,
            split=split,
            validation=validation,
            subset=subset,
            revision=revision,
            streaming=streaming,
        )
    for key, value in (("subset", subset), ("revision", revision)):
        if value is not None:
            raise UserError(
                f"data.{key}: only datasets on the Hub have one; '{path}' is "
                + ("a URL" if protocol(path) else "local")
            )
    files = {_TRAIN: named.get(split)}
    if files[_TRAIN] is None:
        raise UserError(f"data.split: '{path}' has no '{split}'; it has: {', '.join(named)}")
    held_out = _held_out_files(path, named, split=split, validation=validation, streaming=streaming)
    both = {_resolved(file) for file in files[_TRAIN]} & {_resolved(file) for file in held_out}
    if both:
        raise UserError(f"data.validation: '{min(both)}' is trained on; hold out other files")
    if held_out:
        files[_VALIDATION] = held_out
    return (_streamed_store if streaming else _converted_store)(path, files)


def _resolved(file: str) -> str:
    return file if protocol(file) else str(Path(file).resolve())


def _held_out_files(
    path: str,
    named: dict[str, list[str]],
    *,
    split: str,
    validation: str | None,
    streaming: bool,
) -> list[str]:
    if validation is None:
        usual = next((name for name in VALIDATION_NAMES if name in named and name != split), None)
        return [] if usual is None else named[usual]
    if validation in named:
        return named[validation]
    others = _named_splits(validation, "data.validation", streaming)
    if others is None:
        raise UserError(
            f"data.validation: no file or folder '{validation}', nor such a split in '{path}', which has: "
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

    footers = _footers(splits)
    flat = [footer for own in footers.values() for footer in own]
    features = _common_features(flat)
    files = [Path(file) for own in splits.values() for file in own]
    states = [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    with dataset_errors(path):
        builder = datasets.load_dataset_builder("parquet", data_files=splits)
    parts = [(str(f), own.metadata.num_rows) for f, own in zip(files, flat, strict=True)]
    return ConvertedStore(
        path, builder, list(splits), parts=parts, states=states, features=features
    )


def _streamed_store(path: str, splits: dict[str, list[str]], features: Any = None) -> ParquetStore:
    """Files that stay where they are.

    Args:
        features: of a dataset's card, which has the say over what the files tell of their columns.
    """
    footers = _footers(splits)
    own = _common_features([footer for files in footers.values() for footer in files])
    if features is not None and set(features) != set(own):
        raise UserError(
            f"data.path: {path}: its columns are {', '.join(own)}, and {', '.join(features)} as its card has it; "
            "mend its card"
        )
    return StreamedStore(path, list(footers.values()), features=features or own)


def _footers(splits: Mapping[str, list[str]]) -> dict[str, list[Footer]]:
    keys = {_TRAIN: "data.path", _VALIDATION: "data.validation"}
    return {name: read_footers(files, key=keys[name]) for name, files in splits.items()}


def _common_features(footers: Sequence[Footer]) -> Any:
    """The columns of files, as the first has them.

    Raises:
        UserError: they differ in another.
    """
    import datasets

    features = None
    for footer in footers:
        place = footer.file.place
        with dataset_errors(place):
            own = datasets.Features.from_arrow_schema(footer.metadata.schema.to_arrow_schema())
        features = own if features is None else features
        _check_alike(own, features, place, other=footers[0].file.place)
    return features


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
    path: str,
    *,
    split: str,
    validation: str | None,
    subset: str | None,
    revision: str | None,
    streaming: bool,
) -> ParquetStore:
    import datasets

    kept = "" if streaming else f"; kept in {datasets.config.HF_DATASETS_CACHE}"
    announce(f"opening the dataset {path} of the Hugging Face Hub{kept}")
    with dataset_errors(f"no file or folder '{path}', and as a dataset on the Hub"):
        builder = datasets.load_dataset_builder(path, name=subset, revision=revision)
        if not streaming and builder.info.splits is None:  # the dataset's card does not tell
            builder.download_and_prepare()
    files = {str(name): list(own) for name, own in (builder.config.data_files or {}).items()}
    known = files if streaming else builder.info.splits
    for key, name in (("split", split), ("validation", validation)):
        if name is not None and name not in known:
            raise UserError(f"data.{key}: {path} has no '{name}'; it has: {', '.join(known)}")
    if validation is None:
        validation = next(
            (name for name in VALIDATION_NAMES if name in known and name != split), None
        )
    splits = [split] if validation is None else [split, validation]
    if streaming:
        foreign = [f for name in splits for f in files[name] if not f.endswith(".parquet")]
        if foreign:
            raise UserError(
                f"data.path: {foreign[0]} is no Parquet file; leave data.streaming out, and it is converted"
            )
        named = {key: files[n] for key, n in zip((_TRAIN, _VALIDATION), splits, strict=False)}
        return _streamed_store(path, named, builder.info.features)
    return ConvertedStore(
        path,
        builder,
        splits,
        parts=[(f"{path}, {name}", known[name].num_examples) for name in splits],
        states=[path, builder.config_id, builder.hash or ""],
        features=builder.info.features,
    )
