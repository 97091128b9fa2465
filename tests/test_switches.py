"""Switches of training and sampling: those that can't take effect are refused by name, all others go together."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from benchmarks.synthetic import PUBLISHED, SpecTokenizer, SyntheticLatents
from benchmarks.training import TRAIN, make_objective
from semtok import Generator, UserError
from semtok.commands import sample, train_dit
from semtok.commands.cli import run
from semtok.diffusion.training import DiffusionObjective
from semtok.recipe import parse_diffusion_recipe
from semtok.sampler.dit import DiT, velocity_to
from semtok.sampler.request import SampleRequest
from semtok.settings import apply_overrides

SHAPE = {"depth": 6, "width": 32, "heads": 2, "patch_size": 8}


def objective(overrides: list[str], kind: str = "sit") -> DiffusionObjective:
    """The objective of settings on latents of a kind."""
    published = PUBLISHED[kind]
    content = {
        "tokenizer": kind,
        "data": {"kind": "shapes", "size": 256},
        "diffusion": {"network": dict(SHAPE), **published.diffusion},
        "train": {**TRAIN, "batch_size": 4},
    }
    recipe = parse_diffusion_recipe(apply_overrides(content, overrides), "tiny.yaml")
    source = SyntheticLatents(published)
    return make_objective(
        recipe, SpecTokenizer(published.spec), source, published.target_width or 8
    )


# Refused -----------------------------------------------------------------------------------------

ROUTED = "diffusion.routing={}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["diffusion.routing={first: 3, last: 3}"],
            "tiny.yaml: diffusion.routing: 3 first and 3 last of the network's 6 blocks leave none between; pass fewer",
        ),
        (["diffusion.routing.drop=1.0"], "tiny.yaml: diffusion.routing.drop"),
        (
            ["diffusion.routing.drop={5: 0.5}"],
            "diffusion.routing.drop: shares by step begin with step 0",
        ),
        (
            ["diffusion.routing={law: grid, drop: 0.6}"],
            "diffusion.routing: of 2x2 cells 0.25, 0.5 or 0.75 can be dropped, not 0.6",
        ),
        (
            ["diffusion.routing={law: grid, vectors: routed}"],
            "vectors: routed goes with law: random",
        ),
        (["diffusion.routing={law: grid, drop: 0}"], "law takes effect where tokens are dropped"),
        (["diffusion.routing={vectors: routed, drop: 0}"], "vectors takes effect where tokens are"),
        (
            ["diffusion.routing={path_drop: 0, path_drop_per: batch}"],
            "diffusion.routing: path_drop_per takes effect with some path_drop, and it is 0",
        ),
        (
            ["diffusion.routing={vectors: routed}"],
            "diffusion.routing.vectors: routed: this tokenizer",
        ),
        (
            ["diffusion.network.patch_size=32", "diffusion.routing={law: grid}"],
            "diffusion.routing.law: a grid of 1x1 tokens has no whole 2x2 cells; pass random",
        ),
        (
            [ROUTED, "sampler.guidance.base=dropped_path", "diffusion.routing.path_drop=0"],
            "sampler.guidance.base: dropped_path is what diffusion.routing.path_drop=0 never trains",
        ),
        (
            ["sampler.guidance={base: dropped_path, scale: 2.0}"],
            "sampler.guidance.base: dropped_path needs a network with token routing (diffusion.routing)",
        ),
        (
            [
                ROUTED,
                "sampler.guidance={base: dropped_path, scale: 2.0}",
                "diffusion.class_dropout=0",
            ],
            "guidance needs the null label, which diffusion.class_dropout=0 never trains",
        ),
        (
            ["sampler.guidance.base=inner_head"],
            "sampler.guidance.base: inner_head needs a network with a second head (diffusion.internal_guidance)",
        ),
        (
            ["diffusion.internal_guidance.after=6"],
            "tiny.yaml: diffusion.internal_guidance.after: 6 of the network's 6 blocks; pass fewer",
        ),
        (
            [ROUTED, "diffusion.internal_guidance.after=3"],
            "diffusion.internal_guidance.after: block 3 sees only some tokens in training; pass 2 or fewer, or more than 4",
        ),
        (
            ["diffusion.prediction=data", "diffusion.path=cosine"],
            "diffusion.prediction: data goes with diffusion.path=linear",
        ),
        (
            ["diffusion.contrastive_weight=1"],
            "diffusion.contrastive_weight: as much as the squared",
        ),
        (
            [
                "diffusion.contrastive_weight={texture: 0.5}",
                "diffusion.loss_weights.texture={0: 1.0, 9: 0.5}",
            ],
            "diffusion.contrastive_weight.texture: as much as the squared error itself, or more, has no least value; "
            "pass less than 0.5, its loss weight",
        ),
        (
            ["diffusion.contrastive_weight={texture: 0.5}", "diffusion.loss_weights.texture=0"],
            "diffusion.contrastive_weight.texture: the part is not learned where its loss weight is 0; pass 0",
        ),
        (
            ["diffusion.contrastive_weight={txture: 0.5}"],
            "diffusion.contrastive_weight: no part ['txture']",
        ),
        (
            ["diffusion.contrastive_weight=0.1", "train.batch_size=1"],
            "diffusion.contrastive_weight: compares images of a batch, and train.batch_size is 1; pass more",
        ),
        (["diffusion.repa={kernel_size: 5}"], "kernel_size takes effect with projector: conv only"),
        (
            ["diffusion.repa={projector: conv, kernel_size: 2}"],
            "kernel_size: expected an odd number",
        ),
        (
            ["diffusion.repa={projector: conv, projector_width: 8}"],
            "projector_width takes effect with projector: mlp only",
        ),
        (
            [ROUTED, "diffusion.repa={projector: conv, depth: 3}"],
            "diffusion.repa.projector: conv needs the whole map of tokens, of which token routing drops some at block 3",
        ),
        (["diffusion.network.norm_gain=false"], "norm_gain is RMSNorm's; pass rms_norm=true too"),
        (["diffusion.network.qk_norm_eps=1e-6"], "qk_norm_eps takes effect with qk_norm only"),
        (["diffusion.network.qk_norm=batch"], "tiny.yaml: diffusion.network.qk_norm"),
        (
            ["diffusion.network.vector_norm=rms"],
            "diffusion.network.vector_norm: this tokenizer's latents have no vector part",
        ),
        (
            ["diffusion.network={depth: 1, width: 32, heads: 2, value_residual: true}"],
            "value_residual needs a second block; depth is 1",
        ),
        (
            ["diffusion.network.split=[2, 2]"],
            "split is set by diffusion.routing; give that instead",
        ),
        (["diffusion.network.predicts=data"], "predicts is set by diffusion.prediction; give that"),
        (["diffusion.network.inner_head=2"], "inner_head is set by diffusion.internal_guidance"),
        (
            ["diffusion.network={preset: SiT-B/3}"],
            "diffusion.network: no preset 'SiT-B/3'; presets: SiT-T/1",
        ),
        (
            ["diffusion.network={preset: [1]}"],
            "diffusion.network: preset: expected a name such as SiT-B/2, got [1]",
        ),
        (
            ["diffusion.network={preset: SiT-T/2, qk_nrm: true}"],
            "unknown key 'diffusion.network.qk_nrm'; did you mean 'qk_norm'?",
        ),
        (
            ["diffusion.network=SiT-B/3", "diffusion.network.qk_norm=true"],
            "diffusion.network: no preset 'SiT-B/3'",
        ),
    ],
)
def test_what_can_take_no_effect_is_refused_by_name(words, message):
    with pytest.raises(ValueError) as error:  # UserError is one
        objective(words)
    text = str(error.value)
    assert message in text and "\n" not in text, text


def test_a_setting_below_a_presets_name_changes_that_preset():
    content = {"diffusion": {"network": "SiT-B/2"}}
    changed = apply_overrides(
        content, ["diffusion.network.qk_norm=true", "diffusion.network.rope=true"]
    )
    network = {"preset": "SiT-B/2", "qk_norm": True, "rope": True}
    assert changed == {"diffusion": {"network": network}}
    made = objective(["diffusion.network=SiT-T/2", "diffusion.network.depth=2"]).averaged_module()
    assert made.config.width == 192 and made.config.depth == 2 and made.config.qk_norm is False
    assert apply_overrides({"data": "a"}, ["data.size=3"]) == {"data": {"size": 3}}


# Predicting data ----------------------------------------------------------------------------------


def test_a_network_that_predicts_data_gives_the_velocity_to_them_cut_off_near_them():
    x, data = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    t = torch.tensor([0.0, 0.5, 0.99])
    velocity = velocity_to(data, x, t)
    for i, left in enumerate((1.0, 0.5, 0.05)):
        torch.testing.assert_close(velocity[i], (data[i] - x[i]) / left)


def test_predicted_data_are_learned_sampled_and_measured_by_one_law():
    """A perfect prediction has no loss, in training and held out, also of a part that has come to its end."""
    stage = objective(["diffusion.prediction=data", "diffusion.repa=false"], "sfd")
    learner, network = stage.learners["dit"], stage.averaged_module()
    source = SyntheticLatents(PUBLISHED["sfd"])
    batch = source.load(range(4))
    posterior = batch.latents.map(torch.Tensor.float)
    posterior = type(posterior)(posterior.mean, posterior.std.map(torch.zeros_like))
    inputs = {"posterior": posterior, "labels": batch.labels, "features": None}
    noised = learner.noised(posterior, tiny.draws(0, 4))
    data = noised.data
    network._velocity = lambda outputs, grid, x, times: type(posterior.mean)(
        {name: velocity_to(data[name], x[name], times[name]) for name in x}
    )
    output = learner(inputs, tiny.draws(0, 4), 0, {})
    for name in data:
        assert output.terms[f"velocity/{name}"].value.abs().max() < 1e-6
    held_out = stage.validate(network, None, inputs, indices=range(4))
    assert all(value.abs().max() < 1e-6 for value in held_out.values())


def test_half_precision_rounds_weights_and_not_the_state_that_data_are_compared_with():
    stage = objective(["diffusion.prediction=data"])
    network = tiny.awake(stage.averaged_module()).eval()
    x = {"texture": torch.randn(2, 4, 32, 32) * 3}
    times, labels = {"texture": torch.full((2,), 0.97)}, torch.tensor([0, 1])
    with torch.no_grad():
        predicted = network(x, times, labels).velocity.texture * 0.05 + x["texture"]
        halved = network.to(torch.bfloat16)(x, times, labels).velocity.texture * 0.05 + x["texture"]
    rounding = (halved - predicted).abs().mean() / predicted.abs().mean()
    assert 0 < rounding < 0.02, "of the network's output alone"
