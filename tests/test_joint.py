"""Joint diffusion: every composite with every option, parts that lead, weights, alignment, guidance."""

import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import Tensor

import tiny
from semtok import Generator, Tokenizer
from semtok.commands import sample, train_dit
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.diffusion.diffusion_config import (
    DiffusionConfig,
    REPAConfig,
    build_network,
    resolve_defaults,
)
from semtok.diffusion.learner import DiTLearner
from semtok.diffusion.repa import repa_loss
from semtok.diffusion.training import DiffusionObjective
from semtok.objective import Batch
from semtok.recipe import parse_recipe
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.sampling import Method, SamplerConfig, integrate, velocity_function
from semtok.sampler.transport import Schedule
from semtok.settings import parse
from semtok.teachers import Teacher, TeacherConfig, alignment_loss
from tiny import SEMANTICS, tokenizer

SHAPE = DiTArchitecture(depth=2, width=32, heads=2, rms_norm=True, swiglu=True, rope=True)


def objective(
    own: Tokenizer, teacher: Teacher | None = None, **settings: Any
) -> DiffusionObjective:
    torch.manual_seed(0)
    return DiffusionObjective(
        DiffusionConfig(network=SHAPE, **settings),
        own,
        class_names=["a", "b", "c"],
        image_size=(16, 16),
        sampler=SamplerConfig(steps=3, guidance=GuidanceConfig(scale=1.5)),
        teacher=teacher,
    )


def batch(num: int = 8) -> Batch:
    images = tiny.batch_of_shapes(num)
    return Batch(images, torch.arange(num) % 3)


def total(learner: DiTLearner, inputs: dict[str, Any], step: int = 0) -> Tensor:
    output = learner(inputs, tiny.draws(step, len(inputs["labels"])), 0, {})
    return sum(term.weight * term.value.mean() for term in output.terms.values())


# Every combination -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texture", "semantic", "with_global", "lead", "repa"),
    [
        *product(
            ("vae", "send_vae"),
            ("none", "redi", "reglue", "semvae"),
            (False, True),
            (0.0, 0.3),
            (False, True),
        ),
        # Its latents differ from these two's in their values alone.
        ("va_vae", "none", False, 0.0, True),
        ("va_vae", "semvae", True, 0.3, True),
    ],
)
def test_every_combination_learns_and_samples(texture, semantic, with_global, lead, repa):
    own = tokenizer(texture, semantic, with_global)
    leads = dict.fromkeys(own.spec.names[1:], lead)
    alignment = REPAConfig(projector_width=16, with_global=with_global) if repa else False
    teacher = Teacher(TeacherConfig()) if repa and own.teacher is None else None
    stage = objective(own, teacher, leads=leads, repa=alignment)
    learner = stage.learners["dit"]
    assert len(learner.network.timed_parts) == (2 if lead and leads else 0)
    inputs = stage.prepare(batch())
    optimiser = torch.optim.AdamW(learner.parameters(), lr=3e-3)
    with torch.no_grad():
        before = total(learner, inputs)
    for step in range(5):
        loss = total(learner, inputs, step % 2)
        assert loss.isfinite()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert total(learner, inputs) < before
    generator = stage.generator(learner.network)
    images = generator.sample([0, 2], seed=1)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


# What a tokenizer asks for -----------------------------------------------------------------------


