"""Equivariance: how often and how a step transforms, that it belongs to the step alone, and what is refused."""

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.errors import UserError
from semtok.methods.equivariance import EquivarianceConfig, View, Views
from semtok.methods.vae import VAEConfig
from semtok.objective import StepOutput
from semtok.perceptual import teacher_distance
from semtok.recipe import parse_recipe
from semtok.sampler.draws import Draws
from semtok.transforms import scaled, turned, whole_scales

LATENTS = {"probability": 1.0, "low_resolution_probability": 0.0, "scales": [0.5], "turns": [1]}
IMAGES = {"probability": 1e-9, "low_resolution_probability": 1.0, "scales": [0.5]}
WAYS = {
    "latents": LATENTS,
    "images": IMAGES,
    "neither": {**IMAGES, "low_resolution_probability": 0},
}


def views(size: tuple[int, int] = (256, 256), **settings: Any) -> list[View]:
    """Of a thousand steps, of images at stride 8."""
    of_step = Views(EquivarianceConfig(**settings), 8)
    return [of_step(size, tiny.draws(step)) for step in range(1000)]


def test_scaling_is_bilinear_and_turning_is_clockwise():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert scaled(x, (0.5, 1.0))[0, 0].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert turned(x[..., :2, :2], 1)[0, 0].tolist() == [[4, 0], [5, 1]]
    assert torch.equal(turned(turned(x, 1), 3), x) and scaled(x, (1.0, 1.0)) is x
    maps = x.expand(4, 1, 4, 4)
    each = turned(maps, torch.tensor([0, 1, 2, 3]))
    assert all(torch.equal(each[i : i + 1], turned(x, i)) for i in range(4))
    wide = x.reshape(1, 1, 2, 8).expand(2, 1, 2, 8)
    assert torch.equal(turned(wide, torch.tensor([0, 2]))[1:], turned(wide[:1], 2))


def test_only_scales_that_keep_all_sides_whole_are_used():
    every = EquivarianceConfig().scales
    assert len(every) == 24 and whole_scales(every, 32, 32) == every
    assert whole_scales(every, 8) == (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    assert whole_scales(every, 8, 4) == (0.25, 0.5, 0.75)
    assert whole_scales((0.3, 0.05), 10) == (0.3,)


def test_steps_take_the_published_ways_as_often_as_published():
    found = views()
    latents = [v for v in found if v.turns]
    images = [v for v in found if v.encodes_scaled]
    assert len(latents) / 1000 == pytest.approx(0.5, abs=0.05)
    assert len(images) / 1000 == pytest.approx(0.125, abs=0.03)
    assert all(v == View() for v in found if v not in latents and v not in images)
    assert {v.turns for v in latents} == {1, 2, 3} and {v.turns for v in images} == {0}
    assert len({v.factors for v in latents}) == 24
    assert all(v.factors[0] == v.factors[1] < 1 for v in latents + images)


def test_anisotropic_scales_are_of_latents_alone():
    found = views((256, 64), anisotropic=True, turns=(2,))
    latents = [v for v in found if v.turns]
    assert len({v.factors for v in latents}) > 80
    assert {v.factors[1] for v in latents} == {s / 8 for s in range(2, 8)}, "of 8 columns"
    assert len({v.factors[0] for v in latents}) == 24
    assert all(v.factors[0] == v.factors[1] for v in found if v.encodes_scaled)


@pytest.mark.parametrize("turned", ["together", "each"])
def test_a_step_transforms_alike_however_its_batch_is_divided(turned):
    config = EquivarianceConfig(probability=1, low_resolution_probability=0, turned=turned)
    whole, x = tiny.draws(3, num=12), torch.randn(12, 3, 32, 32)
    of_step = Views(config, 4)
    parts = [replace(whole, first=i, num=4) for i in (0, 4, 8)]
    targets = [of_step((32, 32), d).target(x[d.first : d.first + 4]) for d in parts]
    assert torch.equal(torch.cat(targets), of_step((32, 32), whole).target(x))


def test_a_step_waits_for_no_device():
    of_step = Views(EquivarianceConfig(), 8)
    elsewhere = [replace(tiny.draws(step), device=torch.device("meta")) for step in range(20)]
    assert [of_step((64, 64), d) for d in elsewhere] == [
        of_step((64, 64), tiny.draws(step)) for step in range(20)
    ]


# In training -------------------------------------------------------------------------------------


def output(way: str, method: str = "vae", **more: Any) -> tuple[Any, dict, StepOutput]:
    settings = {"name": method, "equivariance": WAYS[way]} | more
    objective = tiny.build(settings)
    objective.learners.train()
    inputs = tiny.batch(objective)
    return objective, inputs, objective.learners["autoencoder"](inputs, tiny.draws(), 0, {})


@pytest.mark.parametrize("way", WAYS)
def test_losses_compare_the_same_transform_of_latents_and_images(way):
    objective, inputs, step = output(way, perceptual="teacher", reconstruction="mse")
    learner, x = objective.learners["autoencoder"], inputs["pixels"]
    small = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
    q = learner.autoencoder.encode(small if way == "images" else x).latent_dist
    z = q.mean + q.std * tiny.draws().normal("posterior", tuple(q.mean.shape[1:]))
    target = small if way == "images" else x
    if way == "latents":
        z = torch.nn.functional.interpolate(z, scale_factor=0.5, mode="bilinear").rot90(-1, (2, 3))
        target = small.rot90(-1, (2, 3))
    x_hat = learner.autoencoder.decode(z).sample
    torch.testing.assert_close(step.carry["reconstruction"], x_hat)
    mse = step.terms["mse"]
    torch.testing.assert_close(mse.value, (x_hat - target).square().mean(dim=(1, 2, 3)))
    share = 1 if way == "neither" else 0.25
    assert mse.weight == share and step.terms["perceptual"].weight == share
    features = objective.teacher.module.features(target)
    expected = teacher_distance(objective.teacher.module, x_hat, features)
    torch.testing.assert_close(step.terms["perceptual"].value, expected)
    assert step.terms["kl"].weight == 1e-6, "it is a sum over the latent"


def test_the_discriminator_is_shown_images_as_they_were_compared():
    objective, inputs, step = output("latents", adversarial=tiny.ADVERSARIAL)
    assert objective.learners["discriminator"].target(inputs["pixels"], tiny.draws()).shape[-1] == 8
    critic = objective.learners["discriminator"]
    shown = []
    critic.discriminator.register_forward_pre_hook(lambda _, args: shown.append(args[0]))
    critic(inputs, tiny.draws(), 0, step.carry)
    target = View((0.5, 0.5), 1).target(inputs["pixels"])
    assert torch.equal(shown[0], target) and torch.equal(shown[1], step.carry["reconstruction"])


def test_an_alignment_sees_latents_as_the_encoder_gave_them():
    values = {}
    for way in WAYS:
        objective, _, step = output(way, "send_vae")
        values[way] = step.terms["alignment"].value
        assert objective.learners["autoencoder"].standardiser.num_updates == 1
    assert torch.equal(values["latents"], values["neither"])
    assert not torch.equal(values["images"], values["neither"])


def test_without_the_setting_and_in_a_plain_step_losses_are_bit_for_bit_the_same():
    plain = tiny.build({"name": "vae"})
    plain.learners.train()
    first = plain.learners["autoencoder"](tiny.batch(plain), tiny.draws(), 0, {})
    _, _, second = output("neither")
    for name, term in first.terms.items():
        assert torch.equal(term.value, second.terms[name].value)
        assert term.weight == second.terms[name].weight


def test_a_run_trains_names_what_is_left_out_and_resumes_as_if_it_had_not_stopped(tmp_path, capsys):
    settings = {"name": "send_vae", "equivariance": {"turned": "each", "scales": [0.5, 0.7, 0.75]}}
    settings |= {"adversarial": tiny.ADVERSARIAL, "decoder_noise": {"law": "mixed", "strength": 1}}
    recipe = parse_recipe(tiny.content(settings, accumulate=2, steps=4, checkpoint_every=2), "tiny")
    train_tokenizer(recipe, tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("note: ") == 1
    used = "note: method.equivariance.scales: 2 are used, 0.5, 0.75; "
    assert used + "left out, as they don't keep a grid of 4x4 whole: 0.7\n" in printed
    whole = tiny.final_tensors(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in whole.values())
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    train_tokenizer(recipe, tmp_path / "run", resume=True)
    again = tiny.final_tensors(tmp_path / "run")
    assert whole.keys() == again.keys() and all(torch.equal(whole[n], again[n]) for n in whole)


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"scales": []}, "scales: none; expected factors above 0, up to 1"),
        ({"scales": [0.5, 1.5]}, r"scales: \[1.5\]; expected factors above 0, up to 1"),
        ({"turns": []}, r"turns: none; pass \[0\] to turn nothing"),
        ({"scales": [1], "turns": [0]}, "change nothing"),
        ({"probability": 1}, "takes no effect with probability 1; pass 0 for it"),
        ({"scales": [1]}, r"takes no effect with scales \[1\]"),
        ({"turned": "each", "turns": [2]}, "turned: each takes no effect"),
        ({"turned": "each", "anisotropic": True}, "images of several shapes"),
    ],
)
def test_settings_that_take_no_effect_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        parse_recipe(tiny.content({"name": "vae", "equivariance": settings}), "tiny")


