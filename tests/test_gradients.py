"""Which parameters each loss moves, and which it must not."""

import pytest
import torch

import tiny
from semtok.objective import StepOutput

# Groups of parameters, by prefix of their name among the learners.
GROUPS = {
    "encoder": ("autoencoder.autoencoder.encoder.", "autoencoder.autoencoder.quant_conv."),
    "decoder": ("autoencoder.autoencoder.decoder.", "autoencoder.autoencoder.post_quant_conv."),
    "mapper": ("autoencoder.mapper.",),
    "discriminator": ("discriminator.",),
}
EXPECTED = {
    "l1": {"encoder", "decoder"},
    "mse": {"encoder", "decoder"},
    "kl": {"encoder"},
    "perceptual": {"encoder", "decoder"},
    "adversarial": {"encoder", "decoder"},
    "alignment": {"encoder", "mapper"},
    "discriminator": {"discriminator"},
}


def outputs(objective) -> dict[str, StepOutput]:
    inputs, carry, result = tiny.batch(objective), {}, {}
    for name in objective.active_learners(step=0):
        result[name] = objective.learners[name](inputs, tiny.draws(), 0, carry)
        carry |= result[name].carry
    return result


@pytest.fixture(scope="module")
def objective():
    objective = tiny.build({"perceptual": "teacher", "adversarial": tiny.ADVERSARIAL})
    objective.learners.train()
    return objective


@pytest.mark.parametrize(
    "term", ["l1", "kl", "perceptual", "adversarial", "alignment", "discriminator"]
)
def test_each_loss_moves_exactly_its_parameters(objective, term):
    objective.zero_grad(set_to_none=True)
    terms = {name: t for out in outputs(objective).values() for name, t in out.terms.items()}
    terms[term].value.mean().backward()
    moved = set()
    for name, parameter in objective.learners.named_parameters():
        group = next(g for g, prefixes in GROUPS.items() if name.startswith(prefixes))
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        if has_gradient:
            moved.add(group)
    assert moved == EXPECTED[term]
    teacher = objective.teacher.module
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_every_trained_parameter_has_an_optimiser_and_a_gradient(objective):
    objective.zero_grad(set_to_none=True)
    for out in outputs(objective).values():
        sum(term.weight * term.value.mean() for term in out.terms.values()).backward()
    without = [name for name, p in objective.learners.named_parameters() if p.grad is None]
    assert not without


def test_losses_are_one_float32_value_per_sample(objective):
    for out in outputs(objective).values():
        for name, term in out.terms.items():
            assert term.value.shape == (4,), name
            assert term.value.dtype == torch.float32, name


def test_mse_replaces_l1():
    objective = tiny.build({"name": "vae", "reconstruction": "mse"})
    terms = outputs(objective)["autoencoder"].terms
    assert set(terms) == {"mse", "kl"}


def test_the_adaptive_weight_balances_the_gradients_at_the_last_layer(objective):
    objective.zero_grad(set_to_none=True)
    terms = outputs(objective)["autoencoder"].terms
    last = objective.averaged_module().decoder.conv_out.weight

    def norm(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value, last, retain_graph=True)[0].norm()

    wanted = norm(terms["l1"].value.mean() + terms["perceptual"].value.mean())
    adversarial = norm(terms["adversarial"].weight * terms["adversarial"].value.mean())
    assert torch.isclose(adversarial, 0.5 * wanted, rtol=1e-2)


def test_the_adaptive_weight_is_capped_and_can_be_turned_off():
    capped = tiny.build({"adversarial": {**tiny.ADVERSARIAL, "max_adaptive": 1e-3, "weight": 1.0}})
    assert outputs(capped)["autoencoder"].terms["adversarial"].weight.item() == pytest.approx(1e-3)
    fixed = tiny.build({"adversarial": {**tiny.ADVERSARIAL, "adaptive": False, "weight": 0.1}})
    assert outputs(fixed)["autoencoder"].terms["adversarial"].weight == 0.1


def test_the_discriminator_may_start_before_its_loss_counts_and_the_weight_ramps():
    settings = {"start_step": 4, "discriminator_start_step": 2, "ramp_steps": 4, "adaptive": False}
    objective = tiny.build({"adversarial": {**tiny.ADVERSARIAL, **settings, "weight": 1.0}})
    assert [objective.active_learners(step) for step in (1, 2)] == [
        ["autoencoder"],
        ["autoencoder", "discriminator"],
    ]
    learner, inputs = objective.learners["autoencoder"], tiny.batch(objective)
    terms = {step: learner(inputs, tiny.draws(), step, {}).terms for step in (3, 4, 5, 9)}
    assert "adversarial" not in terms[3]
    assert [terms[s]["adversarial"].weight for s in (4, 5, 9)] == [0.25, 0.5, 1.0]


def test_gradient_checkpointing_changes_memory_not_gradients():
    gradients = []
    for switch in (False, True):
        objective = tiny.build({"name": "vae", "gradient_checkpointing": switch})
        objective.learners.train()
        assert objective.averaged_module().is_gradient_checkpointing == switch
        terms = outputs(objective)["autoencoder"].terms
        (terms["l1"].value.mean() + 1e-6 * terms["kl"].value.mean()).backward()
        gradients.append([p.grad.clone() for p in objective.learners.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
