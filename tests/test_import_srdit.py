"""Files of SR-DiT and iREPA through ``auto``: what the generator has, and what their settings decide."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from semtok import Generator, UserError
from semtok.hub.dit_settings import sampler_for
from semtok.hub.file_settings import FileSettings
from semtok.hub.formats import checkpoint_of
from semtok.hub.import_dit import import_dit, spec_of
from semtok.hub.imports import Imported, import_opened
from semtok.hub.job import ImportOptions
from semtok.hub.projectors import read_projectors
from semtok.methods.reglue import REGLUETokenizer
from semtok.recipe import load_diffusion_recipe, locate_recipe
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.embeddings import sincos_positions
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.teachers import TeacherConfig, silu_mlp
from test_import_dit import official
from test_import_settings import check_every_setting, texture

SIDE, CLASSES, CHANNELS, VECTOR = 4, 7, 6, 20
SHAPE = DiTArchitecture(
    depth=6,
    width=48,
    heads=4,
    rope=True,
    rms_norm=True,
    norm_gain=False,
    qk_norm="rms",
    qk_norm_eps=torch.finfo(torch.float32).eps,
    vector_norm="rms",
    value_residual=True,
    split=(2, 2),
)
SPEC = LatentSpec((PartSpec("texture", CHANNELS, 16), PartSpec("global", VECTOR, None)))
ARGS = {"model": "SiT-tiny", "num_classes": CLASSES, "resolution": SIDE * 16, "qk_norm": True}
ARGS |= {"vae_name": "REPA-E/e2e-invae", "path_type": "linear", "prediction": "v", "cls": 0.04}
ARGS |= {"cfg_prob": 0.1, "enc_type": "dinov2-vit-b", "proj_coeff": 0.4, "weighting": "uniform"}
ARGS |= {"cfm_weighting": "uniform", "cfm_coeff": 0.07, "time_shifting": True, "shift_base": 4096}
ARGS |= {"cfg_scale": 4.0, "cls_cfg_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0}
_NAMES = (
    ("vector_embed.global.0.", "cls_projectors2."),
    ("vector_embed.global.1.", "wg_norm."),
    ("final.vectors.global.", "final_layer.linear_cls."),
    ("fusion.linear.", "fusion_proj."),
    ("first_share", "v1_lambda"),
)


def weights() -> dict[str, Tensor]:
    """A small network's, under the names of the published code."""
    torch.manual_seed(0)
    made = DiT(SHAPE, SPEC, num_classes=CLASSES)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = official(made, SIDE)
    for ours, theirs in _NAMES:
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    positions = sincos_positions((SIDE, SIDE), SHAPE.width)
    state["pos_embed"] = torch.cat([torch.zeros(1, SHAPE.width), positions])[None]
    state["mask_token"] = state.pop("fusion.mask_token")[None, None]
    head = silu_mlp(SHAPE.width, 8, VECTOR).state_dict()
    return state | {f"projectors.0.{name}": value for name, value in head.items()}


def latents() -> REGLUETokenizer:
    """A tokenizer of such latents; it is not used to encode."""
    options: dict[str, Any] = {"feature_stride": 16, "global_width": VECTOR, "scaled": False}
    teacher = (TeacherConfig(), "not looked at")
    return REGLUETokenizer(texture(CHANNELS, 16), None, teacher, method="reglue", **options).eval()


def read(tokenizer: bool = True, **changes: Any) -> Imported:
    content = {"ema": weights(), "steps": 3, "args": argparse.Namespace(**ARGS | changes)}
    options = ImportOptions(tokenizer=latents() if tokenizer else None)
    return import_opened(checkpoint_of(content, Path("x.pt")), "auto", options)


@pytest.fixture(scope="module")
def imported() -> Imported:
    return read()


