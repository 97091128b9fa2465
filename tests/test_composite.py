"""Composite tokenizers: statistics, coders, the teacher that a loaded one finds again, caches, runs."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import tiny
from semtok import Tokenizer, UserError
from semtok.commands import train_tokenizer as command
from semtok.commands.cli import run
from semtok.commands.tokenizer_export import statistics_batches
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.caches.feature_cache import CachedFeatures
from semtok.data.caches.shards import Shards
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.source import Key
from semtok.images import to_pixels
from semtok.methods.coders import CoderShape, feature_cosine
from semtok.methods.composite import CompositeTokenizer, feature_stride
from semtok.methods.redi import PrincipalComponents
from semtok.methods.semvae import cosine_loss
from semtok.metrics import psnr
from semtok.recipe import parse_recipe
from semtok.settings import read_yaml
from semtok.statistics import StreamingMoments
from semtok.teachers import Teacher, TeacherConfig

METHODS = {
    "redi": {"channels": 4},
    "reglue": {"compressor": {"hidden": [8], "channels": 4}},
    "semvae": {"channels": 4, "width": 16, "heads": 2, "blocks": 1},
    "reg": {"name": "reglue", "compressor": None},
}


def content(name: str, **changes: Any) -> dict[str, Any]:
    """A recipe of one of these methods that trains in seconds; two layers of the teacher."""
    method = {"name": name} | METHODS[name] | changes
    steps = {} if name in ("reglue", "semvae") else {"steps": 0, "warmup_steps": 0}
    recipe = tiny.content(method, **steps)
    recipe["teacher"]["layers"] = [-2, -1]
    return recipe


def trained(name: str, folder: Path, **changes: Any) -> CompositeTokenizer:
    return train_tokenizer(parse_recipe(content(name, **changes), "tiny"), folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run of each method."""
    root = tmp_path_factory.mktemp("composite")
    for name in METHODS:
        trained(name, root / name)
    return {name: root / name for name in METHODS}


def pixels(num: int = 6, size: int = 16) -> Tensor:
    return to_pixels(Shapes(ShapesConfig(size=size), train=True).load(range(num)).images)


# Streaming statistics ----------------------------------------------------------------------------


def test_streaming_moments_are_those_of_everything_at_once():
    values = torch.randn(40, 5, 3, 2, dtype=torch.float64) * 3 + 1e4
    rows = values.transpose(0, 1).flatten(1)
    moments, full = StreamingMoments(), StreamingMoments(covariance=True)
    for part in values.split([1, 7, 30, 2]):
        moments.add(part)
        full.add(part)
    torch.testing.assert_close(moments.mean, rows.mean(dim=1))
    torch.testing.assert_close(moments.std, rows.std(dim=1, unbiased=False))
    torch.testing.assert_close(full.matrix, torch.cov(rows, correction=0))
    torch.testing.assert_close(full.std, moments.std)
    with pytest.raises(ValueError, match="covariance=True"):
        _ = moments.matrix


@pytest.mark.parametrize("rank", [1, 3])
def test_principal_components_are_exact_in_a_space_of_as_many_dimensions(rank):
    directions, offset = torch.randn(rank, 7), torch.randn(7)
    features = torch.einsum("kd,bkhw->bdhw", directions, torch.randn(20, rank, 4, 5))
    features = features + offset[:, None, None]
    moments = StreamingMoments(covariance=True)
    for part in features.split(6):
        moments.add(part)
    coder = PrincipalComponents(CoderShape(feature_channels=7, channels=rank))
    coder.fit(moments)
    code, std = coder.encode(features)
    assert code.shape == (20, rank, 4, 5) and not std.any()
    torch.testing.assert_close(coder.decode(code), features, atol=1e-4, rtol=1e-4)
    fewer = PrincipalComponents(CoderShape(feature_channels=7, channels=max(1, rank - 1)))
    fewer.fit(moments)
    error = (fewer.decode(fewer.encode(features)[0]) - features).abs().max()
    assert (error > 0.1) == (rank > 1)


