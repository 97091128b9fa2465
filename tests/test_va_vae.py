"""What is particular to VA-VAE: the VF loss, its adaptive weight, the projection and the file that it starts from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import tiny
from semtok import UserError
from semtok.commands.train_tokenizer import check_tokenizer, plan_tokenizer, train_tokenizer
from semtok.methods.va_vae import VAVAEObjective, direction_loss, distance_loss
from semtok.recipe import parse_recipe

WIDTH = 128  # of the embedded teacher


def built(alignment: dict[str, Any] | None = None, **method: Any) -> VAVAEObjective:
    objective = tiny.build({"name": "va_vae", "alignment": alignment or {}} | method)
    objective.learners.train()
    return objective


def step(objective: VAVAEObjective, number: int = 0):
    learner = objective.learners["autoencoder"]
    return learner(tiny.batch(objective), tiny.draws(number), 0, {})


# The loss ----------------------------------------------------------------------------------------


def test_similarities_are_compared_pair_by_pair_beyond_the_margin():
    z, f = torch.randn(2, 3, 2, 3), torch.randn(2, 5, 2, 3)
    for margin in (0.0, 0.3):
        expected = torch.zeros(2)
        for image in range(2):
            for i in range(6):
                for j in range(6):
                    ours, theirs = (
                        F.cosine_similarity(x.flatten(2)[image, :, i], x.flatten(2)[image, :, j], 0)
                        for x in (z, f)
                    )
                    expected[image] += F.relu((ours - theirs).abs() - margin) / 36
        torch.testing.assert_close(distance_loss(z, f, margin), expected)


def test_similarities_do_not_ask_for_directions_and_directions_do():
    f = torch.randn(2, 6, 4, 4)
    turn, _ = torch.linalg.qr(torch.randn(6, 6))
    turned = 3 * torch.einsum("ij,bjhw->bihw", turn, f)
    assert distance_loss(turned, f, 0).max() < 1e-5
    assert direction_loss(turned, f, 0).min() > 0.1
    assert direction_loss(3 * f, f, 0).max() < 1e-6
    torch.testing.assert_close(direction_loss(-f, f, 0.5), torch.full((2,), 1.5))


def test_what_lies_within_the_margins_is_left_alone():
    f = torch.randn(2, 6, 4, 4)
    z = (f + 0.05 * torch.randn_like(f)).requires_grad_()
    (distance_loss(z, f, 0.25) + direction_loss(z, f, 0.5)).sum().backward()
    assert not z.grad.any()


def test_both_terms_have_the_weights_and_margins_of_the_settings():
    settings = {"distance_weight": 0.5, "distance_margin": 0.1, "cosine_weight": 2.0}
    objective = built({"adaptive": False, "weight": 3.0, "cosine_margin": 0.2} | settings)
    output, learner = step(objective), objective.learners["autoencoder"]
    inputs = tiny.batch(objective)
    _, z, _ = learner.autoencode(inputs["pixels"], tiny.draws())
    z, f = learner.comparable(z, inputs["features"].patches[-1])
    assert z.shape == f.shape == (4, WIDTH, 4, 4), "on the latents' grid, of the teacher's width"
    expected = 0.5 * distance_loss(z, f, 0.1) + 2 * direction_loss(z, f, 0.2)
    torch.testing.assert_close(output.terms["alignment"].value, expected)
    assert output.terms["alignment"].weight == 3.0
    torch.testing.assert_close(
        output.metrics["alignment_distance"], distance_loss(z, f, 0.1).mean().detach()
    )


@pytest.mark.parametrize(
    ("side", "width", "bias"), [("latents", WIDTH, False), ("teacher", 4, True)]
)
def test_either_side_is_projected_to_the_width_of_the_other(side, width, bias):
    objective = built({"projection": side})
    learner = objective.learners["autoencoder"]
    assert (learner.projection.bias is not None) == bias
    z, f = torch.randn(2, 4, 4, 4), torch.randn(2, WIDTH, 8, 8)
    ours, theirs = learner.comparable(z, f)
    assert ours.shape == theirs.shape == (2, width, 4, 4)
    assert torch.equal(ours, z) == (side == "teacher")
    step(objective).terms["alignment"].value.mean().backward()
    moved = {n for n, p in learner.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("autoencoder.encoder.") for n in moved)
    assert not any(".decoder." in n or "post_quant" in n for n in moved)
    assert "projection.weight" in moved and all(
        p.grad is None for p in objective.teacher.module.parameters()
    )


# Its weight --------------------------------------------------------------------------------------


def gradient_norms(objective: VAVAEObjective) -> tuple[float, float]:
    """At the encoder's last layer: of what compares images, and of the weighted VF loss."""
    terms = step(objective).terms
    last = objective.averaged_module().encoder.conv_out.weight
    images = objective.learners["autoencoder"].images_compared(terms)
    aligned = terms["alignment"].weight * terms["alignment"].value.mean()
    norms = [torch.autograd.grad(t, last, retain_graph=True)[0].norm() for t in (images, aligned)]
    return norms[0].item(), norms[1].item()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_weight_balances_the_gradients_at_the_encoders_last_layer(checkpointing):
    settings = {"perceptual": "teacher", "gradient_checkpointing": checkpointing}
    images, aligned = gradient_norms(built({"weight": 0.5}, **settings))
    assert aligned == pytest.approx(0.5 * images, rel=1e-2) and images > 1e-4


