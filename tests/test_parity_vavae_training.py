"""VA-VAE's training against kits of its official code: the VF loss, the teacher's map, whole steps.

The networks start from the training script's own file, each part by the setting or command that users have for it.
Official losses are sums over an image's numbers, ours means: steps run with weights that make sums of them, variants
with published weights divided, as the recipe has them.

Steps are computed in double precision: the discriminator's gradient nearly cancels in its batch norm, and a
reconstruction that differs by rounding alone moves what is left of it by up to 1e-3 of its size.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from parity import Kit, kits, load_kit
from semtok.hub.import_vae import our_name
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.images import to_pixels
from semtok.methods import image_losses
from semtok.methods.adversarial import AdversarialConfig
from semtok.methods.va_vae import (
    VAVAEConfig,
    VAVAELearner,
    VAVAEObjective,
    direction_loss,
    distance_loss,
)
from semtok.objective import Batch, MethodContext, StepOutput
from semtok.settings import parse
from semtok.storage import read_weights
from semtok.teachers import Teacher, TeacherConfig

TENSOR, LOSS = {"atol": 5e-5, "rtol": 0.0}, {"atol": 5e-5, "rtol": 1e-5}
GRADIENT = {"atol": 1e-6, "rtol": 1e-3}
SECOND_LOSS, SECOND_GRADIENT = {"atol": 1e-4, "rtol": 1e-5}, {"atol": 1e-6, "rtol": 1e-2}
"""After Adam, whose first step is the learning rate times the sign of the gradient."""
DEFAULTS = {
    "logvar_init": 0.0,
    "kl_weight": 1.0,
    "disc_weight": 1.0,
    "disc_factor": 1.0,
    "perceptual_weight": 1.0,
    "vf_weight": 1.0,
    "adaptive_vf": False,
    "distmat_weight": 1.0,
    "cos_weight": 1.0,
    "distmat_margin": 0.0,
    "cos_margin": 0.0,
    "pp_style": False,
}
"""Of the official loss, where a kit leaves one out."""
CAP, CAP_VF = 1e4, 1e8  # fixed there


@pytest.fixture(params=kits("vavae_training"))
def kit(request) -> Kit:
    return load_kit(request.param)


class StandIn(nn.Module):
    """What takes the place of LPIPS in the kit."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        seen = [
            nn.functional.conv2d(x, self.weight, stride=2, padding=1)
            for x in (reconstruction, pixels)
        ]
        return (seen[0] - seen[1]).square().mean(dim=(1, 2, 3))


class Recorded:
    """The kit's noise of the posterior, in the place of ``Draws``."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise.double()

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        assert name == "posterior" and self.noise.shape[1:] == shape
        return self.noise


# Networks ----------------------------------------------------------------------------------------

default_cfgs: dict[str, Any] = {}  # timm looks for them here, by the network's name


def state_of(kit: Kit) -> dict[str, Tensor]:
    return _state(kit.folder / kit.case["files"]["checkpoint"])


@cache
def _state(file: Path) -> dict[str, Tensor]:
    return read_weights(file)["state_dict"]


def teacher_of(kit: Kit, folder: Path) -> Teacher:
    """The kit's foundation network, set as the official code uses it."""
    own = kit.case["constructor"]["foundation_kwargs"]
    options = kit.case["constructor"]["kwargs"]
    side = 224 if options["use_vf"] == "dinov2" else options["ddconfig"]["resolution"]
    name = f"vit_{re.sub(r'[^a-z0-9]', '_', str(kit.folder))}"
    default_cfgs.update(generate_default_cfgs({name: {"num_classes": 0, "classifier": None}}))

    def network(pretrained: bool = False, **given: Any) -> VisionTransformer:
        return build_model_with_cfg(
            VisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            **(own | given),
        )

    if not timm.is_model(name):
        network.__name__, network.__module__ = name, __name__
        register_model(network)
    prefix = "foundation_model.model."
    weights = {n.removeprefix(prefix): t for n, t in state_of(kit).items() if n.startswith(prefix)}
    save_file(weights, folder / "foundation.safetensors")
    return Teacher(
        TeacherConfig(
            name=name,
            checkpoint=str(folder / "foundation.safetensors"),
            input_size=side,
            normalise=False,
            resize="bilinear",
        )
    )