def test_components_are_uncorrelated_largest_first_and_orthonormal():
    features = torch.randn(50, 6, 3, 3) * torch.arange(1, 7)[:, None, None]
    features[:, 1] += 3 * features[:, 0]
    moments = StreamingMoments(covariance=True)
    moments.add(features)
    coder = PrincipalComponents(CoderShape(feature_channels=6, channels=6))
    coder.fit(moments)
    torch.testing.assert_close(coder.components @ coder.components.T, torch.eye(6))
    rows = coder.encode(features)[0].transpose(0, 1).flatten(1)
    covariance = torch.cov(rows, correction=0)
    variances = covariance.diagonal()
    torch.testing.assert_close(covariance, torch.diag(variances), atol=1e-4, rtol=0)
    assert (variances.diff() <= 1e-5).all()
    with pytest.raises(ValueError, match="7 components of features with 6 channels"):
        PrincipalComponents(CoderShape(feature_channels=6, channels=7))


def test_features_that_never_vary_do_no_harm():
    features = torch.randn(10, 4, 2, 2)
    features[:, 2] = 5.0
    moments = StreamingMoments(covariance=True)
    moments.add(features)
    coder = PrincipalComponents(CoderShape(feature_channels=4, channels=4))
    coder.fit(moments)
    torch.testing.assert_close(coder.decode(coder.encode(features)[0]), features)


def test_the_cosine_loss_by_hand():
    a, b = torch.randn(2, 2, 3, 2, 2)
    flat_a, flat_b = a.flatten(2), b.flatten(2)  # (B, D, tokens)
    cosine = torch.nn.functional.cosine_similarity
    by_token = [cosine(flat_a[1, :, i], flat_b[1, :, i], dim=0) for i in range(4)]
    by_channel = [cosine(flat_a[1, i], flat_b[1, i], dim=0) for i in range(3)]
    torch.testing.assert_close(cosine_loss(a, b)[1], 1 - torch.stack(by_token).mean())
    torch.testing.assert_close(cosine_loss(a, b, "tokens")[1], 1 - torch.stack(by_channel).mean())


# The tokenizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_an_export_encodes_as_the_tokenizer_did_and_its_texture_is_that_of_its_vae(runs, name):
    ours = Tokenizer.from_pretrained(runs[name])
    parts = {"redi": ("semantic",), "semvae": ("semantic",), "reg": ("global",)}
    assert ours.spec.names == ("texture", *parts.get(name, ("semantic", "global")))
    with torch.no_grad():
        latents = ours.encode(pixels())
        demo = Tokenizer.from_pretrained("demo")
        assert torch.equal(latents.texture, demo.encode(pixels()).texture)
        assert torch.equal(ours.decode(latents), demo.decode(demo.encode(pixels())))
    ours.spec.check(latents)
    if "semantic" in latents:
        assert latents["semantic"].shape == (6, 4, 8, 8), "8x8 tokens of 16x16 pixels"
        assert ours.decode_features(latents).shape == (6, 256, 8, 8)
    if "global" in latents:
        assert latents["global"].shape == (6, 128)


@pytest.mark.parametrize("name", METHODS)
def test_parts_are_standardised_on_training_images(runs, name):
    ours = Tokenizer.from_pretrained(runs[name])
    recipe = parse_recipe(content(name), "tiny")
    source = Shapes(recipe.data, train=True)
    batches = statistics_batches(source, recipe, torch.device("cpu"))
    with torch.no_grad():
        drawn = [ours.encode(b.pixels, sample=True) for _, b in batches]
    # Other draws than were measured differ where the code is a Gaussian.
    limit = 0.3 if name == "semvae" else 1e-3
    for part in ours.spec.names[1:]:
        values = torch.cat([latents[part] for latents in drawn]).transpose(0, 1).flatten(1)
        spread = values.std(dim=1, unbiased=False)
        torch.testing.assert_close(values.mean(dim=1), torch.zeros(len(values)), atol=limit, rtol=0)
        torch.testing.assert_close(spread, torch.ones(len(values)), atol=limit, rtol=0)


def test_statistics_none_leaves_features_as_published(runs, tmp_path):
    ours = trained("redi", tmp_path / "raw", statistics="none", global_token=True)
    reloaded = Tokenizer.from_pretrained(tmp_path / "raw")
    latents = reloaded.encode(pixels())
    features = reloaded.features(pixels())
    assert torch.equal(latents["global"], features.pooled)
    assert torch.equal(latents["semantic"], reloaded.coder.encode(features.joined)[0])
    assert torch.equal(reloaded.coder.components, ours.coder.components)
    assert reloaded.spec.names == ("texture", "semantic", "global")


