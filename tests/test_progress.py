"""How far something long is: what logs and terminals are told, by every phase, and the way on after Ctrl-C."""

import io
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

import semtok_cli
from semtok import progress
from semtok.commands import cache_latents, evaluate
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data import passes
from semtok.data.images.tar_index import index_shards
from semtok.data.left_out import LeftOut
from semtok.data.remote import StoredFile
from semtok.evaluation.generation import FeatureNetwork, see
from semtok.evaluation.image_sets import ImageSet
from semtok.progress import ProgressLines
from semtok.recipe import parse_recipe
from semtok.training.log import RunLog
from stored import png
from tiny import content


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def told(seconds: list[float], total: int | None = 10, first: int = 0) -> list[str]:
    """The lines of a phase of ten images of which one is done at each of these times."""
    clock, lines = Clock(), []
    one = ProgressLines("measuring", total, first=first, clock=clock, say=lines.append)
    for now in seconds:
        clock.now = now
        one.advance(1)
    one.close()
    return lines


# Logs --------------------------------------------------------------------------------------------


def test_a_phase_of_less_than_five_seconds_says_nothing():
    assert told([0.4 * i for i in range(1, 11)]) == []


def test_a_log_gets_a_line_after_five_seconds_then_every_thirty_and_one_at_the_end():
    assert told([10.0 * i for i in range(1, 11)]) == [
        "measuring: 1 of 10 images (10%), 6 images/min, 01:30 left",
        "measuring: 4 of 10 images (40%), 6 images/min, 01:00 left",
        "measuring: 7 of 10 images (70%), 6 images/min, 00:30 left",
        "measuring: 10 images, done in 01:40 (6 images/min)",
    ]


def test_where_the_number_is_not_known_the_rate_is_told_alone():
    assert told([6.0, 12.0], total=None) == [
        "measuring: 1 images so far, 10 images/min",
        "measuring: 2 images, done in 00:12 (10 images/min)",
    ]


def test_what_was_there_before_tells_nothing_of_the_rate():
    assert told([6.0], first=4)[0] == "measuring: 5 of 10 images (50%), 10 images/min, 00:30 left"


@pytest.mark.parametrize(
    ("count", "seconds", "words"),
    [
        (12_000, 10, "1,200 images/s"),
        (15, 10, "1.5 images/s"),
        (1, 10, "6 images/min"),
        (1, 1800, "2 images/h"),
        (0, 10, "0 images/h"),
    ],
)
def test_slow_rates_are_told_in_minutes_and_hours(count, seconds, words):
    assert progress.rate(count, seconds, "images") == words


def test_a_wait_without_steps_is_told_too():
    lines, waits = [], []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        return len(waits) > 3

    progress.tell_of_waiting("fetching", wait, lines.append)
    assert waits == [5, 30, 30, 30]
    assert lines == [f"fetching: {t} so far" for t in ("00:05", "00:35", "01:05")]
    with progress.waiting("fetching"):
        pass  # its thread has ended: see conftest.py