@dataclass(frozen=True)
class Loss:
    """Settings of the official loss, and how ours express them.

    Attributes:
        scale: what our total is multiplied by to be theirs.
        to_sums: what our means of images are multiplied by within it.
    """

    official: dict[str, Any]
    scale: float
    to_sums: float

    def __getitem__(self, name: str) -> Any:
        return self.official[name]

    def method(self, latent: int) -> dict[str, Any]:
        """Our settings; ``latent``: numbers of an image's latents."""
        weight = self.to_sums / self.scale
        kl = 2 / latent if self["pp_style"] else 1.0  # a mean without the factor 1/2
        return {
            "reconstruction_weight": weight,
            "perceptual": "lpips",
            "perceptual_weight": weight * self["perceptual_weight"],
            "kl_weight": kl * self["kl_weight"] / self.scale,
            "adversarial": {
                "weight": self["disc_weight"],
                "max_adaptive": CAP / self.scale,
                "start_step": 0,
                "norm": "batch",
            },
            "alignment": {
                "weight": self["vf_weight"] / (1 if self["adaptive_vf"] else self.scale),
                "adaptive": self["adaptive_vf"],
                "max_adaptive": CAP_VF / self.scale,
                "distance_weight": self["distmat_weight"],
                "distance_margin": self["distmat_margin"],
                "cosine_weight": self["cos_weight"],
                "cosine_margin": self["cos_margin"],
            },
        }


def loss_of(kit: Kit, *, numbers: int, sums: bool, **changes: Any) -> Loss:
    """The kit's settings with changes.

    Args:
        numbers: of an image.
        sums: whether our weights make sums of our means.
    """
    official = DEFAULTS | kit.case["constructor"]["kwargs"]["lossconfig"]["params"] | changes
    if official["pp_style"]:
        return Loss(official, scale=1.0, to_sums=1.0)
    # Constant, as no optimiser has it.
    variance = state_of(kit)["loss.logvar"].exp().item()
    return Loss(official, scale=1.0 if sums else numbers, to_sums=numbers / variance)