def test_other_image_sizes_have_grids_of_the_same_stride(runs):
    ours = Tokenizer.from_pretrained(runs["reglue"])
    with torch.no_grad():
        latents = ours.encode(torch.rand(1, 3, 32, 24) * 2 - 1)
    assert latents.texture.shape[-2:] == (8, 6) and latents["semantic"].shape[-2:] == (16, 12)


def test_decoding_needs_no_teacher_and_encoding_needs_the_right_one(runs, monkeypatch):
    latents = Tokenizer.from_pretrained(runs["reglue"]).encode(pixels(2))

    def refuse(*_: Any) -> None:
        raise UserError("no teacher here")

    monkeypatch.setattr("semtok.methods.teacher_tokenizer.Teacher", refuse)
    alone = Tokenizer.from_pretrained(runs["reglue"])
    assert alone.decode(latents).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="no teacher here"):
        alone.encode(pixels(2))

    def other(config: TeacherConfig) -> Teacher:
        teacher = Teacher(config)
        with torch.no_grad():
            next(teacher.network.parameters()).add_(1e-3)
        return teacher

    monkeypatch.setattr("semtok.methods.teacher_tokenizer.Teacher", other)
    with pytest.raises(UserError, match="teacher 'demo': its weights here are not those"):
        alone.encode(pixels(2))


@torch.no_grad()
def test_a_teacher_from_a_local_file_travels_with_the_export(tmp_path):
    file = tmp_path / "mine.pth"
    network = Teacher(TeacherConfig()).network
    next(network.parameters()).mul_(1.1)
    torch.save(network.state_dict(), file)
    recipe = content("semvae")
    recipe["teacher"]["checkpoint"] = str(file)
    with torch.enable_grad():
        ours = train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
    expected = ours.eval().encode(pixels(2))
    file.unlink()
    shutil.copytree(tmp_path / "run/export", tmp_path / "elsewhere")
    reloaded = Tokenizer.from_pretrained(tmp_path / "elsewhere")
    assert torch.equal(reloaded.encode(pixels(2))["semantic"], expected["semantic"])
    reloaded.save_pretrained(tmp_path / "again")
    again = Tokenizer.from_pretrained(tmp_path / "again").encode(pixels(2))
    assert torch.equal(again["semantic"], expected["semantic"])


def test_the_texture_may_be_any_tokenizer_of_the_texture_alone(runs, tmp_path, monkeypatch):
    from semtok.methods.vae import Architecture, build_autoencoder

    shape = tiny.AUTOENCODER | {"block_channels": (8, 8, 16)}
    build_autoencoder(Architecture(**shape)).save_pretrained(tmp_path / "vae")
    untrained = {"texture": str(tmp_path / "vae"), "min_texture_psnr": 0}
    ours = trained("reg", tmp_path / "run", **untrained)
    assert ours.spec["texture"].channels == 4
    assert isinstance(Tokenizer.from_pretrained(tmp_path / "run"), CompositeTokenizer)
    with pytest.raises(UserError, match="method.texture: .* has parts texture, semantic"):
        trained("reg", tmp_path / "nested", texture=str(runs["redi"]))
    assert not (tmp_path / "nested").exists()
    with pytest.raises(UserError, match="tokenizer 'nowhere': no such folder"):
        trained("reg", tmp_path / "none", texture="nowhere")


def test_grids_that_do_not_divide_the_image_are_refused_with_a_size_that_does():
    teacher = Teacher(TeacherConfig(input_size=28))
    assert teacher.grid((16, 16)) == (7, 7)
    with pytest.raises(ValueError, match=r"28 gives 7x7 tokens.*pass teacher.input_size=32"):
        feature_stride(teacher, (16, 16))
    assert feature_stride(Teacher(TeacherConfig(input_size=32)), (16, 16)) == 2
    assert feature_stride(Teacher(TeacherConfig(input_size=32)), (16, 24)) == 2


