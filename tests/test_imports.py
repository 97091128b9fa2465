"""``hub import``: published files as exports, every tensor accounted for, and files that are refused."""

import argparse
import json
import os
import pickle
import shutil
import struct
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from parity import kits, load_kit
from semtok import Generator, Tokenizer, UserError
from semtok.commands import hub
from semtok.commands.cli import run
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.hub.formats import open_checkpoint
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.hub.modules import load_module, save_module
from semtok.methods.reglue import Compressor, CompressorShape
from semtok.methods.semvae import SemVAE, SemVAEShape
from semtok.methods.vae import Architecture, build_autoencoder
from semtok.publish import export_files
from semtok.sampler.dit import DiT
from semtok.teachers import Teacher, TeacherConfig
from test_import_dit import SIT, network, official
from test_import_vae import official as official_vae

KITS = (
    "reglue_compressor",
    "reglue_sit",
    "repa_sit",
    "sit",
    "sfd_lightningdit",
    "semvae",
    "lightningdit",
    "vavae_autoencoder",
    "repae",
)


def command(*words: object) -> int:
    return run(hub.main, ["import", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line of a refused import."""
    assert command(*words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def load(folder: Path) -> torch.nn.Module:
    kind = json.loads((folder / "config.json").read_text())["kind"]
    loaders = {"tokenizer": Tokenizer.from_pretrained, "generator": Generator.from_pretrained}
    return loaders.get(kind, load_module)(folder)


def save(model: torch.nn.Module, folder: Path) -> None:
    if isinstance(model, Tokenizer | Generator):
        model.save_pretrained(folder)
    else:
        save_module(model, folder)


def equal(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    state, other = ours.state_dict(), theirs.state_dict()
    return state.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in state.items())


# Kits of the official code -----------------------------------------------------------------------


@pytest.mark.parametrize("folder", [param for name in KITS for param in kits(name)])
def test_parity_kits_are_recognised_and_come_back_as_they_were(folder, tmp_path):
    """What the tests of each kit compare with its official outputs is what the command writes."""
    kit = load_kit(folder)
    file = folder / kit.case["files"]["checkpoint"]
    kwargs = kit.case["constructor"].get("kwargs", {})
    heads = ["--heads", kwargs["num_heads"]] if "num_heads" in kwargs else []
    assert command("auto", file, "--output", tmp_path / "a", *heads) == 0
    options = ImportOptions(heads=kwargs.get("num_heads"))
    imported = import_checkpoint(file, "auto", options)
    first = load(tmp_path / "a")
    assert type(first) is type(imported.model) and equal(first, imported.model)
    save(first, tmp_path / "b")
    assert equal(load(tmp_path / "b"), first)
    # Not a tensor of the imported weights, and no entry beside them, goes without a word.
    checkpoint = open_checkpoint(file)
    entries = set(checkpoint.content) - {checkpoint.nest} if checkpoint.nest else set()
    said = checkpoint.settings
    assert set(checkpoint.state) | entries - {"vae", said.entry} <= set(imported.became)
    assert set(said.became()) <= set(imported.became)


# Files in those formats, made here ---------------------------------------------------------------


@pytest.fixture(scope="module")
def texture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CompVis file of a small autoencoder, imported with a scaling factor."""
    folder = tmp_path_factory.mktemp("texture")
    torch.manual_seed(0)
    made = build_autoencoder(
        Architecture(block_channels=(32, 32, 32), layers_per_block=1, latent_channels=5)
    )
    content = {"state_dict": official_vae(made) | {"loss.logvar": torch.zeros(1)}, "epoch": 3}
    torch.save(content, folder / "x.ckpt")
    words = ["auto", folder / "x.ckpt", "--statistics", "0.5", "--output", folder / "out"]
    assert command(*words) == 0
    return folder / "out"


def test_an_autoencoder_is_a_tokenizer_by_its_scaling_factor(texture, tmp_path, capsys):
    tokenizer = Tokenizer.from_pretrained(texture)
    pixels = Shapes(ShapesConfig(size=16), train=False).load(range(2)).images
    raw = AutoencoderKL.from_pretrained(texture / "vae").eval()
    with torch.no_grad():
        expected = raw.encode(pixels.float() / 127.5 - 1).latent_dist.mean * 0.5
        torch.testing.assert_close(tokenizer.encode(pixels).texture, expected)
    card = (texture / "README.md").read_text()
    assert "| imported from | x.ckpt (compvis-vae) |" in card and "license: other" in card
    assert command("diffusers-vae", texture / "vae", "--output", tmp_path / "again") == 0
    other = Tokenizer.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(other.texture_std, tokenizer.texture_std)


def test_without_statistics_it_says_so_and_takes_those_that_lie_beside(texture, tmp_path, capsys):
    file = texture.parent / "x.ckpt"
    assert command("compvis-vae", file, "--output", tmp_path / "bare") == 0
    assert "note: its latents are not standardised yet" in capsys.readouterr().out
    with pytest.raises(ValueError, match="statistics were not measured"):
        Tokenizer.from_pretrained(tmp_path / "bare").encode(torch.zeros(1, 3, 16, 16))
    copy = tmp_path / "x.ckpt"
    copy.write_bytes(file.read_bytes())
    mean, std = torch.arange(5.0).view(1, 5, 1, 1), torch.full((1, 5, 1, 1), 3.0)
    torch.save({"mean": mean, "std": std}, tmp_path / "latents_stats.pt")
    assert command("auto", copy, "--output", tmp_path / "beside") == 0
    assert "statistics taken from" in capsys.readouterr().out
    tokenizer = Tokenizer.from_pretrained(tmp_path / "beside")
    assert tokenizer.texture_mean.tolist() == [0, 1, 2, 3, 4] and tokenizer.is_measured
    torch.save({"mean": mean[:, :2], "std": std[:, :2]}, tmp_path / "latents_stats.pt")
    message = refused(capsys, "auto", copy, "--output", tmp_path / "wrong")
    assert "latents_stats.pt: statistics of 2 channels, not of 5" in message


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer with the names of REPA's training script."""
    folder = tmp_path_factory.mktemp("transformer")
    state = official(network(SIT, 5), 2)
    torch.save({"ema": state, "model": state, "opt": {}, "steps": 7}, folder / "0000007.pt")
    return folder / "0000007.pt"


def test_a_transformer_with_a_tokenizer_is_a_generator(texture, transformer, tmp_path, capsys):
    words = ["repa", transformer, "--output", tmp_path / "out", "--tokenizer", texture]
    assert command(*words) == 0
    out = capsys.readouterr().out
    assert "left out, other weights" in out and "imported as Generator" in out
    generator = Generator.from_pretrained(tmp_path / "out")
    assert generator.image_size == (32, 32)  # 2x2 tokens of 4x4 cells of 4 pixels
    assert generator.sampler.method == "sde" and generator.sampler.steps == 250
    sampler = generator.sampler.model_copy(update={"steps": 2})
    assert generator.sample([1, "3"], sampler=sampler).shape == (2, 3, 32, 32)


def test_a_transformer_alone_is_a_part(transformer, tmp_path):
    assert command("repa", transformer, "--output", tmp_path / "out") == 0
    part = load_module(tmp_path / "out")
    assert isinstance(part, DiT) and part.num_classes == 7
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "load_module(" in card.text
    assert ModelCardData(**yaml.safe_load(card.data.to_yaml())).to_dict() == card.data.to_dict()
    with pytest.raises(ValueError, match="not a semtok generator"):
        Generator.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="is a network, not a tokenizer"):
        Tokenizer.from_pretrained(tmp_path / "out")


def test_what_the_names_leave_open_is_asked_for(texture, transformer, tmp_path, capsys):
    output = ["--output", tmp_path / "out"]
    message = refused(capsys, "auto", transformer, *output)
    assert "can be of sit or repa, which run time in opposite directions" in message
    message = refused(capsys, "sfd", transformer, *output)
    assert "is of sit or repa by its names, not sfd" in message
    message = refused(capsys, "repa", transformer, *output, "--tokenizer", "demo")
    assert "it generates 5 channels and vectors of [], the tokenizer's latents are" in message
    message = refused(capsys, "repa", transformer, *output, "--statistics", "2")
    assert "--statistics says nothing to a checkpoint of repa" in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    message = refused(capsys, "repa", transformer, "--output", tmp_path / "taken")
    assert "exists already" in message


def compressor_file(folder: Path, coder: Compressor) -> Path:
    names = {n: v for n, v in coder.state_dict().items() if not n.startswith("feature_")}
    state = {f"module.{n.replace('coder.', 'coder.model.', 1)}": v for n, v in names.items()}
    torch.save(state, folder / "compression_model.pth")
    statistics = {"mean": coder.feature_mean.numpy(), "std": coder.feature_std.numpy()}
    torch.save(statistics, folder / "dino_mean_std_x.pth")
    return folder / "compression_model.pth"


def test_a_compressor_with_image_latents_and_teacher_is_a_tokenizer(texture, tmp_path, capsys):
    torch.manual_seed(0)
    teacher = Teacher(TeacherConfig(layers=(-2, -1)))
    coder = Compressor(
        CompressorShape(feature_channels=sum(teacher.widths), hidden=(24,), channels=6)
    )
    coder.feature_mean.normal_()
    file = compressor_file(tmp_path, coder.eval())
    words = ["auto", file, "--tokenizer", texture, "--image-size", 32, "--output", tmp_path / "out"]
    message = refused(capsys, *words, "--teacher", "name=demo")
    assert "codes 256 features, the teacher's layers give 128" in message
    assert command(*words, "--teacher", "name=demo", "layers=[-2,-1]") == 0
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.method == "reglue" and tokenizer.spec.names == (
        "texture",
        "semantic",
        "global",
    )
    pixels = Shapes(ShapesConfig(size=32), train=False).load(range(2)).images
    with torch.no_grad():
        features = teacher.features(pixels.float() / 127.5 - 1, grid=(8, 8))
        expected = coder.encode(features.joined)[0]
        latents = tokenizer.encode(pixels)
    torch.testing.assert_close(latents["semantic"], expected)  # unscaled, as published
    torch.testing.assert_close(latents["global"], features.pooled)


def test_a_semvae_is_standardised_by_its_own_file(texture, tmp_path, capsys):
    torch.manual_seed(0)
    coder = SemVAE(
        SemVAEShape(feature_channels=128, channels=6, width=24, heads=2, blocks=1)
    ).eval()
    settings = "model: {params: {transformer_heads: 2}}"
    content = {"iteration": 9, "model_state_dict": coder.state_dict(), "config": settings}
    torch.save(content, tmp_path / "final.pt")
    words = ["auto", tmp_path / "final.pt", "--tokenizer", texture, "--teacher", "name=demo"]
    words += ["--image-size", 32, "--output", tmp_path / "out"]
    assert "the code's statistics are in another file" in refused(capsys, *words)
    statistics: dict[str, Tensor] = {"mean": torch.ones(1, 6, 1, 1), "std": torch.ones(1, 6, 1, 1)}
    torch.save(statistics, tmp_path / "latents_sv_stats.pt")
    assert command(*words, "--statistics", tmp_path / "latents_sv_stats.pt") == 0
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.method == "semvae" and tokenizer.coder.shape.heads == 2
    assert tokenizer.semantic_mean.tolist() == [1] * 6 and tokenizer.is_measured
    assert equal(tokenizer.coder, coder)


# Files that are refused --------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_a_malicious_pickle_is_refused_and_creates_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("raw.pt").write_bytes(pickle.dumps({"ema": Evil()}))
    torch.save({"ema": {"x_embedder.proj.weight": torch.zeros(1)}, "opt": Evil()}, "saved.pt")
    for file in ("raw.pt", "saved.pt"):
        message = refused(capsys, "auto", file, "--output", "out")
        assert f"{file}: can't be read as a checkpoint: it would run or build" in message
    torch.save({"mean": Evil(), "std": 1}, "latents_stats.pt")
    made = build_autoencoder(
        Architecture(block_channels=(32, 32), layers_per_block=1, latent_channels=3)
    )
    torch.save(official_vae(made), "vae.pt")
    assert "latents_stats.pt: can't be read" in refused(capsys, "auto", "vae.pt", "--output", "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "latents_stats.pt",
        "raw.pt",
        "saved.pt",
        "vae.pt",
    ]


def lying_header(whole: bytes) -> bytes:
    """The same file, whose header promises more than there is."""
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    name = next(n for n in header if n != "__metadata__")
    header[name]["data_offsets"][1] += 10**12
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + size :]