def test_the_weight_does_not_depend_on_whether_losses_are_means_or_sums():
    """A published weight stays what it is: the whole loss is multiplied alike."""
    means, sums = built(), built(reconstruction_weight=768.0)
    ratio = step(sums).terms["alignment"].weight / step(means).terms["alignment"].weight
    assert ratio.item() == pytest.approx(768, rel=1e-3)


def test_the_weight_is_capped():
    capped = built({"max_adaptive": 1e-3, "weight": 1.0})
    assert step(capped).terms["alignment"].weight.item() == pytest.approx(1e-3)


def test_the_loss_is_float32_in_half_precision():
    objective = built()
    exact = step(objective).terms["alignment"]
    with torch.autocast("cpu", torch.bfloat16):
        half = step(objective).terms["alignment"]
    assert half.value.dtype == torch.float32 and half.value.shape == (4,)
    torch.testing.assert_close(half.value, exact.value, atol=0.02, rtol=0)
    torch.testing.assert_close(half.weight, exact.weight, atol=0, rtol=0.1)


# Noise, as Send-VAE's ----------------------------------------------------------------------------


def test_noise_is_that_of_send_vae_and_by_default_there_is_none():
    objective = built()
    learner, inputs = objective.learners["autoencoder"], tiny.batch(objective)
    _, z, _ = learner.autoencode(inputs["pixels"], tiny.draws())
    assert torch.equal(learner.standardiser(z), z), "latents as they are"
    pure = built({"noise": "fixed", "noise_level": 1.0})
    first, second = (step(pure).terms["alignment"].value for _ in range(2))
    assert torch.equal(first, second)
    step(pure).terms["alignment"].value.mean().backward()
    last = pure.averaged_module().encoder.conv_out.weight
    assert last.grad is None or not last.grad.any(), "all of the latents is lost in the noise"
    noised = built({"noise": "uniform"})
    step(noised)
    assert noised.learners["autoencoder"].standardiser.num_updates == 1
    with pytest.raises(UserError, match="method.alignment: noise_level is given exactly when"):
        built({"noise_level": 0.5})


# The file that the projection starts from --------------------------------------------------------


def content(weights: Path, **alignment: Any) -> dict[str, Any]:
    return tiny.content({"name": "va_vae", "alignment": {"weights": str(weights)} | alignment})


def test_the_projection_starts_from_a_published_file_or_from_a_run(tmp_path):
    published = torch.randn(WIDTH, 4, 1, 1)
    state = {"linear_proj.weight": published, "encoder.conv_in.bias": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "last.ckpt")
    recipe = parse_recipe(content(tmp_path / "last.ckpt"), "tiny")
    first = check_tokenizer(recipe, tmp_path / "run").objective.learners["autoencoder"]
    assert torch.equal(first.projection.weight, published)

    train_tokenizer(recipe, tmp_path / "run")
    checkpoint = next((tmp_path / "run" / "checkpoints").iterdir()) / "model.safetensors"
    trained = load_file(checkpoint)["learners.autoencoder.projection.weight"]
    assert not torch.equal(trained, published)
    again = parse_recipe(content(checkpoint), "tiny")
    second = check_tokenizer(again, tmp_path / "next").objective.learners["autoencoder"]
    assert torch.equal(second.projection.weight, trained)

    joint = tmp_path / "joint.safetensors"  # of REPA-E, which has the VAE's learner in its own
    save_file({"learners.autoencoder.vae.projection.weight": published}, joint)
    third = check_tokenizer(parse_recipe(content(joint), "tiny"), tmp_path / "third").objective
    assert torch.equal(third.learners["autoencoder"].projection.weight, published)

    (tmp_path / "last.ckpt").unlink()
    resumed = check_tokenizer(recipe, tmp_path / "run", resume=True)
    assert resumed.objective.learners["autoencoder"].projection.weight.shape == published.shape
    export = load_file(tmp_path / "run/export/vae/diffusion_pytorch_model.safetensors")
    assert not any("projection" in name for name in export), "only training reads it"
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]
    assert {"psnr", "alignment_cosine", "alignment_distance"} <= measured.keys()


