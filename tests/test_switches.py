"""Switches of training and sampling: those that can't take effect are refused by name, all others go together."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL

import tiny
from benchmarks.synthetic import PUBLISHED, SpecTokenizer, SyntheticLatents
from benchmarks.training import TRAIN, make_objective
from semtok import Generator, UserError
from semtok.commands import sample, train_dit
from semtok.commands.cli import run
from semtok.data.images.kinds import open_sources
from semtok.diffusion.training import DiffusionObjective
from semtok.evaluation.protocol import _sampler_in_words
from semtok.hub.diffusers.pipeline import SemtokPipeline
from semtok.hub.diffusers.scheduler import SemtokScheduler
from semtok.hub.diffusers.transformer import SemtokTransformer
from semtok.hub.export_pipeline import export_pipeline
from semtok.images import to_uint8
from semtok.recipe import parse_diffusion_recipe
from semtok.sampler.dit import velocity_to
from semtok.settings import apply_overrides
from semtok.storage import read_json
from semtok.teachers import Teacher, TeacherConfig
from semtok.training.loop import Trainer
from semtok.training.process import make_accelerator

SHAPE = {"depth": 6, "width": 32, "heads": 2, "patch_size": 8}


def objective(overrides: list[str], kind: str = "sit") -> DiffusionObjective:
    """The objective of settings on latents of a kind, for a new run."""
    published = PUBLISHED[kind]
    content = {
        "tokenizer": kind,
        "data": {"kind": "shapes", "size": 256},
        "diffusion": {"network": dict(SHAPE), **published.diffusion},
        "train": {**TRAIN, "batch_size": 4},
    }
    recipe = parse_diffusion_recipe(apply_overrides(content, overrides), "tiny.yaml")
    source = SyntheticLatents(published)
    made = make_objective(
        recipe, SpecTokenizer(published.spec), source, published.target_width or 8
    )
    made.check_use()
    return made


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
            ["diffusion.routing={drop: 0, path_drop: 0}"],
            "diffusion.routing: drop and path_drop are 0, so that nothing is dropped; pass some drop, or "
            "diffusion.routing=null",
        ),
        (
            ["diffusion.network.patch_size=32", ROUTED],
            "diffusion.routing.drop: of one token none is dropped; pass a network of smaller patches, or",
        ),
        (
            [ROUTED, "sampler.guidance.base=dropped_path"],
            "sampler.guidance.base: nothing is guided, as sampler.guidance.scale is 1; pass another scale, or",
        ),
        (
            ["sampler.guidance.interval=[0.2, 1.0]"],
            "sampler.guidance.interval: nothing is guided",
        ),
        (["sampler.guidance.num_channels=3"], "sampler.guidance.num_channels: nothing is guided"),
        (
            ["diffusion.repa={weight: 0, projector: conv}"],
            "diffusion.repa.projector takes effect with some diffusion.repa.weight, and it is 0",
        ),
        (
            ["diffusion.repa={weight: 0, spatial_norm: 0.6}"],
            "diffusion.repa.spatial_norm takes effect with some diffusion.repa.weight",
        ),
        (
            ["diffusion.repa=false", "diffusion.repa.spatial_norm=0.6"],
            "override 'diffusion.repa.spatial_norm=0.6' contradicts 'diffusion.repa=false'; leave one",
        ),
        (
            ["diffusion.repa.spatial_norm=0.6", "diffusion.repa=false"],
            "override 'diffusion.repa=false' contradicts 'diffusion.repa.spatial_norm=0.6'",
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
            "diffusion.internal_guidance.after: block 3 sees only some tokens in training; pass 2 or "
            "fewer, or more than 4",
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
            "diffusion.repa.projector: conv needs the whole map of tokens, of which token routing drops some at "
            "block 3",
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


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("train.precision=bf8", "fp32, tf32, bf16, bf16_matmul, fp16 or auto, got 'bf8'"),
        ("diffusion.network.qk_norm=foo", "true, false, layer or rms, got 'foo'"),
        ("diffusion.repa=true", "false, null or {} with any of weight, depth, projector"),
        ("diffusion.routing=true", "null or {} with any of first, last, drop"),
        ("diffusion.internal_guidance=8", "null or {after: …} with any of weight, got 8"),
        ("train.averages=true", "null or {} with any of sigma_rel, every, keep, got True"),
        ("score=true", "null or {} with any of every, num, judge"),
        ("diffusion.routing.drop=abc", "a number or a mapping {whole number: number}, got 'abc'"),
        ("diffusion.contrastive_weight=abc", "a number or a mapping {text: number}, got 'abc'"),
        ("diffusion.loss_weights.texture=abc", "a number or a mapping {whole number: number}"),
        ("sampler.guidance.interval=abc", "a list or a mapping {text: …}, got 'abc'"),
        ("diffusion.network=5", "a text or {depth: …, width: …, heads: …} with any of"),
        ("diffusion.leads=0.3", "null or a mapping {text: number}, got 0.3"),
        ("train.optimiser=adamw", "null or {learning_rate: …} with any of"),
    ],
)
def test_what_a_setting_of_several_kinds_takes_is_told(word, expected):
    with pytest.raises(UserError) as error:
        objective([word])
    text = str(error.value)
    assert text.startswith(f"tiny.yaml: {word.partition('=')[0]}: expected {expected}"), text
    assert "\n" not in text


def test_of_a_setting_of_several_kinds_what_is_wrong_with_the_kind_that_was_meant_is_told():
    with pytest.raises(UserError, match=r"routing.drop: input should be less than 1, got 1.0"):
        objective(["diffusion.routing.drop=1.0"])
    with pytest.raises(UserError, match="routing.drop.9: input should be a valid number, got 'a'"):
        objective(["diffusion.routing.drop={0: 0.5, 9: a}"])
    with pytest.raises(UserError, match=r"unknown key 'diffusion.repa.wieght'; did you mean 'we"):
        objective(["diffusion.repa={wieght: 1}"])


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


def test_half_precision_does_not_round_the_state_that_data_are_compared_with():
    network = objective(["diffusion.prediction=data"]).averaged_module().eval()
    x = {"texture": torch.randn(2, 4, 32, 32) * 3}
    times, labels = {"texture": torch.full((2,), 0.97)}, torch.tensor([0, 1])
    with torch.no_grad():
        whole = network(x, times, labels).velocity.texture  # a fresh network predicts 0
        half = network.to(torch.bfloat16)(x, times, labels).velocity.texture
    assert torch.equal(half, whole)
    torch.testing.assert_close(whole, -x["texture"] / 0.05)


# Pairs of switches --------------------------------------------------------------------------------

SWITCHES: dict[str, dict[str, list[str]]] = {
    "tokenizer": {"none": [], "reglue": [], "semvae": []},
    "law": {
        "off": [],
        "random": ["routing.drop=0.5"],
        "grid": ["routing.law=grid"],
    },
    "vectors": {"kept": [], "routed": ["routing.vectors=routed"]},
    "path": {"sample": [], "batch": ["routing.path_drop_per=batch"]},
    "values": {"own": [], "residual": ["network.value_residual=true"]},
    "qk_norm": {
        "none": [],
        "as the blocks'": ["network.qk_norm=true"],
        "layer": ["network.qk_norm=layer"],
        "rms": ["network.qk_norm=rms", "network.qk_norm_eps=1.2e-7"],
    },
    "norm": {
        "layer": [],
        "rms": ["network.rms_norm=true"],
        "no gain": ["network.rms_norm=true", "network.norm_gain=false"],
    },
    "positions": {
        "added": [],
        "rotary": ["network.rope=true", "network.position_codes=false"],
        "spread": ["network.rope=true", "network.rope_span=16"],
        "learned": ["network.learned_positions=[2, 2]"],
    },
    "time": {
        "sinusoidal": [],
        "period": ["network.time_period=10"],
        "fourier": ["network.time_embedding=fourier", "time={least: 0.001, shift: dimension}"],
    },
    "head": {
        "none": [],
        "alike": ["network.head={depth: 1}", "network.biases=false"],
        "wide": [
            "network.head={depth: 2, width: 24, heads: 3}",
            "network.condition_activations=2",
        ],
        "reused": ["network.head={depth: 1}", "sampler.state_refresh_rate=2"],
    },
    "contrast": {
        "off": [],
        "all": ["contrastive_weight=0.1"],
        "texture": ["contrastive_weight={texture: 0.05}"],
    },
    "prediction": {"velocity": [], "data": ["prediction=data"]},
    "inner": {"off": [], "on": ["internal_guidance.after=2"]},
    "repa": {
        "off": ["repa=false"],
        "mlp": ["repa={depth: 1}"],
        "conv": ["repa={depth: 2, projector: conv, spatial_norm: 0.6}"],
        "between": ["repa={depth: 3, spatial_norm: 0.6}"],
        "late": ["repa={depth: 5, loss: cosine_mse}"],
    },
    "base": {
        "null_label": [],
        "dropped_path": ["sampler.guidance.base=dropped_path"],
        "inner_head": ["sampler.guidance.base=inner_head"],
    },
    "checkpointing": {"off": [], "on": ["checkpointing=true"]},
    "optimiser": {"adamw": [], "muon": ["train.optimiser.name=muon"]},
}
Choice = tuple[str, str]
APART: set[frozenset[Choice]] = {
    frozenset(pair)
    for pair in (
        (("law", "off"), ("vectors", "routed")),
        (("law", "grid"), ("vectors", "routed")),
        (("tokenizer", "none"), ("vectors", "routed")),
        (("tokenizer", "semvae"), ("vectors", "routed")),
        (("law", "off"), ("path", "batch")),
        (("law", "off"), ("base", "dropped_path")),
        (("inner", "off"), ("base", "inner_head")),
        (("head", "reused"), ("base", "inner_head")),
    )
}


def cover() -> list[dict[str, str]]:
    """Few choices of all switches, in which every two settings that go together meet."""
    choices = [(name, value) for name, values in SWITCHES.items() for value in values]
    pairs = [frozenset(pair) for pair in itertools.combinations(choices, 2)]
    left = {p: None for p in pairs if len(dict(p)) == 2 and p not in APART}  # keeps its order
    rows = []
    while left:
        row = dict(sorted(next(iter(left))))
        for name, values in SWITCHES.items():
            if name in row:
                continue
            allowed = [
                value
                for value in values
                if not any(frozenset((own, (name, value))) in APART for own in row.items())
            ]
            meets = {
                value: sum(frozenset((own, (name, value))) in left for own in row.items())
                for value in allowed
            }
            row[name] = max(allowed, key=meets.__getitem__)
        for pair in itertools.combinations(row.items(), 2):
            left.pop(frozenset(pair), None)
        rows.append(row)
    return rows


COVER = cover()


def test_every_two_switches_that_go_together_meet():
    met = {frozenset(pair) for row in COVER for pair in itertools.combinations(row.items(), 2)}
    assert not met & APART
    several = itertools.combinations(SWITCHES, 2)
    wanted = sum(len(SWITCHES[a]) * len(SWITCHES[b]) for a, b in several) - len(APART)
    assert len(met) == wanted and len(COVER) < 40


@pytest.mark.parametrize("row", COVER, ids=lambda row: "-".join(row.values()).replace(" ", "_"))
def test_switches_go_together(row, tmp_path):
    kind = row["tokenizer"]
    words = [word for name, value in row.items() for word in SWITCHES[name][value]]
    other = ("sampler.", "train.")
    words = [word if word.startswith(other) else f"diffusion.{word}" for word in words]
    content = recipe_content(tokenizer=kind, accumulate=2, steps=2, ema_decay=0.5)
    content["diffusion"] = {"network": {**SHAPE, "patch_size": 1, "depth": 5, "width": 16}}
    content["sampler"] = {"steps": 2, "guidance": {"scale": 1.5}}
    recipe = parse_diffusion_recipe(apply_overrides(content, words), "tiny")
    tokenizer = tiny.tokenizer("vae", kind, kind == "reglue")
    source, held_out = open_sources(recipe.data)
    torch.manual_seed(0)
    stage = DiffusionObjective(
        recipe.diffusion,
        tokenizer,
        class_names=source.class_names,
        image_size=(16, 16),
        sampler=recipe.sampler,
        teacher=Teacher(TeacherConfig(input_size=16)) if kind == "none" else None,
    )
    tiny.awake(stage.averaged_module())
    trainer = Trainer(
        stage,
        recipe.train,
        accelerator=make_accelerator(recipe.train, tmp_path),
        folder=tmp_path,
        source=source,
        validation=held_out,
        num_workers=0,
        tracked={},
    )
    before = [p.detach().clone() for p in stage.learners.parameters()]
    batches = trainer._batches()
    for _ in range(2):
        trainer.train_step(batches)
    after = list(stage.learners.parameters())
    assert all(p.isfinite().all() for p in after)
    names = [name for name, _ in stage.learners.named_parameters()]
    still = [n for n, a, b in zip(names, before, after, strict=True) if torch.equal(a, b)]
    assert not still
    images = stage.generator(trainer.averaged).sample([0, 1], seed=0)
    assert images.isfinite().all() and images.std() > 0


def recipe_content(tokenizer: str, **train: Any) -> dict[str, Any]:
    content = tiny.content(**train)
    del content["method"], content["teacher"]
    return content | {"tokenizer": tokenizer}


# All of them together -----------------------------------------------------------------------------

ALL: dict[str, Any] = {
    "network": {
        **{"depth": 5, "width": 32, "heads": 2, "rope": True, "position_codes": False},
        **{"rms_norm": True, "norm_gain": False, "qk_norm": "rms", "qk_norm_eps": 1.2e-7},
        "value_residual": True,
    },
    "routing": {"first": 2, "last": 1, "law": "grid", "drop": {0: 0.75, 3: 0.5}, "path_drop": 0.3},
    "contrastive_weight": 0.05,
    "prediction": "data",
    "internal_guidance": {"after": 2},
    "repa": {"depth": 2, "projector": "conv", "spatial_norm": 0.6},
    "checkpointing": True,
}


def train(root: Path, name: str, *words: str) -> Path:
    output = root / "runs" / name
    arguments = ["--recipe", str(root / "dit.yaml"), "--output", str(output), *words]
    assert run(train_dit.main, arguments) == 0
    return output


@pytest.fixture(scope="module", params=["reglue", "semvae"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps, and the recipe."""
    root = tmp_path_factory.mktemp(request.param)
    tiny.tokenizer("vae", request.param, request.param == "reglue").save_pretrained(root / "tok")
    content = recipe_content(str(root / "tok"), steps=4, schedule="constant", checkpoint_every=2)
    content["diffusion"] = json.loads(json.dumps(ALL))
    if request.param == "reglue":
        content["diffusion"]["network"]["vector_norm"] = "rms"
    content["sampler"] = {"steps": 2, "guidance": {"scale": 1.5, "base": "dropped_path"}}
    (root / "dit.yaml").write_text(yaml.safe_dump(content))
    train(root, "model")
    return root


