"""Several processes are one process with the same global batch."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

import processes
import tiny
from processes import Ranks
from semtok import Tokenizer
from semtok.commands import sample, train_dit, train_tokenizer
from semtok.commands.cli import run
from semtok.errors import Interrupted
from semtok.recipe import parse_recipe
from semtok.sampler.draws import Draws
from semtok.settings import read_yaml
from semtok.training import precision
from semtok.training.loop import Trainer
from semtok.training.precision import Gains
from test_contrastive import assert_same_step, save_a_step

METHODS = {
    "send_vae_gan": {
        "perceptual": "teacher",
        "adversarial": {**tiny.ADVERSARIAL, "norm": "group", "weight": 0.5},
        "equivariance": {"probability": 0.8, "scales": [0.5, 0.75], "turned": "each"},
        "decoder_noise": {"law": "mixed", "strength": 1.0},
    },
    "repae": {
        "name": "repae",
        "tokenizer": {
            "name": "va_vae",
            "vae": tiny.AUTOENCODER,
            "adversarial": {**tiny.ADVERSARIAL, "norm": "group", "lecam_weight": 0.1},
        },
        "diffusion": {
            "network": {"depth": 2, "width": 24, "heads": 2, "patch_size": 2},
            "repa": {"depth": 1, "projector_width": 16},
        },
        "sampler": {"steps": 2},
    },
    "semvae": {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1},
}


@pytest.mark.parametrize(
    ("name", "optimiser"),
    [
        ("send_vae_gan", "adamw"),
        ("semvae", "adamw"),
        ("send_vae_gan", "muon"),
        ("repae", "adamw"),
    ],
)
def test_two_gloo_processes_train_to_the_weights_of_one(name, optimiser, tmp_path, ranks):
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content(METHODS[name], steps=3, schedule="constant", log_every=1)
    # Adam divides by the gradient's size, so rounding of tiny gradients would show as whole steps.
    content["train"]["optimiser"] = {"name": optimiser, "learning_rate": 1e-4}
    recipe.write_text(yaml.safe_dump(content))
    words = [str(recipe), "--output"]
    assert run(train_tokenizer.main, [*words, str(tmp_path / "one")]) == 0
    outputs = ranks.command("train_tokenizer", [*words, str(tmp_path / "two")])
    assert "training" in outputs[0] and "training" not in outputs[1], "one process speaks"

    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    # Muon makes whole steps of what rounding is in a gradient of low rank: a fiftieth of a matrix's way here.
    atol = {"adamw": 2e-5, "muon": 5e-5}[optimiser]
    for key in (k for k in one if k.startswith(("learners.", "ema."))):
        torch.testing.assert_close(
            one[key], two[key], atol=atol, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_two_processes_measure_the_features_of_all_and_share_a_cache(tmp_path, ranks):
    recipe = tmp_path / "recipe.yaml"
    method = {"name": "reglue", "compressor": {"hidden": [8]}}
    method["feature_cache"] = str(tmp_path / "cache")
    recipe.write_text(yaml.safe_dump(tiny.content(method, num_statistics_images=10, steps=2)))
    words = [str(recipe), "--output"]
    ranks.command("train_tokenizer", [*words, str(tmp_path / "two")])
    # One process reads the cache that two have written.
    assert run(train_tokenizer.main, [*words, str(tmp_path / "one")]) == 0
    one, two = (Tokenizer.from_pretrained(tmp_path / name).coder for name in ("one", "two"))
    for name in ("feature_mean", "feature_std"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), atol=1e-4, rtol=1e-4)


def check_that_processes_agree(folder: str) -> None:
    trainer = tiny.trainer(Path(folder), METHODS["send_vae_gan"], steps=3)
    trainer.run()
    flat = torch.cat([p.detach().flatten() for p in trainer.objective.learners.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    metrics: list[Any] = [None, None]
    dist.all_gather_object(metrics, trainer.validate())
    dist.barrier()
    assert torch.equal(*both) and metrics[0] == metrics[1]


def test_the_two_processes_hold_equal_weights(tmp_path, ranks):
    ranks.run("test_distributed:check_that_processes_agree", str(tmp_path / "run"))


def test_a_generator_too_and_its_samples_are_the_same(tmp_path, ranks):
    objective = tiny.build({"name": "vae"})
    tokenizer = objective.tokenizer(objective.averaged_module())
    tokenizer.measure_statistics([torch.rand(8, 3, 16, 16) * 2 - 1])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content(steps=3, schedule="constant", log_every=1)
    content = {key: content[key] for key in ("data", "train")}
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    content["tokenizer"] = str(tmp_path / "tokenizer")
    shape = {"depth": 2, "width": 32, "heads": 2, "learned_positions": [2, 2]}
    shape |= {"head": {"depth": 1, "width": 48, "heads": 3}, "time_embedding": "fourier"}
    content["diffusion"] = {"network": shape}
    content["sampler"] = {"steps": 2, "method": "sde", "state_refresh_rate": 2}
    recipe.write_text(yaml.safe_dump(content))
    arguments = ["--recipe", str(recipe), "--output"]
    assert run(train_dit.main, [*arguments, str(tmp_path / "one")]) == 0
    ranks.command("train_dit", [*arguments, str(tmp_path / "two")])
    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    for key in (k for k in one if k.startswith(("learners.", "ema."))):
        torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-3)

    words = [str(tmp_path / "one"), "--num", "5", "--batch-size", "2", "--output"]
    assert run(sample.main, [*words, str(tmp_path / "one.npz")]) == 0
    ranks.command("sample", [*words, str(tmp_path / "two.npz")])
    images = [np.load(tmp_path / f"{name}.npz") for name in ("one", "two")]
    assert images[0]["arr_0"].shape == (5, 16, 16, 3)
    assert all(np.array_equal(images[0][k], images[1][k]) for k in ("arr_0", "arr_1"))


def test_a_contrastive_and_routed_step_of_two_processes_is_that_of_one(tmp_path, ranks):
    save_a_step(str(tmp_path / "one"), str(tmp_path / "one.pt"), 1)
    for accumulate in (1, 2):
        files = [str(tmp_path / f"two{accumulate}"), str(tmp_path / f"two{accumulate}.pt")]
        ranks.run("test_contrastive:save_a_step", *files, accumulate)
        assert_same_step(tmp_path / "one.pt", tmp_path / f"two{accumulate}.pt")


def train_in(folder: str) -> None:
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        recipe = Path(folder) / "embedded.yaml"
        patch.setattr("semtok.commands.train_tokenizer.find_recipe", lambda name: recipe)
        processes.run_command("train_dit", ["--recipe", "dit.yaml", "--output", "runs/dit"])


def test_two_processes_train_a_missing_tokenizer_together_first(tmp_path, ranks):
    (tmp_path / "embedded.yaml").write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    content = {key: tiny.content(steps=2)[key] for key in ("data", "train")}
    content["diffusion"] = {"network": {"depth": 1, "width": 32, "heads": 2}}
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(content | {"tokenizer": "embedded"}))
    outputs = ranks.run("test_distributed:train_in", str(tmp_path))
    assert "not trained yet: training" in outputs[0]
    assert (tmp_path / "runs/dit/export/config.json").is_file()


def write_recipe(path: Path, **train: Any) -> str:
    settings = {"schedule": "constant", "log_every": 1, "checkpoint_every": 2, "keep_last": 9}
    content = tiny.content({"name": "vae"}, **settings, **train)
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, ranks, capsys):
    memory = {"gpu": 6, "fixed": 1, "per_image": 2}
    auto = write_recipe(tmp_path / "auto.yaml", accumulate="auto", memory=memory, steps=2)
    stated = write_recipe(tmp_path / "stated.yaml", accumulate=2, steps=2)
    train = [auto, "--output", str(tmp_path / "run")]
    assert run(train_tokenizer.main, train) == 0
    line = "accumulate=2: 2 images at once need 5 of 6 GB on one process"
    assert line in capsys.readouterr().out
    assert run(train_tokenizer.main, [stated, "--output", str(tmp_path / "stated")]) == 0
    ours, theirs = (tiny.final_tensors(tmp_path / name) for name in ("run", "stated"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "as with that number"

    outputs = ranks.command("train_tokenizer", [*train, "--resume", "train.steps=4"])
    line = "accumulate=1: 2 images at once need 5 of 6 GB on each of 2 processes"
    assert line in outputs[0] and line not in outputs[1], "one process speaks"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["accumulate"] == 1
    # A number takes its place where memory turned out to be less: what is learned is the same.
    words = [stated, "--output", str(tmp_path / "stated"), "--resume", "train.accumulate=4"]
    assert run(train_tokenizer.main, [*words, "train.steps=4"]) == 0
    ours, theirs = (tiny.final_tensors(tmp_path / name) for name in ("run", "stated"))
    for key in (k for k in theirs if k.startswith(("learners.", "ema."))):
        torch.testing.assert_close(ours[key], theirs[key], atol=2e-5, rtol=1e-3)
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("run", "stated")
    ]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4]
    for one, other in zip(*rows, strict=True):
        assert one["loss/l1"] == pytest.approx(other["loss/l1"], rel=1e-3)


def train_as_told(folder: str) -> None:
    """In one of several processes, each of which finds another machine."""
    found = [Gains(3.1, 2.0), Gains(3.12, 0.79)][int(os.environ["RANK"])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "found_here", lambda: found)
        content = tiny.content({"name": "vae"}, precision="auto", steps=2)
        train_tokenizer.train_tokenizer(parse_recipe(content, "tiny"), Path(folder))


def test_processes_on_different_machines_agree_on_one_precision(ranks, tmp_path):
    first, second = ranks.run("test_distributed:train_as_told", str(tmp_path / "run"))
    line = "precision: bf16 for matrix products (3.1x as fast here), fp32 for convolutions"
    assert line in first and "precision" not in second
    assert read_yaml(tmp_path / "run" / "recipe.yaml")["train"]["precision"] == "bf16_matmul"


# One, two and four of them -----------------------------------------------------------------------

BATCH_SIZE = 8


def noted(trainer: Trainer, seen: dict[str, list[float]]) -> None:
    """Notes what each place of the global batch sees of images and of noise, as digests."""
    backward = trainer._backward

    def spy(group: list[str], inputs: dict[str, Any], carry: Any, micro_step: int) -> Any:
        first, size = trainer.share.first(micro_step), trainer.share.micro_batch_size
        noise = Draws(
            trainer.config.seed, trainer.step, BATCH_SIZE, first, size, torch.device("cpu")
        )
        rows = zip(inputs["pixels"].double(), noise.normal("posterior", (3,)), strict=True)
        for place, (pixels, drawn) in enumerate(rows, start=first):
            seen[f"{trainer.step}/{place}"] = [pixels.sum().item(), *drawn.tolist()]
        return backward(group, inputs, carry, micro_step)

    trainer._backward = spy


def train_until(folder: str, until: int, accumulate: int) -> None:
    """Goes on in a run to a step, in as many processes as there are."""
    settings = {"schedule": "constant", "warmup_steps": 0, "log_every": 1, "keep_last": 9}
    settings |= {"batch_size": BATCH_SIZE, "accumulate": accumulate, "steps": until}
    settings["optimiser"] = {"learning_rate": 1e-4}
    trainer = tiny.trainer(Path(folder), {"name": "vae"}, **settings)
    trainer.resume()
    seen: dict[str, list[float]] = {}
    noted(trainer, seen)
    trainer.run()
    file = Path(folder) / f"seen.{until}.{trainer.accelerator.process_index}.json"
    file.write_text(json.dumps(seen))


def trained(ranks: Ranks, folder: Path, *stages: tuple[int, int, int]) -> Path:
    """Trains in stages of so many processes, until a step, with so many micro-batches."""
    for num, until, accumulate in stages:
        if num == 1:
            train_until(str(folder), until, accumulate)
        else:
            ranks.run("test_distributed:train_until", str(folder), until, accumulate, num=num)
    return folder


def seen_in(folder: Path) -> dict[str, list[float]]:
    seen: dict[str, list[float]] = {}
    for file in folder.glob("seen.*.json"):
        own = json.loads(file.read_text())
        assert not own.keys() & seen.keys(), "no place of a step is seen twice"
        seen |= own
    return seen


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss/l1"] for line in (folder / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def four(ranks: Ranks) -> Iterator[Ranks]:
    with ranks.more(4):
        yield ranks


@pytest.fixture(scope="module")
def whole(four: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process trains to, in two micro-batches a step."""
    return trained(four, tmp_path_factory.mktemp("whole") / "run", (1, 4, 2))