@pytest.mark.parametrize(
    "damage",
    [
        lying_header,
        lambda whole: whole[: len(whole) // 2],
        lambda whole: struct.pack("<Q", 2**62) + whole[8:],
        lambda whole: b"",
    ],
    ids=["lying header", "truncated", "endless header", "empty"],
)
def test_damaged_safetensors_are_one_line(transformer, tmp_path, capsys, damage):
    state = open_checkpoint(transformer).state
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({n: v.contiguous() for n, v in state.items()}, file)
    assert command("repa", file, "--output", tmp_path / "part") == 0
    capsys.readouterr()
    file.write_bytes(damage(file.read_bytes()))
    message = refused(capsys, "repa", file, "--output", tmp_path / "out")
    assert "x.safetensors: cut short or damaged" in message
    part = tmp_path / "part" / "part.safetensors"
    part.write_bytes(damage(part.read_bytes()))
    with pytest.raises(ValueError, match=r"part.safetensors: cut short or damaged") as error:
        load_module(tmp_path / "part")
    assert "\n" not in str(error.value)


def test_a_newer_part_asks_for_a_newer_library(transformer, tmp_path):
    assert command("repa", transformer, "--output", tmp_path / "out") == 0
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(ValueError, match="format version 99 is newer than this semtok reads"):
        load_module(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"conv.weight": torch.zeros(1)}, "of no known format; it holds conv.weight"),
        (
            {"encoder.down_blocks.0.x": torch.zeros(1)},
            "weights of a diffusers VAE; give the folder",
        ),
        ({"ema": [1, 2]}, "holds no state dict"),
        ({"x_embedder.proj.weight": torch.zeros(1, 2, 3, 3)}, "of no known format"),
    ],
)
def test_unknown_files_say_what_they_hold(tmp_path, capsys, content, words):
    torch.save(content, tmp_path / "x.pt")
    assert words in refused(capsys, "auto", tmp_path / "x.pt", "--output", tmp_path / "out")


