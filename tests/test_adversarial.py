"""The adversarial part: weights that a discriminator starts from, and the weights of sums beside those of means."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from parity import kits, load_kit
from semtok import UserError
from semtok.commands.train_tokenizer import check_tokenizer, train_tokenizer
from semtok.hub.checkpoints import read_checkpoint
from semtok.methods.adversarial import PatchDiscriminator, load_discriminator
from semtok.perceptual import teacher_distance
from semtok.recipe import parse_recipe, write_recipe

METHODS = ("vae", "send_vae")


def published(norm: str = "batch", **shape: Any) -> dict[str, torch.Tensor]:
    """A discriminator's tensors by taming-transformers' names, none as a fresh one's."""
    torch.manual_seed(5)
    network = PatchDiscriminator(**{"width": 8, "num_layers": 1, "norm": norm} | shape)
    state = {
        name.replace("layers.", "main."): t.clone() for name, t in network.state_dict().items()
    }
    return {
        name: t + torch.rand(t.shape) if t.is_floating_point() else t + 7
        for name, t in state.items()
    }


def content(method: str, weights: Path, **adversarial: Any) -> dict[str, Any]:
    settings = tiny.ADVERSARIAL | {"norm": "batch", "weights": str(weights)} | adversarial
    return tiny.content({"name": method, "adversarial": settings})


def started(method: str, weights: Path, folder: Path) -> dict[str, torch.Tensor]:
    """The discriminator with which a run would begin."""
    plan = check_tokenizer(parse_recipe(content(method, weights), "tiny"), folder)
    return plan.objective.learners["discriminator"].discriminator.state_dict()


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    names = {name.replace("layers.", "main."): t for name, t in found.items()}
    return names.keys() == expected.keys() and all(
        torch.equal(t, expected[name]) for name, t in names.items()
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("prefix", ["", "module.", "discriminator.", "loss.discriminator."])
def test_a_discriminator_starts_from_the_file_that_is_named(method, prefix, tmp_path):
    expected = published()
    save_file({prefix + n: t for n, t in expected.items()}, tmp_path / "a.safetensors")
    assert agree(started(method, tmp_path / "a.safetensors", tmp_path / "run"), expected)


@pytest.mark.parametrize("nest", [None, "discriminator", "state_dict"])
def test_pickled_files_are_read_alone_or_within_a_checkpoint(nest, tmp_path):
    expected = published()
    state = {f"loss.discriminator.{n}": t for n, t in expected.items()}
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(1)
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "a.pt")
    assert agree(started("vae", tmp_path / "a.pt", tmp_path / "run"), expected)