def test_a_texture_that_is_not_trained_yet_is_trained_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    found = {"mine": tmp_path / "mine.yaml"}
    monkeypatch.setattr(command, "find_recipe", found.get)
    with pytest.raises(UserError, match="method.heads: 3 does not divide"):
        trained("semvae", tmp_path / "run", texture="mine", heads=3)
    assert not (tmp_path / "runs").exists(), "what is wrong is told before the long work"
    trained("semvae", tmp_path / "run", texture="mine", min_texture_psnr=0)
    assert "tokenizer 'mine' is not trained yet: training" in capsys.readouterr().out
    ours, mine = Tokenizer.from_pretrained("run"), Tokenizer.from_pretrained("mine")
    with torch.no_grad():
        assert torch.equal(ours.encode(pixels(1)).texture, mine.encode(pixels(1)).texture)
    # A resumed run keeps its copy, whatever became of the reference.
    shutil.rmtree(tmp_path / "runs")
    found.clear()
    resumed = parse_recipe(content("semvae", texture="mine", min_texture_psnr=0), "tiny")
    train_tokenizer(resumed, tmp_path / "run", resume=True)


# Training ----------------------------------------------------------------------------------------


def test_a_run_shows_maps_and_measures_the_cosine(runs):
    for name in ("redi", "reglue", "semvae"):
        summary = json.loads((runs[name] / "summary.json").read_text())
        assert -1 <= summary["validation"]["feature_cosine"] <= 1
        assert list((runs[name] / "samples").glob("*.png"))
    assert json.loads((runs["reg"] / "summary.json").read_text())["validation"] == {}
    ours, features = Tokenizer.from_pretrained(runs["redi"]), None
    recipe = parse_recipe(content("redi"), "tiny")
    held_out = to_pixels(Shapes(recipe.data, train=False).load(range(4)).images)
    with torch.no_grad():
        features = ours.features(held_out).joined
        restored = ours.coder.decode(ours.coder.encode(features)[0])
    cosine = feature_cosine(restored, features).mean().item()
    summary = json.loads((runs["redi"] / "summary.json").read_text())
    assert summary["validation"]["feature_cosine"] == pytest.approx(cosine, abs=1e-4)


def test_the_compressors_statistics_are_those_of_the_training_features(runs):
    ours = Tokenizer.from_pretrained(runs["reglue"])
    recipe = parse_recipe(content("reglue"), "tiny")
    source = Shapes(recipe.data, train=True)
    batches = statistics_batches(source, recipe, torch.device("cpu"))
    features = torch.cat([ours.features(b.pixels).joined for _, b in batches])
    rows = features.transpose(0, 1).flatten(1)
    torch.testing.assert_close(ours.coder.feature_mean, rows.mean(dim=1), atol=1e-5, rtol=1e-4)
    expected = rows.std(dim=1, unbiased=False)
    torch.testing.assert_close(ours.coder.feature_std, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["reglue", "semvae"])
def test_an_interrupted_run_ends_with_the_same_weights(runs, tmp_path, name):
    recipe = content(name)
    recipe["train"]["checkpoint_every"] = 3
    train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run/checkpoints").iterdir())[-1])
    train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run", resume=True)
    ours, theirs = tiny.final_tensors(tmp_path / "run"), tiny.final_tensors(runs[name])
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    a, b = (Tokenizer.from_pretrained(r).encode(pixels(2)) for r in (tmp_path / "run", runs[name]))
    assert all(torch.equal(a[part], b[part]) for part in a)


@pytest.mark.parametrize(("name", "encoder_alone"), [("reglue", set()), ("semvae", {"kl"})])
def test_each_term_trains_what_it_should(name, encoder_alone):
    recipe = parse_recipe(content(name), "tiny")
    texture = Tokenizer.from_pretrained("demo")
    objective = command.build_objective(recipe, texture, place="tiny")
    learner = next(iter(objective.learners.values()))
    learner.train()
    output = learner(tiny.batch(objective), tiny.draws(), 0, {})
    names = [n for n, _ in learner.named_parameters()]
    for term_name, term in output.terms.items():
        grads = torch.autograd.grad(
            term.value.mean(), list(learner.parameters()), retain_graph=True, allow_unused=True
        )
        reached = {n for n, g in zip(names, grads, strict=True) if g is not None and g.any()}
        sides = {n.split(".")[1] for n in reached}
        assert sides == ({"encoder"} if term_name in encoder_alone else {"encoder", "decoder"})
    frozen = [objective.teacher.module, texture]
    assert not any(p.grad is not None for module in frozen for p in module.parameters())


