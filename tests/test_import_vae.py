"""Autoencoders in CompVis' layout: against a kit of the official code, and what must be refused."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok import Tokenizer, UserError
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_vae import import_autoencoder
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.methods.vae import Architecture, build_autoencoder, load_autoencoder

IMAGE, SUM = {"atol": 1e-4, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}


def read(path: Path) -> AutoencoderKL:
    return import_autoencoder(open_checkpoint(path).state, place=str(path))


@pytest.fixture(params=kits("vavae_autoencoder"))
def kit(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture
def autoencoder(kit) -> AutoencoderKL:
    """From the training script's file; the bare weights must say the same."""
    files = kit.case["files"]
    ours = read(kit.folder / files["checkpoint"])
    bare = read(kit.folder / files["weights"]).state_dict()
    assert all(torch.equal(value, bare[name]) for name, value in ours.state_dict().items())
    return ours


@torch.no_grad()
def test_parity_vavae_encodes(kit, autoencoder):
    posterior = autoencoder.encode(kit["encode/x"]).latent_dist
    for name, ours in (("mean", posterior.mean), ("logvar", posterior.logvar)):
        torch.testing.assert_close(ours, kit[f"encode/{name}"], **IMAGE)
    z = posterior.mean + posterior.std * kit["encode/noise"]
    torch.testing.assert_close(z, kit["encode/z"], **IMAGE)
    torch.testing.assert_close(posterior.kl(), kit["encode/kl"], **SUM)
    other = autoencoder.encode(kit["encode_other_size/x"]).latent_dist.parameters
    torch.testing.assert_close(other, kit["encode_other_size/moments"], **IMAGE)


@torch.no_grad()
def test_parity_vavae_decodes(kit, autoencoder):
    for latents in ("mean", "z"):
        decoded = autoencoder.decode(kit[f"encode/{latents}"]).sample
        torch.testing.assert_close(decoded, kit[f"decode/reconstruction_of_{latents}"], **IMAGE)
    other = autoencoder.decode(kit["decode_other_size/z"]).sample
    torch.testing.assert_close(other, kit["decode_other_size/image"], **IMAGE)


# Without kits: a file in that layout, made from an autoencoder of ours ---------------------------

_BACK = (
    (".downsamplers.0.conv.", ".downsample.conv."),
    (".upsamplers.0.conv.", ".upsample.conv."),
    (".mid_block.attentions.0.", ".mid.attn_1."),
    (".mid_block.resnets.0.", ".mid.block_1."),
    (".mid_block.resnets.1.", ".mid.block_2."),
    (".attentions.", ".attn."),
    (".resnets.", ".block."),
    (".conv_shortcut.", ".nin_shortcut."),
    (".group_norm.", ".norm."),
    (".to_out.0.", ".proj_out."),
    (".to_", "."),
    (".conv_norm_out.", ".norm_out."),
    ("encoder.down_blocks.", "encoder.down."),
)


def official(autoencoder: AutoencoderKL) -> dict[str, Tensor]:
    levels = len(autoencoder.config.block_out_channels)
    state = {}
    for name, value in autoencoder.state_dict().items():
        attention = ".to_" in name and name.endswith("weight")
        for level in range(levels):
            name = name.replace(f"decoder.up_blocks.{level}.", f"decoder.UP.{levels - 1 - level}.")
        for ours, theirs in _BACK:
            name = name.replace(ours, theirs)
        name = name.replace("decoder.UP.", "decoder.up.")
        state[name] = value[:, :, None, None].clone() if attention else value.clone()
    return state


@pytest.mark.parametrize("attention", [None, (False, True, True)])
def test_any_size_comes_back(tmp_path, attention):
    torch.manual_seed(0)
    shape = Architecture(
        block_channels=(32, 32, 64), layers_per_block=2, latent_channels=3, attention=attention
    )
    made = build_autoencoder(shape).eval()
    content = {"state_dict": official(made) | {"loss.logvar": torch.zeros(1)}, "epoch": 3}
    torch.save(content, tmp_path / "x.ckpt")
    back = read(tmp_path / "x.ckpt")
    assert all(torch.equal(value, made.state_dict()[n]) for n, value in back.state_dict().items())
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(back(pixels).sample, made(pixels).sample)