def test_paths_that_are_none(tmp_path, capsys):
    output = ["--output", tmp_path / "out"]
    assert "none.pt: no such file" in refused(capsys, "auto", tmp_path / "none.pt", *output)
    message = refused(capsys, "auto", tmp_path, *output)
    assert "a folder without a diffusers autoencoder" in message


# What a file says of itself, and what is not taken for granted -------------------------------------


def test_the_arguments_beside_the_weights_decide_the_path(texture, transformer, tmp_path, capsys):
    state = open_checkpoint(transformer).state
    for told, path in (({"path_type": "GVP"}, "cosine"), ({"path_type": "Linear"}, "linear")):
        file = tmp_path / "x.pt"
        arguments = argparse.Namespace(**told, prediction="velocity", cfg_prob=0.2)
        torch.save({"ema": state, "args": arguments}, file)
        options = ImportOptions(tokenizer=Tokenizer.from_pretrained(texture))
        generator = import_checkpoint(file, "sit", options).model
        assert generator.config.path == path and generator.config.class_dropout == 0.2
    for told in ({"path_type": "VP"}, {"prediction": "noise"}, {"prediction": "score"}):
        torch.save({"ema": state, "args": argparse.Namespace(**told)}, file)
        message = refused(capsys, "sit", file, "--output", tmp_path / "out")
        assert "only velocities on the linear and the cosine (GVP) path" in message


