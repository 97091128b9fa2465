"""What commands turn into a one-line message instead of a traceback."""

import contextlib
import difflib
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from semtok.privacy import without_secrets


class UserError(ValueError):
    """Something the user gave can't work: a recipe key, a path, a file, a size.

    The message names the thing, the place and the way out, on one line. Commands print it without
    a traceback and exit with code 2; in Python it is an ordinary ``ValueError``.

    Names and values come from files: line breaks and what else a terminal would obey are told as Python writes them.
    Messages stay in logs: URLs lose credentials and queries.
    """

    def __init__(self, message: str) -> None:
        printed = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(without_secrets(printed))


class NonFiniteLoss(RuntimeError):
    """A loss term became NaN or infinite; the message names it. Commands exit with code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal asked to stop. Commands exit with 128 + n: 130 for SIGINT, 138 for SIGUSR1, 143 for SIGTERM.

    As a ``KeyboardInterrupt``, no ``except Exception`` holds it up.

    Args:
        checkpoint: that was written last; None: there is none.
        way_on: how to go on, in a few words.
    """

    def __init__(
        self, signal_number: int, *, checkpoint: Path | None = None, way_on: str = ""
    ) -> None:
        name = signal.Signals(signal_number).name
        where = f"checkpoint: {checkpoint}" if checkpoint is not None else ""
        super().__init__("; ".join(filter(None, (f"stopped by {name}", where, way_on))))
        self.signal_number, self.checkpoint, self.way_on = signal_number, checkpoint, way_on
        self.exit_code = 128 + signal_number


def printable(name: str) -> str:
    """A file's name as any terminal and file can take it: bytes that are no UTF-8 become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def did_you_mean(
    word: str, known: Iterable[str], otherwise: str = "", *, cutoff: float = 0.6
) -> str:
    """``did you mean 'x'?`` with the known word that is nearest, or ``otherwise`` where none is near.

    Args:
        cutoff: how alike they must be at least, in [0, 1].
    """
    plain = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(word.casefold(), plain, n=1, cutoff=cutoff)
    return f"did you mean '{plain[near[0]]}'?" if near else otherwise


@contextlib.contextmanager
def named_here(pattern: str, prefix: str) -> Iterator[None]:
    """Within this context messages name settings by where they stand in these: what matches the pattern is replaced."""
    try:
        yield
    except ValueError as error:
        raise type(error)(re.sub(pattern, prefix, str(error))) from None