def test_the_papers_ways_need_no_flags():
    reglue = resolve_defaults(DiffusionConfig(network=SHAPE), tokenizer("vae", "reglue", True))
    assert reglue.leads == {"texture": 0.0, "semantic": 0.0, "global": 0.0}
    assert reglue.loss_weights == {"texture": 1.0, "semantic": 1.0, "global": 0.03}
    assert reglue.repa == REPAConfig(weight=0.5, with_global=True) and reglue.cosine_weight == 0
    assert [reglue.repa.depth_in(n) for n in (12, 24, 28, 6, 1)] == [4, 8, 8, 2, 1]

    semvae = resolve_defaults(DiffusionConfig(network=SHAPE), tokenizer("vae", "semvae", False))
    assert semvae.leads == {"texture": 0.0, "semantic": 0.3} and semvae.cosine_weight == 1.0
    # One mean over all channels, with weight 2 on the semantic ones: here 4 of 8.
    assert semvae.loss_weights == {"texture": 0.5, "semantic": 1.0}
    assert semvae.repa == REPAConfig(weight=1.0, depth=2)

    redi = resolve_defaults(DiffusionConfig(network=SHAPE), tokenizer("vae", "redi", False))
    assert redi.repa is False and redi.loss_weights == {"texture": 1.0, "semantic": 1.0}
    plain = resolve_defaults(DiffusionConfig(network=SHAPE), tokenizer("vae", "none", False))
    assert plain.repa is False and plain.leads == {"texture": 0.0}

    own = DiffusionConfig(network=SHAPE, leads={"semantic": 0.1}, repa=False, cosine_weight=0.0)
    changed = resolve_defaults(own, tokenizer("vae", "semvae", False))
    assert changed.leads["semantic"] == 0.1 and not changed.repa and changed.cosine_weight == 0
    assert changed.loss_weights["semantic"] == 1.0


def test_alignment_needs_a_teacher_and_a_global_part_where_it_says_so():
    plain = tokenizer("vae", "none", False)
    with pytest.raises(ValueError, match="diffusion.repa needs a teacher; give teacher.name="):
        objective(plain, repa=REPAConfig())
    with pytest.raises(ValueError, match="diffusion.repa.with_global: .* no global part"):
        objective(plain, Teacher(TeacherConfig()), repa=REPAConfig(with_global=True))


def test_one_forward_of_the_teacher_serves_tokenizer_and_alignment(monkeypatch):
    own = tokenizer("vae", "reglue", True)
    calls = []
    original = Teacher.features
    monkeypatch.setattr(
        Teacher, "features", lambda self, *a, **k: calls.append(self) or original(self, *a, **k)
    )
    objective(own).prepare(batch(2))
    assert calls == [own.teacher]
    calls.clear()
    objective(own, repa=False).prepare(batch(2))
    assert calls == [own.teacher]
    other = Teacher(TeacherConfig(layers=(-2,)))
    calls.clear()
    objective(own, other).prepare(batch(2))
    assert calls == [own.teacher, other]


# Losses ------------------------------------------------------------------------------------------


def test_weights_change_at_the_steps_that_the_recipe_names():
    text = {"network": "SiT-T/2", "loss_weights": {"semantic": {0: 1.0, 250: 0.5, 500: 0.25}}}
    config = parse(DiffusionConfig, text, "recipe.yaml")
    weights = [config.loss_weight("semantic", step) for step in (0, 249, 250, 499, 500, 10**6)]
    assert weights == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert config.loss_weight("texture", 300) == 1.0
    assert parse(
        DiffusionConfig, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), ""
    )
    with pytest.raises(Exception, match="weights by step begin with step 0"):
        parse(DiffusionConfig, text | {"loss_weights": {"semantic": {250: 0.5}}}, "recipe.yaml")
    stage = objective(tokenizer("vae", "redi", False), loss_weights={"semantic": {0: 1.0, 3: 0.25}})
    learner, inputs = stage.learners["dit"], stage.prepare(batch())
    seen = [
        learner(inputs, tiny.draws(0, 8), step, {}).terms["velocity/semantic"].weight
        for step in (2, 3)
    ]
    assert seen == [1.0, 0.25]


@pytest.mark.parametrize("name", ["semantic", "global"])
def test_a_part_without_weight_leaves_its_output_alone(name):
    stage = objective(tokenizer("vae", "reglue", True), loss_weights={name: 0.0}, cosine_weight=1.0)
    learner = stage.learners["dit"]
    inputs, final = stage.prepare(batch()), learner.network.final
    for layer in (final.linear, *final.vectors.values()):  # something to be left alone
        torch.nn.init.normal_(layer.weight, std=0.1)
    channels = 0 if name == "global" else 4
    rows = final.linear.weight.detach().clone()
    vector = final.vectors["global"].weight.detach().clone()
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        optimiser.zero_grad()
        total(learner, inputs, step).backward()
        optimiser.step()
    changed = (final.linear.weight != rows).any(dim=1)  # by channel, as the patch is one cell
    texture = changed[: len(changed) - 4]
    assert texture.all(), "the texture learns"
    if name == "semantic":
        assert not changed[-channels:].any()
        assert not torch.equal(final.vectors["global"].weight, vector)
    else:
        assert changed[-4:].all() and torch.equal(final.vectors["global"].weight, vector)


