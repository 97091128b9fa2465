"""What a published file says of itself: a copy of a checkpoint with any one setting changed is imported with that
effect, or refused by the setting's name, or the setting is one of those that only tell how a training was run."""

import argparse
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from parity import kits, load_kit
from semtok import Generator, Tokenizer, UserError
from semtok.hub.checkpoints import StandIn, read_checkpoint
from semtok.hub.file_settings import (
    ARGUMENTS_OF_RUNS,
    BOOKKEEPING,
    CONFIG_OF_RUNS,
    UNKNOWN,
    plain,
    read_settings,
)
from semtok.hub.formats import checkpoint_of
from semtok.hub.imports import Imported, import_opened
from semtok.hub.job import ImportOptions
from semtok.methods.composite import CompositeTokenizer
from semtok.methods.reglue import Compressor, CompressorShape
from semtok.methods.vae import Architecture, KLTokenizer, build_autoencoder
from semtok.sampler.dit import DiT
from semtok.sampler.embeddings import sincos_positions
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.teachers import Teacher, TeacherConfig
from test_import_dit import LIGHTNING as DEEP_LIGHTNING
from test_import_dit import SIT as DEEP_SIT
from test_import_dit import network, official

LIGHTNING = DEEP_LIGHTNING.model_copy(update={"depth": 1})
SIT = DEEP_SIT.model_copy(update={"depth": 1})
KITS = (
    "sit",
    "repa_sit",
    "irepa",
    "reglue_sit",
    "repae",
    "lightningdit",
    "sfd_lightningdit",
    "semvae",
)
# Other words where one that means nothing would be refused anyway.
WORDS = {
    "path_type": ["GVP", "other"],
    "model": ["SiT-XL/2", "other"],
    "model_type": ["LightningDiT-XL/1", "other"],
    "weighting": ["lognormal", "other"],
    "sampling_method": ["heun", "other"],
    "mode": ["SDE"],
    "cfg_scale": [3.5],
}
# None of these may be put down as bookkeeping.
# fmt: off
MEANING = (
    "path_type", "prediction", "weighting", "cfg_prob", "num_classes", "qk_norm", "cls", "lam",
    "feat_channels", "legacy", "enc_type", "cfm_weighting", "cfm_coeff", "time_shifting", "shift_base",
    "resolution", "image_size", "transport.path_type",
    "transport.prediction", "transport.loss_weight", "transport.sample_eps", "transport.train_eps",
    "transport.use_cosine_loss", "transport.use_lognorm", "model.semfirst_delta_t",
    "model.use_qknorm", "model.use_swiglu", "model.use_rope", "model.use_rmsnorm",
    "model.wo_shift", "model.in_chans", "model.semantic_chans", "model.learn_sigma",
    "model.class_dropout_prob", "model.semantic_weight", "model.semfirst_infer_interval_mode",
    "data.latent_norm", "data.latent_sv_norm", "data.latent_multiplier", "data.num_classes",
    "data.image_size", "vae.downsample_ratio", "vae.model_name", "sample.mode",
    "sample.sampling_method", "sample.cfg_scale", "sample.num_sampling_steps",
    "sample.timestep_shift", "sample.cfg_interval_start", "sample.rtol", "sample.atol",
    "sample.reverse", "sample.likelihood",
)
# fmt: on


# A file with one setting changed -----------------------------------------------------------------


def nested(content: dict[str, Any], entry: str) -> Any:
    value = plain(content[entry])
    return yaml.safe_load(value) if isinstance(value, str) else copy.deepcopy(value)


def with_setting(content: dict[str, Any], entry: str, name: str, value: Any) -> dict[str, Any]:
    """The same file, but for one setting; as the kind of object that it was."""
    settings = nested(content, entry)
    inner, *last = settings, *name.split(".")
    for key in last[:-1]:
        inner = inner[key]
    inner[last[-1]] = value
    if isinstance(content[entry], str):
        settings = yaml.safe_dump(settings)
    if isinstance(content[entry], argparse.Namespace):
        settings = argparse.Namespace(**settings)
    return {**content, entry: settings}


