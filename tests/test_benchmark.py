"""The benchmark: its yardstick computes the same as the library, its estimates add up, its report is whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from benchmarks import caching
from benchmarks import command as benchmark
from benchmarks.memory import LiveBytes, MemoryEstimate, autocast_as_on_cuda, recipe_memory
from benchmarks.plain import PlainREGLUEStep, PlainSiT
from benchmarks.synthetic import PUBLISHED, SyntheticLatents
from benchmarks.timing import counted_flops
from benchmarks.training import (
    dit_forward_flops,
    dit_step,
    make_objective,
    make_trainer,
)
from benchmarks.tricks import _Work
from semtok import Tokenizer
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import build_objective
from semtok.data.images.kinds import open_sources
from semtok.images import to_pixels
from semtok.methods.vae import PRESETS
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.latents import Latents, Posterior
from semtok.sampler.roles import find_hidden_matrices
from semtok.training.loop import Trainer

RECIPES = Path(__file__).parents[1] / "recipes"
SHAPE = DiTArchitecture(depth=2, width=24, heads=2, patch_size=2)


def bench(*words: object) -> int:
    return run(benchmark.main, list(map(str, words)))


def perturbed(network: DiT) -> DiT:
    """Zero-initialised layers would hide differences."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize("kind", ["sit", "reglue"])
def test_the_yardstick_is_the_same_network(kind):
    torch.manual_seed(0)
    spec = PUBLISHED[kind].spec
    network = perturbed(DiT(SHAPE, spec, num_classes=7))
    plain = PlainSiT(network)
    batch = SyntheticLatents(PUBLISHED[kind]).load(range(3)).latents.mean
    x = {
        n: torch.randn(3, *p.shape[1:2], *([8, 8] if p.ndim == 4 else [])) for n, p in batch.items()
    }
    t, labels = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 7, 3])
    ours = network(x, dict.fromkeys(x, t), labels).velocity
    joint = torch.cat([part for part in x.values() if part.ndim == 4], dim=1)
    velocity, vector, _ = plain(joint, x.get("global"), t, labels)
    stacked = torch.cat([part for part in ours.values() if part.ndim == 4], dim=1)
    torch.testing.assert_close(stacked, velocity, atol=1e-5, rtol=1e-4)
    if "global" in x:
        torch.testing.assert_close(ours["global"], vector, atol=1e-5, rtol=1e-4)


def test_the_published_step_has_the_librarys_losses(tmp_path):
    """From the same weights and random numbers, over several optimiser steps."""
    method = {"name": "reglue", "compressor": {"hidden": [8], "channels": 4}, "statistics": "none"}
    content = tiny.content(method, steps=3)
    content["data"]["size"] = 32  # the demo texture's grid is then the teacher's
    made = build_objective(
        parse_recipe(content, "tiny"), Tokenizer.from_pretrained("demo"), place="tiny"
    )
    tokenizer = made.tokenizer(made.averaged_module()).eval()
    del content["method"], content["teacher"]
    repa = {"weight": 0.5, "depth": 1, "with_global": True}
    content["diffusion"] = {
        "network": SHAPE.model_dump(mode="json") | {"patch_size": 1},
        "repa": repa,
    }
    content["train"] |= {"schedule": "constant", "warmup_steps": 0}
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    recipe = parse_diffusion_recipe(content | {"tokenizer": "t"}, "tiny")
    images, _ = open_sources(recipe.data)
    objective = make_objective(recipe, tokenizer, images, None)
    perturbed(objective.averaged_module())
    trainer = make_trainer(objective, recipe.train, images, tmp_path)
    learner = objective.learners["dit"]
    plain = PlainREGLUEStep(PlainSiT(learner.network, learner.projector, 1), tokenizer, seed=0)
    batches = [images.load(range(4 * i, 4 * i + 4)) for i in range(3)]
    objective.learners.train()
    for batch in batches:
        trainer.train_step(iter([batch]))
        ours = trainer.metrics.read(lambda values: values)
        trainer.metrics.clear()
        with torch.no_grad():
            posterior = tokenizer.posterior(batch.images)
        texture = Posterior(
            *(Latents({"texture": p.texture}) for p in (posterior.mean, posterior.std))
        )
        plain(to_pixels(batch.images), texture, batch.labels)
        for name in ("texture", "semantic", "global"):
            assert ours[f"loss/velocity/{name}"] == pytest.approx(plain.losses[-1][name], rel=1e-3)
        assert ours["loss/alignment"] == pytest.approx(plain.losses[-1]["alignment"], rel=1e-3)