def test_statistics_of_other_formats_and_other_files_are_not_taken(texture, tmp_path):
    vae = tmp_path / "sd-vae.ckpt"
    vae.write_bytes((texture.parent / "x.ckpt").read_bytes())
    ones = {"latents_scale": torch.ones(5), "latents_bias": torch.zeros(5)}
    torch.save(ones, tmp_path / "e2e-other-latents-stats.pt")
    torch.save({"mean": torch.zeros(96), "std": torch.ones(96)}, tmp_path / "dino_mean_std_1.pth")
    torch.save({"mean": torch.zeros(5), "std": torch.ones(5)}, tmp_path / "latents_sv_stats.pt")
    assert not import_checkpoint(vae, "auto", ImportOptions()).model.is_measured
    torch.save(ones, tmp_path / "sd-vae-latents-stats.pt")
    assert import_checkpoint(vae, "auto", ImportOptions()).model.is_measured


def with_(state: dict[str, Tensor], name: str, value: Tensor) -> dict[str, Tensor]:
    return {**state, name: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: with_(s, "x_embedder.proj.bias", torch.full((384,), torch.nan)), "not finite"),
        (
            lambda s: with_(s, "x_embedder.proj.bias", torch.zeros(384, dtype=torch.int64)),
            "of int64",
        ),
        (lambda s: with_(s, "blocks.100000000.attn.qkv.weight", torch.zeros(1)), "without gaps"),
        (lambda s: with_(s, "pos_embed2", torch.zeros(1)), "pos_embed2 unknown"),
        (lambda s: with_(s, "projectors.7.0.weight", torch.zeros(1)), "unknown projectors.7"),
        (lambda s: with_(s, "bn.running_mean", torch.zeros(5)), "not repa"),
        (lambda s: with_(s, "pos_embed", s["pos_embed"].repeat(2, 1, 1)), "not the fixed code"),
        (lambda s: with_(s, "module.pos_embed", s["pos_embed"]), "mean the same tensor"),
        (
            lambda s: with_(s, "final_layer.linear.bias", s["final_layer.linear.bias"].repeat(3)),
            "15 outputs for 5 channels",
        ),
        (lambda s: with_(s, "y_embedder.embedding_table.weight", torch.zeros(0, 384)), "is empty"),
        (
            lambda s: with_(s, "y_embedder.embedding_table.weight", torch.tensor(1.0)),
            "x.pt: can't be",
        ),
        (lambda s: with_(s, "x_embedder.proj.weight", torch.tensor(1.0)), "of no known format"),
    ],
)
def test_tensors_that_cannot_be_are_one_line(transformer, tmp_path, capsys, change, words):
    torch.save(change(dict(open_checkpoint(transformer).state)), tmp_path / "x.pt")
    assert words in refused(capsys, "repa", tmp_path / "x.pt", "--output", tmp_path / "out")


