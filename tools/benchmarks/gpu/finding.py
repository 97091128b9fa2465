"""What a part of ``benchmark gpu`` comes to."""

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import semtok
from semtok.storage import first_line

State = Literal["held", "measured", "failed", "skipped", "left out"]
"""A check that held, a measurement that was made; ``left out``: the time was over."""
_PACKAGE = Path(semtok.__file__).parent


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        line: one, for readers.
        figures: what was measured.
    """

    state: State
    line: str
    figures: dict[str, Any] = field(default_factory=dict)


class Skipped(Exception):
    """A check that this machine can't make; the message is the reason."""


def judged(holds: bool, line: str, **figures: Any) -> Finding:
    """A check's."""
    return Finding("held" if holds else "failed", line, figures)


def place_of(error: BaseException) -> str:
    """The last line of semtok that an exception came through; empty: through none."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = Path(frame.filename)
        if file.is_relative_to(_PACKAGE):
            return f"semtok/{file.relative_to(_PACKAGE).as_posix()}:{frame.lineno} ({frame.line})"
    return ""


def told(error: BaseException) -> str:
    """An exception in a line, with the line of semtok that it came through."""
    place = place_of(error)
    return f"{type(error).__name__}: {first_line(error)}" + (f", at {place}" if place else "")
