"""An average of the weights can be chosen after a training, from snapshots of a few."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from semtok import Generator, Tokenizer, UserError
from semtok.commands import hub
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.recipe import parse_recipe
from semtok.training.averages import (
    PowerAverages,
    Profile,
    combine,
    gamma_of,
    list_snapshots,
    reconstruct,
)
from semtok.training.train_config import AveragesConfig

CONFIG = AveragesConfig(every=50, keep=16)
STEPS = 800


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.28])
def test_a_profile_is_as_wide_as_its_name_says(sigma_rel):
    gamma = gamma_of(sigma_rel)
    time = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    weight = time**gamma / (time**gamma).sum()
    mean = (weight * time).sum()
    width = (weight * (time - mean).square()).sum().sqrt()
    assert width.item() == pytest.approx(sigma_rel, rel=1e-5)


def walk() -> torch.Tensor:
    """Weights of a training, (steps, 3): random walks."""
    return torch.randn(STEPS, 3, generator=torch.Generator().manual_seed(0)).cumsum(0)


def directly(sigma_rel: float, step: int) -> torch.Tensor:
    """The average by its definition: the weights after step s weigh what the profile holds between s - 1 and s."""
    edges = (torch.arange(step + 1, dtype=torch.float64) / step) ** (gamma_of(sigma_rel) + 1)
    return (edges.diff()[:, None] * walk()[:step]).sum(0)


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, list[nn.Module]]:
    """Snapshots of a walk, and its averages at the end."""
    folder = tmp_path_factory.mktemp("walk") / "averages"
    module = nn.Linear(3, 1, bias=False)
    averages = PowerAverages(module, CONFIG, folder)
    for step, weights in enumerate(walk(), start=1):
        nn.init.zeros_(module.weight).data += weights
        averages.update()
        if averages.is_due(step):
            averages.write(step)
    return folder, list(averages.modules().values())


def test_what_is_followed_is_the_average_of_all_weights_up_to_there(followed):
    folder, latest = followed
    assert list(list_snapshots(folder)) == list(range(50, 801, 50))
    for module, sigma_rel in zip(latest, CONFIG.sigma_rel, strict=True):
        torch.testing.assert_close(
            module.weight[0].double(), directly(sigma_rel, STEPS), atol=1e-4, rtol=1e-5
        )


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.08, 0.1, 0.15, 0.2])
@pytest.mark.parametrize("step", [800, 650])
def test_any_average_of_a_random_walk_is_put_together_from_a_few(sigma_rel, step, followed):
    folder, latest = followed
    if step != STEPS:  # of an earlier checkpoint, whose averages are those of its snapshot
        latest = [copy.deepcopy(module) for module in latest]
        for module, sigma in zip(latest, CONFIG.sigma_rel, strict=True):
            module.weight.data = directly(sigma, step)[None].float()
    made, missed = reconstruct(sigma_rel, CONFIG, step, copy.deepcopy(latest), folder)
    assert missed < 0.06
    wanted, spread = directly(sigma_rel, step), walk()[:step].std(0)
    assert ((made.weight[0] - wanted).abs() / spread).max() < 0.015
    others = [s for s in (0.02, 0.05, 0.1, 0.25) if abs(s - sigma_rel) > 0.01]
    differences = [((directly(s, step) - wanted).abs() / spread).max() for s in others]
    assert min(differences) > 0.02, "the averages are far enough apart to tell"


def test_weights_that_never_moved_come_out_as_they_were():
    given = [Profile(gamma_of(s), t) for t in (10, 20, 30) for s in (0.05, 0.1)]
    for sigma_rel in (0.01, 0.07, 0.2):
        factors, _ = combine(given, Profile(gamma_of(sigma_rel), 30))
        assert factors.sum() == pytest.approx(1, abs=1e-9)


def test_what_can_not_be_put_together_is_refused_and_what_can_is_told(followed, tmp_path):
    _, latest = followed
    with pytest.raises(UserError, match=r"0.2: the 0 snapshots in .* within reach: 0.04 to 0.12$"):
        reconstruct(0.2, CONFIG, STEPS, latest, tmp_path)
    _, missed = reconstruct(0.07, CONFIG, STEPS, copy.deepcopy(latest), tmp_path)
    assert 0.01 < missed < 0.1


def test_snapshots_are_bounded_in_number(tmp_path):
    config = AveragesConfig(every=10, keep=4, sigma_rel=(0.1,))
    averages = PowerAverages(nn.Linear(2, 2), config, tmp_path)
    kept = {}
    for step in range(1, 201):
        averages.update()
        if averages.is_due(step):
            averages.write(step)
            kept[step] = list(list_snapshots(tmp_path))
    assert kept[40] == [10, 20, 30, 40] and kept[60] == [20, 40, 60]
    assert kept[160] == [40, 80, 120, 160] and kept[160] == kept[max(kept)]
    assert "up to 4 snapshots of 2.4e-05 MB" in averages.disk_line()


# Runs --------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "averages": {"every": 2, "keep": 8},
    "schedule": "constant",
    "steps": 12,
    "checkpoint_every": 5,
    "keep_last": 9,
}


def train(folder: Path, *, resume: bool = False, **settings: Any) -> None:
    content = tiny.content({"name": "vae"}, **SETTINGS | settings)
    train_tokenizer(parse_recipe(content, "tiny"), folder, resume=resume)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A VAE, and a generator on another one."""
    root = tmp_path_factory.mktemp("runs")
    train(root / "vae")
    tiny.runs(root, **SETTINGS)
    return root


