"""Images in Parquet files or in a dataset of the Hugging Face Hub, read by the library ``datasets``."""

import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from semtok.data.attributes import ImageAttributes, image_attributes
from semtok.data.labels import UNLABELLED, Labels, number_classes
from semtok.data.parquet_files import ParquetStore, find_store
from semtok.data.stored import StoredConfig, StoredImages, split_rows
from semtok.errors import UserError
from semtok.extras import need


class ParquetConfig(StoredConfig):
    """Settings of images in Parquet files, or of a dataset on the Hugging Face Hub.

    The library ``datasets`` turns them once into an Arrow table in its own cache (``HF_HOME``), as large as the
    files, of which any row can be read at any time.
    """

    kind: Literal["parquet"] = "parquet"
    path: str
    """A file, a pattern of files (``*``, ``?``, ``[a-z]``), a folder, or a Hub id."""
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


class Parquet(StoredImages):
    """Rows of an Arrow table.

    Args:
        table: a ``datasets.Dataset`` of the undecoded images alone.
        rows: which of the table these are.
        store: where the table comes from.
    """

    expected = "rows with images"

    def __init__(
        self,
        table: Any,
        rows: np.ndarray,
        labels: torch.Tensor,
        *,
        store: ParquetStore,
        class_names: tuple[str, ...],
        image_size: tuple[int, int],
        flip: bool,
        attributes: ImageAttributes | None = None,
    ) -> None:
        super().__init__(
            labels,
            place=store.place,
            title=store.title,
            class_names=class_names,
            image_size=image_size,
            flip=flip,
            attributes=attributes,
        )
        self.table, self.rows, self.store = table, rows, store

    @property
    def identity(self) -> str:
        digest = hashlib.blake2b(self.rows.tobytes(), digest_size=8)
        digest.update("\n".join(self.store.states).encode())
        return f"{self.name} {digest.hexdigest()}"

    @classmethod
    def open(cls, config: ParquetConfig) -> tuple["Parquet", "Parquet"]:
        """The training and the held-out images.

        Raises:
            UserError: a file or dataset is missing or damaged, a column is missing or of another type, there is no
                readable image in either part, or some images have no label.
        """
        need("datasets", "datasets", extra="data", place="data.kind: parquet ")
        import datasets

        store = find_store(
            config.path,
            split=config.split,
            validation=config.validation,
            subset=config.subset,
            revision=config.revision,
        )
        if store.features is not None:  # else they are known only after the download
            _check_columns(store.features, config)
        tables = store.tables()
        num_train = len(tables[0])
        table = datasets.concatenate_datasets(tables) if len(tables) > 1 else tables[0]
        image, label = _check_columns(table.features, config)
        parts = split_rows(len(table), num_train if len(tables) > 1 else None, config)
        known = parts[0] if len(tables) > 1 else None
        class_names, labels = _classes(table, label, known, store.place)
        attributes = _attributes(table, config.attributes) if config.attributes else None
        images = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        sources = [
            cls(
                images,
                rows,
                labels[rows],
                store=store,
                class_names=class_names,
                image_size=config.image_size,
                flip=config.flip,
                attributes=attributes.rows(rows) if attributes is not None else None,
            )
            for rows in parts
        ]
        for source in sources:
            source.check_readable()
        return sources[0], sources[1]

    def contents(self, indices: Sequence[int]) -> list[Path | bytes]:
        (column,) = self.table[self.rows[list(indices)].tolist()].values()
        return [_content(value or {}) for value in column]

    def image_name(self, index: int) -> str:
        return self.store.row_name(int(self.rows[index]))


def _content(value: dict[str, Any]) -> Path | bytes:
    """Of a cell: bytes, or on the Hub also a file in the cache; an empty cell is no image."""
    if value.get("bytes") is None and value.get("path"):
        return Path(value["path"])
    return value.get("bytes") or b""


def _check_columns(features: Any, config: ParquetConfig) -> tuple[str, str | None]:
    """The names of the column of images and, where there is one, of labels."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if config.image_column is not None:
        image = _known(config.image_column, features, "image_column")
    elif len(images) == 1 or "image" in features:
        image = images[0] if len(images) == 1 else "image"
    else:
        raise UserError(
            f"data.image_column: {'several columns' if images else 'no column'} of images in '{config.path}'; "
            f"choose of {_listing(images or features)}"
        )
    kind = features.arrow_schema.field(image).type
    if not (_is_binary(kind) or "bytes" in getattr(kind, "names", ())):
        raise UserError(
            f"data.image_column: '{image}' of '{config.path}' holds {kind}, not images; "
            f"choose of {_listing(features)}"
        )
    if config.label_column is not None:
        label = _known(config.label_column, features, "label_column")
    else:
        label = "label" if "label" in features else None
    for name in config.attributes:
        _known(name, features, "attributes")
    for key, name in (("label_column", label), *(("attributes", n) for n in config.attributes)):
        if name is not None and not _is_categorical(features.arrow_schema.field(name).type):
            raise UserError(
                f"data.{key}: '{name}' of '{config.path}' holds {features.arrow_schema.field(name).type}; "
                "expected whole numbers, truth values or text"
            )
    return image, label


def _known(name: str, features: Any, key: str) -> str:
    if name not in features:
        near = difflib.get_close_matches(name, features, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"choose of {_listing(features)}"
        raise UserError(f"data.{key}: no column '{name}'; {hint}")
    return name


def _listing(names: Any) -> str:
    return ", ".join(names)


def _is_binary(kind: Any) -> bool:
    import pyarrow.types

    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_categorical(kind: Any) -> bool:
    import pyarrow.types as types

    tests = (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
    return any(test(kind) for test in tests)


def _classes(
    table: Any, column: str | None, known: np.ndarray | None, place: str
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the class of each row."""
    import datasets

    if column is None:
        return UNLABELLED, torch.zeros(len(table), dtype=torch.int64)
    labels = _categories(table, column, "label_column")
    feature = table.features[column]
    if not isinstance(feature, datasets.ClassLabel):
        return number_classes(labels, known, place=place)
    if "-1" in labels.values:
        raise UserError(
            f"data.label_column: '{column}' of '{place}' holds -1, which stands for unknown; choose another split"
        )
    numbers = np.array([int(value) for value in labels.values], dtype=np.int64)
    return tuple(feature.names), torch.from_numpy(numbers[labels.codes])


def _attributes(table: Any, columns: Sequence[str]) -> ImageAttributes:
    import datasets

    texts = []
    for column in columns:
        labels, feature = _categories(table, column, "attributes"), table.features[column]
        named = isinstance(feature, datasets.ClassLabel)
        values = [feature.int2str(int(v)) for v in labels.values] if named else labels.values
        texts.append([values[code] for code in labels.codes])
    known = image_attributes(columns, texts)
    if known is None:
        raise UserError(
            "data.attributes: each column is the same in all images; give one that differs"
        )
    return known


def _categories(table: Any, column: str, key: str) -> Labels:
    """The values of a column, as text."""
    import pyarrow

    values = table.data.column(column).cast(pyarrow.string())
    if values.null_count:
        raise UserError(
            f"data.{key}: '{column}' is empty in {values.null_count} of {len(values)} rows"
        )
    if not len(values):
        return Labels((), np.zeros(0, dtype=np.int64))
    encoded = values.combine_chunks().dictionary_encode()
    return Labels(
        tuple(encoded.dictionary.to_pylist()), encoded.indices.to_numpy().astype(np.int64)
    )
