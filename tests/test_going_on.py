"""Runs that go on: with the folder's own recipe, for more steps, alone in their folder, after a full disk."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import semtok
import tiny
from processes import started
from semtok import Tokenizer
from semtok.commands import train_dit, train_tokenizer
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import tokenizer_from_reference
from semtok.lock import LOCK_FILE, InUse, only_one_in
from semtok.recipe import parse_recipe
from semtok.storage import new_file, write_state
from semtok.training.train_config import TrainConfig

VAE = {"name": "vae"}
OWN = ["train.batch_size=2", "train.checkpoint_every=2", "train.log_every=1"]


def write(path: Path, **train: Any) -> Path:
    path.write_text(yaml.safe_dump(tiny.content(VAE, **train)))
    return path


def train(*words: Any) -> int:
    return run(train_tokenizer.main, list(map(str, words)))


def rates(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [row["lr/autoencoder"] for row in rows]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a recipe, and its run ``half``, whose last checkpoint and end are taken away."""
    root = tmp_path_factory.mktemp("going_on")
    write(root / "recipe.yaml")
    assert train(root / "recipe.yaml", *OWN, "--output", root / "half", "--resume", "auto") == 0
    shutil.copytree(root / "half", root / "whole")
    shutil.rmtree(root / "half" / "checkpoints" / "step_00000006")
    shutil.rmtree(root / "half" / "export")
    return root


@pytest.fixture
def half(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root / "half", tmp_path / "half")


