"""One thread for tests, as their networks are so small that more only wait for each other; and what tests take, they
give back."""

import ctypes
import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from given_back import held, taken_since
from processes import Ranks
from semtok_cli import importing_much

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in processes started here
# Large tensors come from memory that is kept. By itself glibc gives it back to the system, which clears each page for
# the next one: a third of the time of convolutions in double precision.
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports make half a million objects that stay. Looking for garbage among them takes a sixth of the time, here and
    in tests."""
    gc.set_threshold(20_000, 20, 10)  # tests import as much again
    with importing_much():
        try:
            return (yield)
        finally:
            gc.collect()


@pytest.fixture(autouse=True, scope="session")
def _temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder for all that is made in the system's, so that it is seen what stays there."""
    tmp_path_factory.getbasetemp()  # pytest's own stays where it is looked for
    with (
        tempfile.TemporaryDirectory(prefix="semtok-", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("TMPDIR", folder)
        patch.setattr("tempfile.tempdir", folder)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_machine_is_fast_in_bf16() -> Iterator[None]:
    """What ``train.precision=auto`` comes to in tests does not depend on where they run."""
    from semtok.training import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "found_here", lambda: precision.Gains(1.0, 1.0))
        yield


class _Blank:
    """Stands for a figure of curves."""

    def savefig(self, file: Any, **_: Any) -> None:
        Image.new("L", (8, 8)).save(file, "PNG")


@pytest.fixture(autouse=True, scope="session")
def _curves_are_blank() -> Iterator[Any]:
    """Curves of what tests train are not drawn, which is a quarter of what tiny ones take; see ``drawn_curves``."""
    from semtok.training import log

    drawn = log._figure_of_curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "_figure_of_curves", lambda points: _Blank())
        yield drawn


@pytest.fixture(scope="module")
def drawn_curves(_curves_are_blank: Any) -> Iterator[None]:
    """For this module's tests curves are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semtok.training.log._figure_of_curves", _curves_are_blank)
        yield


@pytest.fixture(autouse=True, scope="module")
def _what_is_taken_is_given_back(
    request: pytest.FixtureRequest, _temporary_files: None
) -> Iterator[None]:
    """Descriptors, threads, processes and temporary files at the end of a module are those of its start."""
    own = (item for item in request.session.items if item.path == request.path)
    if any("ranks" in item.fixturenames for item in own):  # which stay for other modules
        request.getfixturevalue("ranks").start()
    before = held()
    yield
    new = taken_since(before)
    assert not new, "the tests of this module have not given back:\n" + "\n".join(new)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes that tests share, as they take seconds to start."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    try:
        yield ranks
    finally:
        ranks.close()
