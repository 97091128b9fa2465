"""Autoencoders in CompVis' layout: against a kit of the official code, and what must be refused."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from parity import Kit, kits, load_kit
from semtok import Tokenizer, UserError
from semtok.hub.checkpoints import read_checkpoint
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_vae import import_autoencoder
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.methods.va_vae import load_projection
from semtok.methods.vae import Architecture, VAEConfig, build_autoencoder, load_autoencoder

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


def test_a_va_vae_names_what_stays_in_the_file_for_training(tmp_path):
    """Its frozen teacher, its losses' networks, and the projection, which training can begin with."""
    state = official(of_kinds(("", ""), ("", ""))) | {
        "foundation_model.model.pos_embed": torch.zeros(1, 5, 8),
        "loss.discriminator.main.0.weight": torch.zeros(8, 3, 4, 4),
        "linear_proj.weight": torch.zeros(8, 3, 1, 1),
    }
    content = {"state_dict": state, "callbacks": {}, "optimizer_states": [], "global_step": 4}
    torch.save(content, tmp_path / "last.ckpt")
    imported = import_checkpoint(tmp_path / "last.ckpt", "auto", ImportOptions(statistics=0.5))
    became = imported.became
    assert became["linear_proj.weight"] == "left out, method.alignment.weights reads it"
    assert became["foundation_model.model.pos_embed"] == "left out, only training reads it"
    assert became["callbacks"] == "left out, no weights"
    way_on = f"by method.alignment.weights={tmp_path / 'last.ckpt'}"
    assert any(note.endswith(way_on) for note in imported.notes)


@pytest.fixture(params=kits("vavae_training"))
def training_kit(request) -> Kit:
    return load_kit(request.param)