def test_cached_features_are_those_of_each_step(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    images = Shapes(ShapesConfig(size=16), train=True).load(range(8)).images
    from torchvision.io import write_png

    for i, image in enumerate(images):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        write_png(image, str(folder / "ab"[i % 2] / f"{i}.png"))
    recipe = content("reglue", feature_cache=str(tmp_path / "cache"))
    recipe["data"] = {"kind": "folder", "path": str(folder), "size": 16, "flip": True}
    parsed = parse_recipe(recipe, "tiny")
    train_tokenizer(parsed, tmp_path / "cached")
    assert "computing the teacher's features once" in capsys.readouterr().out
    online = content("reglue")
    online["data"] = recipe["data"]
    train_tokenizer(parse_recipe(online, "tiny"), tmp_path / "online")
    rows = [
        [json.loads(line)["loss/mse"] for line in (tmp_path / r / "metrics.jsonl").open()]
        for r in ("cached", "online")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=2e-2), "they differ by float16's rounding"

    from semtok.data.images.kinds import open_sources

    source, _ = open_sources(parsed.data)
    shards = Shards(tmp_path / "cache", "test")
    cache, teacher = CachedFeatures(source, shards), Teacher(parsed.teacher)
    keys = [Key(2, True), Key(0), Key(5, True)]
    batch = source.load_keys(keys)
    expected = teacher.features(to_pixels(batch.images), grid=(8, 8))
    loaded = cache.load_keys(keys)
    features = loaded.features.restored()
    assert loaded.images is None and torch.equal(loaded.labels, batch.labels)
    for ours, theirs in zip(features.patches, expected.patches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-3, rtol=2e-3)
    torch.testing.assert_close(features.pooled, expected.pooled, atol=5e-3, rtol=2e-3)

    # A second run computes nothing; another teacher's features are not taken for these.
    train_tokenizer(parsed, tmp_path / "second")
    assert "computing" not in capsys.readouterr().out
    recipe["teacher"]["layers"] = [-1]
    with pytest.raises(
        UserError, match=r"holds the teacher's features of something else \(layers: \[-2, -1\]"
    ):
        train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "third")