def test_statistics_within_a_checkpoint_are_checked(transformer, tmp_path, capsys):
    state = dict(open_checkpoint(transformer).state)
    state |= {"bn.running_mean": torch.zeros(5), "bn.num_batches_tracked": torch.tensor(3)}
    for more, words in (({}, "running_var"), ({"bn.running_var": -torch.ones(5)}, "not positive")):
        torch.save({"ema": state | more}, tmp_path / "x.pt")
        message = refused(capsys, "repa-e", tmp_path / "x.pt", "--output", tmp_path / "out")
        assert words in message
    torch.save({"ema": state | {"bn.running_var": torch.full((5,), 4.0)}}, tmp_path / "x.pt")
    tokenizer = Tokenizer.from_pretrained("demo")  # whose eight channels do not fit
    with pytest.raises(UserError, match="generates 5 channels"):
        import_checkpoint(tmp_path / "x.pt", "repa-e", ImportOptions(tokenizer=tokenizer))


@pytest.mark.parametrize("number", ["inf", "nan", "-1", "0", "1e-60"])
def test_a_scaling_factor_is_a_positive_number(texture, tmp_path, capsys, number):
    words = [
        "auto",
        texture.parent / "x.ckpt",
        f"--statistics={number}",
        "--output",
        tmp_path / "o",
    ]
    assert "expected a file or a positive number" in refused(capsys, *words)


