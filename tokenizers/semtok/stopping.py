"""Signals that ask this process to stop, and when it does: at once, or when what it is doing is whole.

SIGTERM and SIGINT come from people, launchers and clusters. SIGUSR1 is what clusters send some time before they end
a job, as SLURM does with ``--signal=USR1@120``.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from types import FrameType

from semtok.errors import Interrupted

_HEARD = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
_SAME_SECONDS = 1.0
"""What follows a signal within this time is the same request: launchers and terminals both send it."""


class When(Enum):
    """What becomes of a signal."""

    AT_ONCE = "it raises Interrupted wherever it finds this process"
    AGREED = "it is remembered, until processes tell each other: then all raise Interrupted"
    LATER = "it is remembered, and whoever postpones it asks for it"


@dataclass
class _State:
    is_listening: bool = False
    when: When = When.AT_ONCE
    received: int | None = None
    at: float = 0.0


_state = _State()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Within this context the signals raise ``Interrupted`` wherever they find this process, but see ``obeyed``.

    One that comes a second or more after the first raises ``KeyboardInterrupt``, whatever goes on. Python hears
    signals in the main thread alone: in another thread, as of a notebook server or a web worker, nothing is changed
    and signals do what they did. Within another such context nothing is changed either.
    """
    if _state.is_listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    _state.__dict__ |= _State(is_listening=True).__dict__
    before = {number: signal.signal(number, _hear) for number in _HEARD}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        _state.__dict__ |= _State().__dict__


@contextlib.contextmanager
def obeyed(when: When) -> Iterator[None]:
    """Says for this context what becomes of a signal. In other threads than the main one it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, _state.when = _state.when, when
    try:
        yield
    finally:
        _state.when = before


@contextlib.contextmanager
def with_way_on(way_on: str) -> Iterator[None]:
    """Within this context what a signal ends says how to go on, where nothing within has said so."""
    try:
        yield
    except Interrupted as stopped:
        if stopped.way_on:
            raise
        number, checkpoint = stopped.signal_number, stopped.checkpoint
        raise Interrupted(number, checkpoint=checkpoint, way_on=way_on) from None


def is_postponed() -> bool:
    """Whether a signal is only remembered, even where processes tell each other."""
    return _state.when is When.LATER


def received() -> int | None:
    """The signal that came; None: none has."""
    return _state.received


def note(number: int) -> None:
    """Remembers a signal that another process of the run has got."""
    if _state.received is None:
        _state.received, _state.at = number, time.monotonic()


def check() -> None:
    """Raises ``Interrupted`` where a signal was remembered and that is not postponed."""
    if _state.received is not None and _state.when is not When.LATER:
        raise Interrupted(_state.received)


def _hear(number: int, _: FrameType | None) -> None:
    if _state.received is not None:
        if time.monotonic() - _state.at < _SAME_SECONDS:
            return
        raise KeyboardInterrupt
    note(number)
    if _state.when is When.AT_ONCE:
        raise Interrupted(number)