def test_the_first_process_alone_tells(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    for rank, num_lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        with progress.progress("looking", 2) as advance:
            advance(2)
        assert len(capsys.readouterr().out.splitlines()) == num_lines


def test_names_that_are_no_utf8_are_told_all_the_same(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    with progress.progress("looking through caf\udce9", 1) as advance:
        advance(1)
    assert capsys.readouterr().out.startswith("looking through caf\ufffd: 1 images")


# Terminals ---------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("seconds", [0.4, 4.0])
def test_a_terminal_gets_one_line_that_is_rewritten(monkeypatch, capsys, seconds):
    clock, terminal = Clock(), Terminal()
    monkeypatch.setattr("tqdm.std.time", clock)
    monkeypatch.setattr("tqdm.std.tqdm.monitor_interval", 0)
    monkeypatch.setattr("sys.stderr", terminal)
    with progress.progress("measuring", 10) as advance:
        for _ in range(10):
            clock.now += seconds
            advance(1)
    written = terminal.getvalue()
    if seconds < 1:
        assert written == ""
    else:
        assert written.count("\n") == 1 and written.endswith("\n")
        assert "measuring:  50%" in written and "00:20<00:20" in written
    assert capsys.readouterr().out == ""


# Training ----------------------------------------------------------------------------------------


def lines_of_training(
    folder: Path, capsys: Any, seconds_a_step: float, log_every: int
) -> list[str]:
    clock = Clock()
    log = RunLog(folder, total_steps=1000, first_step=0, is_main=True, clock=clock)
    for step in range(1, 101):
        clock.now += seconds_a_step
        log.step_done()
        if step % log_every == 0:
            left = (1000 - step) * seconds_a_step
            log.metrics(step, {"loss/a": 1.0, "images_per_second": 4.0}, seconds_left=left)
    log.close()
    return capsys.readouterr().out.splitlines()


def test_the_first_steps_of_a_slow_training_are_told(tmp_path, capsys):
    lines = lines_of_training(tmp_path, capsys, seconds_a_step=20, log_every=50)
    assert lines[0] == "training: 1 of 1,000 steps (0%), 3 steps/min, 5:33:00 left"
    assert lines[1].startswith("training: 3 of 1,000 steps"), "thirty seconds later"
    assert lines[-1] == "step 100/1000  a 1  4.0 images/s  5:00:00 left"


def test_where_metrics_are_told_often_enough_there_is_nothing_between_them(tmp_path, capsys):
    lines = lines_of_training(tmp_path, capsys, seconds_a_step=0.5, log_every=5)
    assert len(lines) == 20 and all(line.startswith("step ") for line in lines)


def test_more_than_a_day_that_is_left_is_told_whole(tmp_path, capsys):
    lines = lines_of_training(tmp_path, capsys, seconds_a_step=200, log_every=100)
    assert lines[-1].endswith("  50:00:00 left")


# Every phase -------------------------------------------------------------------------------------

SHAPES = ("--data", "kind=shapes", "size=16", "num_images=24", "num_validation_images=24")
NUMS = ("--num-train", "20", "--num-held-out", "20")


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every phase counts as long, so that it tells how far it is."""
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    monkeypatch.setattr("semtok.evaluation.predictors.NUM_MAPS", 1)
    # Their lines are for what takes its time, and begin with a thread.
    monkeypatch.setattr(progress, "tell_of_waiting", lambda what, wait: None)


def phases(out: str) -> list[str]:
    """What said that it was done, in its order."""
    return [line.partition(":")[0] for line in out.splitlines() if ", done in " in line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("reconstruction", *NUMS[2:]), ["reconstructing held-out images"]),
        (
            ("latents", *NUMS[2:]),
            [
                "comparing latents with the teacher's features",
                "mapping latents",
                "encoding",
                "encoding",
                "fitting the probe",
            ],
        ),
        (("probe", *NUMS), ["encoding", "encoding", "fitting the probe"]),
    ],
)
def test_evaluations_of_tokenizers_tell_how_far_they_are(at_once, capsys, words, expected):
    task, *others = words
    assert run(evaluate.main, [task, "--tokenizer", "demo", *SHAPES, *others]) == 0
    found = phases(capsys.readouterr().out)
    assert [name.split(" shapes")[0] for name in found] == expected


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A tokenizer's run, and what its command said where every phase is long."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "QUIET_SECONDS", 0)
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        method = {"name": "reglue", "texture": "demo", "compressor": {"hidden": [8], "channels": 4}}
        recipe = content(method, steps=2, log_every=2)
        recipe["data"]["size"] = 32
        train_tokenizer(parse_recipe(recipe, "tiny"), folder)
    return folder, "\n".join(said)


def test_a_training_tells_of_the_passes_around_it(trained):
    assert phases(trained[1]) == [
        "measuring the texture part",
        "measuring the teacher's features",
        "validating",
        "measuring the statistics of the latents",
    ]


def test_a_folder_and_a_cache_tell_how_far_they_are(at_once, tmp_path, capsys):
    for name in "ab":
        for i in range(4):
            file = tmp_path / "images" / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(png(i, (16, 16)))
    words = ["--tokenizer", "demo", "--output", str(tmp_path / "cache")]
    words += ["--data", "kind=folder", f"path={tmp_path / 'images'}", "size=16"]
    assert run(cache_latents.main, words) == 0
    assert run(cache_latents.main, ["--verify", str(tmp_path / "cache")]) == 0
    found = list(
        dict.fromkeys(phases(capsys.readouterr().out))
    )  # a cache is compared as it is opened, too
    assert sorted(found) == sorted(
        [
            f"looking through {tmp_path / 'images'}",
            *(f"latents of the {part} images" for part in ("training", "held-out")),
            *(f"checksums of latents of the {part} images" for part in ("training", "held-out")),
            *(f"comparing {tmp_path / 'cache' / part}" for part in ("train", "validation")),
        ]
    )


def test_indices_of_tars_and_features_of_sets_tell_how_far_they_are(at_once, tmp_path, capsys):
    image = png(1, (16, 16))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content_of in (("a.png", image), ("b.png", image)):
            member = tarfile.TarInfo(name)
            member.size = len(content_of)
            archive.addfile(member, io.BytesIO(content_of))
    index_shards([StoredFile(str(tmp_path / "a.tar"), 0, "made up")], None, LeftOut())
    network = FeatureNetwork("mean", "", lambda x: {"pooled": x.float().mean(dim=(2, 3))})
    pixels = torch.rand(8, 3, 4, 4).mul(255).to(torch.uint8)
    see(ImageSet("made up", "", 8, (4, 4), lambda: iter(pixels.split(4))), [network])
    assert phases(capsys.readouterr().out) == ["indexing tar files", "features (made up)"]


# Ctrl-C ------------------------------------------------------------------------------------------


def interrupt(*_: Any, **__: Any) -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_a_command_is_imported_is_one_line(monkeypatch, capsys):
    def pressed(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("semtok.commands.cli.importlib.import_module", pressed)
    assert semtok_cli.launched("evaluate") == 130
    assert capsys.readouterr().err == "stopped before anything was begun\n"


def test_after_ctrl_c_the_way_on_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(passes, "load_batches", interrupt)
    output = ["--output", str(tmp_path / "out")]
    for command, words, way_on in (
        (cache_latents, ["--tokenizer", "demo", *SHAPES, *output], "the same command goes on"),
        (
            evaluate,
            ["reconstruction", "--tokenizer", "demo", *SHAPES],
            "nothing was written; the same command begins anew",
        ),
    ):
        assert run(command.main, words) == 130
        assert capsys.readouterr().err.splitlines()[-1] == f"stopped by SIGINT; {way_on}"