def others(name: str, value: Any) -> Iterator[Any]:
    """Other values of the same kind."""
    word = name.rpartition(".")[2]
    if word in WORDS:
        yield from WORDS[word]
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int | float):
        yield value * 2 + 1
        if value > 0:
            yield type(value)(0)
    elif isinstance(value, str):
        yield "other"
    elif isinstance(value, list):
        yield [*value, 1]
    else:
        yield 0.5


def read(content: dict[str, Any], options: ImportOptions) -> Imported:
    return import_opened(checkpoint_of(content, Path("x.pt")), "auto", options)


def meaning(imported: Imported) -> dict[str, Any]:
    """All that an import means for its user."""
    model = imported.model
    means: dict[str, Any] = {n: v.double().sum().item() for n, v in model.state_dict().items()}
    means |= {"notes": [n for n in imported.notes if not n.startswith((BOOKKEEPING, UNKNOWN))]}
    if isinstance(model, Generator):
        means |= {"config": model.config.model_dump(), "sampler": model.sampler.model_dump()}
        means |= {"size": model.image_size, "trained": model.training_info}
    else:
        means |= {"coder": model.settings()}
    return means


def check_every_setting(content: dict[str, Any], entry: str, options: ImportOptions) -> None:
    base = read(content, options)
    first, settings = meaning(base), read_settings(content, "x.pt")
    assert UNKNOWN not in base.became.values()
    runs = [name for name, fate in base.became.items() if fate == BOOKKEEPING]
    runs = [name.removeprefix(f"{entry}.") for name in runs]
    runs = [name for name in runs if f"${{{name}}}" not in str(content[entry])]
    together = content
    for name in runs:
        together = with_setting(together, entry, name, next(others(name, value_of(content, name))))
    assert meaning(read(together, options)) == first
    for name in settings.values.keys() - runs:
        effects = [
            effect(content, entry, name, other, first, options)
            for other in others(name, value_of(content, name))
        ]
        assert name not in MEANING or set(effects) != {"none"}, (name, effects)


def value_of(content: dict[str, Any], name: str) -> Any:
    inner = nested(content, "args" if "args" in content else "config")
    for key in name.split("."):
        inner = inner[key]
    return inner


def effect(
    content: dict[str, Any],
    entry: str,
    name: str,
    other: Any,
    first: dict[str, Any],
    options: ImportOptions,
) -> str:
    try:
        imported = read(with_setting(content, entry, name, other), options)
    except UserError as error:
        word = name.rpartition(".")[2]  # of a variable, the setting that stands for it is named
        assert word in str(error) and "\n" not in str(error), (name, other, str(error))
        return "refused"
    if meaning(imported) != first:
        return "effect"
    assert imported.became[f"{entry}.{name}"].startswith(BOOKKEEPING), (name, other)
    return "none"


def test_no_setting_with_a_meaning_is_called_bookkeeping():
    assert not set(MEANING) & (ARGUMENTS_OF_RUNS | CONFIG_OF_RUNS)


# Kits of the official code -----------------------------------------------------------------------


def texture(channels: int, stride: int) -> KLTokenizer:
    levels = stride.bit_length()
    shape = Architecture(
        block_channels=(8,) * levels, layers_per_block=1, latent_channels=channels, norm_groups=4
    )
    tokenizer = KLTokenizer(build_autoencoder(shape), method="vae")
    tokenizer.texture_mean.fill_(1.0)
    tokenizer.texture_std.fill_(2.0)
    tokenizer.num_measured_images.fill_(1)
    return tokenizer.eval()


def composite(spec: LatentSpec) -> Tokenizer:
    """A tokenizer with these parts; it is not used to encode."""
    own = spec["texture"]
    image = texture(own.channels, own.stride)
    if spec.names == ("texture",):
        return image
    names = spec.names
    shape = CompressorShape(feature_channels=64, hidden=(4,), channels=spec["semantic"].channels)
    made = CompositeTokenizer(
        image,
        Compressor(shape),
        Teacher(TeacherConfig()),
        feature_stride=16,
        global_width=spec["global"].channels if "global" in names else None,
        scaled="global" not in names,
        method="reglue",
    )
    made.num_measured_images.fill_(1)
    return made.eval()


