"""The soak command kills commands, starts them again, and finds what they lose."""

import contextlib
import itertools
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import semtok
from semtok.commands.cli import run
from soaking import command, killing, soaking
from soaking.jobs import Job
from soaking.killing import Kill, Moment, environment
from soaking.soaking import Result, Soak
from soaking.warm import Warm

WRITE = Kill(Moment.WRITE, 0.0, True)
TOY = f"""
import subprocess, sys, time, types
from pathlib import Path

sys.modules["semtok"] = package = types.ModuleType("semtok")  # without torch, which takes seconds
package.__path__ = [{str(Path(semtok.__file__).parent)!r}]
from semtok.unfinished import beside, remove_unfinished

how, folder = sys.argv[1], Path("run")
folder.mkdir(exist_ok=True)
if how != "untidy":
    remove_unfinished(folder)
if how == "counting":
    count = folder / "count"
    count.write_text(str(int(count.read_text() if count.exists() else 0) + 1))
if how == "leaving":
    subprocess.Popen(["sleep", "60"])
for number in range(3):
    place = folder / str(number)
    if not place.exists():
        hidden = beside(place)
        hidden.write_text(str(number))
        time.sleep(0.2)
        hidden.rename(place)
if how == "failing":
    print("Traceback (most recent call last):")
    sys.exit(1 if Path("again").exists() else Path("again").touch())
"""


def kill_by(monkeypatch: pytest.MonkeyPatch, kills: Sequence[Kill]) -> None:
    """These in turn, and the last for ever."""
    drawn = itertools.chain(kills, itertools.repeat(kills[-1]))
    monkeypatch.setattr(soaking, "draw_kill", lambda chance: next(drawn))


def soaked(folder: Path, job: Job, num_kills: int, warm: Warm | None = None) -> Result:
    soak = Soak(folder, seed=0, deadline=time.monotonic() + 100, warm=warm)
    *_, results = soak.run([job], num_kills)
    return results[0]


def toy(folder: Path, how: str) -> Job:
    (folder / "toy.py").write_text(TOY)
    return Job("toy", (str(folder / "toy"), how))


def test_a_command_that_is_killed_twice_ends_as_if_it_were_not(tmp_path, monkeypatch):
    images = ("kind=shapes", "size=32", "num_images=8", "num_validation_images=4")
    words = ("--tokenizer", "demo", "--output", "cache", "--shard-size", "2", "--data", *images)
    kill_by(monkeypatch, [Kill(Moment.START, 0.1, False), Kill(Moment.WORK, 0.0, True)])
    with contextlib.closing(Warm(environment())) as warm:
        result = soaked(tmp_path, Job("cache", ("cache_latents", *words)), 2, warm)
    assert result.findings == []
    assert result.num_kills == 2 and result.kills.keys() == {Moment.START, Moment.WORK}
    assert result.restarts >= 2 and result.rounds >= 1


def test_a_command_that_is_killed_before_it_opens_its_log_has_said_nothing(tmp_path, monkeypatch):
    def started(*_: object) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-ISc", ""], start_new_session=True)

    monkeypatch.setattr(killing, "_started", started)
    pace = killing.Pace(0.0, 0.0, 0)
    begun = killing.run_once(
        ("sample",), tmp_path, tmp_path / "log", kill=None, pace=pace, seconds=60, warm=None
    )
    assert begun.output == ""


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("sound", ""),
        ("counting", "round 1: other: run/count"),
        ("untidy", "round 1: left: run/."),
        ("failing", "round 1, start 2: a traceback"),
    ],
)
def test_what_differs_or_stays_after_a_kill_is_found(how, told, tmp_path, monkeypatch):
    kill_by(monkeypatch, [WRITE])
    result = soaked(tmp_path, toy(tmp_path, how), 1)
    assert result.num_kills == 1
    assert any(line.startswith(told) for line in result.findings) or (not told)
    assert bool(result.findings) == bool(told), result.findings


def test_processes_that_go_on_without_their_first_one_are_found_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(killing, "_ORPHAN_SECONDS", 0.1)
    kill_by(monkeypatch, [Kill(Moment.WRITE, 0.0, False)])
    result = soaked(tmp_path, toy(tmp_path, "leaving"), 1)
    assert "round 1, start 1: 1 processes went on after it was killed" in result.findings


def test_the_command_writes_a_table_and_ends_with_1_where_something_differs(
    tmp_path, monkeypatch, capsys
):
    kill_by(monkeypatch, [WRITE])
    for how, code in (("sound", 0), ("counting", 1)):
        monkeypatch.setattr(command, "JOBS", (toy(tmp_path, how),))
        words = ["--kills", "1", "--output", str(tmp_path / how), "--minutes", "1"]
        assert run(command.main, words) == code
        rows = (tmp_path / how / "soak.md").read_text().splitlines()
        assert rows[0].startswith("| job | kills | while it starts |") and len(rows) == 3
        assert rows[2].startswith("| toy | 1 | 0 | 0 | 1 |")
        assert rows[2].endswith("| no |" if code else "| yes |")
    assert "toy: round 1: other: run/count" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--jobs", "train_di"], "--jobs: no job 'train_di'; did you mean 'train_dit'?"),
        (["--kills", "0"], "--kills and --minutes must be more than 0"),
        (["--minutes", "0"], "--kills and --minutes must be more than 0"),
        ([], "is there already; choose a new folder"),
    ],
)
def test_what_can_not_be_soaked_is_told_before_anything_runs(words, told, tmp_path, capsys):
    (tmp_path / "x").touch()
    assert run(command.main, [*words, "--output", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err
