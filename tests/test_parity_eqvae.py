"""EQ-VAE against a kit of its official code: the importer, and each way of a step with losses and gradients."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity import Kit, kits, load_kit
from semtok import Tokenizer
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_vae import our_name
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.images import to_pixels
from semtok.methods.adversarial import AdversarialConfig, DiscriminatorLearner
from semtok.methods.equivariance import EquivarianceConfig, View
from semtok.methods.vae import AutoencoderLearner, VAEConfig
from semtok.objective import MethodContext, StepOutput, Unregistered
from semtok.sampler.draws import Draws

TENSOR, IMAGE = {"atol": 5e-5, "rtol": 0.0}, {"atol": 1e-4, "rtol": 0.0}
SUM = {"atol": 0.0, "rtol": 1e-5}
# Of sums over 49,152 numbers, up to 4e4; biases before a norm have none but rounding. In float64 ours agree to 1.4e-5,
# in float32 with oneDNN to 1.4e-4.
GRADIENTS = {"atol": 5e-3, "rtol": 5e-5}
CASES = [
    f"{way}_{who}"
    for way in ("equivariance", "low_resolution", "full_resolution")
    for who in ("generator", "discriminator")
][:-1]


@dataclass(frozen=True)
class KitDraws(Draws):
    """The random numbers that the official code drew, each as the uniform number that stands for it here."""

    noise: Tensor | None = None
    numbers: dict[str, float] = field(default_factory=dict)

    def number_of_step(self, name: str) -> float:
        return self.numbers[name]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert name == "posterior" and tuple(self.noise.shape[1:]) == shape
        return self.noise


@pytest.fixture(params=kits("eqvae"))
def kit(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture
def folder(kit, tmp_path) -> Path:
    """What the importer makes of the training script's file."""
    imported = import_checkpoint(checkpoint(kit), "auto", ImportOptions(statistics=0.5))
    assert imported.became["loss.discriminator.main.0.weight"] == (
        "left out, only training reads it"
    )
    imported.save(tmp_path / "imported")
    return tmp_path / "imported"


def checkpoint(kit: Kit) -> Path:
    return kit.folder / kit.case["files"]["checkpoint"]


class StandIn(nn.Module):
    """The kit's perceptual distance, in the place of LPIPS."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        seen, wanted = (F.conv2d(x, self.weight, stride=2, padding=1) for x in (a, b))
        return (seen - wanted).square().mean(dim=(1, 2, 3))


def draws_of(kit: Kit, case: str) -> KitDraws:
    """What the official code drew in a case, by the names that ours draws under."""
    config = EquivarianceConfig()
    numbers = {"equivariance": float(kit[f"{case}/u_equivariance"])}
    drawn = kit.case["cases"][case]["draw_order"]
    if "u_low_resolution" in drawn:
        numbers["equivariance/low_resolution"] = float(kit[f"{case}/u_low_resolution"])
    for name, choices in (("scale", config.scales), ("angle", config.turns)):
        if name in drawn:
            place = choices.index(pytest.approx(float(kit[f"{case}/{name}"])))
            numbers[f"equivariance/{name.replace('angle', 'turn')}"] = (place + 0.5) / len(choices)
    noise = kit[f"{case}/posterior_noise"]
    settings = {"seed": 0, "step": 5, "global_batch": len(noise), "first": 0, "num": len(noise)}
    return KitDraws(**settings, device=torch.device("cpu"), noise=noise, numbers=numbers)


def learners(kit: Kit, folder: Path) -> tuple[AutoencoderLearner, DiscriminatorLearner, int]:
    """Ours with the kit's weights and settings, and how many numbers an image has: what sums are of."""
    loss = kit.case["constructor"]["kwargs"]["lossconfig"]["params"]
    size = kit.case["constructor"]["kwargs"]["ddconfig"]["resolution"]
    numbers = 3 * size**2
    adversarial = AdversarialConfig(
        weight=loss["disc_weight"],
        start_step=loss["disc_start"],
        max_adaptive=1e4 / numbers,
        width=kit.case["constructor"]["discriminator_ndf"],
        norm="batch",
        weights=str(checkpoint(kit)),
    )
    config = VAEConfig(
        vae=str(folder),
        kl_weight=loss["kl_weight"] / numbers,
        adversarial=adversarial,
        equivariance=EquivarianceConfig(),
    )
    critic = DiscriminatorLearner(adversarial)
    context = MethodContext((size, size), teacher=None, steps=10)
    learner = AutoencoderLearner(config, context, critic.discriminator)
    weight = open_checkpoint(checkpoint(kit)).state["loss.perceptual_loss.weight"]
    learner.config = config.model_copy(update={"perceptual": "lpips"})
    learner._lpips = Unregistered(StandIn(weight))
    critic.target = learner.target
    return learner.train(), critic.train(), numbers


def pixels_of(kit: Kit, case: str) -> dict[str, Tensor | None]:
    pixels = to_pixels(kit[f"{case}/image_uint8"], device=torch.device("cpu"))
    return {"pixels": pixels, "features": None}