def test_the_cosine_is_that_of_all_spatial_channels_together():
    stage = objective(tokenizer("vae", "reglue", True), cosine_weight=1.0)
    learner = stage.learners["dit"]
    velocity = {
        n: torch.randn(8, *shape) for n, shape in (("texture", (4, 4, 4)), ("semantic", (4, 4, 4)))
    }
    velocity["global"] = torch.randn(8, 128)
    predicted = {n: torch.randn_like(v) for n, v in velocity.items()}
    terms = learner._velocity_terms(predicted, velocity, 0)
    a, b = (torch.cat([x["texture"], x["semantic"]], dim=1)[3] for x in (predicted, velocity))
    by_cell = [
        F.cosine_similarity(a[:, i, j], b[:, i, j], dim=0) for i in range(4) for j in range(4)
    ]
    torch.testing.assert_close(terms["cosine"].value[3], 1 - torch.stack(by_cell).mean())


def test_no_weight_on_any_spatial_part_leaves_no_cosine():
    stage = objective(
        tokenizer("vae", "reglue", True),
        loss_weights={"texture": 0.0, "semantic": {0: 1.0, 3: 0.0}},
        cosine_weight=1.0,
    )
    learner, inputs = stage.learners["dit"], stage.prepare(batch())
    terms = [learner(inputs, tiny.draws(0, 8), step, {}).terms for step in (2, 3)]
    assert "cosine" in terms[0] and "cosine" not in terms[1]


def test_leads_further_apart_than_the_time_axis_are_refused():
    with pytest.raises(ValueError, match="diffusion.leads: .* further apart than 1"):
        objective(tokenizer("vae", "redi", False), leads={"semantic": 0.7, "texture": -0.5})


def test_alignment_with_the_squared_error_by_hand():
    a, b = torch.randn(2, 3, 5, 2, 2)
    cosine = 1 - F.cosine_similarity(a, b, dim=1).mean(dim=(1, 2))
    expected = (cosine + (a - b).square().mean(dim=(1, 2, 3))) / 2
    torch.testing.assert_close(alignment_loss(a, b, "cosine_mse"), expected)
    torch.testing.assert_close(alignment_loss(a, b), cosine)


def test_the_global_token_is_aligned_as_one_more_position():
    own = tokenizer("vae", "reglue", True)
    stage = objective(own, repa=REPAConfig(projector_width=16, with_global=True, depth=1))
    learner, inputs = stage.learners["dit"], stage.prepare(batch())
    hidden = torch.randn(8, 1 + 16, 32)
    ours = repa_loss(
        stage.config.repa,
        learner.projector,
        hidden,
        inputs["features"],
        grid=(4, 4),
        vectors=["global"],
        kept=None,
    )
    tokens = learner.projector(hidden)
    patches = F.interpolate(
        inputs["features"].patches[-1], size=(4, 4), mode="bilinear", antialias=True
    )
    targets = torch.cat([inputs["features"].pooled[:, None], patches.flatten(2).mT], dim=1)
    expected = 1 - F.cosine_similarity(tokens, targets, dim=2).mean(dim=1)
    torch.testing.assert_close(ours, expected)


# Parts that lead ---------------------------------------------------------------------------------


class Asynchronous(Schedule):
    """Takes the general way though no part leads."""

    is_synchronous = False


