"""SR-DiT against kits of its official code: routed and dense networks, losses through the learner, samplers."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.learner import DiTLearner
from semtok.diffusion.repa import REPAConfig
from semtok.diffusion.routing import RoutingConfig
from semtok.hub.formats import open_checkpoint, recognise
from semtok.hub.import_dit import ImportedDiT, import_dit, our_name
from semtok.objective import StepOutput, Term
from semtok.sampler.dit import DiTOutput
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import Latents, Posterior
from semtok.sampler.routing import DENSE, Route
from semtok.sampler.sampling import SamplerConfig, integrate, velocity_function
from semtok.sampler.transport import Schedule, TimeConfig
from semtok.teachers import TeacherFeatures

TENSOR, SUM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}
NORM = {"atol": 1e-7, "rtol": 1e-5}
TOGETHER = Schedule({"texture": 0.0, "global": 0.0})


@pytest.fixture(params=kits("srdit"))
def kit(request) -> Kit:
    return load_kit(request.param)


def network(kit: Kit) -> ImportedDiT:
    """From the checkpoint as the training script writes it; the bare weights must say the same."""
    files, own = kit.case["files"], kit.case["constructor"]["attributes"]
    checkpoint = open_checkpoint(kit.folder / files["checkpoint"])
    bare = open_checkpoint(kit.folder / files["weights"])
    assert recognise(checkpoint) == recognise(bare) == ("sr-dit",)
    state = checkpoint.state
    assert state.keys() == bare.state.keys()
    assert all(torch.equal(state[n], bare.state[n]) for n in state)
    dit = import_dit(state, place=kit.folder.name, split=(own["num_f"], own["num_h"]))
    assert dit.network.config.heads == kit.heads
    return dit


def cases(kit: Kit, prefix: str) -> list[str]:
    """The kit's cases of a kind, of which every kit has some."""
    found = [name for name in kit.case["cases"] if name.startswith(prefix)]
    assert found
    return found


def compare(ours: Tensor, kit: Kit, name: str, limits: dict[str, float]) -> None:
    torch.testing.assert_close(ours, kit[name], **limits, msg=lambda m: f"{name}: {m}")


def time_config(settings: dict[str, Any], shape: tuple[int, ...]) -> TimeConfig:
    law = "uniform" if settings.get("weighting", "uniform") == "uniform" else "logit_normal"
    if not settings["time_shifting"]:
        return TimeConfig(law=law)
    base = settings["shift_base"]
    shift = "spatial_dimension" if base == 4096 else math.sqrt(math.prod(shape) / base)
    return TimeConfig(law=law, shift=shift)


def routing(kit: Kit, train: bool = True) -> RoutingConfig:
    own = kit.case["constructor"]["attributes"]
    blocks = {"first": own["num_f"], "last": own["num_h"]}
    if not train:
        return RoutingConfig(**blocks, drop=0.0, path_drop=0.0)
    return RoutingConfig(
        **blocks,
        drop=own["sprint_drop_ratio"],
        vectors="routed",
        path_drop=own["path_drop_prob"],
        path_drop_per="batch",
    )