def total(output: StepOutput) -> Tensor:
    return sum(term.weight * term.value.mean() for term in output.terms.values())


def test_parity_eqvae_transforms(kit, folder):
    autoencoder = Tokenizer.from_pretrained(folder).autoencoder.eval()
    pixels = pixels_of(kit, "forward")["pixels"]
    with torch.no_grad():
        q = autoencoder.encode(pixels).latent_dist
        torch.testing.assert_close(q.parameters, kit["forward/moments"], **TENSOR)
        for i, (scale, turns) in enumerate(kit.settings("forward")["transforms"]):
            factors = tuple(scale) if isinstance(scale, list) else (scale, scale)
            view = View(factors, turns)
            z = q.mean + q.std * kit["forward/posterior_noise"][i]
            decoded = view.decoded(z)
            torch.testing.assert_close(decoded, kit[f"forward/z_transformed_{i}"], **TENSOR)
            target = view.target(pixels)
            torch.testing.assert_close(target[:1], kit[f"forward/target_{i}"], **TENSOR)
            image = autoencoder.decode(decoded[:1]).sample
            torch.testing.assert_close(image, kit[f"forward/decoded_first_{i}"], **IMAGE)


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("generator")])
def test_parity_eqvae_step_of_the_autoencoder(kit, folder, case, monkeypatch):
    """Losses, published as sums, the adaptive weight, and gradients in every parameter."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    learner, _, numbers = learners(kit, folder)
    inputs, draws = pixels_of(kit, case), draws_of(kit, case)
    output = learner(inputs, draws, kit.settings(case)["global_step"], {})
    terms = output.terms
    target = learner.target(inputs["pixels"], draws)
    assert (target is inputs["pixels"]) == case.startswith("full")
    torch.testing.assert_close(target[:1], kit[f"{case}/target_first"], **TENSOR)
    first = output.carry["reconstruction"][:1]
    torch.testing.assert_close(first, kit[f"{case}/reconstruction_first"], **IMAGE)
    torch.testing.assert_close(
        terms["perceptual"].value, kit[f"{case}/perceptual"].flatten(), **SUM
    )
    torch.testing.assert_close(terms["kl"].value.mean(), kit[f"{case}/kl_loss"], **SUM)
    nll = sum(numbers * terms[n].weight * terms[n].value.mean() for n in ("l1", "perceptual"))
    torch.testing.assert_close(nll, kit[f"{case}/nll_loss"], **SUM)
    g = terms["adversarial"]
    torch.testing.assert_close(g.value.mean(), kit[f"{case}/g_loss"], **TENSOR)
    torch.testing.assert_close(numbers * g.weight, kit[f"{case}/d_weight"], **SUM)
    whole = numbers * total(output)
    torch.testing.assert_close(whole, kit[f"{case}/total_loss"], **SUM)
    whole.backward()
    autoencoder = learner.autoencoder
    levels = len(autoencoder.config.block_out_channels)
    parameters = dict(autoencoder.named_parameters())
    names = kit.case["cases"][case]["grad_norm_names"]
    norms = torch.stack([parameters[our_name(n, levels)].grad.norm() for n in names])
    torch.testing.assert_close(norms, kit[f"{case}/grad_norms"], **GRADIENTS)


@pytest.mark.parametrize("case", [c for c in CASES if c.endswith("discriminator")])
def test_parity_eqvae_step_of_the_discriminator(kit, folder, case):
    """On the draws of its own step."""
    learner, critic, _ = learners(kit, folder)
    inputs, draws = pixels_of(kit, case), draws_of(kit, case)
    with torch.no_grad():
        _, _, x_hat = learner.autoencode(inputs["pixels"], draws)
    target = critic.target(inputs["pixels"], draws)
    torch.testing.assert_close(target[:1], kit[f"{case}/target_first"], **TENSOR)
    torch.testing.assert_close(x_hat[:1], kit[f"{case}/reconstruction_first"], **IMAGE)
    output = critic(inputs, draws, 5, {"reconstruction": x_hat})
    loss = total(output)
    torch.testing.assert_close(loss, kit[f"{case}/disc_loss"], **TENSOR)
    real = output.metrics["logits_real"]
    torch.testing.assert_close(real, kit[f"{case}/logits_real"].mean(), **TENSOR)
    fake = output.metrics["logits_fake"]
    torch.testing.assert_close(fake, kit[f"{case}/logits_fake"].mean(), **TENSOR)
    loss.backward()
    parameters = dict(critic.discriminator.named_parameters())
    names = kit.case["cases"][case]["grad_norm_names"]
    ours = [n.replace("loss.discriminator.main.", "layers.") for n in names]
    norms = torch.stack([parameters[n].grad.norm() for n in ours])
    torch.testing.assert_close(norms, kit[f"{case}/grad_norms"], atol=1e-6, rtol=1e-5)


def test_every_case_of_the_kit_is_held(kit):
    assert set(kit.case["cases"]) == {"forward", *CASES}