def test_parity_vavae_a_trainers_file_is_read_and_so_is_its_projection(training_kit):
    files = training_kit.case["files"]
    imported = import_checkpoint(
        training_kit.folder / files["checkpoint"], "auto", ImportOptions(statistics=1.0)
    )
    bare = read(training_kit.folder / files["weights"]).state_dict()
    ours = imported.model.autoencoder.state_dict()
    assert all(torch.equal(value, bare[name]) for name, value in ours.items())
    state = open_checkpoint(training_kit.folder / files["checkpoint"]).state
    assert state.keys() <= imported.became.keys(), "nothing is lost in silence"
    weight = state["linear_proj.weight"]
    outwards = training_kit.case["constructor"]["kwargs"]["reverse_proj"]
    projection = nn.Conv2d(*weight.shape[:2][::-1], 1, bias=not outwards)
    load_projection(projection, training_kit.folder / files["checkpoint"])
    assert torch.equal(projection.weight, weight)


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


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_older_weights_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    of_kinds(("", ""), ("", "")).save_pretrained("vae", safe_serialization=False)
    torch.save({"encoder.conv_in.bias": Evil()}, "vae/diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="could run code"):
        import_checkpoint("vae", "auto", ImportOptions())
    assert not Path("evil").exists()


def test_other_autoencoders_are_named(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(UserError, match="is of VQModel; can be imported: AutoencoderKL, "):
        import_checkpoint(tmp_path, "auto", ImportOptions())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is of diffusers' VQModel; can be loaded: AutoencoderKL, "):
        load_autoencoder(str(tmp_path))


def test_a_file_where_a_folder_belongs_names_the_way(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"")
    for reader in (load_autoencoder, Tokenizer.from_pretrained):
        with pytest.raises(
            UserError, match="a file; .* semtok hub import auto .*x.pt --output DIR"
        ):
            reader(str(tmp_path / "x.pt"))


FORMS = {
    "variant": {"variant": "fp16"},
    "bin": {"safe_serialization": False},
    "bin-variant": {"safe_serialization": False, "variant": "fp16"},
    "shards": {"max_shard_size": "40KB"},
    "shards-variant": {"max_shard_size": "40KB", "variant": "fp16"},
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_under_any_of_diffusers_names_are_loaded_without_a_word(tmp_path, capfd, form):
    made = of_kinds(("", ""), ("", ""))
    made.save_pretrained(tmp_path / "pipe" / "vae", **FORMS[form])
    state = load_autoencoder(str(tmp_path / "pipe")).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert capfd.readouterr() == ("", "")


def test_whole_weights_go_before_a_variant(tmp_path):
    made = of_kinds(("", ""), ("", ""))
    made.save_pretrained(tmp_path)
    made.half().save_pretrained(tmp_path, variant="fp16")
    state = load_autoencoder(str(tmp_path)).state_dict()
    assert all(value.dtype == torch.float32 for value in state.values())
    assert not all(torch.equal(value, value.half().float()) for value in state.values())


@pytest.mark.parametrize(("taken", "given"), [(1, 1), (4, 4), (3, 4)])
def test_autoencoders_of_other_channels_are_refused_by_name(tmp_path, taken, given):
    made = of_kinds(("", ""), ("", ""), in_channels=taken, out_channels=given)
    made.save_pretrained(tmp_path / "vae")
    torch.save(official(made), tmp_path / "x.pt")
    words = f"takes images of {taken} channels and gives {given}; only autoencoders of RGB images"
    for read_it in (
        lambda: load_autoencoder(str(tmp_path / "vae")),
        lambda: VAEConfig(vae=str(tmp_path / "vae")).check_references(),  # before anything is built
        lambda: import_checkpoint(tmp_path / "vae", "auto", ImportOptions()),
        lambda: import_checkpoint(tmp_path / "x.pt", "auto", ImportOptions(statistics=1.0)),
        lambda: Tokenizer.from_pretrained(tmp_path / "vae"),
    ):
        with pytest.raises(UserError, match=words):
            read_it()


def test_an_export_no_longer_states_the_shift_of_the_vae_that_it_began_with(tmp_path):
    """A pipeline computes ``latents / scaling_factor + shift_factor``: that has to give what the decoder takes."""
    made = of_kinds(("", ""), ("", ""), shift_factor=0.0609, scaling_factor=1.5305)
    made.save_pretrained(tmp_path / "vae")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "vae")
    assert torch.allclose(tokenizer.texture_mean, torch.full((3,), 0.0609))
    tokenizer.save_pretrained(tmp_path / "out")
    config = AutoencoderKL.from_pretrained(tmp_path / "out" / "vae").config
    assert (config.shift_factor, config.scaling_factor) == (0.0, 1.0)
    again = Tokenizer.from_pretrained(tmp_path / "out" / "vae")
    assert again.means_the_same(tokenizer)


def test_a_factor_goes_before_the_statistics_beside_a_file(tmp_path):
    """REPA-E's autoencoders come with statistics; what others train on their latents may scale by one number."""
    torch.save(official(of_kinds(("", ""), ("", ""))), tmp_path / "invae.pt")
    beside = {
        "latents_bias": torch.ones(1, 3, 1, 1),
        "latents_scale": torch.full((1, 3, 1, 1), 4.0),
    }
    torch.save(beside, tmp_path / "invae-latents-stats.pt")
    for given, mean, std in ((None, 1.0, 0.25), (0.3099, 0.0, 1 / 0.3099)):
        options = ImportOptions(statistics=given)
        made = import_checkpoint(tmp_path / "invae.pt", "auto", options)
        assert made.format == "compvis-vae" and made.model.spec.names == ("texture",)
        assert made.model.texture_mean.unique().item() == mean
        assert made.model.texture_std.unique().item() == pytest.approx(std)


WRAPPED = [
    "_orig_mod.",
    "module._orig_mod.",
    "first_stage_model.",
    "ema_model.",
    "vae.",
    "module.vae._orig_mod.",
]


@pytest.mark.parametrize("before", WRAPPED)
def test_what_trainers_put_before_names_is_taken_off(tmp_path, before):
    made = of_kinds(("", ""), ("", ""))
    torch.save({"state_dict": {before + n: v for n, v in official(made).items()}}, tmp_path / "x")
    state = read(tmp_path / "x").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize("kind", ["bool_", "float16", "float64", "int32", "int64", "uint8"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_numbers_of_numpy_beside_the_weights_are_read(tmp_path, kind, writer):
    number = getattr(np, kind)(1)
    content = {"step": number, "losses": np.array([number])}
    if writer == "torch":
        torch.save(content | {"state_dict": {"a": torch.ones(1)}}, tmp_path / "x")
    else:
        (tmp_path / "x").write_bytes(pickle.dumps(content, protocol=2))
    back = read_checkpoint(tmp_path / "x")
    assert back["step"] == number and type(back["step"]) is type(number)
    assert back["losses"].dtype == content["losses"].dtype


def test_text_of_old_pickles_is_decoded_in_no_other_encoding(tmp_path):
    (tmp_path / "x").write_bytes(b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00zipt\x52.")
    with pytest.raises(UserError, match="is refused"):
        read_checkpoint(tmp_path / "x")


@pytest.mark.parametrize(
    ("stated", "told"),
    [
        ({"scaling_factor": 0}, "config.json: scaling_factor 0: expected more than 0"),
        ({"scaling_factor": None}, "config.json: scaling_factor is null"),
        ({"latents_mean": [0.1] * 4}, "states latents_mean and no latents_std"),
        ({"latents_std": [0.1] * 4}, "states latents_std and no latents_mean"),
        ({"latents_mean": [0.1] * 3, "latents_std": [2.0] * 3}, "has 3 numbers for 4 channels"),
        ({"latents_mean": [0.1] * 4, "latents_std": [-2.0] * 4}, "latents_std .*more than 0"),
        ({"shift_factor": float("nan")}, "shift_factor nan is not finite"),
    ],
)
def test_scaling_that_no_latents_have_is_refused_by_its_key(tmp_path, stated, told):
    small = Architecture(
        block_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_groups=4
    )
    build_autoencoder(small).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | stated))
    with pytest.raises(UserError, match=told):
        Tokenizer.from_pretrained(tmp_path)


def _cut(folder: Path) -> None:
    file = folder / f"{NAME}.safetensors"
    file.write_bytes(file.read_bytes()[:300])


def _not_finite(folder: Path) -> None:
    file = folder / f"{NAME}.safetensors"
    state = safetensors.torch.load_file(file)
    state["encoder.conv_in.bias"][1] = float("nan")
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})


def _in_a_dict(folder: Path) -> None:
    file = folder / f"{NAME}.safetensors"
    state = {"state_dict": safetensors.torch.load_file(file), "step": 3}
    file.unlink()
    torch.save(state, folder / f"{NAME}.bin")


def _of_other_channels(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"latent_channels": 8}))


