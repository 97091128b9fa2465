"""Whatever a file holds, reading it works or ends with one line: no other exception, no hang, nothing written
elsewhere, no code run.

Each kind of input has its place: a strategy that makes inputs from small valid files, and what the library does
with them. ``pytest -m long`` tries many more of each.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis.strategies import SearchStrategy

from hostile import guarded, little_memory
from semtok import UserError

FEW, MANY = 20, 300
Files = dict[str, bytes]
Inputs = tuple[SearchStrategy[Any], Callable[[Any], object]]
"""Inputs, and what reads one."""


def only_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that may be written to."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SEMTOK_CACHE", str(folder / "kept"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def fuzz(kind: Inputs, place: Path, num: int) -> None:
    """Tries so many inputs of a kind."""
    inputs, read = kind

    @settings(
        max_examples=num,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[
            Phase.explicit,
            Phase.generate,
        ],  # to shrink a folder takes minutes and tells little
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def reads_or_says_why(given: Any) -> None:
        with guarded(place):
            try:
                read(given)
            except UserError as error:
                note(str(error))
                assert len(str(error).splitlines()) == 1

    with little_memory():
        reads_or_says_why()


def write(folder: Path, files: Files) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_files(folder: Path) -> Files:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def with_errors(*calls: Callable[[], object]) -> None:
    """Each in turn, also where one before was refused."""
    for call in calls:
        try:
            call()
        except UserError as error:
            assert len(str(error).splitlines()) == 1