def test_a_path_may_be_relative_to_where_the_command_runs(tmp_path, monkeypatch):
    save_file(published(), tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    assert agree(started("vae", Path("a.safetensors"), tmp_path / "run"), published())


@pytest.mark.parametrize("method", METHODS)
def test_files_that_can_not_be_are_told_before_training(method, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    save_file(published(width=16, num_layers=2), tmp_path / "wide.safetensors")
    save_file(published("none"), tmp_path / "none.safetensors")
    whole = published()
    broken = whole | {"main.0.weight": torch.full_like(whole["main.0.weight"], torch.nan)}
    save_file(broken, tmp_path / "nan.safetensors")
    torch.save(Evil(), tmp_path / "evil.pt")
    (tmp_path / "cut.pt").write_bytes(b"PK\3\4")
    for name, message in [
        ("gone.pt", "gone.pt: no such file"),
        ("other.safetensors", "holds no discriminator"),
        ("wide.safetensors", r"of another shape .*num_layers=2 method.adversarial.width=16"),
        ("none.safetensors", r"of another shape .*; pass method.adversarial.norm=none"),
        ("nan.safetensors", "not finite"),
        ("evil.pt", "holds more than tensors, and is refused"),
        ("cut.pt", "cut.pt: cut short or damaged"),
    ]:
        recipe = parse_recipe(content(method, tmp_path / name), "tiny")
        with pytest.raises(
            UserError, match=f"tiny: method.adversarial.weights: .*{message}"
        ) as told:
            train_tokenizer(recipe, tmp_path / "run", place="tiny")
        assert "\n" not in str(told.value) and not (tmp_path / "run").exists()
    assert not (tmp_path / "owned").exists()


def test_the_first_step_trains_what_the_file_holds_and_a_resumed_run_does_not_read_it(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(published(), file)
    settings = content("vae", file, optimiser={"learning_rate": 1e-6})
    settings["train"] |= {"checkpoint_every": 3}
    recipe = parse_recipe(settings, "tiny")
    train_tokenizer(recipe, tmp_path / "whole")
    newest, last = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    kept = load_file(newest / "model.safetensors")
    trained = kept["learners.discriminator.discriminator.layers.0.weight"]
    distance = (trained - published()["main.0.weight"]).abs().max()
    assert 0 < distance < 1e-4, "three steps of 1e-6 from the file's"

    theirs = tiny.final_tensors(tmp_path / "whole")
    shutil.rmtree(last)
    file.unlink()
    train_tokenizer(recipe, tmp_path / "whole", resume=True)
    ours = tiny.final_tensors(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_that_kept_no_checkpoint_starts_from_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file(published(), file)
    recipe = parse_recipe(content("vae", file), "tiny")
    (tmp_path / "run").mkdir()
    write_recipe(recipe, tmp_path / "run" / "recipe.yaml")
    plan = check_tokenizer(recipe, tmp_path / "run", resume=True)
    assert agree(plan.objective.learners["discriminator"].discriminator.state_dict(), published())


def test_a_runs_own_discriminator_is_a_start_too(tmp_path):
    first = tiny.content({"name": "vae", "adversarial": tiny.ADVERSARIAL | {"norm": "batch"}})
    train_tokenizer(parse_recipe(first, "tiny"), tmp_path / "first")
    (step,) = (tmp_path / "first" / "checkpoints").iterdir()
    kept = load_file(step / "model.safetensors")
    prefix = "learners.discriminator.discriminator."
    own = {n.removeprefix(prefix): t for n, t in kept.items() if n.startswith(prefix)}
    found = started("send_vae", step / "model.safetensors", tmp_path / "second")
    assert own.keys() == found.keys() and all(torch.equal(own[n], t) for n, t in found.items())


@pytest.mark.parametrize("folder", kits("repae"))
def test_parity_repae_discriminators_are_read_as_published(folder, tmp_path):
    state = read_checkpoint(folder / load_kit(folder).case["files"]["checkpoint"])
    torch.save(state["discriminator"], tmp_path / "discriminator.pt")
    kernels = [t for t in state["discriminator"].values() if t.ndim == 4]
    network = PatchDiscriminator(width=len(kernels[0]), num_layers=len(kernels) - 2, norm="batch")
    load_discriminator(network, tmp_path / "discriminator.pt")
    assert agree(network.state_dict(), state["discriminator"])


# Sums and means ------------------------------------------------------------------------------------

NUMBERS = (
    3 * 16 * 16
)  # of an image: by so much latent diffusion's losses are larger, which are sums
KL_WEIGHT = 100.0  # published are 1e-6, by which no gradient would be seen to move


def test_the_published_weights_of_means_are_taken_as_they_are():
    settings = tiny.content({"name": "vae", "kl_weight": 5.09e-12, "adversarial": tiny.ADVERSARIAL})
    settings["method"]["adversarial"] = tiny.ADVERSARIAL | {"max_adaptive": 0.0509}
    method = parse_recipe(settings, "tiny").method
    assert method.kl_weight == 5.09e-12 and method.adversarial.max_adaptive == 0.0509
    numbers = 3 * 256 * 256
    assert method.kl_weight * numbers == pytest.approx(1e-6, rel=1e-3)
    assert method.adversarial.max_adaptive * numbers == pytest.approx(1e4, rel=1e-3)


@pytest.mark.parametrize(
    ("regime", "scale", "cap"),
    [("free", 1.0, 1e4), ("epsilon", 1e-4, 1e8), ("capped", 1e-4, 1e4)],
)
def test_gradients_are_those_of_latent_diffusions_sums_divided_by_the_numbers_of_an_image(
    regime, scale, cap
):
    """Its loss, written out (``contperceptual.py``): reconstruction and distance summed over an image's numbers, the KL
    by its weight, and 0.5 r of -D, with r = |∇ nll| / (|∇ g| + 1e-4), at most ``cap``, at the last layer. Only ∇ nll is
    of a sum: so 1e-4 is the same for means, and the cap is divided.

    Args:
        regime: what decides the ratio.
        scale: of the discriminator's last layer, and so of its gradient.
        cap: of the ratio, 1e4 as published.
    """
    adversarial = tiny.ADVERSARIAL | {"max_adaptive": cap / NUMBERS, "weight": 0.5}
    method = {"name": "vae", "perceptual": "teacher", "kl_weight": KL_WEIGHT / NUMBERS}
    objective = tiny.build(method | {"adversarial": adversarial})
    objective.learners.train()
    learner, inputs = objective.learners["autoencoder"], tiny.batch(objective)
    discriminator = objective.learners["discriminator"].discriminator
    with torch.no_grad():
        for parameter in discriminator.layers[-1].parameters():
            parameter.mul_(scale)
    parameters = list(learner.autoencoder.parameters())

    terms = learner(inputs, tiny.draws(), 0, {}).terms
    ours = joined(sum(t.weight * t.value.mean() for t in terms.values()), parameters)

    x = inputs["pixels"]
    q, _, x_hat = learner.autoencode(x, tiny.draws())
    distance = teacher_distance(objective.teacher.module, x_hat, inputs["features"])
    nll = ((x - x_hat).abs() + distance[:, None, None, None]).sum() / len(x)
    kl = 0.5 * (q.mean.square() + q.var - 1 - q.logvar).sum() / len(x)
    g = -discriminator(x_hat).mean()
    last = learner.autoencoder.decoder.conv_out.weight
    wanted, other = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, g)
    )
    ratio = (wanted / (other + 1e-4)).clamp(0, cap)
    assert (ratio == cap) == (regime == "capped")
    assert (other < 1e-4) == (regime != "free"), "or 1e-4 plays no part"
    parts = [nll, KL_WEIGHT * kl, 0.5 * ratio.detach() * g]
    theirs = [joined(part, parameters) for part in parts]
    whole = sum(theirs)
    if regime == "free":
        assert all(part.norm() > 0.05 * whole.norm() for part in theirs), "each part counts"
    assert (NUMBERS * ours - whole).norm() < 1e-3 * whole.norm()
    weight = terms["adversarial"].weight.item()
    assert weight * NUMBERS == pytest.approx(0.5 * ratio.item(), rel=1e-3)


def joined(loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The gradient of all parameters, as one vector."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
