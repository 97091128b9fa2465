"""Autoencoders of diffusers that are taken as they are: which, what they encode to, and what must be refused."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from diffusers import VQModel
from einops import rearrange
from torch import Tensor

import tiny
from semtok import Generator, Tokenizer, UserError
from semtok.commands import cache_latents, evaluate, hub
from semtok.commands.cli import run
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.methods.texture_classes import TEXTURE_CLASSES, encode_texture, stated_statistics
from semtok.methods.vae import load_autoencoder
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from textures import TEXTURES, texture

DETERMINISTIC = ("dc", "small")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What diffusers has saved of each."""
    root = tmp_path_factory.mktemp("published")
    for name in TEXTURES:
        texture(name).save_pretrained(root / name)
    return {name: root / name for name in TEXTURES}


def test_there_is_one_of_every_class():
    assert {type(texture(name)).__name__ for name in TEXTURES} == set(TEXTURE_CLASSES)


@pytest.mark.parametrize("name", TEXTURES)
@torch.no_grad()
def test_what_diffusers_has_saved_is_a_tokenizer(folders, tmp_path, name):
    made, tokenizer = texture(name), Tokenizer.from_pretrained(folders[name])
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    coded = made.encode(pixels)[0]
    assert isinstance(coded, Tensor) == (name in DETERMINISTIC)
    posterior = tokenizer.posterior(pixels)
    assert posterior.std.texture.any() == (name not in DETERMINISTIC)
    raw = tokenizer.destandardise(posterior.mean).texture
    torch.testing.assert_close(raw, coded if isinstance(coded, Tensor) else coded.mean)
    wanted = made.decode(raw).sample.clamp(-1, 1)
    decoded = tokenizer.decode(posterior.mean)
    torch.testing.assert_close(decoded, wanted)
    tokenizer.save_pretrained(tmp_path / "export")
    again = Tokenizer.from_pretrained(tmp_path / "export")
    assert again.means_the_same(tokenizer) and again.has_latents_of(tokenizer)
    assert torch.equal(again.decode(posterior.mean), decoded)
    alone = type(made).from_pretrained(tmp_path / "export" / "vae")  # what the card says
    torch.testing.assert_close(alone.decode(raw).sample.clamp(-1, 1), wanted)
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"`{type(made).__name__}.from_pretrained(" in card


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("kl", 0.0609, 1 / 1.5305),
        ("dc", 0.0, 1 / 0.41407),
        ("small", 0.1, 1 / 0.8),
        ("asymmetric", 0.0, 1 / 0.18215),
        ("hunyuan", 0.0, 1 / 0.75289),
    ],
)
def test_latents_are_standardised_by_the_scaling_that_a_config_states(folders, name, mean, std):
    tokenizer = Tokenizer.from_pretrained(folders[name])
    assert tokenizer.is_measured
    torch.testing.assert_close(
        tokenizer.texture_mean, torch.full_like(tokenizer.texture_mean, mean)
    )
    torch.testing.assert_close(tokenizer.texture_std, torch.full_like(tokenizer.texture_std, std))


def test_moments_of_patches_of_latents_become_those_of_the_latents(folders):
    """FLUX.2's batch norm has a mean and a variance for each position in 2x2 latents."""
    norm = texture("flux2").bn
    # Two patches, a standard deviation above and below the mean, have just these moments.
    spread = (norm.running_var + norm.eps).sqrt()
    patches = torch.stack([norm.running_mean - spread, norm.running_mean + spread])
    latents = rearrange(patches, "b (c p q) -> c (b p q)", p=2, q=2)
    tokenizer = Tokenizer.from_pretrained(folders["flux2"])
    torch.testing.assert_close(tokenizer.texture_mean, latents.mean(dim=1))
    torch.testing.assert_close(tokenizer.texture_std, latents.std(dim=1, unbiased=False))


def test_an_import_takes_them_and_a_scaling_of_its_own(folders, tmp_path, capsys):
    words = ["import", "auto", str(folders["dc"]), "--statistics", "2", "--output"]
    assert run(hub.main, [*words, str(tmp_path / "out")]) == 0
    tokenizer = Tokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.texture_std.tolist() == [0.5] * 4
    assert "diffusers-vae" in capsys.readouterr().out