@pytest.mark.parametrize("folder", [param for name in KITS for param in kits(name)])
def test_parity_any_setting_of_an_official_file_acts_or_is_refused_by_name(folder):
    kit = load_kit(folder)
    content = read_checkpoint(folder / kit.case["files"]["checkpoint"])
    kwargs, entry = kit.case["constructor"]["kwargs"], "args" if "args" in content else "config"
    options = ImportOptions(heads=kwargs.get("num_heads"))
    settings = read_settings(content, "x")
    alone = read(content, options).model
    if isinstance(alone, DiT):
        options = ImportOptions(heads=options.heads, tokenizer=composite(alone.spec))
        # These networks are smaller than what their arguments say of images.
        side = kwargs["input_size"] * alone.spec["texture"].stride
        for name in {"resolution", "image_size"} & settings.values.keys():
            content = with_setting(content, entry, name, side)
    check_every_setting(content, entry, options)


# Files in those formats, made here ---------------------------------------------------------------

TRANSPORT = {"path_type": "Linear", "prediction": "velocity", "loss_weight": None}
TRANSPORT |= {"sample_eps": None, "train_eps": None}
CONFIG = {
    "ckpt_path": "x",
    "data": {"data_path": "x", "image_size": 128, "num_classes": 7, "latent_norm": True}
    | {"latent_multiplier": 1.0},
    "vae": {"model_name": "x", "downsample_ratio": 16},
    "model": {"model_type": "LightningDiT-tiny/1", "class_dropout_prob": 0.1, "use_qknorm": True}
    | {"use_swiglu": True, "use_rope": True, "use_rmsnorm": True, "wo_shift": False}
    | {"in_chans": 6, "learn_sigma": False},
    "train": {"max_steps": 3, "exp_name": "x", "ckpt": None},
    "optimizer": {"lr": 1e-4, "beta2": 0.95},
    "transport": TRANSPORT | {"use_cosine_loss": True, "use_lognorm": True},
    "sample": {"mode": "ODE", "sampling_method": "euler", "num_sampling_steps": 250, "rtol": 1e-3}
    | {"atol": 1e-6, "reverse": False, "likelihood": False, "cfg_scale": 6.7, "fid_num": 5}
    | {"cfg_interval_start": 0.11, "timestep_shift": 0.3, "per_proc_batch_size": 4},
}
SFD = copy.deepcopy(CONFIG)
SFD["data"]["latent_sv_norm"] = True
SFD["model"] |= {"semantic_chans": 2, "semfirst_delta_t": 0.4, "semantic_weight": 2.0}
SFD["model"] |= {"semfirst_infer_interval_mode": "both", "use_repa": True, "repa_mode": "cos"}
SIT_ARGS = {"data_path": "x", "model": "SiT-tiny", "image_size": 64, "num_classes": 7} | TRANSPORT
REGLUE_ARGS = {"path_type": "linear", "prediction": "v", "weighting": "uniform", "cfg_prob": 0.1}
REGLUE_ARGS |= {"model": "SiT-tiny", "num_classes": 7, "resolution": 64, "qk_norm": False}
REGLUE_ARGS |= {"enc_type": "dinov2-vit-b", "legacy": False, "cls": 0.03, "lam": 1.0, "seed": 0}
REGLUE_ARGS |= {"encoder_channel_list": "64,4,3", "feat_channels": 3, "interm_layers": [8, 9]}


def of_parts(made: DiT, side: int) -> dict[str, Tensor]:
    """The official names of a network with several parts."""
    state = official(made, side)
    for ours, theirs in (
        ("time_embed.semantic.", "t_embedder_sem."),
        ("time_embed.texture.", "t_embedder_tex."),
        ("vector_embed.global.0.", "cls_projectors2."),
        ("vector_embed.global.1.", "wg_norm."),
        ("final.vectors.global.", "final_layer.linear_cls."),
    ):
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    if "global" in made.spec.names:
        positions = sincos_positions((side, side), made.config.width)
        state["pos_embed"] = torch.cat([torch.zeros(1, made.config.width), positions])[None]
    return state


def parts(config: Any, spec: LatentSpec, timed: tuple[str, ...] = ()) -> DiT:
    torch.manual_seed(0)
    made = DiT(config, spec, num_classes=7, timed_parts=timed)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


