"""What a killed process was writing is removed by whoever writes there next, and nothing else is."""

import subprocess
import sys
from pathlib import Path

import pytest

from semtok import unfinished
from semtok.storage import new_file, new_folder, remove_folder
from semtok.unfinished import as_finished, beside, is_unfinished, remove_unfinished


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-ISc", ""])
    process.wait()
    return process.pid


def left(path: Path, number: int, monkeypatch: pytest.MonkeyPatch, *, was: bool = False) -> Path:
    """What a process of this number would leave of a file."""
    with monkeypatch.context() as patch:
        patch.setattr("os.getpid", lambda: number)
        hidden = beside(path, was=was)
    hidden.write_text("part")
    return hidden


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("writes", [new_file, new_folder])
def test_writing_removes_what_is_of_the_dead_and_leaves_what_is_of_the_living(
    writes, dead, tmp_path, monkeypatch
):
    of_the_dead = left(tmp_path / "a.json", dead, monkeypatch)
    folder = beside(tmp_path / "export")
    (folder / "inner").mkdir(parents=True)
    folder.rename(of_the_dead.with_name(of_the_dead.name.replace("a.json", "export")))
    of_the_living = left(tmp_path / "b.json", 1, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "_machine", lambda: "0123456789ab")
        of_another_machine = left(tmp_path / "c.json", dead, monkeypatch)
    (tmp_path / ".somebody's").write_text("own")
    with writes(tmp_path / "new") as temporary:
        if writes is new_file:
            temporary.write_text("whole")
    kept = [".somebody's", "new", of_the_living.name, of_another_machine.name]
    assert names(tmp_path) == sorted(kept)


def test_what_was_to_be_replaced_and_was_not_is_at_its_place_again(dead, tmp_path, monkeypatch):
    """A process was killed between two renamings."""
    left(tmp_path / "export", dead, monkeypatch, was=True)
    left(tmp_path / "export", dead, monkeypatch)
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["export"]
    left(tmp_path / "export", dead, monkeypatch, was=True)
    remove_unfinished(tmp_path)
    assert names(tmp_path) == ["export"], "the new one was there already"


def test_only_what_was_to_have_these_names_is_removed(dead, tmp_path, monkeypatch):
    left(tmp_path / "recipe.yaml", dead, monkeypatch)
    other = left(tmp_path / "samples.npz", dead, monkeypatch)
    remove_unfinished(tmp_path, "recipe.yaml", "export")
    assert names(tmp_path) == [other.name]


def test_a_folder_that_is_removed_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_text("b")
    monkeypatch.setattr("shutil.rmtree", lambda path: None)  # as if the process were killed there
    remove_folder(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    assert all(map(is_unfinished, names(tmp_path)))


def test_a_hidden_name_tells_what_it_is_of(tmp_path):
    inner = beside(beside(tmp_path / "a.b")) / "c"
    assert is_unfinished(inner.parent.name) and not is_unfinished("a.b")
    assert as_finished(inner) == tmp_path / "a.b" / "c"
    assert inner.parent.suffix == ".b", "libraries go by the ending"
