"""A judge that nothing was aligned to: it learns from real images alone, once, and tells how well it reads."""

import contextlib
import shutil
from pathlib import Path

import pytest
import torch

from semtok import lock
from semtok.commands import evaluate
from semtok.commands.cli import run
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.errors import UserError
from semtok.evaluation.classes import Judge, accuracy, features_and_labels, real_batches
from semtok.evaluation.judge import JudgeNetwork, trained_judge
from semtok.lock import only_one_in

CPU = torch.device("cpu")
CONFIG = ShapesConfig(size=16, classes=("hue",), num_images=1000, num_validation_images=200)
TRAIN, HELD_OUT = Shapes.open(CONFIG)


def judge(cache: Path, *, steps: int = 40, num_images: int = 1000, seed: int = 0) -> Judge:
    return trained_judge(
        TRAIN, num_images=num_images, cache=cache, device=CPU, seed=seed, steps=steps
    )


def test_a_judge_that_saw_nothing_but_training_images_reads_held_out_ones(tmp_path):
    trained = judge(tmp_path)
    features, labels = features_and_labels(trained.network, real_batches(HELD_OUT, 200))
    share, by_label = accuracy(trained.read(features), labels)
    assert share > 0.95 and set(by_label) == set(range(6))
    assert accuracy(trained.read(features), (labels + 1) % 6)[0] < 0.05
    assert features.shape == (200, 128) and features.std(axis=0).max() > 0, "a network for FD"


def test_it_is_trained_once_for_the_same_images_and_seed_and_repeats(tmp_path):
    before = torch.get_rng_state()
    first = judge(tmp_path / "one", steps=2).network
    assert torch.equal(before, torch.get_rng_state()), "it draws nobody else's random numbers"
    (file,) = (tmp_path / "one").iterdir()
    written = file.stat().st_mtime_ns
    assert judge(tmp_path / "one", steps=2).network.identity == first.identity
    assert file.stat().st_mtime_ns == written, "read, not trained again"
    assert judge(tmp_path / "two", steps=2).network.identity == first.identity, "it repeats"
    file.write_bytes(file.read_bytes()[:100])
    assert judge(tmp_path / "one", steps=2).network.identity == first.identity, "damaged: made anew"
    assert judge(tmp_path / "one", steps=2, seed=1).network.identity != first.identity
    assert judge(tmp_path / "one", steps=2, num_images=100).network.identity != first.identity
    TRAIN.flip = not TRAIN.flip
    assert judge(tmp_path / "one", steps=2).network.identity != first.identity, "mirrored or not"
    TRAIN.flip = not TRAIN.flip
    assert len(list((tmp_path / "one").iterdir())) == 4


def test_a_judge_that_another_process_trains_is_waited_for_and_read(tmp_path, monkeypatch, capsys):
    first = judge(tmp_path / "other", steps=2).network
    (file,) = (tmp_path / "other").iterdir()
    cache, other = tmp_path / "cache", contextlib.ExitStack()
    other.enter_context(only_one_in(cache, "another", lock_file=f".{file.stem}.lock"))

    def ends(seconds: float) -> None:
        shutil.copy(file, cache)
        other.close()

    monkeypatch.setattr(lock.time, "sleep", ends)
    monkeypatch.setattr("semtok.evaluation.judge._train", None)
    assert judge(cache, steps=2).network.identity == first.identity
    assert "a command that trains this judge is at work there" in capsys.readouterr().out
    assert [found.name for found in cache.iterdir()] == [file.name]


def test_large_images_are_made_smaller_and_keep_their_shape():
    network = JudgeNetwork(2, (160, 192)).eval()
    assert network.input_size == (64, 77)
    assert network(torch.zeros(1, 3, 160, 192)).shape == (1, 2)


def test_images_of_one_class_have_no_judge(tmp_path):
    train, _ = Shapes.open(CONFIG)
    train.class_names = ("all",)
    with pytest.raises(UserError, match="the images have one class; take a teacher"):
        trained_judge(train, num_images=10, cache=tmp_path, device=CPU)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "trained", "--teacher", "demo"], "--teacher: goes with --judge teacher"),
        (["--judge-steps", "5"], "--judge-steps: goes with --judge trained"),
        (["--judge", "trained", "--judge-steps", "0"], "--judge-steps must be at least 1"),
        (["--judge", "demo", "--judge-seed", "1"], "--judge-seed: goes with --judge trained, and"),
        (["--judge", "demo", "--teacher", "demo"], "--teacher: goes with --judge teacher, and the"),
        (["--judge", "demo", "--judge", "trained"], "--judge: one reads the classes here"),
        (["--judge", "nobody"], "--judge nobody: expected trained, teacher, demo"),
    ],
)
def test_words_without_effect_on_the_judge_are_refused(capsys, words, message):
    assert run(evaluate.main, ["classes", "--model", "none", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