def test_options_that_say_nothing_to_a_file_are_refused(transformer, texture, tmp_path, capsys):
    output = ["--output", tmp_path / "out"]
    message = refused(capsys, "repa", transformer, "--image-size", 64, *output)
    assert "--image-size says nothing" in message
    torch.save({"ema": {"x": torch.zeros(1), "y": 3}, "model": {}}, tmp_path / "x.pt")
    assert "'ema' holds no state dict" in refused(capsys, "auto", tmp_path / "x.pt", *output)
    torch.save({"ema": open_checkpoint(transformer).state}, tmp_path / "x.pt")
    message = refused(capsys, "repa", tmp_path / "x.pt", "--weights", "model", *output)
    assert "holds no 'model' beside 'ema'" in message
    file = compressor_file(
        tmp_path, Compressor(CompressorShape(feature_channels=8, hidden=(4,), channels=2)).eval()
    )
    message = refused(capsys, "auto", file, "--tokenizer", texture, *output)
    assert "give both --tokenizer and --teacher, or neither" in message


def test_hidden_files_are_not_uploaded_and_exports_are_open_to_others(texture, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(texture, copy)
    (copy / ".env").write_text("SECRET=1")
    (copy / ".git").mkdir()
    (copy / ".git" / "config").write_text("x")
    names = [name for name, _ in export_files(copy)]
    assert "config.json" in names and not any(name.startswith(".") for name in names)
    assert all(p.stat().st_mode & 0o044 == 0o044 for p in texture.rglob("*") if p.is_file())


# Whose fault it is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_classes": -1}, "num_classes: input should be greater than or equal to 0, got -1"),
        ({"timed_parts": None}, "timed_parts: input should be a valid "),
        ({"latents": [{"name": "texture"}]}, "'latents.0.channels' is missing"),
        ({"latents": [{"name": "x", "channels": 5, "stride": 8}]}, "'texture' first"),
        ({"latents": [{"name": "texture", "channels": 6, "stride": 8}]}, "tensors do not fit"),
        ({"num_classes": 10**12}, "tensors do not fit: label_embed.weight"),
        ({"architecture": {"depth": 1}}, "'architecture.width' is missing"),
    ],
)
def test_a_damaged_network_is_one_line(transformer, tmp_path, change, words):
    assert command("repa", transformer, "--output", tmp_path / "out") == 0
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        load_module(tmp_path / "out")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"settings": {"hidden": [4], "channels": 2}}, "'feature_channels' is missing"),
        ({"settings": {"feature_channels": 8, "hidden": [-4], "channels": 2}}, "hidden.0: input"),
        ({"settings": {"feature_channels": 8, "hidden": [5], "channels": 2}}, "do not fit"),
        ({"settings": None}, "settings: expected settings, got None"),
        ({"method": "vae"}, "method 'vae' has no coder"),
        ({"method": None}, "unknown method 'None'"),
    ],
)
def test_a_damaged_coder_is_one_line(tmp_path, change, words):
    save_module(
        Compressor(CompressorShape(feature_channels=8, hidden=(4,), channels=2)), tmp_path / "out"
    )
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError) as error:
        load_module(tmp_path / "out")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [TypeError, AttributeError, RuntimeError, KeyError, IndexError])
def test_a_fault_of_ours_is_not_told_as_a_damaged_file(transformer, tmp_path, monkeypatch, fault):
    def broken(*_: object, **__: object) -> None:
        raise fault("ours")

    assert command("repa", transformer, "--output", tmp_path / "network") == 0
    save_module(
        Compressor(CompressorShape(feature_channels=8, hidden=(4,), channels=2)), tmp_path / "coder"
    )
    compressor = compressor_file(
        tmp_path, Compressor(CompressorShape(feature_channels=8, hidden=(4,), channels=2)).eval()
    )
    made = build_autoencoder(
        Architecture(block_channels=(32, 32), layers_per_block=1, latent_channels=3)
    )
    torch.save(official_vae(made), tmp_path / "vae.pt")
    monkeypatch.setattr(torch.nn.Conv2d, "__init__", broken)  # which all of them are made of
    for file, format in (
        (transformer, "repa"),
        (compressor, "auto"),
        (tmp_path / "vae.pt", "auto"),
    ):
        with pytest.raises(fault, match="ours"):
            import_checkpoint(file, format, ImportOptions())
    for name in ("network", "coder"):
        with pytest.raises(fault, match="ours"):
            load_module(tmp_path / name)


