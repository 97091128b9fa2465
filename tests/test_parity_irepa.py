"""iREPA against kits of its official code: targets, projectors, network, and the loss through the learner."""

import math
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from parity import Kit, kits, load_kit
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.learner import DiTLearner
from semtok.diffusion.repa import REPAConfig, spatially_normalised
from semtok.hub.checkpoints import read_checkpoint
from semtok.hub.formats import open_checkpoint, recognise
from semtok.hub.import_dit import ImportedDiT, import_dit, our_name
from semtok.hub.projectors import read_projectors
from semtok.objective import Term
from semtok.sampler.latents import Latents, Posterior
from semtok.sampler.transport import TimeConfig
from semtok.teachers import TeacherFeatures

TENSOR, SUM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}
NORM = {"atol": 1e-7, "rtol": 1e-5}


@pytest.fixture(params=kits("irepa"))
def kit(request) -> Kit:
    return load_kit(request.param)


def network(kit: Kit) -> ImportedDiT:
    """From the checkpoint as the training script writes it; the bare weights must say the same."""
    checkpoint = open_checkpoint(kit.folder / kit.case["files"]["checkpoint"])
    bare = open_checkpoint(kit.folder / kit.case["files"]["weights"])
    assert recognise(checkpoint) == recognise(bare) == ("repa",)
    state = checkpoint.state
    assert state.keys() == bare.state.keys()
    assert all(torch.equal(state[n], bare.state[n]) for n in state)
    return import_dit(state, place=kit.folder.name, heads=kit.heads)


def compare(ours: Tensor, kit: Kit, name: str, limits: dict[str, float]) -> None:
    torch.testing.assert_close(ours, kit[name], **limits, msg=lambda m: f"{name}: {m}")