METHODS = get_args(Method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("split", [True, False])
def test_without_a_lead_the_asynchronous_code_is_the_synchronous_to_the_last_bit(method, split):
    if method == "sde" and not split:
        pytest.skip("goes with the other solvers")
    own = tokenizer("vae", "reglue", True)
    network = build_network(
        resolve_defaults(DiffusionConfig(network=SHAPE), own), own.spec, num_classes=3
    )
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    names, labels = own.spec.names, torch.tensor([0, 1])
    start = {"texture": torch.randn(2, 4, 4, 4), "semantic": torch.randn(2, 4, 4, 4)}
    start["global"] = torch.randn(2, 128)
    config = SamplerConfig(
        method=method, steps=5, guidance=GuidanceConfig(scale=1.5), split_at_borders=split
    )
    ends = []
    for kind in (Schedule, Asynchronous):
        schedule = kind(dict.fromkeys(names, 0.0))
        generator = torch.Generator().manual_seed(3)
        velocity = velocity_function(network, labels, schedule, config.guidance)
        with torch.no_grad():
            end = integrate(
                velocity,
                start,
                config,
                schedule=schedule,
                noise=lambda shape, g=generator: torch.randn(2, *shape, generator=g),
            )
        ends.append(end)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in names)


def test_without_a_lead_training_is_the_same_to_the_last_bit():
    losses = []
    for kind in (Schedule, Asynchronous):
        stage = objective(tokenizer("vae", "semvae", True), leads={"semantic": 0.0})
        learner = stage.learners["dit"]
        learner.schedule = kind(dict(stage.schedule.starts))
        losses.append(total(learner, stage.prepare(batch())))
    assert torch.equal(*losses)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "leads",
    [{"semantic": 0.3}, {"semantic": 0.7, "global": 0.2}, {"texture": 0.25}, {"global": 1.0}],
)
def test_no_part_moves_before_its_time_or_after_it(method, leads):
    names = ("texture", "semantic", "global")
    schedule = Schedule.from_leads(dict.fromkeys(names, 0.0) | leads)
    start = {n: torch.randn(1, 2, 3, 3) for n in names}
    seen: list[tuple[float, dict[str, Tensor]]] = []
    generator = torch.Generator().manual_seed(0)
    integrate(
        lambda state, *_: {n: torch.ones_like(x) for n, x in state.items()},
        start,
        SamplerConfig(method=method, steps=7),
        schedule=schedule,
        noise=lambda shape: torch.randn(1, *shape, generator=generator),
        watch=lambda clock, state: seen.append((clock, state)),
    )
    assert seen[0][0] == 0 and seen[-1][0] == pytest.approx(schedule.length)
    for name in names:
        begin, end = schedule.starts[name], schedule.starts[name] + 1
        before = [state[name] for clock, state in seen if clock <= begin + 1e-9]
        after = [state[name] for clock, state in seen if clock >= end - 1e-9]
        assert before and all(torch.equal(x, start[name]) for x in before)
        assert after and all(torch.equal(x, after[-1]) for x in after)
        if method != "sde":  # each part goes through exactly one unit of time
            torch.testing.assert_close(after[-1], start[name] + 1, atol=1e-5, rtol=0)