def of_kinds(down: tuple[str, ...], up: tuple[str, ...], **more: object) -> AutoencoderKL:
    """An autoencoder with attention where the words say, finest first on both sides."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=tuple(f"{kind}DownEncoderBlock2D" for kind in down),
        up_block_types=tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(up)),
        block_out_channels=(32, 32),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=32,
        **more,
    ).eval()


@pytest.mark.parametrize(
    ("down", "up", "more"),
    [
        (("", "Attn"), ("", ""), {}),
        (("", ""), ("Attn", ""), {}),
        (("", ""), ("", ""), {"mid_block_add_attention": False}),
        (("", ""), ("", ""), {"use_quant_conv": False, "use_post_quant_conv": False}),
    ],
)
def test_attention_on_one_side_and_missing_convolutions_come_back(tmp_path, down, up, more):
    made = of_kinds(down, up, **more)
    state = {f"first_stage_model.{n}": value for n, value in official(made).items()}
    content = {"state_dict": state | {"model.diffusion_model.x": torch.zeros(1)}}
    torch.save(content, tmp_path / "whole.ckpt")
    imported = import_checkpoint(tmp_path / "whole.ckpt", "auto", ImportOptions(statistics=0.5))
    assert imported.became["model.diffusion_model.x"] == "left out, of other networks"
    imported.save(tmp_path / "out")
    back = Tokenizer.from_pretrained(tmp_path / "out").autoencoder
    pixels = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(back(pixels).sample, made(pixels).sample)


def wider(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a first multiplier of 2."""
    return {
        name: value[:16] if name.startswith("encoder.conv_in.") else value
        for name, value in state.items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"encoder.extra": torch.zeros(1)}, "encoder.extra unknown"),
        (lambda s: {k: v for k, v in s.items() if "norm_out" not in k}, "norm_out.bias missing"),
        (lambda s: s | {"encoder.conv_in.bias": torch.zeros(5)}, r"conv_in.bias \(5,\) instead of"),
        (lambda s: s | {"post_quant_conv.weight": torch.zeros(2, 2, 1, 1)}, "has one number"),
        (wider, "its first multiplier is 2, from 16 channels to 32; AutoencoderKL has one number"),
        (
            lambda s: {k: v for k, v in s.items() if not k.startswith("decoder.mid.attn_1.")},
            "only one of encoder and decoder has attention in the middle",
        ),
        (lambda s: {"a": torch.zeros(1)}, "not an autoencoder in CompVis' layout"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    shape = Architecture(block_channels=(32, 32), layers_per_block=1, latent_channels=3)
    state = change(official(build_autoencoder(shape)))
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, file)
    with pytest.raises(ValueError, match=message):
        read(file)


# diffusers' folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", [{"variant": "fp16"}, {"safe_serialization": False}], ids=["variant", "bin"]
)
def test_a_folder_with_only_a_variant_or_older_weights_is_read(tmp_path, form):
    made = of_kinds(("", ""), ("", ""))
    made.save_pretrained(tmp_path / "vae", **form)
    imported = import_checkpoint(tmp_path / "vae", "auto", ImportOptions())
    state = imported.model.autoencoder.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_older_weights_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_kinds(("", ""), ("", "")).save_pretrained("vae", safe_serialization=False)
    torch.save({"encoder.conv_in.bias": Evil()}, "vae/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="can't be loaded"):
        import_checkpoint("vae", "auto", ImportOptions())
    assert not Path("evil").exists()


def test_other_autoencoders_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderDC"}')
    with pytest.raises(UserError, match="is of AutoencoderDC; only AutoencoderKL can be imported"):
        import_checkpoint(tmp_path, "auto", ImportOptions())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is of diffusers' AutoencoderDC; only AutoencoderKL"):
        load_autoencoder(str(tmp_path))


def test_a_file_where_a_folder_belongs_names_the_way(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")
    for reader in (load_autoencoder, Tokenizer.from_pretrained):
        with pytest.raises(
            UserError, match="a file; .* semtok hub import auto .*x.pt --output DIR"
        ):
            reader(str(tmp_path / "x.pt"))
