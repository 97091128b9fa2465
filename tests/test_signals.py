"""A signal is heard in every phase of a command, leaves what there is to keep, and says the way on."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from semtok import Tokenizer, stopping
from semtok.commands import around_training, train_dit, train_tokenizer
from semtok.commands.cli import run
from semtok.data import passes
from semtok.data.order import load_batches
from semtok.data.source import Key
from semtok.errors import Interrupted, UserError
from semtok.processes import gather, together
from semtok.recipe import parse_recipe
from semtok.stopping import When
from semtok.training.held_out import HeldOut
from semtok.training.loop import Trainer

SETTINGS: dict[str, Any] = {"sample_every": 3, "export_at": [4], "log_every": 1}
VAE = {"name": "vae"}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 138}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.content(VAE, **SETTINGS)))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What a run that nobody stops ends with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(train_tokenizer.main, [str(recipe), "--output", str(folder)]) == 0
    return tiny.final_tensors(folder)


def sent(number: int, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
    """As a function, but a signal comes before its work, or after it."""

    def interrupted(*args: Any, **options: Any) -> Any:
        result = function(*args, **options) if after else None
        signal.raise_signal(number)
        return result if after else function(*args, **options)

    return interrupted


PHASES = {
    "statistics": (train_tokenizer, "statistics_batches", signal.SIGUSR1, None),
    "the step before the last picture": (Trainer, "_log", signal.SIGTERM, 1),
    "the first picture": (HeldOut, "picture", signal.SIGTERM, 3),
    "an export on the way": (train_tokenizer, "_export_on_the_way", signal.SIGUSR1, 4),
    "a checkpoint": (Trainer, "save", signal.SIGINT, 6),
    "validation": (HeldOut, "metrics", signal.SIGTERM, 6),
    "the export": (Tokenizer, "save_pretrained", signal.SIGUSR1, 4),
    "the summary": (around_training, "summarise", signal.SIGTERM, 6),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_that_is_stopped_in_any_phase_keeps_its_steps_and_goes_on(
    phase, recipe, whole, tmp_path, capsys, monkeypatch
):
    place, name, number, step = PHASES[phase]
    with monkeypatch.context() as patch:
        patch.setattr(place, name, sent(number, getattr(place, name)))
        words = [str(recipe), "--output", str(tmp_path / "run")]
        assert run(train_tokenizer.main, words) == CODES[number]
    told = capsys.readouterr().err.strip().splitlines()
    kept = f"checkpoint: {tmp_path}/run/checkpoints/step_{step:08d}; " if step else ""
    assert told == [f"stopped by {number.name}; {kept}go on with --resume"]
    assert run(train_tokenizer.main, [*words, "--resume", "auto"]) == 0
    after = tiny.final_tensors(tmp_path / "run")
    assert all(torch.equal(whole[name], after[name]) for name in whole)
    assert (tmp_path / "run" / "exports" / "0000004" / "config.json").is_file()
    pictures = sorted(file.name for file in (tmp_path / "run" / "samples").iterdir())
    assert pictures == ["step_00000003.png", "step_00000006.png"]


def test_images_that_are_read_are_left_at_once(monkeypatch):
    source = tiny.open_sources(parse_recipe(tiny.content(VAE), "tiny").data)[0]
    monkeypatch.setattr(passes, "load_batches", sent(signal.SIGTERM, passes.load_batches))
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), stopping.listening():
        list(passes.read_images(source, [], batch_size=2))


def test_loader_processes_outlive_the_signals_that_a_cluster_sends_to_all_processes():
    source = tiny.open_sources(parse_recipe(tiny.content(VAE), "tiny").data)[0]
    keys = [[Key(index)] for index in range(6)]
    batches = load_batches(source, keys, num_workers=1, pin_memory=False)
    next(batches)
    (loader,) = multiprocessing.active_children()
    for number in CODES:
        os.kill(loader.pid, number)
    assert len(list(batches)) == 5


def test_before_the_first_file_a_run_says_that_it_starts_again(
    recipe, tmp_path, capsys, monkeypatch
):
    start = around_training.start_trainer
    monkeypatch.setattr(around_training, "start_trainer", sent(signal.SIGTERM, start))
    assert run(train_tokenizer.main, [str(recipe), "--output", str(tmp_path / "run")]) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command starts it again\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [train_tokenizer, train_dit])
def test_while_a_run_is_planned_a_signal_says_that_nothing_was_begun(
    command, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(command, "check_launch", sent(signal.SIGTERM, command.check_launch))
    words = ["vae"] if command is train_tokenizer else ["--tokenizer", "demo"]
    assert run(command.main, [*words, "--output", str(tmp_path / "run")]) == 143
    told = "stopped by SIGTERM; nothing was begun; give the same command again\n"
    assert capsys.readouterr().err == told
    assert not (tmp_path / "run").exists()


def test_signals_within_a_second_are_one_request_and_a_later_one_is_obeyed_at_once(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with stopping.listening(), stopping.obeyed(When.LATER):
        signal.raise_signal(signal.SIGTERM)
        for number, at in ((signal.SIGTERM, 10.01), (signal.SIGINT, 10.9)):
            now[0] = at
            signal.raise_signal(number)
        assert stopping.received() == signal.SIGTERM
        now[0] = 11.1
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert not isinstance(caught.value, Interrupted)
    assert stopping.received() is None, "what comes next is not stopped"


def test_what_is_remembered_is_obeyed_where_processes_meet_next():
    with stopping.listening():
        with stopping.obeyed(When.LATER):
            signal.raise_signal(signal.SIGUSR1)
            assert gather(1) == [1]
        with pytest.raises(Interrupted, match="SIGUSR1") as caught, together():
            gather(1)
    assert caught.value.exit_code == 138


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in CODES]
    with stopping.listening(), stopping.listening():
        assert all(signal.getsignal(number) is stopping._hear for number in CODES)
    assert [signal.getsignal(number) for number in CODES] == before


def test_two_trainings_one_after_another_work_in_a_thread_and_change_no_handler(tmp_path):
    before = [signal.getsignal(number) for number in CODES]
    made: list[Any] = []

    def work() -> None:
        for name in ("one", "two"):
            recipe = parse_recipe(tiny.content(VAE, steps=2), "tiny")
            tokenizer = train_tokenizer.train_tokenizer(recipe, str(tmp_path / name))
            made.append(tokenizer.encode(tiny.batch_of_shapes(2))["texture"])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(made) == 2 and torch.equal(*made)
    assert [signal.getsignal(number) for number in CODES] == before


def test_two_trainings_at_once_would_share_random_numbers_and_the_second_is_refused(
    tmp_path, monkeypatch
):
    recipe = parse_recipe(tiny.content(VAE, steps=2), "tiny")
    alone = train_tokenizer.train_tokenizer(recipe, tmp_path / "alone")
    told: list[str] = []

    def at_once() -> None:
        with pytest.raises(
            UserError, match="another training is at work in this process"
        ) as caught:
            train_tokenizer.train_tokenizer(recipe, tmp_path / "other")
        told.append(str(caught.value))

    original = Trainer.train_step

    def step(self: Trainer, *args: Any) -> None:
        thread = threading.Thread(target=at_once)
        thread.start()
        thread.join()
        original(self, *args)

    monkeypatch.setattr(Trainer, "train_step", step)
    beside = train_tokenizer.train_tokenizer(recipe, tmp_path / "beside")
    images = tiny.batch_of_shapes(2)
    assert len(told) == 2 and not (tmp_path / "other").exists()
    assert torch.equal(alone.encode(images)["texture"], beside.encode(images)["texture"])
