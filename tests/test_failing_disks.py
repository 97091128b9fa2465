"""A disk that is full or fails is told in one line, what was whole stays so, and the same command goes on."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from failing_disk import FailingDisk
from semtok.commands import cache_latents, sample, train_tokenizer
from semtok.commands.cli import run
from semtok.errors import UserError
from semtok.lock import LOCK_FILE
from semtok.storage import disk_told_with, new_file, write_json, write_tensors
from semtok.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from semtok.training.log import RunLog
from semtok.unfinished import is_unfinished

NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
STATE = dict.fromkeys(("seconds", "skipped", "ema_updates", "schedules"), 0) | {"optimisers": {}}
STATE |= dict.fromkeys(("scaler", "metrics", "random"), 0)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FailingDisk:
    return FailingDisk(tmp_path, monkeypatch)


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if is_unfinished(path.name)]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def words_of(number: int) -> str:
    return "make room" if number in (errno.ENOSPC, errno.EDQUOT) else "see to the disk"


@pytest.mark.parametrize("number", NUMBERS)
def test_at_whichever_write_a_disk_fails_the_last_checkpoint_stays_whole(number, disk, tmp_path):
    modules = {"learners": torch.nn.Linear(2, 2)}

    def save(step: int) -> None:
        save_checkpoint(
            tmp_path, step=step, modules=modules, state={"step": step, **STATE}, keep_last=1
        )

    save(1)
    before = files(tmp_path)
    failed = 0
    for at in range(1, 100):
        disk.fail(number, at)
        try:
            save(2)
        except OSError as error:
            failed += 1
            assert error.errno == number and Path(error.filename).is_relative_to(tmp_path)
            assert not any(map(is_unfinished, Path(error.filename).parts))
            disk.fail(0)
            now = files(tmp_path)
            assert before.items() <= now.items()
            kept = load_checkpoint(list_checkpoints(tmp_path)[0], modules=modules, parameters={})
            assert kept["step"] == 1
            continue
        break
    assert failed > 3, "it has to be found at each write"
    disk.fail(0)
    save(3)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_json(path, {"a": 1}),
        lambda path: write_tensors(path, {"a": torch.ones(3)}),
    ],
    ids=["json", "tensors"],
)
def test_a_file_is_the_old_one_or_the_new_one_and_the_error_names_it(
    write: Callable[[Path], None], number, disk, tmp_path
):
    path = tmp_path / "a.file"
    path.write_text("old")
    for at in range(1, 20):
        disk.fail(number, at)
        try:
            with new_file(path) as temporary:
                write(temporary)
        except OSError as error:
            assert error.errno == number and error.filename in (str(path), str(tmp_path))
            disk.fail(0)
            assert path.read_text() == "old"
            if number in (errno.ENOSPC, errno.EDQUOT):
                assert not unfinished(tmp_path)
            continue
        break
    assert at > 2
    disk.fail(0)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_line_of_metrics_that_can_not_be_written_names_the_file(number, disk, tmp_path):
    log = RunLog(tmp_path, total_steps=2, first_step=0, is_main=True)
    disk.fail(number)
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        log.metrics(1, {"loss/a": 1.0, "images_per_second": 1.0}, seconds_left=1.0)
    log.close()


def test_a_folder_above_that_is_closed_is_told_with_the_setting_that_names_the_place(tmp_path):
    closed, place = (
        PermissionError(errno.EACCES, "Permission denied", str(tmp_path)),
        tmp_path / "a",
    )
    told = f"data.cache: {tmp_path}: Permission denied; see to the disk and begin anew"
    with (
        pytest.raises(UserError, match=f"^{told}$"),
        disk_told_with("begin anew", place=place, key="data.cache"),
    ):
        raise closed
    elsewhere = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "b"))
    with pytest.raises(PermissionError), disk_told_with("begin anew", place=place):
        raise elsewhere


# Commands ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What commands make on a disk that is well: a folder, and how much each writes."""

    folder: Path
    writes: dict[str, int]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("disks")
    tiny.runs(root, steps=2)
    recipe = tiny.content({"name": "vae"}, steps=4, checkpoint_every=2, log_every=1, sample_every=2)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    writes = {}
    with pytest.MonkeyPatch.context() as patch:
        disk = FailingDisk(root, patch)
        for name, command in commands(root).items():
            disk.fail(0)
            assert run(*command(root / name)) == 0
            writes[name] = disk.writes
    return Made(root, writes)


def commands(root: Path) -> dict[str, Callable[[Path], tuple[Any, list[str]]]]:
    data = ["kind=shapes", "size=16", "num_images=12", "num_validation_images=4"]
    resume = ["--resume", "auto"]

    def of(main: Any, *words: object) -> Callable[[Path], tuple[Any, list[str]]]:
        return lambda output: (main, [*map(str, words), "--output", str(output)])

    return {
        "run": lambda output: (
            train_tokenizer.main,
            [str(root / "recipe.yaml"), *resume, "--output", str(output)],
        ),
        "cache": of(
            *(cache_latents.main, "--tokenizer", root / "tok", "--shard-size", 4),
            *("--data", *data),
        ),
        "set": of(sample.main, root / "dit", "--num", 4, "--batch-size", 2),
        "set.npz": of(sample.main, root / "dit", "--num", 4, "--batch-size", 2),
    }


def same(name: str, ours: Path, theirs: Path) -> bool:
    if name == "run":
        a, b = tiny.final_tensors(ours), tiny.final_tensors(theirs)
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    return (
        files(ours) == files(theirs) if ours.is_dir() else ours.read_bytes() == theirs.read_bytes()
    )


@pytest.mark.parametrize(
    ("name", "number", "share"),
    [
        ("run", errno.ENOSPC, 0.3),
        ("run", errno.ESTALE, 0.9),
        ("cache", errno.EROFS, 0.5),
        ("cache", errno.EDQUOT, 0.9),
        ("set", errno.ESTALE, 0.5),
        ("set", errno.ENOSPC, 0.8),
        ("set.npz", errno.EIO, 0.95),
    ],
)
def test_a_command_tells_of_the_disk_in_one_line_and_given_again_it_goes_on(
    name, number, share, made, disk, tmp_path, capsys
):
    command = commands(made.folder)[name](tmp_path / name)
    disk.fail(number, int(made.writes[name] * share))
    assert run(*command) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: "), told
    assert os.strerror(number) in told and f"; {words_of(number)} and " in told
    assert str(tmp_path / name) in told and not any(map(is_unfinished, told.split("/")))
    disk.fail(0)
    assert run(*command) == 0
    assert same(name, tmp_path / name, made.folder / name)
    assert not unfinished(tmp_path)
    assert not list(tmp_path.rglob(LOCK_FILE))
