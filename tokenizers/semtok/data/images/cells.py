"""What a cell of a table, or a label, says: spellings of one thing are one, and what says nothing is found."""

import math
import re
import unicodedata
from collections.abc import Iterable

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_NOTHING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "null", "-", "?"})
# What computers write for truth values, each with what else stands for the same.
_TRUTH = (("1", "true", "yes", "y", "t"), ("0", "false", "no", "n", "f"))


class Ambiguous(ValueError):
    """Two values may mean the same, or one says nothing; the message begins with the values."""


def says_nothing(cell: str) -> bool:
    """Whether a cell stands for what is not known; ``none`` does not, as it is an answer too."""
    return cell.strip().casefold() in _NOTHING


def is_number(cell: str) -> bool:
    """Whether a cell is a number, written in decimal."""
    return _NUMBER.fullmatch(cell) is not None and math.isfinite(float(cell))


def plain(values: Iterable[str]) -> dict[str, str]:
    """For each value of a column how it is written plainly.

    Blanks around it do not count, nor which of its forms Unicode text is in (NFC is plain). Where all are numbers,
    ``1``, ``+1`` and ``1.0`` are ``1``.

    Raises:
        Ambiguous: a value says nothing; two differ in upper and lower case alone; or a truth value is written in two
            ways, such as ``1`` and ``true``.
    """
    plainly = {value: unicodedata.normalize("NFC", value.strip()) for value in values}
    for value in plainly.values():
        if says_nothing(value):
            raise Ambiguous(f"'{value}' says nothing")
    if all(map(is_number, plainly.values())):
        return {value: _plain_number(number) for value, number in plainly.items()}
    _check_alike(sorted(set(plainly.values())))
    return plainly


def _plain_number(text: str) -> str:
    if re.fullmatch(r"[+-]?\d+", text):  # as many digits as there are
        return str(int(text))
    number = float(text)
    return str(int(number)) if number.is_integer() else repr(number)


def _check_alike(values: list[str]) -> None:
    known: dict[str, str] = {}
    for value in values:
        other = known.setdefault(value.casefold(), value)
        if other != value and len(value) > 1:  # letters may be what images show
            raise Ambiguous(f"'{other}' and '{value}' differ in upper and lower case alone")
    for words in _TRUTH:
        found = [known[word] for word in words if word in known]
        if len(found) > 1 and all(value.casefold() in sum(_TRUTH, ()) for value in values):
            raise Ambiguous(f"'{found[0]}' and '{found[1]}' mean the same")
