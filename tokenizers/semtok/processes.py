"""What the processes that a launcher started tell each other: values, and that one of them has failed.

Every exchange is the same collective, so a process that fails meets the others wherever they wait next,
and all end, or go on, together. Outside a launcher there is one process, and nothing is exchanged.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from semtok.errors import UserError
from semtok.storage import first_line

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    message: str
    is_users: bool
    """Whether it is of those that commands tell in one line."""


def num_processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Which one this is, from 0."""
    return dist.get_rank() if num_processes() > 1 else 0


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; all have to ask.

    Args:
        value: small, as it is pickled.

    Raises:
        UserError: another process failed within ``together`` by what its user can mend.
        RuntimeError: another process failed otherwise.
    """
    if num_processes() == 1:
        return [value]
    for index, told in enumerate(values := _exchange(value)):
        if isinstance(told, _Failure):
            kind = UserError if told.is_users else RuntimeError
            raise _known_to_all(kind(f"process {index}: {told.message}"))
    return values


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within this context a failure of one process is a failure of all.

    The others notice it at their next ``gather``, or at the end of the context, where all wait for each other.
    No collective but ``gather`` may stand inside. What they raise, see there.
    """
    try:
        yield
    except Exception as error:  # whatever it is, the others would wait for this process in vain
        if num_processes() > 1 and not _is_known(error):
            _exchange(_Failure(first_line(error), isinstance(error, UserError | OSError)))
            _known_to_all(error)
        raise
    gather(None)


def _exchange(value: Any) -> list[Any]:
    values: list[Any] = [None] * num_processes()
    try:
        dist.all_gather_object(values, value)
    except RuntimeError as error:  # of the transport, where another process was killed
        reason = f"another process has ended ({first_line(error)}); the same command goes on"
        raise _known_to_all(UserError(reason)) from None
    return values


def _known_to_all(error: Exception) -> Exception:
    error.__dict__["_known_to_all"] = True
    return error


def _is_known(error: BaseException | None) -> bool:
    """Whether all have heard of an error, or of the one that it was made of, as messages are given places."""
    while error is not None:
        if "_known_to_all" in error.__dict__:
            return True
        error = error.__context__
    return False
