"""Attributes of images, read from a table: a header, then a row for each image, which its first column names.

It is CSV, or as CelebA's ``list_attr_celeba.txt``: separated by blanks, of which the header names the attributes
alone, with or without a first line that tells the number of rows.
"""

import csv
import io
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from semtok.data.images.cells import Ambiguous, plain
from semtok.data.left_out import LeftOut
from semtok.errors import UserError

_FEW = 20  # images, among which each may well have a category of its own
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


def read_attributes(
    path: Path, images: Sequence[str], left_out: LeftOut | None = None
) -> ImageAttributes:
    """Reads the attributes of images; one that is the same in all can't be probed for and is left out.

    The table names an image by its path, or by its file name where only one image has it, with or without the
    suffix, in any of Unicode's forms.

    Args:
        images: the path of each, relative to the folder, or in its tar file; with ``/``.
        left_out: rows of other images are added.

    Raises:
        UserError: the table can't be read, lacks an image, says two things of one, cells of an attribute say nothing
            or may mean the same, or no attribute has two categories.
    """
    names, rows = _table(path)
    used = list(_names_of(path, rows, images))
    if left_out is not None:
        own = set(used)
        for name in rows:
            if name not in own:
                left_out.add("rows of the table of attributes without an image", name)
    try:
        known = image_attributes(names, zip(*(rows[name] for name in used), strict=True))
    except Ambiguous as problem:
        raise _error(path, f"{problem}; mend it or remove the column") from None
    if known is None:
        raise _error(path, "each attribute is the same in all images; give one that differs")
    return known


def image_attributes(
    names: Iterable[str], columns: Iterable[Sequence[str]]
) -> ImageAttributes | None:
    """Attributes from a column of categories for each, leaving out those that are the same in all images.

    Spellings of one category are one, see ``cells.plain``; free text, which nobody probes for, is left as it is.

    Returns:
        None where that leaves out all.

    Raises:
        Ambiguous: cells of an attribute say nothing, or may mean the same.
    """
    categories: dict[str, tuple[str, ...]] = {}
    values = []
    for name, column in zip(names, columns, strict=True):
        cells = set(column)
        is_text = 2 * len(cells) > len(column) >= _FEW
        try:
            plainly = {cell: cell for cell in cells} if is_text else plain(cells)
        except Ambiguous as problem:
            raise Ambiguous(f"'{name}': {problem}") from None
        found = _sorted(set(plainly.values()))
        if len(found) > 1:
            index = {category: i for i, category in enumerate(found)}
            categories[name] = found
            values.append(torch.tensor([index[plainly[cell]] for cell in column]))
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
    lines = _lines(path)
    rows: dict[str, list[str]] = {}
    names = _header(path, next(lines, (0, []))[1])
    for number, cells in lines:
        # Interned, as there are millions of cells, of few values.
        name, *values = (sys.intern(cell) for cell in cells)

        def error(problem: str, number: int = number) -> UserError:
            return _error(path, problem, line=number)

        if len(values) != len(names):
            raise error(f"{len(values)} values, {len(names)} attributes; mend it")
        for column, cell in zip(("name", *names), (name, *values), strict=True):
            if not cell:
                raise error(f"'{column}' is empty; fill it in or remove the column")
        key = PurePosixPath(name).as_posix()
        if key in rows:
            raise error(f"'{name}' occurs a second time; remove one")
        rows[key] = values
    return names, rows


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line, first the header's."""
    text = _text(path)
    lines = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, cells) for number, cells in lines if cells]
    count = int(lines[0][1][0]) if lines and _is_count(lines[0][1]) else None
    head = lines[count is not None :][:2]
    # CelebA's header names no column of file names.
    is_blank = len(head) == 2 and len(head[1][1]) == len(head[0][1]) + 1 and "," not in text
    if is_blank:
        rows = lines[count is not None :]
        if count is not None and count != len(rows) - 1:
            raise _error(path, f"tells of {count} rows and has {len(rows) - 1}; mend it", line=1)
        yield head[0][0], ["file", *head[0][1]]
        yield from rows[1:]
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as problem:
        raise _error(path, f"not CSV ({problem}); mend it", line=reader.line_num) from None


def _is_count(cells: list[str]) -> bool:
    return len(cells) == 1 and cells[0].isdecimal()


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


def _names_of(path: Path, rows: dict[str, list[str]], images: Sequence[str]) -> Iterator[str]:
    """By which name the table has each image."""

    def names(image: str) -> list[str]:
        whole = PurePosixPath(image)
        return list(dict.fromkeys((str(whole), str(whole.with_suffix("")), whole.name, whole.stem)))

    form = _form(rows, images)
    known = {form(name): name for name in rows}
    owners = Counter(form(name) for image in images for name in names(image))
    missing: list[str] = []
    for image in images:
        whole, *others = map(form, names(image))
        fitting = [name for name in (whole, *others) if name in known]
        own = [name for name in fitting if name == whole or owners[name] == 1]
        if not own and fitting:
            raise _error(path, f"'{fitting[0]}' names others beside '{whole}'; {_WAY_OUT}")
        if not own:
            missing.append(image)
        elif len(own) > 1:
            raise _error(path, f"both '{own[0]}' and '{own[1]}' name '{whole}'; remove one")
        else:
            yield known[own[0]]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _error(path, f"no row for image '{missing[0]}'{more}; {_WAY_OUT}")


def _form(rows: Iterable[str], images: Iterable[str]) -> Callable[[str], str]:
    """Names in Unicode's form NFC, but for those that differ in nothing but their form."""
    shared: set[str] = set()
    for names in (rows, images):
        counts = Counter(unicodedata.normalize("NFC", name) for name in set(names))
        shared |= {name for name, count in counts.items() if count > 1}
    # An image is named in several ways, so that none of the ways to name it is told apart by its form either.
    stems = {PurePosixPath(name).with_suffix("").as_posix() for name in shared}
    bare = {PurePosixPath(name).name for name in shared | stems}
    kept = shared | stems | bare

    def form(name: str) -> str:
        composed = unicodedata.normalize("NFC", name)
        return name if composed in kept else composed

    return form


def _sorted(categories: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(sorted(categories), key=float))
    except ValueError:
        return tuple(sorted(categories))