def test_all_switches_together_are_resumed_to_the_same_weights(trained):
    again = trained / "runs" / "again"
    shutil.copytree(trained / "runs" / "model", again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    train(trained, "again", "--resume")
    ours, theirs = (tiny.final_tensors(trained / "runs" / name) for name in ("again", "model"))
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert ours.keys() == theirs.keys()


def awake_generator(root: Path) -> Generator:
    """Of the run, with weights by which images depend on everything."""
    generator = Generator.from_pretrained(root / "runs/model")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in generator.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    generator.save_pretrained(root / "awake")
    return Generator.from_pretrained(root / "awake")


def test_every_base_draws_other_images_by_every_way_to_ask_for_it(trained, tmp_path, capsys):
    generator = awake_generator(trained)
    assert generator.can_be_guided == dict.fromkeys(("null_label", "dropped_path", "inner_head"), 1)
    export_pipeline(generator, tmp_path / "pipeline")
    pipeline = loaded(tmp_path / "pipeline")
    drawn = {}
    for base in generator.can_be_guided:
        drawn[base] = generator.sample([0, 2], seed=3, guidance_base=base)
        images = pipeline([0, 2], seed=3, guidance_base=base, output_type="pt").images * 2 - 1
        torch.testing.assert_close(images, drawn[base], atol=1e-4, rtol=0)
        words = ["--num", "2", "--classes", "0", "2", "--seed", "3", "--guidance-base", base]
        file = tmp_path / f"{base}.npz"
        assert run(sample.main, [str(trained / "awake"), *words, "--output", str(file)]) == 0
        written = torch.from_numpy(np.load(file)["arr_0"]).permute(0, 3, 1, 2)
        assert (written.int() - to_uint8(drawn[base]).int()).abs().max() <= 1
    assert torch.equal(generator.sample([0, 2], seed=3), drawn["dropped_path"]), "its own"
    with pytest.raises(ValueError, match="guidance_base: the weak model takes its place"):
        generator.sample([0], weak=generator, guidance_base="null_label")
    words = ["--weak", str(trained / "awake"), "--guidance-base", base]
    assert (
        run(sample.main, [str(trained / "awake"), *words, "--output", str(tmp_path / "x.png")]) == 2
    )
    assert "--guidance-base: --weak takes its place; give one of them" in capsys.readouterr().err
    line = " ".join(_sampler_in_words(json.loads(generator.sampler.model_dump_json())))
    assert "guidance 1.5" in line and "away from dropped_path" in line
    for one, other in itertools.combinations(drawn.values(), 2):
        assert (one - other).abs().max() > 1e-3


def loaded(folder: Path) -> SemtokPipeline:
    """An exported pipeline, by the classes that its code was made of."""
    index = read_json(folder / "model_index.json")
    made = SemtokPipeline(
        SemtokTransformer.from_pretrained(folder / "transformer"),
        SemtokScheduler.from_pretrained(folder / "scheduler"),
        AutoencoderKL.from_pretrained(folder / "vae"),
        **{k: index[k] for k in ("id2label", "height", "width", "can_be_guided")},
    )
    made.set_progress_bar_config(disable=True)
    return made