def test_a_cache_that_the_disk_can_not_hold_is_refused(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("semtok.data.caches.shards.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"needs 0.0 GB, the disk has 0.0 GB free"):
        trained("semvae", tmp_path / "run", feature_cache=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("redi", ["train.steps=5"], "method 'redi' with these settings learns nothing by steps"),
        ("reglue", ["train.steps=0"], "train.steps: expected at least 1, got 0"),
        ("reg", ["method.global_token=false"], "with neither compressor nor global_token"),
        ("semvae", ["method.heads=3"], "method.heads: 3 does not divide the width 16"),
        ("semvae", ["method.cosine_axis=channels"], "method.cosine_axis"),
        ("semvae", ["teacher=null"], "needs a teacher"),
        ("redi", ["teacher.input_size=28"], "pass teacher.input_size=32"),
        ("redi", ["method.channels=300"], "300 components of features with 256 channels"),
        ("redi", ["method.feature_cache=cache"], "nothing is read twice here; leave it out"),
        ("reglue", ["method.feature_cache=recipe.yaml/x"], "method.feature_cache: recipe.yaml/x: "),
        ("reglue", ["method.compressor.hidden=[0]"], "method.compressor.hidden.0"),
        ("reglue", ["train.optimiser=null"], "train.optimiser is missing"),
        ("reglue", ["train.constant_steps=6"], "pass train.constant_steps="),
        (
            "reglue",
            ["train.schedule=constant", "train.constant_steps=1"],
            "schedule=cosine or linear only",
        ),
    ],
)
def test_settings_that_can_not_work_are_one_line(
    tmp_path, monkeypatch, capsys, name, overrides, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content(name)))
    arguments = [str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run"), *overrides]
    assert run(command.main, arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_damaged_exports_are_told_in_one_line(runs, tmp_path):
    export = shutil.copytree(runs["semvae"] / "export", tmp_path / "export")
    (export / "coder.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="coder.safetensors: cut short or damaged"):
        Tokenizer.from_pretrained(export)
    shutil.copy(runs["reglue"] / "export/coder.safetensors", export)
    with pytest.raises(UserError, match="coder.safetensors: does not fit the network"):
        Tokenizer.from_pretrained(export)
    config = json.loads((export / "config.json").read_text())
    del config["settings"]["coder"]
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json: settings: .coder. is missing"):
        Tokenizer.from_pretrained(export)


def test_the_rate_is_constant_between_warmup_and_cosine():
    from semtok.training.train_config import TrainConfig

    told = dict(steps=100, batch_size=1, optimiser={"learning_rate": 1.0}, warmup_steps=10)
    told |= dict(constant_steps=40, final_lr_fraction=0.1)
    for schedule, at_60 in (("cosine", 0.914), ("linear", 0.82)):
        config = TrainConfig.model_validate_json(json.dumps(told | {"schedule": schedule}))
        factors = [config.learning_rate_factor(step) for step in range(101)]
        assert factors[4] == pytest.approx(0.5) and factors[9:51] == [1.0] * 42
        assert factors[60] == pytest.approx(at_60, abs=1e-3)
        assert factors[75] == pytest.approx(0.55) and factors[100] == pytest.approx(0.1)


# What a loaded tokenizer is to other code --------------------------------------------------------


def test_the_teacher_is_no_part_of_the_module(runs):
    ours = Tokenizer.from_pretrained(runs["reglue"])
    before = list(ours.state_dict())
    ours.encode(pixels(1))
    assert list(ours.state_dict()) == before
    ours.requires_grad_(True)
    assert not any(p.requires_grad for p in ours.teacher.parameters())
    double = Tokenizer.from_pretrained(runs["reglue"]).double()
    with torch.no_grad():
        latents, ours = double.encode(pixels(1)), ours.encode(pixels(1))
    assert latents["semantic"].dtype == torch.float64
    torch.testing.assert_close(latents["semantic"].float(), ours["semantic"], atol=1e-4, rtol=1e-4)


def test_an_average_begins_with_what_was_measured(runs, tmp_path):
    recipe = content("redi")
    assert recipe["train"]["ema_decay"] == 0.9
    recipe["train"]["ema_decay"] = None
    train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
    a, b = (
        Tokenizer.from_pretrained(run).coder.state_dict()
        for run in (tmp_path / "run", runs["redi"])
    )
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(b["components"], torch.eye(4, 256))


def test_an_export_without_its_texture_is_not_looked_for_on_the_hub(runs, tmp_path, monkeypatch):
    shutil.copytree(runs["redi"] / "export", tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine/texture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "semtok.references._from_hub", lambda *_, **__: pytest.fail("asked the Hub")
    )
    with pytest.raises(UserError, match="mine/texture': no such folder"):
        Tokenizer.from_pretrained("mine")


@pytest.mark.parametrize(
    "defaults",
    [
        {"leads": 5},
        {"leads": {"semantic": "x"}},
        {"leads": {"semantc": 0.3}},
        {"loss_weights": {"texture": -1.0}},
        {"cosine_weight": "much"},
        {"repa": 5},
    ],
)
def test_damaged_defaults_are_told_in_one_line(runs, tmp_path, defaults):
    export = shutil.copytree(runs["redi"] / "export", tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    config["diffusion_defaults"] |= defaults
    (export / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: diffusion_defaults"):
        Tokenizer.from_pretrained(export)


# More of the cache -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> dict[str, Any]:
    """Data settings of six images in a folder, one of which can't be read."""
    from torchvision.io import write_png

    (tmp_path / "images").mkdir()
    for i, image in enumerate(Shapes(ShapesConfig(size=16), train=True).load(range(6)).images):
        write_png(image, str(tmp_path / f"images/{i}.png"))
    (tmp_path / "images/3.png").write_text("no image")
    path = str(tmp_path / "images")
    return {"kind": "folder", "path": path, "size": 16, "validation_fraction": 0.2}


def cached(folder: dict[str, Any], cache: Path, run: Path) -> None:
    recipe = content("reglue", feature_cache=str(cache)) | {"data": folder}
    train_tokenizer(parse_recipe(recipe, "tiny"), run)


def test_a_cache_names_unreadable_files_and_notices_changed_ones(folder, tmp_path, capsys):
    for run_name in ("first", "second"):
        cached(folder, tmp_path / "cache", tmp_path / run_name)
        assert "3.png" in capsys.readouterr().out
        summary = json.loads((tmp_path / run_name / "summary.json").read_text())
        assert summary["num_skipped_files"] == 1
    for name in ("0.png", "1.png", "2.png"):  # one of them may be held out
        shutil.copy(tmp_path / "images/5.png", tmp_path / "images" / name)
    with pytest.raises(UserError, match=r"cache holds .* of something else \(source"):
        cached(folder, tmp_path / "cache", tmp_path / "third")
    assert not (tmp_path / "third").exists(), "told before the run's folder is claimed"


def test_a_second_run_leaves_a_cache_alone_that_another_writes(
    folder, tmp_path, monkeypatch, capsys
):
    """It waits."""
    original, waited = Teacher.features, []

    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    def features(self: Teacher, images: Tensor, **settings: Any) -> Any:
        if settings.get("grid") == (8, 8) and len(images) > 1 and not waited:
            waited.append(True)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("semtok.lock.time.sleep", stop)
                cached(folder, tmp_path / "cache", tmp_path / "other")
            assert "at work there" in capsys.readouterr().out
        return original(self, images, **settings)

    monkeypatch.setattr(Teacher, "features", features)
    cached(folder, tmp_path / "cache", tmp_path / "run")
    assert waited
    cached(folder, tmp_path / "cache", tmp_path / "other")
    runs = [tiny.final_tensors(tmp_path / name) for name in ("run", "other")]
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".cache")]


def test_a_damaged_cache_says_what_to_do(folder, tmp_path):
    cached(folder, tmp_path / "cache", tmp_path / "run")
    index = (tmp_path / "cache/index.json").read_text()
    for name, text in (("index.json", "[]"), ("shard-000000.safetensors", "short")):
        (tmp_path / "cache" / name).write_text(text)
        with pytest.raises(UserError, match="method.feature_cache: .* is damaged"):
            cached(folder, tmp_path / "cache", tmp_path / "again")
        (tmp_path / "cache/index.json").write_text(index)


def test_layers_with_grids_of_their_own_are_refused(tmp_path, monkeypatch):
    from dataclasses import replace

    original = Teacher.features

    def features(self: Teacher, images: Tensor, **settings: Any) -> Any:
        seen = original(self, images, **settings)
        return replace(seen, patches=(seen.patches[0].repeat(1, 1, 2, 2), *seen.patches[1:]))

    monkeypatch.setattr(Teacher, "features", features)
    with pytest.raises(UserError, match=r"teacher.layers: .* pass teacher.layers=\[-1\]"):
        trained("reglue", tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What the texture does to the images -------------------------------------------------------------


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Black lines on white, which the embedded VAE was not made for."""
    root = tmp_path_factory.mktemp("drawings")
    for index in range(12):
        image = np.full((16, 16, 3), 255, np.uint8)
        image[index % 12 + 2, 2:14] = image[2:14, 13 - index % 10] = 0
        (root / "ab"[index % 2]).mkdir(exist_ok=True)
        Image.fromarray(image).save(root / "ab"[index % 2] / f"{index}.png")
    return root


def on(images: Path, name: str, **changes: Any) -> dict[str, Any]:
    recipe = content(name, **changes)
    recipe["data"] = {"kind": "folder", "path": str(images), "size": 16}
    return recipe


@pytest.mark.parametrize("name", METHODS)
def test_a_texture_that_was_made_for_other_images_is_refused_before_training(
    drawings, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(on(drawings, name)))
    assert run(command.main, ["recipe.yaml", "--output", "runs/x"]) == 2
    error = capsys.readouterr().err.strip()
    found = re.fullmatch(
        r"error: recipe.yaml: method.texture: 'demo' shows 8 of the training images at 16x16 with a "
        r"PSNR of (.*) dB; 28.45 dB where it was trained, .*; pass method.texture=vae, which .*"
        rf"recipes/vae.yaml data.kind=folder data.path={re.escape(str(drawings))} data.size=16 "
        r"--output .* or pass a smaller method.min_texture_psnr",
        error,
    )
    assert found is not None, error
    assert 0 < float(found[1]) < 18
    assert not (tmp_path / "runs").exists()


def test_a_texture_that_shows_its_own_images_no_better_is_to_be_trained_longer(
    drawings, tmp_path, capsys
):
    texture = Tokenizer.from_pretrained("demo")
    texture.training_info = texture.training_info | {"metrics": {"psnr": 5.0}}
    texture.save_pretrained(tmp_path / "mine")
    recipe = on(drawings, "reg", texture=str(tmp_path / "mine"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run(command.main, [str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert (
        "shows its own images no better; train it longer" in error and "other images" not in error
    )


def test_told_so_a_run_takes_any_texture_and_says_in_the_end_what_it_does(
    drawings, tmp_path, capsys
):
    recipe = parse_recipe(on(drawings, "reg", min_texture_psnr=0), "tiny")
    ours = train_tokenizer(recipe, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["texture"]
    source = open_sources(recipe.data)[0]
    images = to_pixels(source.load(source.chosen(8)).images)
    texture = Tokenizer.from_pretrained("demo")
    with torch.no_grad():
        expected = psnr(texture.decode(texture.encode(images)), images).mean().item()
    assert found == {
        "psnr": pytest.approx(expected, abs=1e-4),
        "num_images": 8,
        "psnr_where_trained": pytest.approx(28.4475, abs=1e-3),
    }
    output = capsys.readouterr().out
    assert f"with a PSNR of {expected:.2f} dB; 28.45 dB where it was trained" in output
    assert re.search(rf"PSNR of the texture +{expected:.2f} dB on 8 training images", output)
    assert ours.spec.names == ("texture", "global")


def test_the_embedded_texture_passes_on_the_embedded_images_and_null_measures_nothing(
    runs, tmp_path
):
    summary = json.loads((runs["semvae"] / "summary.json").read_text())
    assert summary["texture"]["psnr"] > 20
    trained("reg", tmp_path / "run", min_texture_psnr=None)
    assert "texture" not in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_resumed_run_tells_what_it_measured_at_its_start(drawings, tmp_path, monkeypatch):
    settings = on(drawings, "reglue", min_texture_psnr=0)
    train_tokenizer(parse_recipe(settings, "tiny"), tmp_path / "run")
    first = json.loads((tmp_path / "run" / "summary.json").read_text())["texture"]
    monkeypatch.setattr("semtok.commands.texture_quality._measured", None)
    settings["method"]["min_texture_psnr"] = 18.0  # decides about a start
    train_tokenizer(parse_recipe(settings, "tiny"), tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["texture"] == first


def test_a_recipes_name_trains_the_texture_on_the_same_images(
    drawings, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tiny.content({"name": "vae"}, steps=2)))
    monkeypatch.setattr(command, "find_recipe", {"mine": tmp_path / "mine.yaml"}.get)
    recipe = parse_recipe(on(drawings, "reg", texture="mine", min_texture_psnr=0), "tiny")
    train_tokenizer(recipe, Path("runs/x"))
    made = read_yaml(Path("runs/x_mine/recipe.yaml"))
    assert (made["data"]["kind"], made["data"]["path"]) == ("folder", str(drawings))
    capsys.readouterr()
    (tmp_path / "runs" / "x").rename(tmp_path / "runs" / "away")
    train_tokenizer(recipe, Path("runs/x"))
    assert "is not trained yet" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs" / "x")
    other = on(tmp_path, "reg", texture="mine", min_texture_psnr=0)
    copied = shutil.copytree(drawings, tmp_path / "others")
    other["data"]["path"] = str(copied)
    images = sorted(copied.rglob("*.png"))
    images[0].unlink()
    with pytest.raises(UserError, match="runs/x_mine: can't resume with other images"):
        train_tokenizer(parse_recipe(other, "tiny"), Path("runs/x"))


def test_a_score_trains_no_recipe_on_other_images_than_it_is_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'vae' is not trained yet, and not on these images; train"):
        command.tokenizer_from_reference("vae", drawn=False)


def test_all_that_does_not_suit_in_a_cnn_is_told_at_once_and_what_does(tmp_path):
    network = timm.create_model("test_resnet")
    save_file(network.state_dict(), tmp_path / "cnn.safetensors")
    recipe = content("reglue")
    recipe["teacher"] = {
        "name": "test_resnet",
        "checkpoint": str(tmp_path / "cnn.safetensors"),
        "layers": [-2, -1],
        "input_size": 224,
    }
    with pytest.raises(UserError) as raised:
        train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
    message = str(raised.value)
    for words in (
        "teacher.layers: [-2, -1] have maps of [",
        "pass teacher.layers=[-1]",
        "teacher.input_size: 224 gives 7x7 tokens",
        "pass teacher.input_size=256",
        "or take a vision transformer",
    ):
        assert words in message
    assert not (tmp_path / "run").exists()