@pytest.mark.parametrize(
    ("method", "size", "words"),
    [
        (
            {"equivariance": {}},
            (16, 32),
            r"turns: \[1, 3\] need square images, and these are 16x32",
        ),
        ({"equivariance": {"scales": [0.3]}}, 16, "scales: none leaves images of 16x16 whole"),
        (
            {"equivariance": {}, "adversarial": tiny.ADVERSARIAL},
            16,
            "too many for images of 4x4, which these method.equivariance.scales make",
        ),
        (
            {"name": "send_vae", "mapper": {"patch_size": 4}, "equivariance": {}},
            16,
            "none leaves images of 16x16 whole on a grid of 16 pixels",
        ),
    ],
)
def test_images_that_can_not_be_transformed_are_refused_by_name(method, size, words):
    content = tiny.content({"name": "vae"} | method)
    content["data"]["size"] = size
    if isinstance(size, tuple):
        with pytest.raises(ValueError, match=words):
            Views(VAEConfig(vae="tiny", **method).equivariance, 4).check(size)
        return
    with pytest.raises(UserError, match=words):
        tiny.build({"name": "vae"} | method)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lpips_net": "alex"}, "lpips_net: alex needs images of at least 31 pixels a side"),
        ({"equivariance": {}}, "some of 4x4, which these method.equivariance.scales make"),
    ],
)
def test_images_too_small_for_lpips_are_refused_before_the_first_step(settings, words, monkeypatch):
    monkeypatch.setattr("semtok.methods.image_losses.LPIPS", lambda net: torch.nn.Identity())
    tiny.build({"name": "vae", "perceptual": "lpips"})
    with pytest.raises(UserError, match=words):
        tiny.build({"name": "vae", "perceptual": "lpips"} | settings)


def number(draws: Draws) -> float:
    return draws.number_of_step("x")


def test_numbers_of_a_step_are_those_of_its_seed_alone():
    first = number(tiny.draws(3))
    assert first == number(replace(tiny.draws(3, num=8), first=4, num=2)) != number(tiny.draws(4))
    assert 0 <= first < 1