def test_where_sums_have_the_same_two_terms_a_run_goes_on_to_the_last_bit(four, whole, tmp_path):
    run = trained(four, tmp_path / "run", (2, 1, 1), (1, 3, 2), (2, 4, 1))
    ours, theirs = tiny.final_tensors(run), tiny.final_tensors(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert losses(run) == losses(whole) and seen_in(run) == seen_in(whole)


def test_four_processes_repeat_a_run_and_the_log_has_the_figures_of_each(four, tmp_path):
    """To the last bit from its start alone: DDP arranges gradients anew after its first step, and sums of four terms
    depend on that."""
    run, again = (trained(four, tmp_path / name, (4, 3, 1)) for name in ("run", "again"))
    ours, theirs = tiny.final_tensors(run), tiny.final_tensors(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    names = {"step_seconds", "data_wait", "forward_seconds", "own_seconds", "memory_gb"}
    assert row["processes"].keys() == names | {"images_per_second"}
    assert all(len(figures) == 4 for figures in row["processes"].values())
    assert row["health/slowest_process"] in range(4)
    assert row["health/forward_seconds_slowest"] == max(row["processes"]["forward_seconds"])


@pytest.mark.parametrize("stages", [((1, 1, 1), (4, 2, 1), (2, 4, 2)), ((4, 2, 1), (1, 4, 4))])
def test_where_sums_are_ordered_differently_a_run_goes_on_within_rounding(
    stages, four, whole, tmp_path
):
    run = trained(four, tmp_path / "run", *stages)
    assert seen_in(run) == seen_in(whole), "images and noise, to the last bit"
    assert losses(run) == pytest.approx(losses(whole), rel=1e-6)
    ours, theirs = tiny.final_tensors(run), tiny.final_tensors(whole)
    for name in ours:
        # No output depends on an attention's bias of keys: its gradient is nothing but rounding, of which Adam makes
        # whole steps.
        atol = 1e-4 if name.endswith("to_k.bias") else 1e-6
        torch.testing.assert_close(ours[name], theirs[name], atol=atol, rtol=0)


def stop(folder: str) -> None:
    """Trains until the third of four processes gets SIGTERM in its third step."""
    trainer = tiny.trainer(
        Path(folder), {"name": "vae"}, steps=1000, warmup_steps=0, log_every=1000
    )
    step, rank = trainer.train_step, trainer.accelerator.process_index

    def spy(batches: Any) -> None:
        step(batches)
        if trainer.step == 3 and rank == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train_step = spy
    try:
        trainer.run()
    except Interrupted as stopped:
        told = {"step": trainer.step, "checkpoint": stopped.checkpoint.name}
        (Path(folder) / f"stopped.{rank}.json").write_text(json.dumps(told))


def test_a_signal_to_one_of_four_processes_ends_all_with_a_checkpoint(four, tmp_path):
    four.run("test_distributed:stop", str(tmp_path), num=4)
    told = [json.loads((tmp_path / f"stopped.{rank}.json").read_text()) for rank in range(4)]
    (step,) = {one["step"] for one in told}
    assert 3 <= step <= 5 and {one["checkpoint"] for one in told} == {f"step_{step:08d}"}