SEMANTIC = LatentSpec((PartSpec("texture", 4, 16), PartSpec("semantic", 2, 16)))
JOINT = LatentSpec(
    (PartSpec("texture", 4, 8), PartSpec("semantic", 3, 16), PartSpec("global", 20, None))
)


def made_here(kind: str) -> tuple[dict[str, Any], LatentSpec]:
    """A file of a small network with its settings, and its latents."""
    plain_texture = LatentSpec((PartSpec("texture", 6, 16),))
    if kind == "lightningdit":
        return {"ema": official(network(LIGHTNING, 6), 8), "config": CONFIG}, plain_texture
    if kind == "sfd":
        made = parts(LIGHTNING, SEMANTIC, ("semantic", "texture"))
        return {"ema": of_parts(made, 8), "config": SFD}, SEMANTIC
    if kind == "reglue":
        args = argparse.Namespace(**REGLUE_ARGS)
        return {"ema": of_parts(parts(SIT, JOINT), 2), "args": args}, JOINT
    args = argparse.Namespace(**SIT_ARGS)
    spec = LatentSpec((PartSpec("texture", 5, 8),))
    return {"ema": official(network(SIT, 5), 2), "args": args}, spec


def generator_of(kind: str, *changes: tuple[str, Any]) -> Generator:
    content, spec = made_here(kind)
    for name, value in changes:
        content = with_setting(content, "args" if "args" in content else "config", name, value)
    model = read(content, ImportOptions(tokenizer=composite(spec))).model
    assert isinstance(model, Generator)
    return model


@pytest.mark.parametrize("kind", ["sit", "reglue", "lightningdit", "sfd"])
def test_any_setting_of_a_file_acts_or_is_refused_by_name(kind):
    content, spec = made_here(kind)
    entry = "args" if "args" in content else "config"
    check_every_setting(content, entry, ImportOptions(tokenizer=composite(spec)))


def test_a_configuration_decides_training_latents_and_sampler(tmp_path):
    generator = generator_of("sfd")
    config, sampler = generator.config, generator.sampler
    assert config.leads["semantic"] == pytest.approx(0.4) and config.leads["texture"] == 0
    assert config.loss_weights == pytest.approx({"texture": 4 / 6, "semantic": 2 * 2 / 6})
    assert config.time.law == "logit_normal" and config.cosine_weight == 1
    assert (sampler.method, sampler.steps) == ("euler", 249)
    assert sampler.shift == pytest.approx(1 / 0.3)
    assert sampler.guidance.scale == 6.7 and sampler.guidance.interval == (0.11, 1.0)
    changes = (("data.latent_multiplier", 0.5), ("data.latent_sv_norm", False))
    scaled = generator_of("sfd", *changes)
    assert scaled.tokenizer.texture_std.tolist() == [4.0] * 4  # 2, and latents half as large
    assert scaled.tokenizer.semantic_std.tolist() == [2.0] * 2
    scaled.save_pretrained(tmp_path / "out")
    back = Generator.from_pretrained(tmp_path / "out")
    assert back.tokenizer.texture_std.tolist() == [4.0] * 4
    assert generator_of("lightningdit").sampler.guidance.num_channels == 3


def test_a_network_alone_keeps_what_its_file_says_of_training():
    content, _ = made_here("sfd")
    content = with_setting(content, "config", "transport.path_type", "GVP")
    imported = read(content, ImportOptions())
    assert imported.model.spec == SEMANTIC  # split and stride as the file says
    assert imported.trained["trained_with"]["path"] == "cosine"
    assert imported.trained["trained_with"]["leads"] == {"semantic": 0.4}
    assert "left out: a network alone is not sampled" in imported.became.values()


def test_settings_are_read_from_every_kind_of_object():
    nodes = StandIn()
    leaf, inner = StandIn(), StandIn()
    leaf._val, inner._content = "Linear", {"path_type": leaf}
    nodes._content = {"transport": inner}
    for held in (nodes, {"transport": {"path_type": "Linear"}}, "transport: {path_type: Linear}"):
        assert read_settings({"config": held}, "x").values == {"transport.path_type": "Linear"}
    text = "variables: {dim: 3}\nmodel: {dim: '${variables.dim}', lost: '${no.where}'}"
    values = read_settings({"config": text}, "x").values
    assert values["model.dim"] == 3 and values["model.lost"] == "${no.where}"
    assert read_settings({"args": argparse.Namespace(a=1)}, "x").values == {"a": 1}