def bytes_of(run: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in list_snapshots(run / "averages").values()}


def test_a_run_that_goes_on_keeps_the_snapshots_of_one_that_never_stopped(runs, tmp_path):
    shutil.copytree(runs / "vae", tmp_path / "vae")
    for name in ("step_00000010", "step_00000012"):
        shutil.rmtree(tmp_path / "vae" / "checkpoints" / name)
    # Of steps that are to be done again, one file as of another course of things.
    stale = tmp_path / "vae" / "averages" / "step_00000008.safetensors"
    shutil.copyfile(stale.with_name("step_00000002.safetensors"), stale)
    before = bytes_of(runs / "vae")
    train(tmp_path / "vae", resume=True)
    assert list(before) == [f"step_{s:08d}.safetensors" for s in (2, 4, 6, 8, 10, 12)]
    assert bytes_of(tmp_path / "vae") == before
    ours, theirs = (tiny.final_tensors(folder / "vae") for folder in (tmp_path, runs))
    assert any(key.startswith("average1.") for key in theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_following_averages_changes_nothing_else(runs, tmp_path):
    train(tmp_path / "plain", averages=None)
    ours, theirs = (tiny.final_tensors(run) for run in (runs / "vae", tmp_path / "plain"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def checkpoint(*words: str) -> int:
    return run(hub.main, ["checkpoint", *map(str, words)])


def test_a_tokenizer_is_exported_with_the_average_that_is_asked_for(runs, tmp_path, capsys):
    def weights(*words: str) -> tuple[torch.Tensor, str]:
        output = tmp_path / "_".join(["out", *words])
        assert checkpoint(runs / "vae", *words, "--output", output) == 0
        tokenizer = Tokenizer.from_pretrained(output)
        told = tokenizer.training_info["weights"]
        assert f"| weights | {told} |" in (output / "README.md").read_text()
        return tokenizer.autoencoder.encoder.conv_in.weight, told

    kept = tiny.tensors_of(runs / "vae" / "checkpoints" / "step_00000012")
    key = "encoder.conv_in.weight"
    for word, name in (("ema", "ema"), ("trained", "learners.autoencoder.autoencoder")):
        found, told = weights("--average", word)
        assert torch.equal(found, kept[f"{name}.{key}"]) and told == word
    found, told = weights("--average", "0.05")
    torch.testing.assert_close(found, kept[f"average0.{key}"])
    assert told == "average of sigma_rel 0.05"
    found, told = weights("--average", "0.15")
    narrow, wide = (kept[f"average{i}.{key}"] for i in (0, 1))
    assert (found - narrow).norm() > (wide - narrow).norm(), "further from the last weights"
    assert "sigma_rel 0.15: its profile is met but for" in capsys.readouterr().out
    assert weights()[1] == "ema"
    earlier, _ = weights("--average", "0.1", "--step", "10")
    ten = tiny.tensors_of(runs / "vae" / "checkpoints" / "step_00000010")
    torch.testing.assert_close(earlier, ten[f"average1.{key}"])


def test_a_generator_too_and_several_are_compared_by_held_out_images(runs, tmp_path, capsys):
    words = (runs / "dit", "--average", "0.07", "--output", tmp_path / "out")
    assert checkpoint(*words) == 0
    generator = Generator.from_pretrained(tmp_path / "out")
    assert generator.training_info["weights"] == "average of sigma_rel 0.07"
    assert checkpoint(runs / "dit", "--average", "ema,0.05,0.1") == 0
    table = capsys.readouterr().out
    row = next(line.split() for line in table.splitlines() if line.split()[:1] == ["velocity"])
    assert len(row) == 4 and row[2] != row[3]
    summary = json.loads((runs / "dit" / "summary.json").read_text())
    assert summary["validation"]["velocity"] == pytest.approx(float(row[1]), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vae", "--average", "0.5", "--output", "x"], "--average 0.5: expected a width from 0.01"),
        (["vae", "--average", "best", "--output", "x"], "--average best: expected a width"),
        (["vae", "--average", "0.05,0.1", "--output", "x"], "leave --output out"),
        (["vae"], "--output is missing"),
        (["tok", "--average", "0.1"], "has followed none (train.averages)"),
        (["nowhere", "--average", "0.1"], "is no run"),
        (["tok", "--average", "0.1", "--output", "x"], "has followed none (train.averages)"),
        (["vae", "--average", "0.01", "--output", "x"], "within reach: 0."),
    ],
)
def test_an_average_that_can_not_be_had_is_refused(words, message, runs, capsys):
    assert checkpoint(runs / words[0], *words[1:]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


def test_a_damaged_snapshot_is_named(runs, tmp_path, capsys):
    shutil.copytree(runs / "vae", tmp_path / "vae")
    file = tmp_path / "vae" / "averages" / "step_00000004.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert checkpoint(tmp_path / "vae", "--average", "0.08", "--output", tmp_path / "out") == 2
    assert f"{file}: cut short or damaged" in capsys.readouterr().err


def test_settings_that_take_no_effect_are_refused():
    for averages, message in (
        ({"every": 13}, "train.averages.every: 13 is more than train.steps 12"),
        ({"every": 2, "sigma_rel": [0.1, 0.1]}, "expected distinct widths"),
        ({"every": 2, "sigma_rel": [0.3]}, "train.averages.sigma_rel"),
    ):
        with pytest.raises(UserError, match=message):
            parse_recipe(tiny.content({"name": "vae"}, **SETTINGS | {"averages": averages}), "t")
