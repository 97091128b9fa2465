"""Processes hear of one that does no more, from its last words, its silence, or from where it stands."""

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from semtok import heartbeat
from semtok.heartbeat import Place, _Beats

NUM = 3
Start = Callable[..., list[_Beats]]


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts the threads of three processes, in this one."""
    monkeypatch.setattr(heartbeat, "INTERVAL", 0.02)
    monkeypatch.setattr(heartbeat, "GRACE", 1e9)
    options = {"wait_for_workers": False, "use_libuv": False}
    server: TCPStore | None = TCPStore("127.0.0.1", 0, is_master=True, **options)
    started: list[_Beats] = []

    port = server.port

    def begin(places: list[Place], patience: float = 1e9) -> list[_Beats]:
        for rank, place in enumerate(places):
            store = TCPStore("127.0.0.1", port, is_master=False, **options)
            seconds = timedelta(seconds=min(patience, 1e6))
            started.append(_Beats(store, "", rank, NUM, seconds, place))
            started[-1].start()
        return started

    yield begin
    for each in started:  # connections end with the stores
        each._over.set()
        each.join()
        del each.store
    server = None


def heard(beats: list[_Beats]) -> set[str | None]:
    with contextlib.suppress(AssertionError):
        wait_for(lambda: all(each.place.heard for each in beats))
    return {each.place.heard for each in beats}


def test_a_process_that_fails_says_why_before_it_ends(start):
    beats = start([Place() for _ in range(NUM)])
    beats[1].end("CUDA out of memory")
    assert heard([beats[0], beats[2]]) == {"process 1 of 3 has ended: CUDA out of memory"}


def test_a_process_that_is_silent_is_dead(start, monkeypatch):
    monkeypatch.setattr(heartbeat, "DEAD_AFTER", 2.0)
    beats = start([Place() for _ in range(NUM)])
    wait_for(lambda: all(each._count for each in beats))
    beats[2]._over.set()
    assert heard(beats[:2]) == {"process 2 of 3 has ended, or its machine"}


def test_what_a_process_has_slept_through_is_no_silence_of_another(monkeypatch):
    """As where a cluster suspends all processes for a night, and lets one go on before the other."""
    now = 0.0
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now)
    seen = heartbeat._Seen(looked=now)
    for _ in range(2):
        seen.look("1 0 0")
        now += heartbeat.INTERVAL
    now += 9 * 3600
    assert seen.look("1 0 0") < 4 * heartbeat.INTERVAL
    for _ in range(int(heartbeat.DEAD_AFTER / heartbeat.INTERVAL)):
        now += heartbeat.INTERVAL
        silent = seen.look("1 0 0")
    assert silent > heartbeat.DEAD_AFTER
    assert seen.look("2 0 0") == 0


def test_a_process_for_which_the_others_wait_too_long_is_named(start):
    places = [Place(marks=7, step=40), Place(marks=6, step=40), Place(marks=7, step=40)]
    line = "process 1 of 3 has fallen behind: the others have waited for it for 0.00333 minutes, at step 40"
    assert heard(start(places, patience=0.2)) == {line}


def test_processes_that_end_in_order_say_nothing(start):
    """Also where the first one, which may hold what the others listen to, ends long before."""
    beats = start([Place(marks=9), Place(), Place(marks=5)])
    wait_for(lambda: all(each._count for each in beats))
    beats[0].end(None)
    wait_for(lambda: not beats[1].is_alive() and not beats[2].is_alive())
    assert {each.place.heard for each in beats} == {None}


def test_after_a_failure_that_no_dead_process_explains_nobody_is_accused(start, monkeypatch):
    monkeypatch.setattr(heartbeat, "SUSPECTED_AFTER", 2.0)
    beats = start([Place() for _ in range(NUM)])
    assert beats[0].ask() is None
