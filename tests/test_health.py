"""Jumps of losses are told with their step, and what processes wait for where it is worth a line."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from semtok.training import health
from semtok.training.health import Jumps, Processes
from semtok.training.log import MetricSums


def noisy(num: int, spread: float = 0.3, name: str = "loss/a") -> dict[int, dict[str, float]]:
    """A value that falls, and is noisy."""
    noise = torch.randn(num, generator=torch.Generator().manual_seed(0)) * spread
    return {step: {name: math.exp(noise[step - 1] - step / num)} for step in range(1, num + 1)}


def found(steps: dict[int, dict[str, float]], window: int = 50) -> list[dict[str, Any]]:
    jumps, numbers = Jumps(), sorted(steps)
    windows = [numbers[first : first + window] for first in range(0, len(numbers), window)]
    return [jump for own in windows if (jump := jumps.find({n: steps[n] for n in own}))]


@pytest.mark.parametrize("window", [1, 50, 1000])
def test_a_jump_is_found_at_its_step(window):
    steps = noisy(600)
    assert not found(steps, window)
    usual, steps[433]["loss/a"] = steps[433]["loss/a"], 30.0
    (jump,) = found(steps, window)
    assert jump["loss/a"].step == 433 and jump["loss/a"].value == 30.0
    assert jump["loss/a"].ratio == pytest.approx(30.0 / usual, rel=2)


def test_what_is_noisy_or_begins_late_is_no_jump():
    assert not found(noisy(600, spread=1.0)), "sizes from a tenth to ten times"
    late = {step: {"loss/a": 0.0 if step < 300 else 2.0} for step in range(1, 600)}
    assert not found(late)
    assert not found({step: {"metric/a": step**4.0} for step in range(1, 600)}), "no loss"


@pytest.mark.parametrize("window", [1, 7, 30, 50])
def test_what_stays_is_told_once_however_often_the_log_is_written(window):
    higher = noisy(600)
    for step in range(401, 601):
        higher[step]["loss/a"] *= 40
    assert [jump["loss/a"].step in range(401, 451) for jump in found(higher, window)] == [True]


def test_what_goes_on_rising_is_told_again():
    rising = noisy(420, spread=0.0)
    for step in range(401, 421):
        rising[step]["loss/a"] *= 2.0 ** (step - 400)
    steps = [jump["loss/a"].step for jump in found(rising, window=1)]
    assert 6 <= len(steps) <= 12 and steps[-1] > 415


def test_a_run_names_the_step_of_a_jump(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(health, "_ENOUGH", 10)
    trainer = tiny.trainer(tmp_path, {"name": "vae"}, steps=20, log_every=10)
    note = trainer._note

    def spy(values: dict[str, torch.Tensor]) -> None:
        jumps = trainer.step + 1 == 18
        note({n: 1000 * v if jumps and n == "loss/l1" else v for n, v in values.items()})

    trainer._note = spy
    trainer.run()
    told = [line for line in capsys.readouterr().out.splitlines() if "its usual size" in line]
    assert len(told) == 1 and told[0].startswith("warning: step 18: loss/l1 "), told
    first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").open())
    assert "jumps" not in first and last["jumps"]["loss/l1"][0] == 18
    for row in (first, last):
        assert row["health/step_seconds"] > row["health/forward_seconds"] > 0
        assert 0 <= row["health/data_wait"] <= 1 and row["health/memory_gb"] > 0.05
        assert "processes" not in row


def test_a_run_that_goes_on_warns_as_one_that_was_not_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(health, "_ENOUGH", 10)

    def told(*, resume: bool) -> list[str]:
        settings = {"steps": 20, "log_every": 10, "checkpoint_every": 15}
        trainer = tiny.trainer(tmp_path, {"name": "vae"}, **settings)
        note = trainer._note

        def spy(values: dict[str, torch.Tensor]) -> None:
            jumps = trainer.step + 1 in (13, 18)
            note({n: 1000 * v if jumps and n == "loss/l1" else v for n, v in values.items()})

        trainer._note = spy
        if resume:
            trainer.resume()
            assert trainer.step == 15
        trainer.run()
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if "its usual size" in line]

    whole = told(resume=False)
    shutil.rmtree(tmp_path / "checkpoints/step_00000020")
    assert told(resume=True) == whole and len(whole) == 1


def test_values_of_each_step_are_those_of_all_its_micro_batches():
    sums = MetricSums()
    for step in (1, 2, 3):
        for value in (1.0, 2.0):
            sums.add({"a": torch.tensor(value * step)}, step=step)
            if step > 1:
                sums.add({"late": torch.tensor([6.0, 3.0])}, step=step)
    one, both = {"a": 1.5}, {"a": 3.0, "late": 2.0}
    assert sums.read_steps() == {1: one, 2: both, 3: {"a": 4.5, "late": 2.0}}
    sums.clear()
    assert sums.read_steps() == {}


def test_processes_that_wait_or_are_slow_twice_in_a_row_are_named_once():
    processes, quiet = Processes(), {"data_wait": [0.1] * 4, "own_seconds": [1.0] * 4}
    bad = {"data_wait": [0.1, 0.1, 0.1, 0.71], "own_seconds": [1.0, 2.1, 0.9, 1.0]}
    said = [processes.lines(figures, 10) for figures in (quiet, bad, quiet, bad, bad, bad)]
    slow = "process 1 of 4 takes 2.1 times as long as the median process, without what it waits for others"
    waits = "process 3 of 4 waits for data 71% of its time; more data.num_workers may help"
    assert said == [[], [], [], [], [slow, waits], []]
    short = Processes()
    assert not any(short.lines(bad, 1) for _ in range(3)), "too short to tell"
    alone = {"data_wait": [0.6], "own_seconds": [1.0]}
    assert Processes().lines(alone, 9) == [] and len(short.lines(alone, 9)) == 0
    assert short.lines(alone, 9)[0].startswith("training waits for data 60% of its time")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_times_of_a_gpu_are_taken_without_waiting(tmp_path):
    trainer = tiny.trainer(Path(tmp_path), {"name": "vae"}, steps=30, log_every=30)
    tiny.ten_steps_without_synchronisation(trainer)
    torch.cuda.synchronize()
    waited, computed = trainer.health.clock.read()
    assert waited > 0 and computed > 0