def test_unknown_settings_are_named():
    content, _ = made_here("sit")
    content["args"].novelty = 3
    imported = read(content, ImportOptions())
    assert imported.became["args.novelty"] == UNKNOWN
    assert f"{UNKNOWN}: args.novelty" in imported.notes


def test_guidance_tuned_for_another_size_is_not_taken():
    assert generator_of("reglue").sampler.guidance.scale == 1
    sit = generator_of("sit").sampler.guidance
    assert sit.scale == 1 and sit.num_channels == 3  # published: 1.5 on three channels


def test_the_time_of_a_network_is_told_from_its_arguments():
    content, _ = made_here("sit")
    assert read(content, ImportOptions()).format == "sit"
    content["args"] = argparse.Namespace(path_type="linear", prediction="v")
    assert read(content, ImportOptions()).format == "repa"
    del content["args"]
    with pytest.raises(UserError, match="sit or repa, which run time in opposite directions"):
        read(content, ImportOptions())


@pytest.mark.parametrize(
    "missing", [{"swiglu": False}, {"rope": False}, {"rms_norm": False}, {"qk_norm": False}]
)
def test_a_lightningdit_is_told_by_any_of_its_layers_or_by_its_configuration(missing):
    made = network(LIGHTNING.model_copy(update=missing), 6)
    state = official(made, 8)
    checkpoint = checkpoint_of({"ema": state}, Path("x.pt"))
    options = ImportOptions(heads=4)
    assert import_opened(checkpoint, "auto", options).format == "lightningdit"
    for format in ("sit", "repa"):
        with pytest.raises(UserError, match=f"is of lightningdit by its names, not {format}"):
            import_opened(checkpoint, format, options)
    bare = official(network(SIT, 5), 2)
    config = with_setting({"config": CONFIG}, "config", "model.in_chans", 5)
    for name in ("qknorm", "swiglu", "rope", "rmsnorm"):
        config = with_setting(config, "config", f"model.use_{name}", False)
    config = with_setting(config, "config", "data.image_size", 128)
    assert read({"ema": bare} | config, ImportOptions()).format == "lightningdit"


def test_channel_splits_that_are_not_certain_are_asked_for():
    content, _ = made_here("sfd")
    del content["config"]
    with pytest.raises(UserError, match="its 6 channels .* give --tokenizer or --semantic-channel"):
        read(content, ImportOptions())
    assert read(content, ImportOptions(semantic_channels=2)).model.spec == SEMANTIC
    content, _ = made_here("reglue")
    assert read(content, ImportOptions()).model.spec["semantic"].channels == 3
    with pytest.raises(UserError, match="3 channels are semantic; leave --semantic-channels out"):
        read(content, ImportOptions(semantic_channels=2))
    del content["args"]
    with pytest.raises(UserError, match="reg or reglue, which mean different things"):
        read(content, ImportOptions())
    opened = checkpoint_of(content, Path("x.pt"))
    assert import_opened(opened, "reg", ImportOptions()).model.spec["texture"].channels == 7
    with pytest.raises(UserError, match="--semantic-channels"):
        import_opened(opened, "reglue", ImportOptions())


@pytest.mark.parametrize("kind", ["lightningdit", "reglue"])
def test_labels_without_one_for_none_get_it(kind):
    content, spec = made_here(kind)
    table = "y_embedder.embedding_table.weight"
    content["ema"] = content["ema"] | {table: content["ema"][table][:7]}
    if kind == "lightningdit":
        content = with_setting(content, "config", "model.class_dropout_prob", 0)
        content = with_setting(content, "config", "sample.cfg_scale", 1.0)
    else:
        content = with_setting(content, "args", "cfg_prob", 0.0)
    generator = read(content, ImportOptions(tokenizer=composite(spec))).model
    assert generator.network.num_classes == 7 and generator.config.class_dropout == 0
    assert not generator.network.label_embed.weight[7].any()