def test_operations_are_those_of_the_paper():
    # SiT-B/2 at 256x256: 23.01 GMACs (DiT, table 9: 23.01 Gflops, counted as here by half).
    torch.manual_seed(0)
    spec = PUBLISHED["sit"].spec
    shape = DiTArchitecture(depth=12, width=768, heads=12, patch_size=2)
    with torch.device("meta"):
        network = DiT(shape, spec, num_classes=1000)
    assert dit_forward_flops(network, 2) == pytest.approx(2 * 2 * 23.01e9, rel=0.02)


def test_operations_of_a_step_are_those_that_it_takes(tmp_path):
    """Counted by formula for a transformer with REPA's projector, and as it happens for samplers."""
    step, flops = dit_step("repa", "SiT-T/8", 1, [], tmp_path)
    assert flops == pytest.approx(counted_flops(step), rel=0.03)
    file = tmp_path / "x.json"
    words = ["sampling", "--network", "SiT-T/8", "--batch-size", 1, "--rounds", 1]
    guided = "sampler.guidance={scale: 2, interval: [0.5, 1]}"
    sides = ["sampler.steps=2", "--against", "sampler.steps=2", guided]
    assert bench(*words, *sides, "--output", file) == 0
    rows = json.loads(file.read_text())["rows"]
    taken = [row["GFLOP/s"] * row["ms"] for row in rows]
    assert taken[1] == pytest.approx(1.5 * taken[0], rel=1e-3), "3 forwards against 2"


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def test_memory_of_a_tokenizers_step_is_what_a_real_one_takes(tmp_path):
    """On tensors with contents, in the loop itself; its gradients are counted apart."""
    method = {"perceptual": "teacher", "adversarial": {**tiny.ADVERSARIAL, "weight": 0.5}}
    content = tiny.content(method, batch_size=16, steps=9)
    content["data"]["size"] = 32
    estimate = recipe_memory(write(tmp_path / "recipe.yaml", content), [], None, tmp_path)
    recipe = parse_recipe(content, "tiny")
    source, _ = open_sources(recipe.data)
    objective = build_objective(recipe, place="tiny")
    trainer = make_trainer(objective, recipe.train, source, tmp_path)
    batches = trainer._batches()
    trainer.train_step(batches)
    with LiveBytes() as live:
        trainer.train_step(batches)
    assert 1e-9 * live.most == pytest.approx(estimate.step + 16 * estimate.per_image, rel=0.05)
    sizes = [p.numel() for p in objective.learners.parameters()]
    assert estimate.gradients == estimate.optimiser == pytest.approx(8e-9 * sum(sizes))
    content["train"] |= {"optimiser": {"name": "muon", "learning_rate": 1e-3}}
    content["train"] |= {"averages": {"every": 1}}
    by_muon = recipe_memory(write(tmp_path / "muon.yaml", content), [], None, tmp_path)
    matrices = sum(m.parameter.numel() for m in find_hidden_matrices(objective.learners))
    assert matrices and estimate.optimiser - by_muon.optimiser == pytest.approx(4e-9 * matrices)
    assert by_muon.average == pytest.approx(3 * estimate.average), "the EMA and two more"
    averaged = [p.numel() for p in objective.averaged_module().parameters()]
    assert estimate.average == pytest.approx(4e-9 * sum(averaged))
    others = [p.numel() for p in trainer.objective.frozen_modules()[0].parameters()]
    assert estimate.networks == pytest.approx(4e-9 * (sum(sizes) + sum(others)), rel=0.01)


def test_memory_of_a_generators_step_falls_with_half_precision_and_checkpointing(tmp_path):
    content = {key: tiny.content()[key] for key in ("data", "train")}
    shape = {"depth": 4, "width": 192, "heads": 3, "patch_size": 4}
    content["diffusion"] = {"network": shape, "repa": {"weight": 0.5}}
    recipe = write(tmp_path / "recipe.yaml", content)

    def estimate(*words: str) -> MemoryEstimate:
        return recipe_memory(recipe, list(words), "repa", tmp_path)

    plain, half = estimate(), estimate("train.precision=bf16")
    # Norms are in float32 all the same, so that it is no half.
    assert 0.5 * plain.per_image < half.per_image < 0.8 * plain.per_image
    copies = (half.step - plain.step) / plain.networks
    assert copies == pytest.approx(0.5, abs=0.1), "weights in 16 bits are there beside the others"
    for words in ([], ["train.precision=bf16"]):
        less = estimate("diffusion.checkpointing=true", *words)
        assert less.per_image < 0.5 * estimate(*words).per_image
    assert estimate("train.ema_decay=null").average == 0


