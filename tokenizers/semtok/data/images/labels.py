"""Class numbers from what a store says of its images: numbers, or names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semtok.data.images.cells import Ambiguous, is_number, plain
from semtok.errors import UserError

_MAX_CLASSES = 1_000_000  # an embedding has a row for each
NUMBER = re.compile(r"[+-]?\d+")
"""Labels that are all of this form are numbers of classes."""
LABEL_NAME = re.compile(r"label|class|category|target|^y$", re.IGNORECASE)
"""Names of columns that may hold labels."""
UNLABELLED = ("images",)
"""Class names where images have no labels."""


@dataclass(frozen=True)
class Labels:
    """What is said of each image.

    Attributes:
        values: distinct labels, as text; class numbers are decimal.
        codes: int64 (N,), indices into ``values``.
    """

    values: tuple[str, ...]
    codes: np.ndarray


def number_classes(
    labels: Labels,
    known: Sequence[int] | None = None,
    *,
    place: str,
    held_out: str = "data.validation",
) -> tuple[tuple[str, ...], Tensor]:
    """Class names, and the class of each image.

    Where all labels are numbers they are the classes, from 0 to the largest; names are numbered in sorted order.

    Args:
        known: the images that tell which classes there are; None: all do.
        place: the store, for messages.
        held_out: the setting that names the held-out images.

    Returns:
        names, int64 (N,).

    Raises:
        UserError: a number that can't be a class, or an image of a class that those which are known lack.
    """
    seen = labels.codes if known is None else labels.codes[known]
    told = {labels.values[code] for code in np.unique(seen)}
    if all(NUMBER.fullmatch(value) for value in labels.values):
        numbers = {value: int(value) for value in labels.values}
        wrong = [number for number in numbers.values() if not 0 <= number < _MAX_CLASSES]
        if wrong:
            hint = "names that are all digits need a letter before them"
            if wrong[0] < 0:
                hint = "-1 often means that a part has no labels: choose another"
            raise UserError(
                f"data.path: {place}: label {wrong[0]}; class numbers start at 0 and stay below {_MAX_CLASSES:,} "
                f"({hint})"
            )
        num_classes = 1 + max(numbers[value] for value in told) if told else 0
        names = tuple(map(str, range(num_classes)))
        unknown = [value for value, number in numbers.items() if number >= num_classes]
    else:
        names = tuple(sorted(told))
        numbers = {name: number for number, name in enumerate(names)}
        unknown = sorted(set(labels.values) - told)
    if unknown:
        raise UserError(
            f"{held_out}: {place}: held-out images have classes that training lacks: "
            f"{', '.join(unknown[:5])}"
        )
    by_code = torch.tensor([numbers[value] for value in labels.values], dtype=torch.int64)
    return names, by_code[torch.from_numpy(labels.codes)]


def plain_labels(labels: Labels, *, place: str) -> Labels:
    """The same, of which each class has one spelling, see ``cells.plain``.

    Raises:
        UserError: labels may mean the same, say nothing, or are numbers and not whole.
    """
    try:
        plainly = plain(labels.values)
    except Ambiguous as problem:
        more = "labels" if " and " in str(problem) else "label"
        raise UserError(
            f"data.path: {place}: {more} {problem}; write what is one class alike, and leave images of no class out"
        ) from None
    values = tuple(sorted(set(plainly.values())))
    parted = [v for v in values if not re.fullmatch(r"-?\d+", v)]
    if parted and all(map(is_number, values)):
        raise UserError(
            f"data.path: {place}: label {parted[0]} is no whole number; number classes from 0, or name them"
        )
    codes = {value: code for code, value in enumerate(values)}
    anew = np.array([codes[plainly[value]] for value in labels.values], dtype=np.int64)
    return Labels(values, anew[labels.codes] if len(anew) else labels.codes)