def test_a_file_of_sr_dit_becomes_a_generator_trained_and_sampled_as_published(imported):
    model = imported.model
    assert imported.format == "sr-dit" and isinstance(model, Generator)
    assert model.network.config == SHAPE == model.config.architecture
    config, routing, sampler = model.config, model.config.routing, model.sampler
    assert (routing.first, routing.last, routing.drop, routing.vectors) == (2, 2, 0.75, "routed")
    assert (routing.path_drop, routing.path_drop_per) == (0.05, "batch")
    assert config.time.shift == "spatial_dimension" and config.time.law == "uniform"
    assert config.contrastive_weight == {"texture": 0.07}
    assert config.loss_weights == {"texture": 1.0, "global": 0.04}
    assert (config.repa.weight, config.repa.depth, config.repa.with_global) == (0.4, 2, True)
    assert (sampler.method, sampler.diffusion, sampler.shift) == ("sde", "linear", None)
    # The scale was tuned for the published size; what it moves away from is of any.
    assert sampler.guidance.base == "dropped_path" and sampler.guidance.scale == 1
    assert "image_size" not in imported.trained and model.image_size == (SIDE * 16, SIDE * 16)


def test_its_image_latents_are_scaled_as_in_its_training_whatever_the_tokenizer_says(imported):
    given, own = latents(), imported.model.tokenizer
    assert given.texture_std.unique().item() == 2
    assert own.texture_std.unique().item() == pytest.approx(1 / 0.3099)
    assert not own.texture_mean.any()
    assert any("standardised" in note for note in imported.notes)


def test_a_generator_of_sr_dit_comes_back_and_draws_with_path_drop_guidance(imported, tmp_path):
    imported.model.save_pretrained(tmp_path)
    again = Generator.from_pretrained(tmp_path)
    assert again.config == imported.model.config
    guidance = again.sampler.guidance.model_copy(update={"scale": 2.5})
    config = again.sampler.model_copy(update={"steps": 2, "guidance": guidance})
    first, second = (
        model.sample([0, 3], seed=1, sampler=config) for model in (imported.model, again)
    )
    assert torch.equal(first, second) and first.isfinite().all()


def test_the_published_size_is_guided_as_published():
    recipe = load_diffusion_recipe(locate_recipe("imagenet256/srdit_b1"), [], tokenizer="some")
    sampler = sampler_for("sr-dit", recipe.diffusion.architecture, FileSettings("x.pt"))
    guidance = sampler.guidance
    assert (sampler.steps, sampler.last_step, sampler.shift) == (250, 0.04, None)
    assert guidance.base == "dropped_path" and guidance.interval == (0.15, 1.0)
    assert guidance.scale == {"texture": 2.5, "global": 2.5}


def test_bare_weights_are_taken_as_published():
    checkpoint = checkpoint_of(weights(), Path("x.safetensors"))
    made = import_opened(checkpoint, "auto", ImportOptions(tokenizer=latents())).model
    assert made.config.loss_weights["global"] == 0.03
    assert made.config.contrastive_weight == {"texture": 0.05}
    assert made.config.time.shift == "spatial_dimension" and made.config.repa.weight == 0.5


def test_every_argument_of_sr_dit_acts_or_is_refused_by_name():
    names = ("cls", "proj_coeff", "cfm_weighting", "cfm_coeff", "time_shifting", "shift_base")
    names += ("cls_cfg_scale", "guidance_low", "guidance_high")
    content = {"ema": weights(), "args": argparse.Namespace(**{n: ARGS[n] for n in names})}
    check_every_setting(content, "args", ImportOptions(tokenizer=latents()))


def test_times_are_shifted_as_its_file_says():
    assert read(time_shifting=False).model.config.time.shift == 1
    dimensions = CHANNELS * SIDE * SIDE
    shift = read(shift_base=1024).model.config.time.shift
    assert shift == pytest.approx(math.sqrt(dimensions / 1024))


def test_a_contrast_that_weighs_times_is_refused_by_name():
    with pytest.raises(UserError, match="cfm_weighting 'linear'; only a contrast") as told:
        read(tokenizer=False, cfm_weighting="linear")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(("name", "value"), [("model", "SiT-B/1"), ("num_classes", 1000)])
