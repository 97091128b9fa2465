"""Images in Parquet files or in a dataset of the Hugging Face Hub, converted once or read where they are."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semtok.data.images.attributes import ImageAttributes, image_attributes
from semtok.data.images.cells import Ambiguous
from semtok.data.images.encoded import StoredImages, split_rows
from semtok.data.images.labels import LABEL_NAME, UNLABELLED, Labels, number_classes, plain_labels
from semtok.data.images.parquet_files import ParquetConfig, ParquetStore, find_store
from semtok.data.left_out import LeftOut
from semtok.errors import UserError, did_you_mean
from semtok.extras import need

_BINARY = ("binary", "large_binary", "binary_view")
_CATEGORICAL = ("integer", "boolean", "floating", "string", "large_string", "string_view")


class Parquet(StoredImages):
    """Rows of Parquet files.

    Args:
        store: the files.
        column: of the images. Each source keeps what it fetched of it, so that none takes another's place.
        rows, labels, about: see ``StoredImages``; the rows are sorted.
    """

    expected = "rows with images"

    def __init__(
        self,
        store: ParquetStore,
        column: str,
        rows: np.ndarray,
        labels: torch.Tensor,
        **about: Any,
    ) -> None:
        super().__init__(rows, labels, place=store.place, title=store.title, **about)
        self.store, self.cells = store, store.images(column)
        self.block_size = self.cells.block_sizes(rows)

    @property
    def identity(self) -> str:
        digest = hashlib.blake2b(self.rows.tobytes(), digest_size=8)
        digest.update("\n".join(self.store.states).encode())
        return f"{self.name} {digest.hexdigest()}"

    @property
    def file_states(self) -> dict[str, str]:
        return self.store.file_states

    @classmethod
    def open(cls, config: ParquetConfig) -> tuple["Parquet", "Parquet"]:
        """The training and the held-out images.

        Raises:
            UserError: a file or dataset is missing or damaged, a column is missing or of another type, there is no
                readable image in either part, or some images have no label.
        """
        need("datasets", "datasets", extra="data", place="data.kind: parquet ")
        store = find_store(config)
        image, label = _check_columns(store.features, config)
        if not store.num_rows:
            raise UserError(f"data.path: '{store.place}' holds no rows; expected {cls.expected}")
        left_out = _left_out(store, {image, label, *config.attributes}, label)
        num_rows = store.prepare()
        parts = split_rows(sum(num_rows), num_rows[0] if len(num_rows) > 1 else None, config)
        known = parts[0] if len(num_rows) > 1 else None
        columns = store.columns([*([label] if label is not None else []), *config.attributes])
        class_names, labels = _classes(columns, store, label, known, sum(num_rows))
        attributes = _attributes(columns, store, config.attributes) if config.attributes else None
        return cls.parts_of(
            (store, image),
            parts,
            labels,
            config,
            class_names=class_names,
            attributes=attributes,
            left_out=left_out,
        )

    def check_readable(self) -> None:
        if len(self):
            (cell,) = self.cells.read(self.rows[:1])
            if cell and not cell.get("bytes") and cell.get("path"):
                _content(cell, self.image_name(0), refuse=True)
        super().check_readable()

    def contents(self, indices: Sequence[int]) -> list[Path | bytes]:
        values = self.cells.read(self.rows[list(indices)])
        named = zip(indices, values, strict=True)
        return [_content(value or {}, self.image_name(index)) for index, value in named]

    def image_name(self, index: int) -> str:
        return self.store.row_name(int(self.rows[index]))


def _content(value: dict[str, Any], place: str, *, refuse: bool = False) -> Path | bytes:
    """Of a cell: bytes, or of a dataset of the Hub also a file in its cache; an empty cell is no image.

    Args:
        refuse: whether a name alone is an error too.

    Raises:
        UserError: it names another file, which is none of the dataset's.
    """
    import datasets
    from huggingface_hub import constants

    if value.get("bytes") is not None or not value.get("path"):
        return value.get("bytes") or b""
    path = os.path.normpath(value["path"])
    caches = (datasets.config.HF_DATASETS_CACHE, constants.HF_HUB_CACHE)
    if any(Path(path).is_relative_to(cache) for cache in caches):
        return Path(path)
    if refuse or os.path.isabs(path) or path.startswith(".."):
        raise UserError(
            f"data.path: {place} names the file {value['path']!r} and holds no image; put the images themselves there, "
            "or pass data.kind=folder and the folder of the files"
        )
    return b""  # a name alone


def _left_out(store: ParquetStore, used: set[str | None], label: str | None) -> LeftOut:
    """Counts columns and splits that are not read."""
    import datasets

    left_out = LeftOut()
    for name, feature in store.features.items():
        if name not in used:
            looks = isinstance(feature, datasets.ClassLabel) or LABEL_NAME.search(name)
            is_label = label is None and looks
            left_out.add(
                "columns that may hold labels (data.label_column=…)" if is_label else "columns",
                name,
            )
    for name in store.other_splits:
        left_out.add("splits", name)
    return left_out


def _check_columns(features: Any, config: ParquetConfig) -> tuple[str, str | None]:
    """The names of the column of images and, where there is one, of labels."""
    import datasets
    import pyarrow.types

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if config.image_column is not None:
        image = _known(config.image_column, features, "image_column")
    elif len(images) == 1 or "image" in features:
        image = images[0] if len(images) == 1 else "image"
    else:
        raise UserError(
            f"data.image_column: {'several columns' if images else 'no column'} of images in '{config.path}'; "
            f"choose of {', '.join(images or features)}"
        )
    kind = features.arrow_schema.field(image).type
    binary = any(getattr(pyarrow.types, f"is_{name}")(kind) for name in _BINARY)
    if not (binary or "bytes" in getattr(kind, "names", ())):
        raise UserError(
            f"data.image_column: '{image}' of '{config.path}' holds {kind}, not images; "
            f"choose of {', '.join(features)}"
        )
    label = config.label_column
    if label is None and "label" in features:
        label = "label"
    columns = [("label_column", label)] if label is not None else []
    for key, name in (*columns, *(("attributes", name) for name in config.attributes)):
        kind = features.arrow_schema.field(_known(name, features, key)).type
        if not any(getattr(pyarrow.types, f"is_{name}")(kind) for name in _CATEGORICAL):
            raise UserError(
                f"data.{key}: '{name}' of '{config.path}' holds {kind}; "
                "expected whole numbers, truth values or text"
            )
    return image, label


def _known(name: str, features: Any, key: str) -> str:
    if name not in features:
        hint = did_you_mean(name, features, f"choose of {', '.join(features)}")
        raise UserError(f"data.{key}: no column '{name}'; {hint}")
    return name


def _classes(
    columns: Any, store: ParquetStore, name: str | None, known: np.ndarray | None, num_rows: int
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the class of each row."""
    import datasets

    if name is None:
        return UNLABELLED, torch.zeros(num_rows, dtype=torch.int64)
    labels, feature = _categories(columns, name, "label_column"), store.features[name]
    if not isinstance(feature, datasets.ClassLabel):
        return number_classes(plain_labels(labels, place=store.place), known, place=store.place)
    if "-1" in labels.values:
        raise UserError(
            f"data.label_column: '{name}' of '{store.place}' holds -1, which stands for unknown; choose another split"
        )
    numbers = np.array([int(value) for value in labels.values], dtype=np.int64)
    return tuple(feature.names), torch.from_numpy(numbers[labels.codes])


def _attributes(columns: Any, store: ParquetStore, names: Sequence[str]) -> ImageAttributes:
    import datasets

    texts = []
    for name in names:
        labels, feature = _categories(columns, name, "attributes"), store.features[name]
        named = isinstance(feature, datasets.ClassLabel)
        values = [feature.int2str(int(v)) for v in labels.values] if named else labels.values
        texts.append([values[code] for code in labels.codes])
    try:
        known = image_attributes(names, texts)
    except Ambiguous as problem:
        raise UserError(
            f"data.attributes: {store.place}: {problem}; mend it or leave the column out"
        ) from None
    if known is None:
        raise UserError(
            "data.attributes: each column is the same in all images; give one that differs"
        )
    return known


def _categories(columns: Any, name: str, key: str) -> Labels:
    """The values of a column, as text."""
    import pyarrow

    values = columns.column(name).cast(pyarrow.string())
    if values.null_count:
        raise UserError(
            f"data.{key}: '{name}' is empty in {values.null_count} of {len(values)} rows"
        )
    if not len(values):
        return Labels((), np.zeros(0, dtype=np.int64))
    encoded = values.combine_chunks().dictionary_encode()
    return Labels(
        tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64)
    )