def test_on_a_gpu_norms_of_half_precision_are_in_float32():
    with autocast_as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        x = torch.nn.Linear(4, 4)(torch.randn(2, 4))
        assert x.dtype == torch.bfloat16
        assert torch.nn.LayerNorm(4)(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.LayerNorm(4)(x).dtype == torch.bfloat16, "elsewhere as before"


def test_the_block_that_the_memory_command_prints_is_one_for_a_recipe(tmp_path, capsys):
    recipe = write(tmp_path / "recipe.yaml", tiny.content({"name": "vae"}))
    assert bench("memory", recipe, "--gpu", "40", "--output", tmp_path / "x.json") == 0
    (line,) = (each for each in capsys.readouterr().out.splitlines() if "memory:" in each)
    memory = yaml.safe_load(line)["memory"]
    content = tiny.content({"name": "vae"}, accumulate="auto", memory=memory)
    assert parse_recipe(content, "tiny").train.memory.model_dump() == memory
    figures = json.loads((tmp_path / "x.json").read_text())
    assert figures["memory"] == memory and memory["gpu"] == 40
    assert figures["per_image"] <= memory["per_image"] < figures["per_image"] + 0.002


def test_the_report_is_whole(tmp_path, capsys):
    file = tmp_path / "x.json"
    words = ["dit", "--network", "SiT-T/8", "--latents", "reglue", "--batch-size", 1, "--rounds", 1]
    sides = ["train.accumulate=1", "--against", "train.ema_decay=0.5", "--output", file]
    assert bench(*words, *sides) == 0
    out, figures = capsys.readouterr().out, json.loads(file.read_text())
    assert "times as fast as" in out and "waiting for data" in out and "GFLOP/s" in out
    assert [row["what"] for row in figures["rows"]] == ["train.accumulate=1", "train.ema_decay=0.5"]
    assert all(row["of matmul"] > 0 and 0 <= row["waiting for data"] < 1 for row in figures["rows"])
    assert (
        bench(
            "sampling", "--network", "SiT-T/8", "--batch-size", 1, "--rounds", 1, "sampler.steps=2"
        )
        == 0
    )
    recipe = RECIPES / "vae.yaml"
    assert bench("tokenizer", recipe, "--rounds", 1, "train.batch_size=2") == 0
    assert "training step of" in capsys.readouterr().out


def test_what_writing_a_cache_takes_is_told_apart_from_the_networks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(caching, "random_reglue", lambda _: tiny.tokenizer("vae", "reglue", True))
    monkeypatch.setattr(caching, "_SIZE", 16)
    file = tmp_path / "x.json"
    words = ["cache", "--num-images", 600, "--num-encoded", 3, "--output", file]
    assert bench(*words, "--targets") == 0
    with_targets = json.loads(file.read_text())
    assert "with REPA's targets" in capsys.readouterr().out
    assert bench(*words) == 0
    figures = json.loads(file.read_text())
    assert 26_000 < figures["bytes_per_image"] < 27_000
    added = with_targets["bytes_per_image"] - figures["bytes_per_image"]
    assert added == pytest.approx(768 * 256 + 4 * 256 + 4 * 768, rel=1e-3)
    read, written, encoded = (row["images/s"] for row in figures["rows"])
    assert figures["share_of_writing"] == pytest.approx(encoded / written)
    assert read > 0 and "is writing" in capsys.readouterr().out


def test_every_trick_is_measured_without_and_with(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "f8d4", PRESETS["tiny"])
    file = tmp_path / "x.json"
    words = ["tricks", "--network", "SiT-T/8", "--batch-size", 1, "--rounds", 1]
    assert bench(*words, "--compiler", "aot_eager", "--output", file) == 0
    rows = json.loads(file.read_text())["rows"]
    assert len({row["trick"] for row in rows}) == 8
    assert all(row["gain"] == pytest.approx(row["without_ms"] / row["with_ms"]) for row in rows)


def test_only_one_side_of_the_compiled_step_is_compiled(tmp_path):
    steps = _Work("SiT-T/8", 1, "fp32", "aot_eager", tmp_path).compiled_step()
    blocks = [step.trainer.objective.averaged_module().blocks for step in steps]
    assert [own[0]._compiled_call_impl is not None for own in blocks] == [False, True]


def test_random_weights_stand_in_for_those_that_would_be_fetched(tmp_path):
    """A teacher and LPIPS' backbone that nothing here has, and a folder of images that does not exist."""
    content = tiny.content({"perceptual": "lpips", "lpips_net": "squeeze"}, batch_size=2)
    content["teacher"] = {"name": "test_vit", "input_size": 160}
    content["data"] = {"kind": "folder", "path": "nowhere", "size": 32}
    recipe, file, cache = tmp_path / "recipe.yaml", tmp_path / "x.json", torch.hub.get_dir()
    recipe.write_text(yaml.safe_dump(content))
    assert bench("tokenizer", recipe, "--random", "--rounds", 1, "--output", file) == 0
    (row,) = json.loads(file.read_text())["rows"]
    assert row["GFLOP/s"] > 0 and row["images/s"] == pytest.approx(2e3 / row["ms"])
    assert torch.hub.get_dir() == cache, "later runs find the real weights"


def test_both_sides_of_a_tokenizer_keep_their_own_settings_of_the_process(tmp_path, monkeypatch):
    """What building a trainer sets for the whole process, as cuDNN's search for the fastest kernels."""
    recipe, file, seen = tmp_path / "recipe.yaml", tmp_path / "x.json", []
    recipe.write_text(yaml.safe_dump(tiny.content({"name": "vae"}, batch_size=2)))
    train_step = Trainer.train_step

    def watched(trainer: Trainer, batches: object) -> None:
        seen.append((trainer.config.cudnn_benchmark, torch.backends.cudnn.benchmark))
        train_step(trainer, batches)

    monkeypatch.setattr(Trainer, "train_step", watched)
    words = ["tokenizer", recipe, "--random", "--rounds", 2, "--output", file]
    try:
        one, other = (f"train.cudnn_benchmark={value}" for value in ("true", "false"))
        assert bench(*words, one, "--against", other) == 0
    finally:
        torch.backends.cudnn.benchmark = False
    assert set(seen) == {(True, True), (False, False)} and len(seen) == 8
    figures = json.loads(file.read_text())
    assert [row["what"] for row in figures["rows"]] == [one, other]
    assert f"{other} is" in figures["ratio"] and f"as fast as {one}" in figures["ratio"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dit", "--rounds", "0"], "--rounds must be at least 1"),
        (["dit", "a=1", "--against", "a=1"], "the same settings on both sides"),
        (["dit", "train.nope=1"], "train.nope"),
        (["reglue", "--network", "SiT-S/8"], "--network SiT-S/8: the published step is of a SiT"),
        (["tokenizer", "none.yaml"], "none.yaml: no such file"),
        (["reglue", "train.batch_size=2"], "train.batch_size: not here"),
        (["dit", "data.size=32"], "data.size: not here"),
        (["memory", "x.yaml", "--output", "."], "--output .: not a file that can be written"),
        (["memory", RECIPES / "vae.yaml", "--latents", "sit"], "trains a tokenizer, which sees"),
        (["memory", RECIPES / "dit.yaml"], "trains a generator; give --latents sit or"),
        (["memory", RECIPES / "redi.yaml"], "learns nothing by steps"),
        (["memory", "x.yaml", "--gpu", "0"], "--gpu must be more than 0"),
    ],
)
def test_wrong_words_are_one_line(capsys, words, message):
    assert bench(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_what_routing_saves_is_counted_and_timed_in_pairs(tmp_path, capsys):
    words = ["--latents", "sit", "--network", "SiT-T/8", "--batch-size", 1, "--rounds", 1]
    assert bench("routing", *words, "--output", tmp_path / "routing.json") == 0
    report = json.loads((tmp_path / "routing.json").read_text())
    training, guided = report["rows"]
    # Of 16 tokens two of six blocks see 4, but the others, the fusion and conditions stay.
    assert 1.1 < training["times_fewer_operations"] < 1.5
    assert 1.1 < guided["times_fewer_operations"] < 1.3
    assert all(seconds > 0 for row in report["rows"] for seconds in row["seconds"])
    assert report["optimiser_seconds"] > 0 and "times fewer" in capsys.readouterr().out
    assert bench("routing", *words, "diffusion.routing=null") == 2
    assert "diffusion.routing: is what is measured; leave it on" in capsys.readouterr().err


def test_a_routed_steps_operations_are_counted_as_its_tokens_are(tmp_path):
    routing = ["diffusion.routing={first: 1, last: 1}"]
    counts = [
        dit_step("sit", "SiT-T/8", 1, words, tmp_path)[1]
        for words in ([], [*routing], [*routing, "diffusion.routing.drop=0"])
    ]
    assert counts[1] < 0.75 * counts[0] and counts[2] > counts[0]