def test_the_network_is_told_each_distinct_time_once():
    own = tokenizer("vae", "reglue", True)
    for leads, expected in (
        ({}, ()),
        ({"semantic": 0.3}, ("semantic", "texture")),
        ({"semantic": 0.3, "global": 0.3}, ("semantic", "texture")),
        ({"texture": 0.2}, ("texture", "semantic")),
    ):
        config = resolve_defaults(DiffusionConfig(network=SHAPE, leads=leads), own)
        network = build_network(config, own.spec, num_classes=3)
        assert network.timed_parts == expected
        widths = {e.mlp[2].out_features for e in network.time_embed.values()}
        assert widths == {32 // max(1, len(expected))}
    three = resolve_defaults(
        DiffusionConfig(network=SHAPE, leads={"semantic": 0.3, "global": 0.1}), own
    )
    with pytest.raises(ValueError, match="width 32 is not divisible among 3 times"):
        build_network(three, own.spec, num_classes=3)


def test_training_times_pass_through_the_three_phases():
    stage = objective(tokenizer("vae", "semvae", False), leads={"semantic": 0.3})
    seen: list[dict[str, Tensor]] = []
    network = stage.averaged_module()
    original = network.forward
    network.forward = lambda x, times, y, **k: seen.append(times) or original(x, times, y, **k)
    inputs = stage.prepare(batch(64))
    for step in range(8):
        total(stage.learners["dit"], inputs, step)
    texture, semantic = (torch.cat([t[n] for t in seen]) for n in ("texture", "semantic"))
    alone, both, last = texture == 0, (texture > 0) & (semantic < 1), semantic == 1
    assert alone.any() and both.any() and last.any()
    torch.testing.assert_close(semantic[both] - texture[both], torch.full((int(both.sum()),), 0.3))
    assert bool((alone | both | last).all()) and texture.max() <= 1 and semantic.min() >= 0


# Guidance ----------------------------------------------------------------------------------------


def test_scales_and_intervals_are_of_a_parts_own_time():
    guidance = GuidanceConfig(
        scale={"texture": 2.0, "semantic": 3.0, "global": 1.0},
        interval={"semantic": (0.5, 0.9), "texture": (0.0, 0.4)},
    )
    assert guidance.active({"texture": 0.3, "semantic": 0.6, "global": 0.3}) == {
        "texture": 2.0,
        "semantic": 3.0,
    }
    assert guidance.active({"texture": 0.41, "semantic": 0.95, "global": 0.5}) == {}
    everywhere = GuidanceConfig(scale=2.0, interval={"semantic": (0.5, 0.9)})
    assert everywhere.active({"texture": 0.0, "semantic": 0.0}) == {"texture": 2.0}
    with pytest.raises(ValueError, match="expected 0 <= begin <= end <= 1"):
        GuidanceConfig(interval={"semantic": (0.9, 0.5)})
    with pytest.raises(ValueError, match=r"sampler.guidance.interval: no part \['semantc'\]"):
        DiffusionObjective(
            DiffusionConfig(network=SHAPE),
            tokenizer("vae", "redi", False),
            class_names=["a"],
            image_size=(16, 16),
            sampler=SamplerConfig(guidance=GuidanceConfig(interval={"semantc": (0.0, 1.0)})),
        )


# The commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A generator in SemVAE's latents, trained by the commands for a few steps."""
    root = tmp_path_factory.mktemp("joint")
    recipe = tiny.content(SEMANTICS["semvae"] | {"texture": "demo"})
    train_tokenizer(parse_recipe(recipe, "tiny"), root / "tok")
    recipe = tiny.content()
    del recipe["method"], recipe["teacher"]
    recipe["diffusion"] = {"network": SHAPE.model_dump()}
    recipe["sampler"] = {"method": "euler", "steps": 6}
    (root / "dit.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ["--recipe", str(root / "dit.yaml"), "--tokenizer", str(root / "tok")]
    assert run(train_dit.main, [*arguments, "--output", str(root / "run")]) == 0
    return root / "run"


def test_a_generator_leads_by_its_tokenizers_default_and_survives_the_disk(model, tmp_path):
    generator = Generator.from_pretrained(model)
    assert generator.schedule.length == pytest.approx(1.3)
    assert generator.network.timed_parts == ("semantic", "texture")
    assert "loss/alignment" in (model / "metrics.jsonl").read_text()
    latents = generator.sample_latents([0, 1], seed=4)
    assert list(latents) == ["texture", "semantic"]
    generator.save_pretrained(tmp_path / "copy")
    again = Generator.from_pretrained(tmp_path / "copy").sample([0, 1], seed=4)
    assert torch.equal(again, generator.sample([0, 1], seed=4))


def test_an_interrupted_joint_run_ends_with_the_same_weights(model, tmp_path):
    root = model.parent
    arguments = ["--recipe", str(root / "dit.yaml"), "--tokenizer", str(root / "tok")]
    arguments += ["--output", str(tmp_path / "run"), "train.checkpoint_every=3"]
    assert run(train_dit.main, arguments) == 0
    shutil.rmtree(sorted((tmp_path / "run/checkpoints").iterdir())[-1])
    assert run(train_dit.main, [*arguments, "--resume"]) == 0
    ours, theirs = tiny.final_tensors(tmp_path / "run"), tiny.final_tensors(model)
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


def test_sampling_needs_no_teacher(model, monkeypatch):
    def refuse(*_: Any) -> None:
        raise AssertionError("sampling decodes the texture alone")

    monkeypatch.setattr("semtok.methods.composite.Teacher", refuse)
    assert Generator.from_pretrained(model).sample([0]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_strip_shows_both_parts_over_time(model, tmp_path, method, capsys):
    output = tmp_path / "strip.png"
    arguments = ["--classes", "0", "1", "2", "--strip", "5", "--method", method]
    assert run(sample.main, [str(model), *arguments, "--output", str(output)]) == 0
    assert "sampling over time of 3 images" in capsys.readouterr().out
    width, height = Image.open(output).size
    assert 0 < width - 4 - 5 * 100 < 204, "labels, and five columns"
    assert 0 < height - 4 - 6 * 100 < 30, "times, and two rows an image"
    bad = [str(model), "--strip", "1", "--output", str(tmp_path / "x.png")]
    assert run(sample.main, bad) == 2
    assert "--strip: expected at least 2 columns" in capsys.readouterr().err


def test_a_strip_ends_with_the_sample_and_starts_with_the_noise(model):
    generator = Generator.from_pretrained(model)
    seen: list[tuple[float, dict[str, Tensor]]] = []
    latents = generator.sample_latents([1], watch=lambda c, s: seen.append((c, s)))
    assert all(torch.equal(seen[-1][1][name], latents[name]) for name in latents)
    third = next(state for clock, state in seen if clock == pytest.approx(0.3))
    assert torch.equal(third["texture"], seen[0][1]["texture"])
    assert not torch.equal(third["semantic"], seen[0][1]["semantic"])


def test_a_weak_model_must_have_the_same_codes(model):
    main, weak = Generator.from_pretrained(model), Generator.from_pretrained(model)
    strong = main.sampler.model_copy(update={"guidance": GuidanceConfig(scale=1.5)})
    assert main.sample([0], weak=weak, sampler=strong).isfinite().all()
    with torch.no_grad():
        next(weak.tokenizer.coder.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="another tokenizer's latents"):
        main.sample([0], weak=weak, sampler=strong)


def test_guidance_of_what_a_model_has_not_is_refused_beside_a_weak_model_too(model):
    main = Generator.from_pretrained(model)
    for guidance, message in (
        ({"scale": {"semantc": 2.0}}, r"sampler.guidance.scale: no part \['semantc'\]"),
        ({"scale": 2.0, "num_channels": 99}, "num_channels: the texture has 8 channels, not 99"),
    ):
        sampler = main.sampler.model_copy(update={"guidance": GuidanceConfig(**guidance)})
        for weak in (None, main):
            with pytest.raises(ValueError, match=message):
                main.sample([0], weak=weak, sampler=sampler)


def test_what_the_recipe_refuses_sampling_refuses_too(model, tmp_path, capsys):
    copy = tmp_path / "copy"
    Generator.from_pretrained(model).save_pretrained(copy)
    config = (copy / "config.json").read_text()
    (copy / "config.json").write_text(
        config.replace('"split_at_borders": true', '"split_at_borders": false')
    )
    output = ["--num", "1", "--output", str(tmp_path / "x.png")]
    words = [str(copy), "--method", "sde", "--num", "1", "--output", str(tmp_path / "sde.png")]
    assert run(sample.main, words) == 0, "no option could change it"
    told = "note: sampler.split_at_borders of this model does not go with sde"
    assert told in capsys.readouterr().err
    (copy / "config.json").write_text(
        config.replace('"class_dropout": 0.1', '"class_dropout": 0.0')
    )
    assert run(sample.main, [str(copy), "--guidance", "2", *output]) == 2
    assert "diffusion.class_dropout=0 never trains" in capsys.readouterr().err
    assert run(sample.main, [str(copy), *output]) == 0


def test_other_image_sizes_than_the_tokenizers_are_told(model, tmp_path, capsys):
    root = model.parent
    arguments = ["--recipe", str(root / "dit.yaml"), "--tokenizer", str(root / "tok")]
    arguments += ["--output", str(tmp_path / "run"), "data.size=24", "train.steps=2"]
    assert run(train_dit.main, arguments) == 0
    assert "was trained on images of 16x16, these are 24x24" in capsys.readouterr().out
