"""Contrastive flow matching: each velocity is moved away from that of the image before it in the global batch."""

from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from benchmarks.synthetic import PUBLISHED, SpecTokenizer, SyntheticLatents
from benchmarks.training import TRAIN, make_objective, make_trainer
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.learner import contrast, squared_error
from semtok.objective import PREVIOUS, StepOutput
from semtok.recipe import parse_diffusion_recipe
from semtok.sampler.draws import Draws
from semtok.training.loop import Trainer

KIND = PUBLISHED["reglue"]
NETWORK = {"depth": 3, "width": 32, "heads": 2, "patch_size": 8}
SETTINGS = {
    "network": NETWORK,
    "path": "cosine",
    "contrastive_weight": 0.3,
    "routing": {"first": 1, "last": 1, "path_drop": 0.5, "path_drop_per": "batch"},
    "repa": {"with_global": True, "depth": 2, "projector_width": 8},
}


def trainer(folder: Path, accumulate: int, **settings: Any) -> Trainer:
    """One whose network's outputs depend on everything, on latents drawn once."""
    content = {
        "tokenizer": "reglue",
        "data": {"kind": "shapes", "size": 256},
        "diffusion": SETTINGS | settings,
        "train": TRAIN | {"batch_size": 8, "accumulate": accumulate},
    }
    recipe = parse_diffusion_recipe(content, "tiny")
    source = SyntheticLatents(KIND)
    objective = make_objective(recipe, SpecTokenizer(KIND.spec), source, KIND.target_width)
    tiny.awake(objective.averaged_module())
    return make_trainer(objective, recipe.train, source, folder)


def save_a_step(folder: str, file: str, accumulate: int) -> None:
    """Loss terms and gradients of the first step, which is not taken."""
    made = trainer(Path(folder), accumulate)
    made.optimisers.step = lambda active: {}
    made.train_step(made._batches())
    losses = made.metrics.read(made._mean_over_processes)
    gradients = {n: p.grad for n, p in made.objective.learners.named_parameters()}
    if made.accelerator.is_main_process:
        torch.save([losses, gradients], file)


def test_losses_and_gradients_are_the_same_in_micro_batches(tmp_path):
    """And in two processes: test_distributed."""
    save_a_step(str(tmp_path / "one"), str(tmp_path / "one.pt"), 1)
    save_a_step(str(tmp_path / "four"), str(tmp_path / "four.pt"), 4)
    assert_same_step(tmp_path / "one.pt", tmp_path / "four.pt")


def assert_same_step(one: Path, other: Path) -> None:
    (losses, gradients), (their_losses, theirs) = torch.load(one), torch.load(other)
    assert {f"loss/contrast/{name}" for name in KIND.spec.names} <= losses.keys()
    assert losses["loss/contrast/global"] != 0 and losses["loss/alignment"] > 0
    for key in (k for k in losses if "loss" in k):
        assert their_losses[key] == pytest.approx(losses[key], rel=1e-4), key
    for key, gradient in gradients.items():
        torch.testing.assert_close(theirs[key], gradient, atol=1e-5, rtol=1e-3)


def output_of(made: Trainer, step: int = 0) -> tuple[StepOutput, Draws]:
    inputs = next(made._inputs_of_step(made._batches()))
    draws = tiny.draws(step, 8)
    return made.objective.learners["dit"](inputs, draws, step, {}), draws


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_a_term_is_minus_the_distance_to_the_velocity_of_the_image_before(tmp_path, path):
    made = trainer(tmp_path, 1, path=path, contrastive_weight={"texture": 0.05}, routing=None)
    learner = made.objective.learners["dit"]
    inputs = next(made._inputs_of_step(made._batches()))
    assert len(inputs[PREVIOUS].mean["texture"]) == 1
    output, draws = output_of(made)
    assert {n for n in output.terms if "contrast" in n} == {"contrast/texture"}
    assert output.terms["contrast/texture"].weight == 0.05
    noised = learner.noised(inputs["posterior"], draws)
    dropped = draws.uniform("class_dropout") < 0.1
    labels = torch.where(dropped, 1000, inputs["labels"])
    predicted = learner.network(noised.x, noised.times, labels).velocity["texture"]
    target = noised.velocity["texture"]
    by_hand = torch.stack([-(predicted[i] - target[i - 1]).square().mean() for i in range(8)])
    torch.testing.assert_close(output.terms["contrast/texture"].value, by_hand)


def test_a_number_is_of_each_parts_own_weight(tmp_path):
    config = DiffusionConfig(
        network="SiT-T/1", contrastive_weight=0.1, loss_weights={"global": 0.03}
    )
    assert config.contrastive_weight_of("global", 0) == pytest.approx(0.003)
    made = trainer(tmp_path, 1, contrastive_weight=0.1, loss_weights={"global": {0: 0.5, 3: 0.0}})
    weights = [{n: t.weight for n, t in output_of(made, step)[0].terms.items()} for step in (0, 3)]
    assert weights[0]["contrast/global"] == pytest.approx(0.05)
    assert weights[0]["contrast/texture"] == pytest.approx(0.1)
    assert "contrast/global" not in weights[1]


def test_the_gradient_is_that_of_the_velocity_less_that_of_the_other():
    predicted = torch.randn(4, 3, 2, 2, requires_grad=True)
    velocity = torch.randn(4, 3, 2, 2)
    total = squared_error(predicted, velocity) + 0.25 * contrast(predicted, velocity, velocity[-1:])
    (own,) = torch.autograd.grad(total.sum(), predicted)
    wanted = ((predicted - velocity) - 0.25 * (predicted - velocity.roll(1, 0))) * 2 / 12
    torch.testing.assert_close(own, wanted)
