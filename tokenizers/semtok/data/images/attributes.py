"""Attributes of images, read from a CSV table: a header, then a row for each image, which its first column names."""

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from semtok.errors import UserError

_WAY_OUT = "name each image in the first column, by its path in the folder or a unique file name"


@dataclass(frozen=True)
class ImageAttributes:
    """What is known of images.

    Attributes:
        categories: sorted category names of each attribute, two or more; numbers sort as numbers.
        values: int64 (images, attributes), indices into the categories.
    """

    categories: dict[str, tuple[str, ...]]
    values: Tensor

    def rows(self, rows: Sequence[int]) -> "ImageAttributes":
        """Those of some of the images, with the same categories."""
        return ImageAttributes(self.categories, self.values[list(rows)])


def read_attributes(path: Path, images: Sequence[str]) -> ImageAttributes:
    """Reads the attributes of images; one that is the same in all can't be probed for and is left out.

    The table names an image by its path, or by its file name where only one image has it, with or without the
    suffix. Rows of other images don't matter.

    Args:
        images: the path of each, relative to the folder, or in its tar file; with ``/``.

    Raises:
        UserError: the table can't be read, lacks an image, says two things of one, or no attribute has two categories.
    """
    names, rows = _table(path)
    known = image_attributes(names, zip(*_rows_of(path, rows, images), strict=True))
    if known is None:
        raise _error(path, "each attribute is the same in all images; give one that differs")
    return known


def image_attributes(
    names: Iterable[str], columns: Iterable[Sequence[str]]
) -> ImageAttributes | None:
    """Attributes from a column of categories for each, leaving out those that are the same in all images.

    Returns:
        None where that leaves out all.
    """
    categories: dict[str, tuple[str, ...]] = {}
    values = []
    for name, column in zip(names, columns, strict=True):
        found = _sorted(set(column))
        if len(found) > 1:
            index = {category: i for i, category in enumerate(found)}
            categories[name] = found
            values.append(torch.tensor([index[cell] for cell in column]))
    return ImageAttributes(categories, torch.stack(values, dim=1)) if categories else None


def _error(path: Path, message: str, *, line: int | None = None) -> UserError:
    place = f"{path}, line {line}" if line else str(path)
    return UserError(f"data.attributes: {place}: {message}")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets begin with a byte order mark
    except UnicodeDecodeError:
        raise _error(path, "not UTF-8; save it as CSV in UTF-8") from None
    except OSError as error:
        raise _error(path, f"{error.strerror}; pass data.attributes=FILE") from None


def _table(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The names of the attributes, and their values by the name of an image."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    # Interned, as there are millions of cells, of few values.
    lines = ([sys.intern(cell.strip()) for cell in cells] for cells in reader if cells)
    rows: dict[str, list[str]] = {}

    def error(problem: str) -> UserError:
        return _error(path, problem, line=reader.line_num)

    try:
        names = _header(path, next(lines, []))
        for name, *values in lines:
            if len(values) != len(names):
                raise error(f"{len(values)} values, {len(names)} attributes; mend it")
            for column, cell in zip(("name", *names), (name, *values), strict=True):
                if not cell:
                    raise error(f"'{column}' is empty; fill it in or remove the column")
            key = PurePosixPath(name).as_posix()
            if key in rows:
                raise error(f"'{name}' occurs a second time; remove one")
            rows[key] = values
    except csv.Error as problem:
        raise error(f"not CSV ({problem}); mend it") from None
    return names, rows


def _header(path: Path, cells: list[str]) -> list[str]:
    names = cells[1:]
    if not names:
        raise _error(path, "no attributes; expected CSV with a header such as 'file,colour,size'")
    if "" in names:
        raise _error(path, "an attribute has no name; fill in the header")
    for name, count in Counter(names).items():
        if count > 1:
            raise _error(path, f"attribute '{name}' occurs {count} times; rename or remove one")
    return names


def _rows_of(path: Path, rows: dict[str, list[str]], images: Sequence[str]) -> Iterator[list[str]]:
    """The row of each image."""

    def names(image: str) -> list[str]:
        whole = PurePosixPath(image)
        return list(dict.fromkeys((str(whole), str(whole.with_suffix("")), whole.name, whole.stem)))

    owners = Counter(name for image in images for name in names(image))
    for image in images:
        whole, *others = names(image)
        fitting = [name for name in (whole, *others) if name in rows]
        own = [name for name in fitting if name == whole or owners[name] == 1]
        if not own:
            problem = f"'{fitting[0]}' names others beside" if fitting else "no row for image"
            raise _error(path, f"{problem} '{whole}'; {_WAY_OUT}")
        if len(own) > 1:
            raise _error(path, f"both '{own[0]}' and '{own[1]}' name '{whole}'; remove one")
        yield rows[own[0]]


def _sorted(categories: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(sorted(categories), key=float))
    except ValueError:
        return tuple(sorted(categories))
