"""Official checkpoints of any size, in every nesting, and files that are none."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_coder import import_compressor, import_semvae
from semtok.hub.import_dit import import_dit
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.embeddings import rotary_table, sincos_positions
from semtok.sampler.latents import LatentSpec, PartSpec

SIT = DiTArchitecture(depth=3, width=384, heads=6, patch_size=4)
LIGHTNING = DiTArchitecture(
    depth=2, width=64, heads=4, swiglu=True, rope=True, rms_norm=True, qk_norm=True
)
_NAMES = (
    ("patch_embed.", "x_embedder.proj."),
    ("time_embed.all.", "t_embedder."),
    ("label_embed.", "y_embedder.embedding_table."),
    ("final.norm.", "final_layer.norm_final."),
    ("final.linear.", "final_layer.linear."),
    ("final.modulation.", "final_layer.adaLN_modulation.1."),
    (".modulation.", ".adaLN_modulation.1."),
)


def network(config: DiTArchitecture, channels: int) -> DiT:
    torch.manual_seed(0)
    made = DiT(config, LatentSpec((PartSpec("texture", channels, 8),)), num_classes=7)
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made.eval()


def official(made: DiT, side: int) -> dict[str, Tensor]:
    """The network's weights under the names that the published code gives them."""
    state = {}
    for name, value in made.state_dict().items():
        for ours, theirs in _NAMES:
            name = name.replace(ours, theirs)
        state[name] = value
    config = made.config
    state["pos_embed"] = sincos_positions((side, side), config.width)[None]
    if config.rope:
        cos, sin = rotary_table((side, side), config.width // config.heads, 0, torch.device("cpu"))
        state |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    return state


def velocity(made: DiT, x: Tensor, t: Tensor) -> Tensor:
    labels = torch.tensor([0, 7])
    with torch.no_grad():
        return made({"texture": x}, {"texture": t}, labels).velocity.texture


@pytest.mark.parametrize(("config", "channels", "side"), [(SIT, 5, 2), (LIGHTNING, 6, 8)])
def test_any_size_is_told_from_the_shapes(config, channels, side):
    made = network(config, channels)
    imported = import_dit(official(made, side), place="test").network
    assert imported.config == config and imported.num_classes == 7
    x, t = torch.randn(2, channels, 8, 8), torch.tensor([0.1, 0.8])
    torch.testing.assert_close(velocity(imported, x, t), velocity(made, x, t))


def test_unused_outputs_of_learn_sigma_are_dropped():
    made = network(SIT, 5)
    state = official(made, 2)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        cells = state[name].unflatten(0, (16, 5))
        state[name] = torch.cat([cells, torch.randn_like(cells)], dim=1).flatten(0, 1)
    x, t = torch.randn(2, 5, 8, 8), torch.tensor([0.1, 0.8])
    imported = import_dit(state, place="test").network
    torch.testing.assert_close(velocity(imported, x, t), velocity(made, x, t))


def test_repas_time_and_sign_are_turned_round_exactly():
    made = network(SIT, 5)
    imported = import_dit(official(made, 2), place="test", family="repa").network
    x, t = torch.randn(2, 5, 8, 8), torch.tensor([0.1, 0.8])
    ours, theirs = velocity(imported, x, t), -velocity(made, x, 1 - t)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, -velocity(made, x, t), atol=1e-2)


def test_nestings_and_prefixes_of_the_training_scripts(tmp_path):
    state = official(network(LIGHTNING, 6), 8)
    other = {f"module.{name}": value + 1 for name, value in state.items()}
    files = {
        "nested.pt": {"model": other, "ema": state, "opt": {}, "args": argparse.Namespace(x=1)},
        "bare.pt": state,
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        read = open_checkpoint(tmp_path / name).state
        assert read.keys() == state.keys()
        assert all(torch.equal(read[n], state[n]) for n in state)
    read = open_checkpoint(tmp_path / "nested.pt", weights="model").state
    assert torch.equal(read["pos_embed"], state["pos_embed"] + 1)
    safetensors.torch.save_file(state, tmp_path / "bare.safetensors")
    assert open_checkpoint(tmp_path / "bare.safetensors").state.keys() == state.keys()


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module._orig_mod.", "ema_model.", "module.ema_model._orig_mod."]
)
def test_what_compilers_and_wrappers_put_before_names_is_taken_off(tmp_path, prefix):
    state = official(network(SIT, 5), 2)
    named = {prefix + name: value for name, value in state.items()}
    block = prefix + "blocks.0.attn.qkv.bias"
    named[block.replace("blocks.0.", "blocks.0._orig_mod.")] = named.pop(block)
    torch.save(named, tmp_path / "x.pt")
    assert open_checkpoint(tmp_path / "x.pt").state.keys() == state.keys()