@pytest.mark.parametrize(
    ("state", "alignment", "message"),
    [
        ({"encoder.weight": torch.zeros(2)}, {}, "holds no projection"),
        ({"linear_proj.weight": torch.zeros(9, 4, 1, 1)}, {}, r"of another shape .*\(9, 4, 1, 1\)"),
        (
            {"linear_proj.weight": torch.zeros(WIDTH, 4, 1, 1)},
            {"projection": "teacher"},
            "of another shape .*; choose the teacher, .*method.alignment.projection",
        ),
        ({"linear_proj.weight": torch.full((WIDTH, 4, 1, 1), torch.nan)}, {}, "is not finite"),
        (None, {}, "no such file"),
    ],
)
def test_a_file_that_does_not_fit_is_told_before_training(state, alignment, message, tmp_path):
    if state is not None:
        save_file(state, tmp_path / "a.safetensors")
    recipe = parse_recipe(content(tmp_path / "a.safetensors", **alignment), "tiny")
    with pytest.raises(UserError, match=f"^tiny: method.alignment.weights: .*{message}") as told:
        train_tokenizer(recipe, tmp_path / "run", place="tiny")
    assert "\n" not in str(told.value) and not (tmp_path / "run").exists()


# Settings that do not go together ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"alignment": {"distance_weight": 0, "cosine_weight": 0}},
            "method.alignment: distance_weight and cosine_weight are both 0; give one",
        ),
        (
            {"vae": "demo", "train": "decoder"},
            "method.train: .* pass method.name=vae and leave method.alignment out",
        ),
    ],
)
def test_settings_that_align_nothing_are_refused(method, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(tiny.content({"name": "va_vae"} | method), "tiny")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"reconstruction_weight": 0}, "method.reconstruction_weight: 0 .* compares no images"),
        (
            {"reconstruction_weight": 0, "adversarial": tiny.ADVERSARIAL | {"adaptive": False}},
            "method.alignment.adaptive: .* pass method.alignment.adaptive=false",
        ),
        (
            {"alignment": {"distance_weight": 0, "distance_margin": 0.1}},
            "method.alignment.distance_margin takes no effect with method.alignment.distance_weight=0; .*=0.25$",
        ),
        (
            {"alignment": {"cosine_weight": 0, "cosine_margin": 0.3}},
            "method.alignment.cosine_margin takes no effect with method.alignment.cosine_weight=0",
        ),
        (
            {"alignment": {"adaptive": False, "max_adaptive": 3}},
            r"method.alignment.max_adaptive takes no effect .* method.alignment.max_adaptive=1e\+08$",
        ),
    ],
)
def test_settings_without_effect_are_refused_but_in_a_run_that_goes_on(method, message, tmp_path):
    recipe = parse_recipe(tiny.content({"name": "va_vae"} | method), "tiny")
    with pytest.raises(UserError, match=message):
        check_tokenizer(recipe, tmp_path / "run")
    assert plan_tokenizer(recipe, tmp_path / "run", resume=True, place="tiny").recipe == recipe


@pytest.mark.parametrize("name", ["va_vae", "send_vae"])
def test_an_alignment_of_no_weight_is_refused(name):
    message = "method.alignment.weight: 0 aligns nothing; .* pass method.name=vae and leave"
    with pytest.raises(UserError, match=message) as told:
        parse_recipe(tiny.content({"name": name, "alignment": {"weight": 0}}), "tiny")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["va_vae", "send_vae"])
def test_layers_of_the_teacher_that_nothing_reads_are_refused(name, tmp_path):
    recipe = tiny.content({"name": name}) | {"teacher": {"name": "demo", "layers": [0, -1]}}
    with pytest.raises(UserError, match=r"teacher.layers: \[0, -1\] .*pass teacher.layers=\[-1\]"):
        check_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
    recipe["method"]["perceptual"] = "teacher"
    check_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