class Recorded:
    """The random numbers of a case, in the place of ``Draws``; those that a case has not drop nothing."""

    _NAMES = {
        "class_dropout": "label_drop_uniform",
        "route": "token_drop_uniform",
        "noise/texture": "noise",
        "noise/global": "noise_cls",
        "path": "path_drop_uniform",
    }

    def __init__(self, kit: Kit, case: str, num: int) -> None:
        self.kit, self.case, self.num, self.global_batch = kit, case, num, num

    def __call__(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        if name.startswith("posterior/"):
            return torch.zeros(1, *shape)
        if name == "time":  # of noise; the shift is the same for that and for ours
            if f"{self.case}/time_uniform" in self.kit.tensors:
                return 1 - self.kit[f"{self.case}/time_uniform"].flatten()
            return -self.kit[f"{self.case}/time_normal"].flatten()
        own = f"{self.case}/{self._NAMES[name]}"
        return self.kit[own] if own in self.kit.tensors else torch.ones(self.num)

    normal = uniform = uniform_of_step = __call__


def forward(
    dit: ImportedDiT, kit: Kit, case: str, labels: Tensor, route: Route = DENSE
) -> tuple[DiTOutput, dict[str, Tensor]]:
    """The network's output, and what passes between its parts."""
    inner, seen = dit.network, {}
    first, last = inner.config.split
    places = {
        "v1": (inner.blocks[0], lambda inputs, output: output[1]),
        "dense": (inner.blocks[first - 1], lambda inputs, output: output[0]),
        "middle": (inner.blocks[-last - 1], lambda inputs, output: output[0]),
        "fusion_input": (inner.fusion.linear, lambda inputs, output: inputs[0]),
        "fused": (inner.fusion.linear, lambda inputs, output: output),
    }

    def noted(name: str, take: Any) -> Any:
        return lambda module, inputs, output: seen.update({name: take(inputs, output)})

    hooks = [
        module.register_forward_hook(noted(name, take)) for name, (module, take) in places.items()
    ]
    output = inner(
        {"texture": kit[f"{case}/x"], "global": kit[f"{case}/cls_token"]},
        {"texture": 1 - kit[f"{case}/t"]},
        labels,
        hidden_after=first,
        route=route,
    )
    for hook in hooks:
        hook.remove()
    return output, seen


def check_forward(
    dit: ImportedDiT, kit: Kit, case: str, output: DiTOutput, seen: dict[str, Tensor]
) -> None:
    compare(-output.velocity.texture, kit, f"{case}/velocity", TENSOR)
    compare(-output.velocity["global"], kit, f"{case}/cls_velocity", TENSOR)
    for name, own in seen.items():
        if name != "fusion_input" or f"{case}/fusion_input" in kit.tensors:
            compare(own, kit, f"{case}/{name}", TENSOR)
    compare(output.hidden, kit, f"{case}/dense", TENSOR)
    for i, projector in enumerate(dit.projectors):
        compare(projector(output.hidden), kit, f"{case}/projected_{i}", TENSOR)


@torch.no_grad()
def test_parity_srdit_forward(kit):
    dit = network(kit)
    output, seen = forward(dit, kit, "forward", kit["forward/y"])
    assert seen.keys() == {"dense", "middle", "fusion_input", "fused", "v1"}
    check_forward(dit, kit, "forward", output, seen)


@torch.no_grad()
@pytest.mark.parametrize("skipped", [False, True], ids=["dropped", "skipped"])
def test_parity_srdit_without_the_path_between(kit, skipped):
    """Samplers skip the blocks between, where the official ones run them and throw the result away."""
    dit, num = network(kit), len(kit["forward/y"])
    route = Route(num_skipped=num) if skipped else Route(dropped=torch.ones(num, dtype=torch.bool))
    output, seen = forward(dit, kit, "forward", kit["forward/y"], route)
    compare(-output.velocity.texture, kit, "forward/velocity_path_drop", TENSOR)
    compare(-output.velocity["global"], kit, "forward/cls_velocity_path_drop", TENSOR)
    compare(seen["fused"], kit, "forward/fused_path_drop", TENSOR)


@torch.no_grad()
def test_parity_srdit_routes_as_in_training(kit):
    dit, dropout = network(kit), kit.case["constructor"]["kwargs"]["class_dropout_prob"]
    for case in cases(kit, "forward_train"):
        labels = kit[f"{case}/y"]
        dropped = kit[f"{case}/label_drop_uniform"] < dropout
        labels = torch.where(dropped, dit.network.num_classes, labels)
        side = kit[f"{case}/x"].shape[-1] // dit.network.config.patch_size
        route = routing(kit).route(Recorded(kit, case, len(labels)), (side, side), 1, step=0)
        if f"{case}/ids_keep" in kit.tensors:
            assert torch.equal(route.kept, kit[f"{case}/ids_keep"])
        assert route.dropped.tolist() == [kit.case["cases"][case]["path_dropped"]] * len(labels)
        output, seen = forward(dit, kit, case, labels, route)
        check_forward(dit, kit, case, output, seen)


# Losses ------------------------------------------------------------------------------------------


def loss_case(kit: Kit, case: str) -> tuple[DiTLearner, StepOutput]:
    """The training learner itself, on the case's inputs and random numbers. Of several teachers it is run with each,
    and the mean of their alignments is taken."""
    settings, dit = kit.settings(case), network(kit)
    weights, train, labels = settings["coefficients"], settings["train_mode"], kit[f"{case}/y"]
    kwargs, latent = kit.case["constructor"]["kwargs"], kit[f"{case}/latent"]
    side = latent.shape[-1] // dit.network.config.patch_size
    route = routing(kit, train)
    config = DiffusionConfig(
        network="SiT-T/2",  # the network itself is the imported one
        path=settings["path_type"],
        time=time_config(settings, latent.shape[1:]),
        leads={"texture": 0.0, "global": 0.0},
        loss_weights={"texture": 1.0, "global": weights["cls"]},
        contrastive_weight={"texture": weights["cfm"]},
        cosine_weight=0.0,
        class_dropout=kwargs["class_dropout_prob"] if train else 0.0,
        routing=route,
        repa=REPAConfig(weight=weights["proj"], depth=route.first, with_global=True),
    )
    learner = DiTLearner(config, dit.network, 1)
    clean = Latents({"texture": latent, "global": kit[f"{case}/cls_token"]})
    inputs: dict[str, Any] = {
        "posterior": Posterior(clean, clean.map(torch.zeros_like)),
        "labels": labels,
    }
    draws = Recorded(kit, case, len(labels))
    noised = learner.noised(inputs["posterior"], draws)
    compare((1 - noised.t).view_as(kit[f"{case}/t"]), kit, f"{case}/t", TENSOR)
    compare(noised.x["texture"], kit, f"{case}/x_t", TENSOR)
    compare(noised.x["global"], kit, f"{case}/cls_t", TENSOR)
    alignments = []
    for i, projector in enumerate(dit.projectors):
        targets = kit[f"{case}/z_{i}"]
        patches = targets[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        learner.projector = projector
        features = TeacherFeatures((patches,), targets[:, 0])
        output = learner(inputs | {"features": features}, draws, 0, {})
        alignments.append(output.terms["alignment"].value)
    terms = dict(output.terms)
    terms["alignment"] = Term(torch.stack(alignments).mean(dim=0), weights["proj"])
    if settings["cfm_weighting"] == "linear":
        contrast = terms["contrast/texture"]
        terms["contrast/texture"] = Term((1 - noised.t) * contrast.value, contrast.weight)
    learner.projector = dit.projectors
    return learner, StepOutput(terms)


def check_gradients(learner: DiTLearner, kit: Kit, case: str, which: str) -> None:
    names = kit.case["cases"][case]["grad_norm_names"]
    ours = {name.removeprefix("network."): p for name, p in learner.named_parameters()}
    ours = {name.replace("projector.", "projectors."): p for name, p in ours.items()}
    for name, expected in zip(names, kit[f"{case}/{which}"], strict=True):
        gradient = ours[our_name(name)].grad
        norm = gradient.norm() if gradient is not None else torch.zeros(())
        torch.testing.assert_close(
            norm, expected, **NORM, msg=lambda m, n=name: f"{case}/{which} of {n}: {m}"
        )


def test_parity_srdit_losses_and_gradients(kit):
    for case in cases(kit, "loss"):
        check_losses(kit, case)


def check_losses(kit: Kit, case: str) -> None:
    """A class token's loss that the kit calls a broadcast is a defect of the official code, and in its sum."""
    weights, (learner, output) = kit.settings(case)["coefficients"], loss_case(kit, case)
    value = {name: term.value for name, term in output.terms.items()}
    weighted = {name: term.weight * term.value.mean() for name, term in output.terms.items()}
    assert value.keys() == {"velocity/texture", "velocity/global", "contrast/texture", "alignment"}
    compare(value["velocity/texture"], kit, f"{case}/denoising_loss", SUM)
    compare(value["contrast/texture"].mean(), kit, f"{case}/cfm_loss", SUM)
    # Ours is 1 - cosine, theirs the negative cosine.
    compare(value["alignment"].mean() - 1, kit, f"{case}/proj_loss", TENSOR)
    norms = {
        "velocity/texture": "grad_norms_denoising",
        "contrast/texture": "grad_norms_cfm",
        "alignment": "grad_norms_proj",
    }
    is_whole = f"{case}/denoising_loss_cls" in kit.tensors
    if is_whole:
        compare(value["velocity/global"], kit, f"{case}/denoising_loss_cls", SUM)
        norms["velocity/global"] = "grad_norms_cls"
    for name, which in norms.items():
        learner.zero_grad()
        weighted[name].backward(retain_graph=True)
        check_gradients(learner, kit, case, which)
    if is_whole:
        learner.zero_grad()
        total = sum(weighted.values())
        compare(total - weights["proj"], kit, f"{case}/total_loss", TENSOR)
        total.backward()
        check_gradients(learner, kit, case, "grad_norms")
        norm = torch.stack([p.grad.norm() for p in learner.parameters() if p.grad is not None])
        compare(norm.norm(), kit, f"{case}/total_grad_norm", SUM)


# Samplers ----------------------------------------------------------------------------------------


def test_parity_srdit_samplers(kit):
    for case in cases(kit, "sde"):
        check_sampler(kit, case)


def check_sampler(kit: Kit, case: str) -> None:
    settings, dit, inner = kit.settings(case), network(kit), kit.case["cases"][case]
    interval = (1 - settings["guidance_high"], 1 - settings["guidance_low"])
    scale, vector = settings["cfg_scale"], settings["cls_cfg_scale"]
    # The official sampler guides above 1 only, and a class token whose own scale is positive.
    scale, vector = (scale, vector if vector > 0 else 1.0) if scale > 1 else (1.0, 1.0)
    config = SamplerConfig(
        method="sde",
        steps=settings["num_steps"],
        diffusion="linear",
        guidance=GuidanceConfig(
            scale={"texture": scale, "global": vector},
            interval=interval,
            base="dropped_path" if settings["path_drop"] else "null_label",
        ),
    )
    asked: list[float] = []
    velocity = velocity_function(dit.network, kit[f"{case}/y"], TOGETHER, config.guidance)

    def noted(state: Any, clock: float, *rest: Any) -> Any:
        place = len(asked)
        asked.append(1 - clock)
        for name, theirs in (("texture", "x_at_calls"), ("global", "cls_at_calls")):
            torch.testing.assert_close(state[name], kit[f"{case}/{theirs}"][place], **TENSOR)
        return velocity(state, clock, *rest)

    numbers: Iterator[Tensor] = iter(
        values
        for pair in zip(kit[f"{case}/noise"], kit[f"{case}/noise_cls"], strict=True)
        for values in pair
    )
    start = {"texture": kit[f"{case}/z"], "global": kit[f"{case}/cls_z"]}
    shapes = {name: part.shape[1:] for name, part in start.items()}
    time = time_config(settings, shapes["texture"])
    with torch.no_grad():
        ours = integrate(
            noted,
            start,
            config,
            schedule=TOGETHER,
            path=settings["path_type"],
            shift=time.shift_for(shapes),
            noise=lambda _: next(numbers),
        )
    compare(ours.texture, kit, f"{case}/samples", TENSOR)
    assert next(numbers, None) is None, "every recorded number was used"
    theirs = sorted(set(inner["network_call_t"]), reverse=True)
    torch.testing.assert_close(asked, theirs, atol=1e-6, rtol=0)
