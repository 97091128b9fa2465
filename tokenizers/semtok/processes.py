"""What the processes that a launcher started tell each other: values, and that one of them has failed.

Every exchange is the same collective, so a process that fails meets the others wherever they wait next,
and all end, or go on, together. Outside a launcher there is one process, and nothing is exchanged.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from semtok import heartbeat, stopping
from semtok.errors import Interrupted, UserError
from semtok.lock import InUse
from semtok.stopping import When
from semtok.storage import first_line

T = TypeVar("T")

PATIENCE = timedelta(hours=2)
"""How long a process waits for the others, which may be writing pictures or decoding images."""


@dataclass(frozen=True)
class _Failure:
    message: str
    kind: type[Exception]
    """What the other processes raise."""
    signal_number: int | None = None
    """Of the signal that stopped the process, where one did."""


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
        Interrupted: a signal asked this process, or another, to stop, and none postpones that.
    """
    if num_processes() == 1:
        stopping.check()
        return [value]
    told = _exchange((value, stopping.received()))
    for index, failure in enumerate(told):
        if isinstance(failure, _Failure):
            raise _known_to_all(_raised_again(failure, index))
    asked = next((number for _, number in told if number is not None), None)
    if asked is not None:
        stopping.note(asked)
        if not stopping.is_postponed():
            raise _known_to_all(Interrupted(asked))
    return [value for value, _ in told]


def _raised_again(failure: _Failure, index: int) -> BaseException:
    """What a process raises as another has failed."""
    if failure.signal_number is not None:
        stopping.note(failure.signal_number)
        return Interrupted(failure.signal_number)
    return failure.kind(f"process {index}: {failure.message}")


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Within this context a failure of one process is a failure of all, and so is a signal that stops one.

    The others notice it at their next ``gather``, or at the end of the context, where all wait for each other.
    No collective but ``gather`` may stand inside. What they raise, see there.
    """
    when = When.LATER if stopping.is_postponed() else When.AT_ONCE
    try:
        with stopping.obeyed(when), heartbeat.own_work():
            yield
    except (Exception, Interrupted) as error:  # else the others would wait for this process in vain
        if num_processes() > 1 and not _is_known(error):
            number = error.signal_number if isinstance(error, Interrupted) else None
            _exchange(_Failure(first_line(error), _kind_for_others(error), number))
            _known_to_all(error)
        raise
    with interruptible():
        gather(None)


@contextlib.contextmanager
def watching(patience: timedelta = PATIENCE) -> Iterator[None]:
    """Within this context processes notice that one of them has died, or has stood still for so long, and end.

    Raises:
        UserError: a collective failed as a process has died; the message says which.
    """
    if not heartbeat.begin(patience):
        yield
        return
    failure: str | None = "it was stopped"
    try:
        yield
        failure = None
    except RuntimeError as error:
        if not _is_known(error) and heartbeat.is_of_transport(error):
            failure = None
            raise _known_to_all(_gone(error)) from None
        failure = first_line(error)
        raise
    except (Exception, Interrupted) as error:
        failure = None if _is_known(error) or isinstance(error, Interrupted) else first_line(error)
        raise
    finally:
        heartbeat.end(failure)


def _gone(error: BaseException) -> UserError:
    """What to say where a collective failed by what carries it."""
    with stopping.obeyed(
        When.LATER
    ):  # launchers end the others meanwhile, and the name is what is to be told
        who = heartbeat.dead() or f"another process has ended ({first_line(error)})"
    return UserError(f"{who}; give the same command again, a training with --resume auto")


def leave() -> None:
    """Leaves the group of processes in order, so that none of its threads outlives the interpreter."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this context a signal stops the only process at once, and several where they next meet.

    Where that is postponed already it stays so.
    """
    alone = When.AT_ONCE if num_processes() == 1 else When.AGREED
    with stopping.obeyed(When.LATER if stopping.is_postponed() else alone):
        yield


def _kind_for_others(error: BaseException) -> type[Exception]:
    """Of those that commands tell in one line, or not."""
    if isinstance(error, InUse):
        return InUse
    return UserError if isinstance(error, UserError | OSError) else RuntimeError


def _exchange(value: Any) -> list[Any]:
    values: list[Any] = [None] * num_processes()
    heartbeat.mark()
    try:
        # It is made of several exchanges, of which each is of all.
        with stopping.obeyed(When.LATER), heartbeat.waiting():
            dist.all_gather_object(values, value)
    except RuntimeError as error:  # of the transport, where another process was killed
        raise _known_to_all(_gone(error)) from None
    return values


def _known_to_all(error: BaseException) -> BaseException:
    error.__dict__["_known_to_all"] = True
    return error


def _is_known(error: BaseException | None) -> bool:
    """Whether all have heard of an error, or of the one that it was made of, as messages are given places."""
    while error is not None:
        if "_known_to_all" in error.__dict__:
            return True
        error = error.__context__
    return False
