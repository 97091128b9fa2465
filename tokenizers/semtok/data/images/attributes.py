"""Attributes of the images of a folder, read from a table.

Three formats, told apart by the file:

- ``predicate-matrix-binary.txt`` of Animals with Attributes 2 (arXiv 1707.00600), beside its
  ``predicates.txt`` and ``classes.txt``: values of each class, so of every image in the class's folder;
- CelebA's ``list_attr_celeba.txt`` (arXiv 1411.7766), known by its first line, which is the number of
  images; the second line names the attributes, then comes a line for each image;
- anything else is CSV with a header: the first column names the image, every other is an attribute.
"""

import csv
import difflib
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from semtok.errors import UserError

_OF_CLASSES = "predicate-matrix-binary.txt"
_WAY_OUT = "name each image in the first column, by its path in the folder or a unique file name"


@dataclass(frozen=True)
class ImageAttributes:
    """What a table says of the images of a folder.

    Attributes:
        categories: sorted category names of each attribute, two or more; numbers sort as numbers.
        values: int64 (images, attributes), indices into the categories.
    """

    categories: dict[str, tuple[str, ...]]
    values: Tensor

    def rows(self, rows: Sequence[int]) -> "ImageAttributes":
        """Those of some of the images, with the same categories."""
        return ImageAttributes(self.categories, self.values[list(rows)])


_Line = tuple[int, list[str]]  # a line's number and its cells, of which the first names the row
_Rows = dict[str, list[str]]  # values by the name of an image or a class


def read_attributes(
    path: Path, files: Sequence[tuple[Path, int]], root: Path, class_names: Sequence[str]
) -> ImageAttributes:
    """Reads the attributes of images; one that is the same in all can't be probed for and is left out.

    A table of images names them by path relative to ``root``, or by file name where only one image has
    it, with or without the suffix. Rows of other images don't matter.

    Args:
        files: (path, class index) of each image.
        class_names: what the indices mean.

    Raises:
        UserError: the table can't be read, lacks an image or a class, says two things of one, or no
            attribute has two categories.
    """
    if path.name == _OF_CLASSES:
        names, rows = _class_table(path)
        chosen = _rows_of_classes(path, rows, [class_names[label] for _, label in files])
    else:
        text = _text(path)
        of_celeba = text.partition("\n")[0].strip().isdecimal()
        names, rows = _celeba_table(path, text) if of_celeba else _csv_table(path, text)
        chosen = _rows_of_images(path, rows, [file.relative_to(root) for file, _ in files])
    known = image_attributes(names, zip(*chosen, strict=True))
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


def _csv_table(path: Path, text: str) -> tuple[list[str], _Rows]:
    lines = _csv_lines(path, text)
    _, header = next(lines, (1, []))
    if len(header) < 2:
        raise _error(path, "no attributes; expected CSV with a header such as 'file,colour,size'")
    return header[1:], _rows(path, header[1:], lines)


def _csv_lines(path: Path, text: str) -> Iterator[_Line]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as error:
        raise _error(path, f"not CSV ({error}); mend it", line=reader.line_num) from None


def _celeba_table(path: Path, text: str) -> tuple[list[str], _Rows]:
    lines = _spaced_lines(text)
    _, (count, *_) = next(lines)
    _, names = next(lines, (2, []))
    rows = _rows(path, names, lines)
    if len(rows) != int(count):
        raise _error(path, f"{len(rows)} rows, its first line says {count}; get the whole file")
    return names, rows


def _class_table(path: Path) -> tuple[list[str], _Rows]:
    def listed(name: str) -> list[str]:  # lines such as '1\tantelope'
        return [" ".join(cells[1:]) for _, cells in _spaced_lines(_text(path.with_name(name)))]

    classes, names = listed("classes.txt"), listed("predicates.txt")
    lines = list(_spaced_lines(_text(path)))
    if len(lines) != len(classes):
        raise _error(path, f"{len(lines)} rows for {len(classes)} classes; use matching files")
    named = ((n, [name, *cells]) for name, (n, cells) in zip(classes, lines, strict=True))
    return names, _rows(path, names, named)


def _spaced_lines(text: str) -> Iterator[_Line]:
    return ((n, line.split()) for n, line in enumerate(text.split("\n"), 1) if line.strip())


def _rows(path: Path, names: list[str], lines: Iterable[_Line]) -> _Rows:
    """Gathers the rows, with the checks that all formats share."""
    if "" in names:
        raise _error(path, "an attribute has no name; fill in the header")
    for name, count in Counter(names).items():
        if count > 1:
            raise _error(path, f"attribute '{name}' occurs {count} times; rename or remove one")
    rows: _Rows = {}
    for number, (name, *cells) in lines:
        if (found := len(cells)) != (known := len(names)):
            raise _error(path, f"{found} values, {known} attributes; mend it", line=number)
        if not all((name, *cells)):
            empty = ["name", *names][[name, *cells].index("")]
            raise _error(path, f"'{empty}' is empty; fill it in or remove the column", line=number)
        key = PurePosixPath(name).as_posix()
        if key in rows:
            raise _error(path, f"'{name}' occurs a second time; remove one", line=number)
        rows[key] = [sys.intern(cell) for cell in cells]  # millions of cells, of few values
    return rows


def _rows_of_classes(path: Path, rows: _Rows, classes: list[str]) -> list[list[str]]:
    for name in dict.fromkeys(classes):
        if name not in rows:
            near = difflib.get_close_matches(name, rows, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "name each sub-folder by its class"
            raise _error(path.with_name("classes.txt"), f"no class '{name}'; {hint}")
    return [rows[name] for name in classes]


def _rows_of_images(path: Path, rows: _Rows, images: list[Path]) -> list[list[str]]:
    """The row of each image, given by its path relative to the folder."""

    def names(image: Path) -> list[str]:
        whole = image.as_posix()
        bare = whole.removesuffix(image.suffix)
        return list(dict.fromkeys((whole, bare, image.name, image.stem)))

    named = [names(image) for image in images]
    owners = Counter(name for owned in named for name in owned)
    chosen = []
    for whole, *others in named:
        fitting = [name for name in (whole, *others) if name in rows]
        own = [name for name in fitting if name == whole or owners[name] == 1]
        if not own:
            problem = f"'{fitting[0]}' names others beside" if fitting else "no row for image"
            raise _error(path, f"{problem} '{whole}'; {_WAY_OUT}")
        if len(own) > 1:
            raise _error(path, f"both '{own[0]}' and '{own[1]}' name '{whole}'; remove one")
        chosen.append(rows[own[0]])
    return chosen


def _sorted(categories: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(sorted(categories), key=float))
    except ValueError:
        return tuple(sorted(categories))