@pytest.mark.parametrize(
    "words",
    [
        ["recipe.yaml", "--resume"],
        ["recipe.yaml", "--resume", "auto"],
        ["--resume"],
        ["train.keep_last=5", "--resume"],
        ["--resume", "train.keep_last=5"],
        ["--resume=auto", "train.batch_size=2"],
        ["recipe.yaml", *OWN, "--resume"],
    ],
)
def test_a_run_goes_on_with_its_own_settings_that_need_not_be_repeated(
    words, root, half, monkeypatch
):
    monkeypatch.chdir(root)
    assert train(*words, "--output", half) == 0
    ours, theirs = tiny.final_tensors(half), tiny.final_tensors(root / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    settings = yaml.safe_load((half / "recipe.yaml").read_text())["train"]
    assert settings["batch_size"] == 2
    assert settings["keep_last"] == (5 if "train.keep_last=5" in words else 2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume", "train.batch_size=4"], "train.batch_size was 2 and is now 4"),
        (["other.yaml", "--resume"], "train.ema_decay was 0.9 and is now 0.5"),
        (["--resume", "auto", "train.steps=3"], "train.steps was 6 and is now 3"),
        (["--resume", "train.steps=5"], "train.steps was 6 and is now 5"),
        (["--resume", "train.planned_before=[[3, 6]]"], "planned_before: is not as the run was"),
        (["recipe.yaml"], "holds a run already; go on with --resume"),
        (["--resume", "train.batch_siz=2"], "did you mean 'batch_size'"),
        ([], "a recipe is missing"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(words, told, root, half, monkeypatch, capsys):
    monkeypatch.chdir(root)
    write(root / "other.yaml", ema_decay=0.5)
    assert train(*words, *(["--output", half] if words else [])) == 2
    assert told in capsys.readouterr().err


def test_a_run_of_another_method_is_told_by_the_methods_name(root, half, monkeypatch, capsys):
    monkeypatch.chdir(root)
    (root / "sent.yaml").write_text(yaml.safe_dump(tiny.content({"name": "send_vae"})))
    assert train("sent.yaml", "--resume", "auto", "--output", half) == 2
    assert "recipe: method.name was 'vae' and is now 'send_vae' (and" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [[], ["recipe.yaml"]])
def test_a_run_of_another_command_is_told_with_the_command_that_goes_on(
    recipe, root, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(root)
    (tmp_path / "recipe.yaml").write_text("tokenizer: demo\ndiffusion: {}\n")
    assert train(*recipe, "--resume", "--output", tmp_path) == 2
    told = f"{tmp_path}: is a transformer's run; semtok train_dit --resume --output {tmp_path} goes"
    assert told in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("method: {name: vae}\n")
    words = ["--tokenizer", "demo"] if recipe else []
    assert run(train_dit.main, [*words, "--resume", "--output", str(tmp_path)]) == 2
    told = f"{tmp_path}: is a tokenizer's run; semtok train_tokenizer --resume --output {tmp_path} goes"
    assert told in capsys.readouterr().err


def test_a_finished_run_is_left_alone_and_said_to_be_finished(root, tmp_path, capsys):
    folder = shutil.copytree(root / "whole", tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert train("--resume", "auto", "--output", folder) == 0
    assert f"{folder}: is finished, 6 steps" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert train("--resume", "auto", "--output", folder, "train.batch_size=4") == 2
    assert "train.batch_size was 2 and is now 4" in capsys.readouterr().err
    recipe = parse_recipe(yaml.safe_load((folder / "recipe.yaml").read_text()), "own")
    again = train_tokenizer.train_tokenizer(recipe, folder, resume="auto")
    assert isinstance(again, Tokenizer)


def test_a_cosine_is_planned_anew_for_more_steps_and_its_recipe_makes_the_same_run(
    root, tmp_path, capsys
):
    grown = shutil.copytree(root / "whole", tmp_path / "grown")
    assert train("--resume", "auto", "--output", grown, "train.steps=10") == 0
    assert "train.steps is 10 and was 6: the cosine is planned anew" in capsys.readouterr().out
    settings = yaml.safe_load((grown / "recipe.yaml").read_text())["train"]
    assert settings["planned_before"] == [[6, 6]] and settings["steps"] == 10
    short = TrainConfig(**(tiny.content(VAE)["train"]))
    long = TrainConfig(**(tiny.content(VAE, steps=10)["train"]))
    # A row tells the rate of the step after it.
    planned = [short.learning_rate_factor(step) for step in range(1, 6)]
    planned += [long.learning_rate_factor(step) for step in range(6, 11)]
    seen = [rate / 1e-3 for rate in rates(grown)]
    assert seen[:5] + seen[6:] == pytest.approx(planned[:5] + planned[6:])
    assert train(grown / "recipe.yaml", "--output", tmp_path / "again") == 0
    ours, theirs = tiny.final_tensors(grown), tiny.final_tensors(tmp_path / "again")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_constant_rate_goes_on_for_more_steps(tmp_path, capsys):
    recipe = write(tmp_path / "r.yaml", schedule="constant", steps=2)
    assert train(recipe, "--output", tmp_path / "run") == 0
    assert train(recipe, "--output", tmp_path / "run", "--resume", "auto", "train.steps=4") == 0
    settings = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["train"]
    assert settings["steps"] == 4 and settings["planned_before"] == []
    assert train("--output", tmp_path / "run", "--resume", "train.steps=3") == 2
    assert "train.steps 3: the run has done 4 already" in capsys.readouterr().err


def test_a_run_that_comes_first_goes_on_with_its_own_settings(root, tmp_path, monkeypatch, capsys):
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    shutil.copy(root / "recipe.yaml", recipes / "small.yaml")
    monkeypatch.setattr("semtok.references.recipe_folder", lambda: recipes)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root / "half", tmp_path / "runs" / "small")
    tokenizer_from_reference("small")
    assert "resuming after step 4" in capsys.readouterr().out
    assert Tokenizer.from_pretrained("small").training_info["steps"] == 6


def test_a_generator_needs_neither_tokenizer_nor_settings_to_go_on(tmp_path, capsys):
    tiny.runs(tmp_path)
    words = ["--output", str(tmp_path / "dit"), "--resume", "train.steps=8"]
    assert run(train_dit.main, words) == 0
    assert "resuming after step 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "dit" / "summary.json").read_text())["steps"] == 8


# Short runs --------------------------------------------------------------------------------------


def test_a_short_run_of_a_recipe_cuts_its_warm_up_and_says_so(tmp_path, capsys):
    recipe = write(
        tmp_path / "r.yaml", steps=60, warmup_steps=20, constant_steps=30, export_at=[50]
    )
    assert train(recipe, "train.steps=6", "--print-recipe") == 0
    shown = capsys.readouterr()
    settings = yaml.safe_load(shown.out)["train"]
    assert (settings["warmup_steps"], settings["constant_steps"]) == (2, 3)
    assert settings["export_at"] == []
    assert shown.err == (
        "note: train.steps 6 of 60: train.warmup_steps=2 train.constant_steps=3 train.export_at=[], cut to fit\n"
    )
    assert train(recipe, "train.steps=50", "train.export_at=[50]", "--print-recipe") == 0
    shown = capsys.readouterr()
    assert yaml.safe_load(shown.out)["train"]["warmup_steps"] == 20 and not shown.err
    assert train(recipe, "train.steps=6", "train.warmup_steps=7") == 2
    assert "train.warmup_steps 7 and train.constant_steps 3 is more" in capsys.readouterr().err


# One at a time -----------------------------------------------------------------------------------


def test_a_second_run_in_a_folder_is_told_who_is_there(half, capsys):
    with only_one_in(half, "a run"):
        assert train("--resume", "--output", half) == 2
    told = capsys.readouterr().err
    assert f"error: {half}: a run is at work there (process {os.getpid()} on " in told
    assert told.count("\n") == 1
    assert not (half / LOCK_FILE).exists()


def test_a_folder_that_was_made_for_nothing_is_gone_again(tmp_path):
    with pytest.raises(RuntimeError), only_one_in(tmp_path / "a", "a run"):
        raise RuntimeError
    assert not (tmp_path / "a").exists()


def test_a_killed_process_leaves_no_lock_though_one_that_it_forked_lives_on(tmp_path):
    script = (
        "import os, sys, time, types; from pathlib import Path\n"
        "sys.modules['semtok'] = package = types.ModuleType('semtok')\n"  # without torch, which takes seconds
        "package.__path__ = [sys.argv[3]]\n"
        "from semtok.lock import only_one_in\n"
        "with only_one_in(Path(sys.argv[1]), 'a run'):\n"
        "    if not os.fork():\n"
        "        os.setsid()\n"
        "        Path(sys.argv[2]).write_text(str(os.getpid()))\n"
        "    time.sleep(60)\n"
    )
    folder, child = tmp_path / "run", tmp_path / "child"
    words = ["-c", script, str(folder), str(child), str(Path(semtok.__file__).parent)]
    with started(words, tmp_path / "log") as process:
        while not (child.exists() and child.read_text()):
            assert process.poll() is None, (tmp_path / "log").read_text()
        with pytest.raises(InUse, match=f"process {process.pid} on"), only_one_in(folder, "a run"):
            pass
        process.kill()
        process.wait()
        try:
            with only_one_in(folder, "a run"):
                assert (folder / LOCK_FILE).is_file()
        finally:
            os.kill(int(child.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("has_locks", [True, False])
def test_a_run_on_another_machine_is_known_by_its_touching_the_file(
    has_locks, tmp_path, monkeypatch
):
    """As on a disk that several machines share, where locks are missing or each machine's own."""
    monkeypatch.setattr("semtok.lock.BEAT_SECONDS", 0.01)
    if not has_locks:
        monkeypatch.setattr("semtok.lock.fcntl", None)
    place = tmp_path / LOCK_FILE
    owner = {"host": "elsewhere", "pid": 7, "since": "2026-01-01 00:00:00"}
    place.write_text(json.dumps(owner))
    with only_one_in(tmp_path, "a run"):
        pass
    place.write_text(json.dumps(owner))
    moments = iter(range(1, 1000))

    def touch(_: float) -> None:
        os.utime(place, ns=(0, next(moments)))

    monkeypatch.setattr("semtok.lock.time.sleep", touch)
    with (
        pytest.raises(InUse, match="process 7 on elsewhere, since 2026"),
        only_one_in(tmp_path, "a run"),
    ):
        pass


# Full disks --------------------------------------------------------------------------------------


@pytest.fixture
def small_files() -> Any:
    """Files take so many bytes at most, as on a full disk, once it is called with a number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_torch_can_not_write_is_the_system_s_error(tmp_path, small_files):
    small_files(10_000)
    with (
        pytest.raises(OSError, match="File too large.*weights.pt"),
        new_file(tmp_path / "weights.pt") as temporary,
    ):
        write_state(temporary, {"a": torch.zeros(10_000)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_goes_on(
    file, root, half, small_files, capsys
):
    """Whether it is full at the networks, which safetensors writes, or at the rest, which torch writes."""
    sizes = {p.name: p.stat().st_size for p in (half / "checkpoints/step_00000004").iterdir()}
    assert sizes["model.safetensors"] < sizes["state.pt"]
    small_files(sizes[file] - 1)
    assert train("--resume", "--output", half) == 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    told = capsys.readouterr().err
    assert told.startswith(f"error: {half}/") and told.count("\n") == 1
    assert "File too large; make room and go on with --resume auto" in told
    assert train("--resume", "auto", "--output", half) == 0
    ours, theirs = tiny.final_tensors(half), tiny.final_tensors(root / "whole")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