def test_blocks_without_shifts_are_imported_exactly():
    made = network(LIGHTNING, 6)
    state = official(made, 8)
    for index, block in enumerate(made.blocks):
        for kind in ("weight", "bias"):
            value = getattr(block.modulation, kind).data
            parts = list(value.chunk(6))  # shift, scale, gate of attention, then of the MLP
            parts[0].zero_()
            parts[3].zero_()
            name = f"blocks.{index}.adaLN_modulation.1.{kind}"
            state[name] = torch.cat([part for i, part in enumerate(parts) if i not in (0, 3)])
    imported = import_dit(state, place="test")
    assert imported.without_shifts
    x, t = torch.randn(2, 6, 8, 8), torch.tensor([0.1, 0.8])
    assert torch.equal(velocity(imported.network, x, t), velocity(made, x, t))


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_files_that_are_no_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil.pt").write_bytes(pickle.dumps({"ema": Evil()}))
    torch.save({"ema": Evil()}, "saved.pt")
    torch.save({"ema": [1, 2]}, "list.pt")
    Path("text.pt").write_text("hello")
    for name, words in (
        ("evil.pt", "it would run or build '.*mkdir' .* is refused"),
        ("saved.pt", "it would run or build '.*mkdir' .* is refused"),
        ("list.pt", "holds no state dict"),
        ("text.pt", "can't be read as a checkpoint"),
        ("none.pt", "no such file"),
    ):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            open_checkpoint(name)
    assert not Path("evil").exists()


def test_networks_that_are_others_are_refused_by_name():
    state = official(network(SIT, 5), 2)
    for change, words in (
        ({"pos_embed": state["pos_embed"] + 0.1}, "pos_embed is not the fixed code of a 2x2 grid"),
        ({"pos_embed": torch.zeros(1, 3, 384)}, "not a square grid"),
        ({"blocks.0.extra": torch.zeros(1)}, "x.pt: tensors do not fit: blocks.0.extra unknown"),
    ):
        with pytest.raises(UserError, match=words):
            import_dit(state | change, place="x.pt")
    for name in ("final_layer.linear.weight", "t_embedder.mlp.0.weight", "pos_embed"):
        partial = {n: value for n, value in state.items() if n != name}
        with pytest.raises(UserError, match="x.pt: can't be read as a transformer of SiT"):
            import_dit(partial, place="x.pt", family="repa")
    with pytest.raises(UserError, match="x.pt: can't be read as a transformer of SiT"):
        import_dit({"conv.weight": torch.zeros(1)}, place="x.pt")
    narrow = official(network(DiTArchitecture(depth=1, width=32, heads=2), 4), 2)
    with pytest.raises(UserError, match="width 32 is no published size; give --heads N"):
        import_dit(narrow, place="x.pt")


def test_positions_that_repa_e_has_trained_are_read_and_used():
    state = official(network(SIT, 5), 2)
    trained = state | {
        "pos_embed": state["pos_embed"] + 0.1 * torch.randn(1, 4, 384),
        "bn.running_mean": torch.zeros(5),
        "bn.running_var": torch.ones(5),
    }
    before, after = (import_dit(s, place="x.pt", family="sit").network for s in (state, trained))
    assert before.positions is None and after.config.learned_positions == (2, 2)
    assert torch.equal(after.positions, trained["pos_embed"][0]) and after.positions.requires_grad
    x, t = torch.randn(2, 5, 8, 8), torch.tensor([0.1, 0.8])
    assert not torch.allclose(velocity(after, x, t), velocity(before, x, t), atol=1e-3)
    after.positions.data = sincos_positions((2, 2), 384)
    assert torch.equal(velocity(after, x, t), velocity(before, x, t))


def test_damaged_coders_are_one_line():
    statistics = torch.zeros(2), torch.ones(2)
    for state in (
        {},
        {"encoder.0.weight": torch.zeros(3)},
        {"encoder.x.weight": torch.zeros(2, 2)},
    ):
        with pytest.raises(UserError, match="x.pt: not a SemVAE checkpoint"):
            import_semvae(state, place="x.pt")
        with pytest.raises(UserError, match="x.pt: not a REGLUE compressor"):
            import_compressor(state, statistics, place="x.pt")


def test_damaged_projectors_and_odd_arguments_are_one_line():
    state = official(network(SIT, 5), 2) | {"projectors.0.0.weight": torch.zeros(2, 2)}
    for settings in (
        {},
        {"heads": 0},
        {"family": "foo"},
        {"spec": LatentSpec((PartSpec("texture", 9, 8),))},
    ):
        with pytest.raises(UserError, match="x.pt: can't be read as a transformer of SiT") as e:
            import_dit(state, place="x.pt", **settings)
        assert "\n" not in str(e.value)
