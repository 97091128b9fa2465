"""``train.precision=auto``: what is chosen on which machine, that it is kept, and what then computes in which type."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from semtok.commands.run_folder import differing
from semtok.commands.train_tokenizer import main, train_tokenizer
from semtok.errors import UserError
from semtok.recipe import parse_recipe, recipe_text
from semtok.settings import read_yaml
from semtok.speed import computing, set_convolutions
from semtok.training import precision
from semtok.training.precision import Gains, Gpu, chosen, found_here, measured, paired_gain
from semtok.training.process import check_launch

FAST, MIXED, SLOW = Gains(3.1, 2.0), Gains(3.12, 0.79), Gains(0.6, 0.5)
measure = measured.__wrapped__  # anew, whatever was measured before
find = found_here  # as the library does it


def run(folder: Path, machine: Gains, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """Trains a tiny VAE by the command, on a machine of these gains; what its recipe then says."""
    monkeypatch.setattr(precision, "found_here", lambda: machine)
    file = folder.parent / "vae.yaml"
    if not file.is_file():
        content = tiny.content({"name": "vae"}, precision="auto", steps=4, checkpoint_every=2)
        file.write_text(recipe_text(parse_recipe(content, "tiny")))
    assert main([str(file), "--output", str(folder), *words]) == 0
    return read_yaml(folder / "recipe.yaml")["train"]["precision"]


@pytest.mark.parametrize(
    ("found", "expected", "line"),
    [
        (
            [MIXED],
            "bf16_matmul",
            "bf16 for matrix products (3.1x as fast here), fp32 for convolutions (bf16 0.8x)",
        ),
        ([FAST], "bf16", "bf16 for matrix products (3.1x as fast here) and convolutions (2.0x)"),
        ([SLOW], "fp32", "fp32 (bf16 matrix products 0.6x as fast here)"),
        ([Gains(1.1, 3.0)], "fp32", "fp32 (bf16 matrix products 1.1x as fast here)"),
        ([Gpu("H100", True)], "bf16", "bf16 (H100 has it in hardware)"),
        ([Gpu("T4", False)], "fp32", "fp32 (T4 has no fast bf16)"),
        ([Gpu("H100", True), Gpu("T4", False)], "fp32", "fp32 (T4 has no fast bf16)"),
        (
            [FAST, MIXED],
            "bf16_matmul",
            "bf16 for matrix products (3.1x as fast here), fp32 for convolutions (bf16 0.8x)",
        ),
        ([FAST, SLOW], "fp32", "fp32 (bf16 matrix products 0.6x as fast here)"),
    ],
)
def test_the_precision_follows_from_what_the_slowest_process_is_fast_in(found, expected, line):
    assert chosen(found) == (expected, f"precision: {line}")


def test_a_gain_is_the_median_of_pairs_without_the_first():
    full, half = iter([100.0, 2, 2, 2, 2, 2]), iter([1.0, 1, 2, 0.1, 0.5, 2])
    assert paired_gain(lambda: next(full), lambda: next(half)) == 2
    assert list(itertools.chain(full, half)) == []


def test_what_is_plainly_slower_is_not_measured_further():
    times = iter([1.0, 9.0, 1.0, 8.0])
    assert paired_gain(lambda: next(times), lambda: next(times)) == 1 / 8


def test_measuring_draws_no_random_numbers_of_the_training():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    gains = measure()
    assert gains.matmul > 0 and gains.convolution > 0
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_gpu_is_asked_whether_its_hardware_has_bf16(has_bf16, monkeypatch):
    def is_supported(including_emulation: bool) -> bool:
        return has_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.random.fork_rng(devices=[]))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert find() == Gpu("a GPU", has_bf16)


def test_the_choice_is_said_before_the_training_and_noted_in_the_runs_recipe(
    tmp_path, monkeypatch, capsys
):
    assert run(tmp_path / "run", MIXED, monkeypatch) == "bf16_matmul"
    told = capsys.readouterr().out
    assert told.index("precision: bf16 for matrix products (3.1x as fast") < told.index("training ")
    exported = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert exported["trained"]["recipe"]["train"]["precision"] == "bf16_matmul"


@pytest.mark.parametrize("names_recipe", [True, False])
def test_a_resumed_run_computes_as_it_began_on_a_machine_that_would_choose_otherwise(
    names_recipe, tmp_path, monkeypatch, capsys
):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    words = ["train.schedule=constant"]
    run(whole, FAST, monkeypatch, *words)
    run(halves, FAST, monkeypatch, *words, "train.steps=2")
    capsys.readouterr()
    if names_recipe:
        kept = run(halves, SLOW, monkeypatch, "--resume", *words, "train.steps=4")
    else:
        monkeypatch.setattr(precision, "found_here", lambda: SLOW)
        main(["--output", str(halves), "--resume", "train.steps=4"])
        kept = read_yaml(halves / "recipe.yaml")["train"]["precision"]
    assert kept == "bf16"
    told = capsys.readouterr().out
    assert (
        "bf16, as the run began, which is slow on this machine: bf16 matrix products 0.6x" in told
    )
    one, two = tiny.final_tensors(whole), tiny.final_tensors(halves)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_resumed_run_says_nothing_where_it_is_fast(tmp_path, monkeypatch, capsys):
    run(tmp_path / "run", FAST, monkeypatch)
    capsys.readouterr()
    run(tmp_path / "run", FAST, monkeypatch, "--resume")
    assert "precision" not in capsys.readouterr().out


def test_another_precision_than_the_runs_is_refused_and_auto_is_not(tmp_path, monkeypatch):
    run(tmp_path / "run", FAST, monkeypatch)
    wanted = parse_recipe(read_yaml(tmp_path / "vae.yaml"), "vae.yaml")
    assert differing(tmp_path / "run" / "recipe.yaml", wanted) == []
    wanted = wanted.model_copy(
        update={"train": wanted.train.model_copy(update={"precision": "fp16"})}
    )
    [change] = differing(tmp_path / "run" / "recipe.yaml", wanted)
    assert change == ("train.precision", "bf16", "fp16")
    recipe = wanted.model_copy(
        update={"train": wanted.train.model_copy(update={"precision": "fp32"})}
    )
    with pytest.raises(UserError, match="train.precision was 'bf16' and is now 'fp32'"):
        train_tokenizer(recipe, tmp_path / "run", resume=True)


def types_seen(networks: list[nn.Module]) -> dict[type[nn.Module], set[torch.dtype]]:
    """What linear layers and convolutions will have made, filled as they run."""
    seen: dict[type[nn.Module], set[torch.dtype]] = {}

    def hook(module: nn.Module, _: Any, output: torch.Tensor) -> None:
        kind = nn.Linear if isinstance(module, nn.Linear) else nn.Conv2d
        seen.setdefault(kind, set()).add(output.dtype)

    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.register_forward_hook(hook)
    return seen


@pytest.mark.parametrize(
    ("asked", "convolutions"),
    [("bf16", torch.bfloat16), ("bf16_matmul", torch.float32)],
)
def test_convolutions_alone_stay_in_float32_in_training(asked, convolutions, tmp_path):
    made = tiny.trainer(tmp_path / "run", precision=asked)
    seen = types_seen([*made.objective.learners.values(), *made.objective.frozen_modules()])
    made.train_step(made._batches())
    assert seen == {nn.Linear: {torch.bfloat16}, nn.Conv2d: {convolutions}}


def test_convolutions_in_float32_are_compiled_whole():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    set_convolutions([network], "bf16_matmul")
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 6, 6)
    with computing(torch.device("cpu"), "bf16_matmul"):
        assert torch.equal(compiled(images), network(images))


def test_another_precision_takes_convolutions_back_and_half_weights_stay_half():
    network = nn.Sequential(nn.Conv2d(3, 4, 3))
    images = torch.randn(2, 3, 6, 6)
    set_convolutions([network], "bf16_matmul")
    with computing(torch.device("cpu"), "bf16_matmul"):
        assert network(images).dtype == torch.float32
        assert network.bfloat16()(images).dtype == torch.bfloat16
    set_convolutions([network.float()], "bf16")
    with computing(torch.device("cpu"), "bf16"):
        assert network(images).dtype == torch.bfloat16


def test_a_launchers_half_precision_is_refused_unless_it_is_the_one_asked_for(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")

    def check(asked: str) -> None:
        check_launch(parse_recipe(tiny.content({"name": "vae"}, precision=asked), "tiny").train)

    check("bf16_matmul")
    with pytest.raises(UserError, match="is not train.precision, auto; pass train.precision=bf16"):
        check("auto")