def objective_of(
    kit: Kit, loss: Loss, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> VAVAEObjective:
    """What trains, from the kit's file."""
    file, state = kit.folder / kit.case["files"]["checkpoint"], state_of(kit)
    if not (folder / "vae").exists():
        import_checkpoint(file, "auto", ImportOptions(statistics=1.0)).save(folder)
    options = kit.case["constructor"]["kwargs"]
    side = options["ddconfig"]["resolution"] // 2 ** (len(options["ddconfig"]["ch_mult"]) - 1)
    method = loss.method(latent=options["embed_dim"] * side**2)
    method["alignment"] |= {
        "projection": "latents" if options["reverse_proj"] else "teacher",
        "weights": str(file),
    }
    config = parse(VAVAEConfig, {"vae": str(folder)} | method, "kit")
    kernels = [t for n, t in state.items() if n.startswith("loss.discriminator") and t.ndim == 4]
    # Kits are narrower than a user's may be.
    narrow = {"width": len(kernels[0]), "num_layers": len(kernels) - 2, "weights": str(file)}
    assert isinstance(config.adversarial, AdversarialConfig)
    adversarial = config.adversarial.model_copy(update=narrow)
    perceptual = StandIn(state["loss.perceptual_loss.weight"])
    monkeypatch.setattr(image_losses, "LPIPS", lambda net: perceptual)
    resolution = options["ddconfig"]["resolution"]
    context = MethodContext((resolution, resolution), teacher_of(kit, folder), steps=2)
    objective = VAVAEObjective(config.model_copy(update={"adversarial": adversarial}), context)
    objective.learners.train()
    return objective


def in_double(objective: VAVAEObjective, monkeypatch: pytest.MonkeyPatch) -> VAVAEObjective:
    """The same in double precision, what else is in float32 whatever the networks are in included."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    for module in (objective, *objective.frozen_modules()):
        module.double()
    return objective


# Terms, and the teacher ---------------------------------------------------------------------------


def test_parity_vf_terms_and_their_gradients(kit, tmp_path, monkeypatch):
    loss = loss_of(kit, numbers=1, sums=True)
    objective = objective_of(kit, loss, tmp_path, monkeypatch)
    learner = objective.learners["autoencoder"]
    weight, settings = learner.projection.weight, kit.settings("terms")
    assert settings["margins_order"] == ["distmat_margin", "cos_margin"]
    for number, margins in enumerate(settings["margins"]):
        z = kit["terms/z"].clone().requires_grad_()
        compared, aux = learner.comparable(z, kit["terms/aux_feature"])
        torch.testing.assert_close(compared, kit["terms/z_compared"], **TENSOR)
        torch.testing.assert_close(aux, kit["terms/aux_compared"], **TENSOR)
        values = {
            "distmat": distance_loss(compared, aux, margins[0]).mean(),
            "cos": direction_loss(compared, aux, margins[1]).mean(),
        }
        for name, value in values.items():
            torch.testing.assert_close(value, kit[f"terms/{name}_loss_{number}"], **TENSOR)
            ours = torch.autograd.grad(value, (z, weight), retain_graph=True)
            for what, gradient in zip(("z", "proj"), ours, strict=True):
                expected = kit[f"terms/{name}_grad_{what}_{number}"]
                torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_parity_foundation_map(kit, tmp_path):
    assert kit.settings("foundation")["type"] == kit.case["constructor"]["kwargs"]["use_vf"]
    teacher = teacher_of(kit, tmp_path)
    ours = teacher.features(to_pixels(kit["foundation/image_uint8"])).patches[-1]
    torch.testing.assert_close(ours, kit["foundation/aux_feature"], **TENSOR)


# Whole steps --------------------------------------------------------------------------------------


class Step:
    """One batch, forward and backward, by our learners; values as the official code logs them.

    Args:
        generator, discriminator: the official factors of the adversarial losses, 0 before they start.
    """

    def __init__(
        self,
        objective: VAVAEObjective,
        loss: Loss,
        pixels: Tensor,
        noise: Tensor,
        *,
        generator: float,
        discriminator: float,
    ) -> None:
        self.objective, self.loss, self.pixels = objective, loss, pixels
        self.learner: VAVAELearner = objective.learners["autoencoder"]
        self.inputs = objective.prepare(Batch(pixels, torch.zeros(len(pixels), dtype=torch.int64)))
        self.output: StepOutput = self.learner(self.inputs, Recorded(noise), 0, {})
        self.values = dict(self._values(generator))
        # Before its start the official code weighs the generator's term too, and multiplies it by 0.
        factors = {"adversarial": generator}
        self.total = sum(
            t.weight * t.value.mean() * factors.get(n, 1.0) for n, t in self.terms.items()
        )
        adversary = objective.learners["discriminator"](self.inputs, None, 0, self.output.carry)
        self.disc = adversary.terms["discriminator"].value.mean() * discriminator
        constant = 0.0 if loss["pp_style"] else pixels[0].numel() * loss["logvar_init"]
        self.values |= {
            "total_loss": loss.scale * self.total.detach() + constant,
            "disc_loss": self.disc.detach(),
            "logits_real": adversary.metrics["logits_real"],
            "logits_fake": adversary.metrics["logits_fake"],
        }

    @property
    def terms(self) -> dict[str, Any]:
        return self.output.terms

    def _values(self, generator: float) -> Iterator[tuple[str, Tensor]]:
        loss, terms = self.loss, self.terms
        mean = {name: term.value.detach().mean() for name, term in terms.items()}
        images = self.learner.images_compared(terms).detach()
        constant = 0.0 if loss["pp_style"] else self.pixels[0].numel() * loss["logvar_init"]
        yield "nll_loss", loss.scale * images + constant
        yield "rec_loss", mean["l1"] + loss["perceptual_weight"] * mean["perceptual"]
        latent = kit_latents(self.learner, self.pixels)
        yield "kl_loss", mean["kl"] * (2 / latent if loss["pp_style"] else 1)
        yield "g_loss", mean["adversarial"]
        weight = terms["adversarial"].weight
        # A factor that is 0 by the settings leaves the ratio out.
        yield "d_weight", weight * loss.scale if loss["disc_factor"] else torch.zeros(())
        yield "disc_factor", torch.tensor(generator)
        yield "vf_loss", mean["alignment"]
        yield "vf_weight", torch.as_tensor(terms["alignment"].weight * loss.scale)
        yield "perceptual", terms["perceptual"].value.detach()
        yield "distmat_loss", self.output.metrics["alignment_distance"]
        yield "cos_loss", self.output.metrics["alignment_direction"]

    def backward(self) -> None:
        """Gradients of both totals; norms of those at the last layers come among the values."""
        self.values |= dict(self._last_gradients())
        self.objective.zero_grad(set_to_none=True)
        self.total.backward()
        self.disc.backward()

    def _last_gradients(self) -> Iterator[tuple[str, Tensor]]:
        autoencoder, images = self.learner.autoencoder, self.learner.images_compared(self.terms)
        for side in ("decoder", "encoder"):
            last = getattr(autoencoder, side).conv_out.weight
            other = {"decoder": "adversarial", "encoder": "alignment"}[side]
            values = {"nll": images, {"decoder": "g", "encoder": "vf"}[side]: None}
            for name, value in values.items():
                value = self.terms[other].value.mean() if value is None else value
                (gradient,) = torch.autograd.grad(value, last, retain_graph=True)
                factor = self.loss.scale if name == "nll" else 1.0
                yield f"{name}_grad_norm_{side}_last", factor * gradient.norm()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Norms of the gradients of the total, by our names."""
        for name, parameter in self.learner.named_parameters():
            yield name.removeprefix("autoencoder."), self.loss.scale * parameter.grad.norm()


def kit_latents(learner: VAVAELearner, pixels: Tensor) -> int:
    """Numbers of an image's latents."""
    stride = 2 ** (len(learner.autoencoder.config.block_out_channels) - 1)
    return learner.autoencoder.config.latent_channels * (pixels.shape[-1] // stride) ** 2


def check(step: Step, kit: Kit, prefix: str, loss: dict[str, float], gradient: dict[str, float]):
    """Every number that the kit has under these names and the step has too."""
    found = 0
    for name, ours in step.values.items():
        if f"{prefix}{name}" not in kit.tensors:
            continue
        found += 1
        is_gradient = "grad_norm" in name or name in ("d_weight", "vf_weight")
        limit = gradient if is_gradient else loss
        if prefix.startswith("step/second") and name == "total_loss":
            limit = gradient
        torch.testing.assert_close(
            ours.to(torch.float32),
            kit[f"{prefix}{name}"],
            **limit,
            msg=lambda m, n=f"{prefix}{name}": f"{n}: {m}",
        )
    assert found >= 10


def check_gradients(step: Step, kit: Kit, prefix: str, limit: dict[str, float]) -> None:
    case = kit.case["cases"]["step"]
    levels = len(step.learner.autoencoder.config.block_out_channels)
    ours = dict(step.gradients())
    # A norm of as many groups as channels takes a bias away again: what the kit has there is rounding.
    limit = limit | {"atol": 2e-6 * kit[f"{prefix}grad_norms"].max().item()}
    for name, expected in zip(case["grad_norm_names"], kit[f"{prefix}grad_norms"], strict=True):
        own = our_name(name, levels).replace("linear_proj.", "projection.")
        torch.testing.assert_close(
            ours.pop(own).to(torch.float32), expected, **limit, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not ours
    network = step.objective.learners["discriminator"].discriminator
    state = dict(network.named_parameters())
    norms = kit[f"{prefix}discriminator_grad_norms"]
    for name, expected in zip(case["discriminator_grad_norm_names"], norms, strict=True):
        own = state[name.replace("main.", "layers.")].grad.norm().to(torch.float32)
        torch.testing.assert_close(own, expected, **limit, msg=lambda m, n=name: f"{n}: {m}")
    buffers = dict(network.named_buffers())
    own = torch.cat(
        [buffers[n.replace("main.", "layers.")] for n in case["discriminator_bn_buffer_names"]]
    )
    expected = kit[f"{prefix}discriminator_bn_buffers_after"]
    torch.testing.assert_close(own.to(torch.float32), expected, **SECOND_LOSS)


def factor(loss: Loss, counter: int) -> float:
    """The official factor of the adversarial loss at a count of its optimisers' steps."""
    return loss["disc_factor"] * (counter >= loss["disc_start"])


def test_parity_two_steps_of_training(kit, tmp_path, monkeypatch):
    pixels, settings = to_pixels(kit["step/image_uint8"]).double(), kit.settings("step")
    loss = loss_of(kit, numbers=pixels[0].numel(), sums=True)
    objective = in_double(objective_of(kit, loss, tmp_path, monkeypatch), monkeypatch)
    pattern = r"Adam lr ([\d.e-]+) betas \(([\d.]+), ?([\d.]+)\)"
    rate, *betas = map(float, re.search(pattern, settings["optimizer"]).groups())
    optimisers = [
        torch.optim.Adam(learner.parameters(), rate, tuple(betas))
        for learner in objective.learners.values()
    ]
    case = kit.case["cases"]["step"]
    counters = zip(
        case["global_step_seen_by_generator_loss"],
        case["global_step_seen_by_discriminator_loss"],
        strict=True,
    )
    limits = ((LOSS, GRADIENT), (SECOND_LOSS, SECOND_GRADIENT))
    for number, (generator, discriminator) in enumerate(counters):
        step = Step(
            objective,
            loss,
            pixels,
            kit["step/posterior_noise"][number],
            generator=factor(loss, generator),
            discriminator=factor(loss, discriminator),
        )
        prefix = ("step/", "step/second_")[number]
        step.backward()
        check(step, kit, prefix, *limits[number])
        check_gradients(step, kit, prefix, limits[number][1])
        if number == 0:
            check_maps(step, kit, kit["step/posterior_noise"][0])
        for optimiser in optimisers:
            optimiser.step()


@torch.no_grad()
def check_maps(step: Step, kit: Kit, noise: Tensor) -> None:
    learner = step.learner
    q = learner.autoencoder.encode(step.pixels).latent_dist
    features = step.inputs["features"].patches[-1]
    compared, aux = learner.comparable(q.mean + q.std * noise, features)
    ours = {
        "moments": q.parameters,
        "reconstruction_first": step.output.carry["reconstruction"][:1],
        "z_compared": compared,
        "aux_compared": aux,
    }
    for name, value in ours.items():
        torch.testing.assert_close(value.to(torch.float32), kit[f"step/{name}"], **TENSOR)


def variants() -> list[Any]:
    """Parameters for a test: every variant of every kit."""
    found = []
    for one in kits("vavae_training"):
        if one.values[0] is None:
            return [pytest.param(None, 0, marks=one.marks)]
        for number, each in enumerate(load_kit(*one.values).settings("loss_variants")["variants"]):
            found.append(pytest.param(*one.values, number, id=f"{one.id}-{each['name']}"))
    return found


@pytest.mark.parametrize(("folder", "number"), variants())
def test_parity_variants_of_the_loss(folder, number, tmp_path, monkeypatch):
    """By published weights divided, beside means."""
    kit = load_kit(folder)
    variant = kit.settings("loss_variants")["variants"][number]
    pixels = to_pixels(kit["loss_variants/image_uint8"]).double()
    loss = loss_of(kit, numbers=pixels[0].numel(), sums=False, **variant["set"])
    now = factor(loss, variant["global_step"])
    step = Step(
        in_double(objective_of(kit, loss, tmp_path, monkeypatch), monkeypatch),
        loss,
        pixels,
        kit["loss_variants/posterior_noise"][number],
        generator=now,
        discriminator=now,
    )
    check(step, kit, f"loss_variants/{variant['name']}_", LOSS, GRADIENT)