def as_map(tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    height = grid[0] if grid is not None else math.isqrt(tokens.shape[1])
    return rearrange(tokens, "b (h w) d -> b d h w", h=height)


def project(projector: nn.Module, tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    if not isinstance(projector, nn.Conv2d):
        return projector(tokens)
    return rearrange(projector(as_map(tokens, grid)), "b d h w -> b (h w) d")


def test_parity_irepa_targets(kit):
    settings, features = kit.settings("spatial_norm"), as_map(kit["spatial_norm/feat"])
    for i, alpha in enumerate(settings["alphas"]):
        ours = spatially_normalised(features, alpha).flatten(2).transpose(1, 2)
        compare(ours, kit, f"spatial_norm/normalised_{i}", TENSOR)


@torch.no_grad()
def test_parity_irepa_projectors(kit):
    settings, dit = kit.settings("projectors"), network(kit)
    tokens, oblong = kit["projectors/tokens"], kit["projectors/tokens_rect"]
    kind = kit.case["constructor"]["kwargs"]["projection_layer_type"]
    for i, projector in enumerate(dit.projectors):
        if f"projectors/{kind}_{i}" in kit.tensors:
            compare(project(projector, tokens), kit, f"projectors/{kind}_{i}", TENSOR)
    ours = project(dit.projectors[0], oblong, tuple(settings["hw"]))
    compare(ours, kit, f"projectors/{kind}_rect", TENSOR)
    others = read_checkpoint(kit.folder / kit.case["files"]["other_projectors"])
    assert others.keys() == settings["others"].keys() and others
    for name, state in others.items():
        heads = read_projectors({f"projectors.0.{inner}": v for inner, v in state.items()})
        compare(project(heads[0], tokens), kit, f"projectors/{name}", TENSOR)


@torch.no_grad()
def test_parity_irepa_forward(kit):
    dit, depth = network(kit), kit.case["constructor"]["kwargs"]["encoder_depth"]
    output = dit.network(
        {"texture": kit["forward/x"]},
        {"texture": 1 - kit["forward/t"]},
        kit["forward/y"],
        hidden_after=depth,
    )
    compare(-output.velocity.texture, kit, "forward/velocity", TENSOR)
    compare(output.hidden, kit, "forward/hidden_at_encoder_depth", TENSOR)
    for i, projector in enumerate(dit.projectors):
        compare(project(projector, output.hidden), kit, f"forward/projected_{i}", TENSOR)


class Recorded:
    """The random numbers of a case, in the place of ``Draws``."""

    def __init__(self, kit: Kit, case: str) -> None:
        self.kit, self.case = kit, case

    def __call__(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        if name == "posterior/texture":
            return torch.zeros(1, *shape)
        if name == "noise/texture":
            return self.kit[f"{self.case}/noises"]
        if name == "class_dropout":
            own = f"{self.case}/label_drop_draw"
            return self.kit[own] if own in self.kit.tensors else torch.ones(1)
        assert name == "time"
        drawn = self.kit[f"{self.case}/t_draw"].flatten()
        is_uniform = self.kit.settings(self.case)["weighting"] == "uniform"
        return 1 - drawn if is_uniform else -drawn  # of noise

    normal = uniform = __call__


def loss_case(kit: Kit, case: str) -> tuple[DiTLearner, dict[str, Term]]:
    """The training learner, with each teacher in turn; the terms, with the mean of their alignments."""
    settings, dit, kwargs = kit.settings(case), network(kit), kit.case["constructor"]["kwargs"]
    assert settings["projection_loss_type"] == "cosine" and settings["spnorm_method"] == "zscore"
    is_uniform = settings["weighting"] == "uniform"
    config = DiffusionConfig(
        network="SiT-T/2",  # the network itself is the imported one
        path=settings["path_type"],
        time=TimeConfig(law="uniform" if is_uniform else "logit_normal"),
        leads={"texture": 0.0},
        loss_weights={"texture": 1.0},
        cosine_weight=0.0,
        class_dropout=kwargs["class_dropout_prob"] if settings["train_mode"] else 0.0,
        repa=REPAConfig(
            weight=float(settings["proj_coeff"]),
            depth=kwargs["encoder_depth"],
            projector="conv" if isinstance(dit.projectors[0], nn.Conv2d) else "mlp",
            spatial_norm=settings["zscore_alpha"],
        ),
    )
    learner, alignments = DiTLearner(config, dit.network, 1), []
    clean = Latents({"texture": kit[f"{case}/latents"]})
    posterior = Posterior(clean, clean.map(torch.zeros_like))
    for i, projector in enumerate(dit.projectors):
        target = as_map(kit[f"{case}/feat_{i}"])
        learner.projector = projector
        features = TeacherFeatures((target,), target.mean(dim=(2, 3)))
        inputs: dict[str, Any] = {"posterior": posterior, "labels": kit[f"{case}/y"]}
        output = learner(inputs | {"features": features}, Recorded(kit, case), 0, {})
        alignments.append(output.terms["alignment"].value)
    learner.projector = dit.projectors
    value = torch.stack(alignments).mean(dim=0)
    return learner, output.terms | {"alignment": Term(value, config.repa.weight)}


def test_parity_irepa_losses_and_gradients(kit):
    found = [name for name in kit.case["cases"] if name.startswith("loss")]
    assert {"loss", "loss_train_mode"} <= set(found)
    for case in found:
        learner, terms = loss_case(kit, case)
        assert terms.keys() == {"velocity/texture", "alignment"}
        compare(terms["velocity/texture"].value, kit, f"{case}/denoising_loss", SUM)
        alignment, weight = terms["alignment"].value.mean(), terms["alignment"].weight
        # Ours is 1 - cosine, theirs the negative cosine.
        compare(alignment - 1, kit, f"{case}/proj_loss", TENSOR)
        compare(weight * (alignment - 1), kit, f"{case}/weighted_proj_loss", TENSOR)
        total = sum(term.weight * term.value.mean() for term in terms.values())
        compare(total - weight, kit, f"{case}/total_loss", TENSOR)
        total.backward()
        ours = {name.removeprefix("network."): p for name, p in learner.named_parameters()}
        ours = {name.replace("projector.", "projectors."): p for name, p in ours.items()}
        names = kit.case["cases"][case]["grad_norm_names"]
        for name, expected in zip(names, kit[f"{case}/grad_norms"], strict=True):
            norm = ours[our_name(name)].grad.norm()
            torch.testing.assert_close(
                norm, expected, **NORM, msg=lambda m, n=name, c=case: f"{c}, {n}: {m}"
            )