def _a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


NAME = "diffusion_pytorch_model"
BROKEN = {
    _cut: f"{NAME}.safetensors: cut short or damaged",
    _not_finite: r"vae: its weights are not finite \(NaN or infinite in encoder.conv_in.bias\)",
    _in_a_dict: f"{NAME}.bin: is no plain weights file, it holds state_dict, step; .* semtok hub import",
    _of_other_channels: "its weights do not fit its config.json [^;]*$",
    _a_list: "config.json holds no settings",
}


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__[1:])
def test_a_broken_vae_is_told_in_words_of_our_own(tmp_path, breaks):
    small = Architecture(
        block_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_groups=4
    )
    build_autoencoder(small).save_pretrained(tmp_path / "vae")
    breaks(tmp_path / "vae")
    with pytest.raises(UserError, match=BROKEN[breaks]):
        load_autoencoder(str(tmp_path / "vae"))


def test_a_folder_around_a_vae_is_the_vae_for_every_reader(tmp_path):
    small = Architecture(
        block_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_groups=4
    )
    made = build_autoencoder(small)
    made.save_pretrained(tmp_path / "vae")
    for loaded in (
        load_autoencoder(str(tmp_path)),
        Tokenizer.from_pretrained(tmp_path).autoencoder,
    ):
        assert torch.equal(loaded.encoder.conv_in.weight, made.encoder.conv_in.weight)