# ReDi's principal components ---------------------------------------------------------------------


class PCA:
    """Pickles as scikit-learn's does, by name and attributes; that library need not be installed."""

    def __init__(self, features: Tensor | None = None, *, whiten: bool = False) -> None:
        self.n_components, self.whiten, self.random_state = None, whiten, None
        if features is not None:
            centred = features - features.mean(0)
            _, values, directions = torch.linalg.svd(centred, full_matrices=False)
            self.mean_, self.components_ = features.mean(0).numpy(), directions.numpy()
            self.singular_values_ = values.numpy()
            self.noise_variance_ = np.float64(0)

    def transform(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean_) @ self.components_.T


PCA.__module__ = "sklearn.decomposition._pca"


@pytest.fixture
def pca_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """For pickling alone: readers never look for it."""
    monkeypatch.setitem(sys.modules, PCA.__module__, types.SimpleNamespace(PCA=PCA))


def fitted_pca() -> tuple[PCA, Tensor]:
    features = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean, std = features.mean(0), features.std(0, correction=0)
    return PCA((features - mean) / std + 0.5), features


@pytest.mark.parametrize("form", ["torch", "pickle", "arrays"])
def test_a_pca_file_is_the_coder_of_its_projection(texture, tmp_path, pca_module, form):
    pca, features = fitted_pca()
    mean, std = features.mean(0).numpy(), features.std(0, correction=0).numpy()
    file = tmp_path / "dino_pca_model.pth"
    content = {"pca_model": pca, "mean": mean, "std": std}
    if form == "torch":
        torch.save(content, file)
    elif form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        file = file.with_suffix(".safetensors")
        arrays = {"components": pca.components_, "pca_mean": pca.mean_, "mean": mean, "std": std}
        tensors = {n: torch.as_tensor(v).contiguous() for n, v in arrays.items()}
        safetensors.torch.save_file(tensors, file)
    assert command("auto", file, "--output", tmp_path / "coder") == 0
    coder = load_module(tmp_path / "coder")
    expected = pca.transform((features.numpy() - mean) / std)[:, :8]
    code, _ = coder.encode(features[:, :, None, None])
    torch.testing.assert_close(code[..., 0, 0], torch.as_tensor(expected), atol=1e-4, rtol=1e-4)
    words = ["auto", file, "--tokenizer", texture, "--image-size", 32, "--semantic-channels", 3]
    assert command(*words, "--teacher", "name=demo", "--output", tmp_path / "out") == 0
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.method == "redi" and tokenizer.spec["semantic"].channels == 3
    assert torch.equal(tokenizer.coder.components, coder.components[:3])


def test_pca_files_that_are_others_are_refused(tmp_path, capsys, monkeypatch, pca_module):
    monkeypatch.chdir(tmp_path)
    pca, features = fitted_pca()
    vector = features.mean(0).numpy()
    whitened = PCA(features, whiten=True)
    for content, words in (
        ({"pca": whitened, "mean": vector, "std": vector}, "it whitens"),
        ({"pca": PCA(), "mean": vector, "std": vector}, "not fitted"),
        ({"pca": pca, "mean": vector}, "one entry for the features' std, found 0"),
        ({"pca": pca, "mean": vector[:3], "std": vector}, "of different features"),
        ({"pca": pca, "mean": vector, "std": 0 * vector}, "not positive"),
        ({"pca": pca, "mean": vector, "std": Evil()}, "would run or build"),
    ):
        Path("x.pkl").write_bytes(pickle.dumps(content))
        assert words in refused(capsys, "auto", "x.pkl", "--output", "out")
    assert not Path("evil").exists()