def test_arguments_of_another_network_are_told_with_a_way_out(name, value):
    with pytest.raises(UserError, match=f"its args says {name} {value!r}; .*safetensors"):
        read(**{name: value})


def test_what_does_not_fit_sr_dit_is_named():
    state = weights()
    shallow = {n: v for n, v in state.items() if not n.startswith(("blocks.4.", "blocks.5."))}
    for content, words in (
        (shallow, "4 blocks, of which the first 2 and the last 2 see all tokens"),
        ({n: v for n, v in state.items() if n != "mask_token"}, "fusion.mask_token missing"),
        (state | {"mask_token": torch.zeros(1, 1, 5)}, r"fusion.mask_token \(5,\)"),
        ({n: v for n, v in state.items() if n != "blocks.3.attn.v1_lambda"}, "blocks.3"),
        (state | {"feat_rope.freqs_cos": torch.zeros(16, 12)}, "not the fixed code"),
    ):
        with pytest.raises(UserError, match=words):
            import_dit(content, place="x.pt")


def test_twenty_channels_beside_a_mask_token_are_no_reglue_latents():
    state = weights()
    state["x_embedder.proj.weight"] = torch.zeros(SHAPE.width, 20, 1, 1)
    assert spec_of(state)["texture"].channels == 20


def test_sr_dit_has_as_many_parameters_as_its_code_counts():
    """140.24 million with the projector, which sampling does not need."""
    recipe = load_diffusion_recipe(locate_recipe("imagenet256/srdit_b1"), [], tokenizer="some")
    spec = LatentSpec((PartSpec("texture", 32, 16), PartSpec("global", 768, None)))
    with torch.device("meta"):
        network = DiT(recipe.diffusion.architecture, spec, num_classes=1000)
        projector = silu_mlp(768, recipe.diffusion.repa.projector_width, 768)
    count = sum(p.numel() for m in (network, projector) for p in m.parameters())
    # The code counts what is frozen there too: the table of positions.
    assert round((count + 257 * 768) / 1e6, 2) == 140.24


# iREPA --------------------------------------------------------------------------------------------


def head_of(kind: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    made = {
        "mlp": silu_mlp(16, 12, 8),
        "linear": torch.nn.Linear(16, 8),
        "conv": torch.nn.Conv2d(16, 8, 3, padding=1),
    }[kind]
    return {f"projection_layer.{name}": value for name, value in made.state_dict().items()}


@pytest.mark.parametrize("kind", ["mlp", "linear", "conv"])
def test_irepas_heads_are_read_whatever_they_are(kind):
    heads = read_projectors({f"projectors.1.{n}": v for n, v in head_of(kind).items()} | {
        f"projectors.0.{n}": v for n, v in head_of("mlp").items()
    })  # fmt: skip
    x = torch.randn(2, 16, 4, 4)
    x = x if kind == "conv" else x.flatten(2).transpose(1, 2)
    given = {n.removeprefix("projection_layer."): v for n, v in head_of(kind).items()}
    assert len(heads) == 2 and heads[1].state_dict().keys() == given.keys()
    assert heads[1](x).shape[1:] == ((8, 4, 4) if kind == "conv" else (16, 8))
    assert not heads[1].training


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"projectors.0.projection_layer.weight": torch.zeros(8, 16, 2, 2)}, "an odd number"),
        ({"projectors.0.projection_layer.extra": torch.zeros(1)}, "unknown projectors.0.extra"),
        ({"projectors.0.projection_layer.bias": torch.zeros(3)}, "projectors.0.bias is not"),
        ({"projectors.2.projection_layer.bias": torch.zeros(8)}, "unknown projectors.2.bias"),
    ],
)
def test_heads_that_are_none_are_named(change, words):
    state = {f"projectors.0.{n}": v for n, v in head_of("conv").items()}
    with pytest.raises(ValueError, match=words):
        read_projectors(state | change)
