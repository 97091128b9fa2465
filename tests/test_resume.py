"""An interrupted run ends with the same weights, to the last bit, as an uninterrupted one."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from processes import started
from semtok.commands.train_tokenizer import main, train_tokenizer
from semtok.recipe import parse_recipe
from semtok.unfinished import beside

METHOD = {"perceptual": "teacher", "adversarial": {**tiny.ADVERSARIAL, "start_step": 2}}


def train(folder: Path, *, resume: bool = False, **settings) -> None:
    recipe = parse_recipe(tiny.content(METHOD, **settings), "tiny")
    train_tokenizer(recipe, folder, resume=resume)


def assert_equal_to_the_last_bit(a: Path, b: Path) -> None:
    ours, theirs = tiny.final_tensors(a), tiny.final_tensors(b)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(folder)
    return folder


def test_three_steps_and_three_more_are_six_steps(uninterrupted, tmp_path):
    settings = {"checkpoint_every": 3}
    # The first half is the same run, stopped at its checkpoint by removing what came after.
    train(tmp_path / "run", **settings)
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [p.name for p in newest] == ["step_00000003", "step_00000006"]
    for file in newest[-1].iterdir():
        file.unlink()
    newest[-1].rmdir()
    train(tmp_path / "run", resume=True, **settings)
    assert_equal_to_the_last_bit(tmp_path / "run", uninterrupted)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert steps == [2, 4, 6], "no logged step is repeated or lost"


LONGER = {"steps": 26, "checkpoint_every": 5, "keep_last": 5, "sample_every": 1000, "log_every": 1}


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longer") / "run"
    train(folder, **LONGER)
    return folder


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_to_the_same_weights(signal_number, tmp_path, longer):
    recipe, said, killed = tmp_path / "recipe.yaml", tmp_path / "said", tmp_path / "killed"
    recipe.write_text(yaml.safe_dump(tiny.content(METHOD, **LONGER)))
    words = ["-m", "semtok_cli", "train_tokenizer", str(recipe), "--output", str(killed)]
    metrics = killed / "metrics.jsonl"
    with started(words, said) as process:
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 6:
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.01)
        process.send_signal(signal_number)
        code = process.wait(60)
    names = [p.name for p in sorted((killed / "checkpoints").glob("step_*"))]
    if signal_number == signal.SIGTERM:
        assert code == 128 + signal.SIGTERM
        assert "stopped by SIGTERM" in said.read_text() and "--resume" in said.read_text()
        assert names[-1] >= "step_00000006", "the checkpoint is of the step that was interrupted"
    else:
        assert code == -signal.SIGKILL
        assert "step_00000005" in names
    assert names[-1] < "step_00000026", "the run was stopped before its end"

    assert main([str(recipe), "--output", str(killed), "--resume"]) == 0
    assert_equal_to_the_last_bit(killed, longer)


def test_resuming_a_finished_run_changes_nothing(uninterrupted):
    before = tiny.final_tensors(uninterrupted)
    train(uninterrupted, resume=True)
    after = tiny.final_tensors(uninterrupted)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_newest_checkpoints_are_kept_and_nothing_temporary_stays(tmp_path):
    def train_vae(*, resume: bool, **settings) -> None:
        recipe = parse_recipe(tiny.content({"name": "vae"}, **settings), "tiny")
        train_tokenizer(recipe, tmp_path / "run", resume=resume)

    folder = tmp_path / "run" / "checkpoints"
    train_vae(resume=False, checkpoint_every=3, schedule="constant")
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        beside(path).mkdir() if path.parent != tmp_path else None
    settings = {"checkpoint_every": 1, "keep_last": 2, "steps": 8, "schedule": "constant"}
    train_vae(resume=True, **settings)
    assert sorted(p.name for p in folder.iterdir()) == ["step_00000007", "step_00000008"]


def test_global_random_generators_are_restored():
    import random

    import numpy as np

    from semtok.training.checkpoint import random_state, restore_random_state

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), np.random.rand(), random.random()

    state = random_state()
    first = draw()
    restore_random_state(state)
    assert draw() == first


def test_accumulated_micro_batches_equal_one_batch(tmp_path):
    # Without running statistics, which see one micro-batch at a time. Adam would hide a gradient that is
    # too large by a factor: so would clipping, which comes after the norm that is logged.
    settings = {"steps": 3, "log_every": 1}
    for name, accumulate in (("one", 1), ("two", 2)):
        content = tiny.content({"name": "vae"}, accumulate=accumulate, **settings)
        train_tokenizer(parse_recipe(content, "tiny"), tmp_path / name)
    norms = [
        [
            json.loads(line)["grad_norm/autoencoder"]
            for line in (tmp_path / n / "metrics.jsonl").open()
        ]
        for n in ("one", "two")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    for name, tensor in one.items():
        if name.startswith("learners."):
            torch.testing.assert_close(tensor, two[name], atol=2e-5, rtol=1e-3)