def diffusion(tokenizer: Path, cache: str) -> dict:
    content = tiny.content(steps=2, warmup_steps=0)
    del content["method"], content["teacher"]
    shape = {"depth": 1, "width": 24, "heads": 2, "patch_size": 2}
    content |= {"tokenizer": str(tokenizer), "sampler": {"steps": 2}}
    content["diffusion"] = {"network": shape, "repa": False}
    content["data"]["cache"] = cache
    return content


def test_a_composite_and_its_generator_stand_on_a_frozen_texture(folders, tmp_path, capsys):
    """Encoded, scored, cached without a standard deviation, trained on from the cache and drawn."""
    method = {"name": "redi", "channels": 4, "texture": str(folders["dc"])}
    recipe = tiny.content(method | {"min_texture_psnr": None}, steps=0, warmup_steps=0)
    made = train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "redi")
    assert torch.equal(made.texture_std, Tokenizer.from_pretrained(folders["dc"]).texture_std)
    data = [f"{key}={value}" for key, value in recipe["data"].items() if key != "classes"]
    data += ["classes=[shape, hue]"]
    words = ["--tokenizer", str(tmp_path / "redi"), "--data", *data]
    assert run(cache_latents.main, [*words, "--output", str(tmp_path / "cache")]) == 0
    kept = capsys.readouterr().out
    assert "texture/mean" in kept and "texture/std" not in kept
    assert run(evaluate.main, ["reconstruction", *words, "--num-held-out", "8"]) == 0
    assert "PSNR" in capsys.readouterr().out
    content = diffusion(tmp_path / "redi", str(tmp_path / "cache"))
    train_dit(parse_diffusion_recipe(content, "tiny"), tmp_path / "dit")
    images = Generator.from_pretrained(tmp_path / "dit").sample([0, 1], seed=0)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in TEXTURES if name != "kl"])
def test_training_one_is_refused_by_its_class(folders, name):
    recipe = parse_recipe(tiny.content({"name": "vae", "vae": str(folders[name])}), "tiny")
    kind = type(texture(name)).__name__
    told = f"is of diffusers' {kind}, and only AutoencoderKL can be trained; .* method.texture"
    for read in (recipe.method.check_references, lambda: load_autoencoder(str(folders[name]))):
        with pytest.raises(UserError, match=told) as error:
            read()
        assert "\n" not in str(error.value)


def test_other_classes_are_refused_with_those_that_can_be_loaded(tmp_path):
    VQModel(block_out_channels=(4,), norm_num_groups=4).save_pretrained(tmp_path)
    for read in (
        lambda: Tokenizer.from_pretrained(tmp_path),
        lambda: load_autoencoder(str(tmp_path)),
    ):
        with pytest.raises(UserError, match="is of diffusers' VQModel; can be loaded: Auto.*Tiny"):
            read()


def test_a_class_that_an_older_diffusers_has_not_is_told(folders, monkeypatch):
    older = types.SimpleNamespace(__version__="0.31.0")
    monkeypatch.setitem(sys.modules, "diffusers", older)
    with pytest.raises(UserError, match=r"AutoencoderDC, which diffusers 0.31.0 has not; pip"):
        Tokenizer.from_pretrained(folders["dc"])


def test_a_decoder_to_another_size_is_refused_by_its_sizes(tmp_path):
    made = type(texture("small"))(
        encoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        decoder_block_out_channels=(8, 8),
        num_decoder_blocks=(1, 1),
    )
    made.save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"8x8 pixels to \(4, 2, 2\) and decodes that to \(3, 4, 4\)"
    ):
        Tokenizer.from_pretrained(tmp_path)


@torch.no_grad()
def test_weights_in_half_precision_and_three_channels_alone_are_held_as_for_a_vae(tmp_path):
    texture("dc").save_pretrained(tmp_path / "pipe" / "vae", variant="fp16")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "pipe")
    mean, std = encode_texture(tokenizer.autoencoder, torch.zeros(1, 3, 8, 8))
    assert mean.shape == (1, 4, 2, 2) and not std.any()
    stated, _ = stated_statistics(tokenizer.autoencoder, "x")
    assert stated.shape == (4,)
    config = tmp_path / "pipe" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 1}))
    with pytest.raises(UserError, match="takes images of 1 channels"):
        Tokenizer.from_pretrained(tmp_path / "pipe")
