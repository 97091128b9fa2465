"""What is exported of one run twice, by two processes, is the same to the last byte."""

from pathlib import Path

import pytest

import tiny
from processes import started
from semtok.commands import hub, sample
from semtok.commands.cli import run
from soaking.comparing import differences


def make(runs: Path, output: Path) -> None:
    """All kinds of exports of the runs in a folder."""
    for name in ("tok", "dit"):
        words = ["checkpoint", str(runs / name), "--output", str(output / f"{name}_export")]
        assert run(hub.main, words) == 0
    assert run(hub.main, ["export", str(runs / "dit"), "--output", str(output / "pipeline")]) == 0
    words = [str(runs / "dit"), "--num", "3", "--output", str(output / "set.npz")]
    assert run(sample.main, words) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, drawn_curves: None) -> Path:
    """Two runs of one recipe in ``ours`` and ``theirs``, the second and what is exported beside it by a process where
    sets and dicts have another order."""
    root = tmp_path_factory.mktemp("same")
    program = "import sys, pathlib, tiny, test_same_bytes as test; root = pathlib.Path(sys.argv[1])"
    program += "; tiny.runs(root / 'theirs', steps=2); test.make(root / 'ours', root / 'b')"
    tiny.runs(root / "ours", steps=2)
    words = ["-c", program, str(root)]
    with started(words, root / "log", {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}) as process:
        make(root / "ours", root / "a")
        assert process.wait(180) == 0, (root / "log").read_text()
    return root


@pytest.mark.parametrize("name", ["tok_export", "dit_export", "pipeline"])
def test_exports_of_a_run_are_equal_byte_for_byte(name, root):
    ours, theirs = (
        {
            p.relative_to(root / k): p.read_bytes()
            for p in (root / k / name).rglob("*")
            if p.is_file()
        }
        for k in "ab"
    )
    assert len(ours) > 3 and ours.keys() == theirs.keys()
    assert not [path for path, content in ours.items() if content != theirs[path]]


def test_sets_of_a_generator_are_equal_byte_for_byte(root):
    assert (root / "a" / "set.npz").read_bytes() == (root / "b" / "set.npz").read_bytes()


def test_runs_of_a_recipe_differ_in_their_seconds_alone(root):
    """Checkpoints with EMA and optimisers, metrics, pictures and the export."""
    assert differences(root / "ours" / "tok", root / "theirs" / "tok") == []
