"""DiT^DH against kits of RAE's official code: networks, guidance, the training loss through the learner, samplers."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.learner import DiTLearner
from semtok.hub.formats import open_checkpoint, recognise
from semtok.hub.headed_dit import import_headed_dit, our_name
from semtok.sampler.dit import DiT
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import Latents, Posterior
from semtok.sampler.sampling import SamplerConfig, Velocity, integrate, velocity_function
from semtok.sampler.transport import Schedule, TimeConfig, scaled_score

TENSOR, NORM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 1e-7, "rtol": 1e-5}
ALONE = Schedule({"texture": 0.0})


@pytest.fixture(params=kits("rae_dit"))
def kit(request) -> Kit:
    return load_kit(request.param)


def network(kit: Kit, role: str = "checkpoint") -> DiT:
    """From one of the kit's files, each of which its official code takes."""
    checkpoint = open_checkpoint(kit.folder / kit.case["files"][role])
    assert recognise(checkpoint) == ("dit-dh",)
    which = "guidance_kwargs" if role == "guidance_model" else "stage2_kwargs"
    own = kit.case["constructor"][which]
    equal = own["hidden_size"][0] == own["hidden_size"][1]
    dit = import_headed_dit(
        checkpoint.state,
        place=kit.folder.name,
        encoder_blocks=own["depth"][0] if equal else None,
    ).network
    shape = dit.config
    assert [shape.depth, shape.head.depth] == own["depth"]
    assert [shape.heads, shape.head.heads] == own["num_heads"]
    assert [shape.width, shape.last_width] == own["hidden_size"]
    assert shape.swiglu == own["use_swiglu"] and shape.rms_norm == own["use_rmsnorm"]
    assert bool(shape.qk_norm) == own["use_qknorm"]
    assert (shape.learned_positions is not None) == own["use_pos_embed"]
    return dit


def guide(kit: Kit) -> DiT | None:
    return network(kit, "guidance_model") if "guidance_model" in kit.case["files"] else None


def compare(ours: Tensor, kit: Kit, name: str, limits: dict[str, float] = TENSOR) -> None:
    torch.testing.assert_close(ours, kit[name], **limits, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_parity_rae_dit_forward(kit):
    """Its time is the noise's, and its velocity points to noise."""
    x, t, y = ({"texture": kit["forward/x"]}, 1 - kit["forward/t"], kit["forward/y"])
    for dit, name in ((network(kit), "velocity"), (guide(kit), "guidance_velocity")):
        if f"forward/{name}" in kit.tensors:
            compare(-dit(x, {"texture": t}, y).velocity.texture, kit, f"forward/{name}")
    bare, whole = network(kit, "weights").state_dict(), network(kit).state_dict()
    assert all(torch.equal(bare[name], whole[name]) for name in whole)


# Guidance ----------------------------------------------------------------------------------------


def guidance(settings: dict[str, Any]) -> GuidanceConfig:
    """Theirs is closed at both ends too, of the noise's time."""
    begin, end = settings["cfg_interval"]
    return GuidanceConfig(scale=settings["scale"], interval=(1 - end, 1 - begin))


@torch.no_grad()
def test_parity_rae_dit_guidance(kit):
    settings, dit, weak = kit.settings("guidance"), network(kit), guide(kit)
    x, y = kit["guidance/x"], kit["guidance/y"]
    null = torch.full_like(y, dit.num_classes)
    for case in settings["cases"]:
        config, clock = guidance(case | {"scale": settings["scale"]}), 1 - case["t"]
        for kind, other in (("cfg", None), ("autoguidance", weak)):
            guided = velocity_function(dit, y, ALONE, config, weak=other)
            first, second = kit[f"guidance/{kind}_{case['name']}"].chunk(2)
            ours = -guided({"texture": x}, clock, clock)["texture"]
            torch.testing.assert_close(ours, first, **TENSOR)
            if kind == "autoguidance":
                plain = velocity_function(dit, null, ALONE, config, weak=other)
                ours = -plain({"texture": x}, clock, clock)["texture"]
            # Of classifier-free guidance both halves are the same.
            torch.testing.assert_close(ours, second, **TENSOR)


# Losses ------------------------------------------------------------------------------------------


class Recorded:
    """The random numbers of a case, in the place of ``Draws``; labels are dropped where it has numbers for that."""

    def __init__(self, kit: Kit, case: str, num: int) -> None:
        self.kit, self.case, self.num, self.global_batch = kit, case, num, num

    def __call__(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        if name.startswith("posterior/"):
            return torch.zeros(1, *shape)
        if name == "class_dropout":
            return self.kit.tensors.get(f"{self.case}/label_drop_draw", torch.ones(self.num))
        own = {"time": "t_uniform", "noise/texture": "noise"}[name]
        value = self.kit[f"{self.case}/{own}"]
        return 1 - value if name == "time" else value  # theirs is the noise's

    normal = uniform = __call__


def time_config(settings: dict[str, Any]) -> TimeConfig:
    kind, shift = settings["time_dist_type"], settings["time_dist_shift"]
    if kind == "uniform":
        return TimeConfig(least=0.001, shift=shift)
    law, mean, std = kind.split("_")
    assert law == "logit-normal"
    return TimeConfig(
        law="logit_normal", mean=-float(mean), std=float(std), least=0.001, shift=shift
    )


@pytest.mark.parametrize("case", ["loss", "loss_uniform"])
def test_parity_rae_dit_losses_and_gradients(kit, case):
    settings, dit = kit.settings(case), network(kit)
    kwargs = kit.case["constructor"]["stage2_kwargs"]
    assert settings["path_type"] == "Linear"
    config = DiffusionConfig(
        network="SiT-T/2",  # the network itself is the imported one
        time=time_config(settings),
        leads={"texture": 0.0},
        cosine_weight=0.0,
        class_dropout=kwargs["class_dropout_prob"] if settings["train_mode"] else 0.0,
        repa=False,
    )
    learner, clean = DiTLearner(config, dit, None), Latents({"texture": kit[f"{case}/latent"]})
    posterior = Posterior(clean, clean.map(torch.zeros_like))
    inputs = {"posterior": posterior, "labels": kit[f"{case}/y"], "features": None}
    draws = Recorded(kit, case, len(clean.texture))
    noised = learner.noised(posterior, draws)
    compare(1 - noised.t, kit, f"{case}/t")
    compare(noised.x["texture"], kit, f"{case}/x_t")
    predicted: list[Tensor] = []
    hook = dit.register_forward_hook(
        lambda module, words, output: predicted.append(output.velocity.texture)
    )
    value = learner(inputs, draws, 0, {}).terms["velocity/texture"].value
    hook.remove()
    compare(-predicted[0], kit, f"{case}/pred")
    compare(value, kit, f"{case}/loss")
    value.mean().backward()
    ours, own = dict(dit.named_parameters()), kit.case["cases"][case]
    names = [our_name(name, dit.config.depth) for name in own["grad_norm_names"]]
    assert set(names) == ours.keys()
    for name, norm in zip(names, kit[f"{case}/grad_norms"], strict=True):
        torch.testing.assert_close(
            ours[name].grad.norm(), norm, **NORM, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )


# Samplers ----------------------------------------------------------------------------------------


def sampler(settings: dict[str, Any]) -> SamplerConfig:
    own, shift = settings["sampler"], settings["time_dist_shift"]
    guided = guidance(settings) if settings["method"] != "none" else GuidanceConfig()
    if settings["mode"] == "SDE":
        assert (own["sampling_method"], own["last_step"]) == ("euler", "Mean")
        return SamplerConfig(
            method="sde",
            steps=own["num_steps"],
            diffusion=own["diffusion_form"],
            last_step=own["last_step_size"],
            shift=shift,
            guidance=guided,
        )
    return SamplerConfig(
        method=own["sampling_method"],
        steps=own["num_steps"] - 1,
        rtol=own["rtol"],
        atol=own["atol"],
        error_over="batch",
        shift=shift,
        end=0.999,
        guidance=guided,
    )


@torch.no_grad()
def test_parity_rae_dit_samplers(kit):
    for case in kit.case["cases"]:
        if case.startswith(("ode", "sde")):
            check_sampler(kit, case)


def check_sampler(kit: Kit, case: str) -> None:
    settings, dit = kit.settings(case), network(kit)
    config, weak = sampler(settings), None
    if settings["method"] == "autoguidance":
        weak = guide(kit)
    start, y = kit[f"{case}/z"], kit[f"{case}/y"]
    num = len(start)
    # Brownian numbers of the whole doubled batch, of which the first half is kept.
    noise: Iterator[Tensor] = (own[:num] for own in kit.tensors.get(f"{case}/noise", ()))
    velocity = velocity_function(dit, y, ALONE, config.guidance, weak=weak)
    path: list[Tensor] = []
    clock: list[float] = []

    def watch(now: float, state: dict[str, Tensor]) -> None:
        clock.append(1 - now)
        path.append(state["texture"])

    ours = integrate(
        velocity,
        {"texture": start},
        config,
        schedule=ALONE,
        shift=config.shift,
        noise=lambda _: next(noise),
        watch=watch,
    )
    trajectory, limits = kit[f"{case}/trajectory"], TENSOR
    if config.method == "dopri5":
        limits = {"atol": 1e-4, "rtol": 0.0}
    if config.method == "sde":
        check_sde(kit, case, path, velocity, config)
        return
    torch.testing.assert_close(
        clock, kit.case["cases"][case]["time_grid_float32"], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(torch.stack(path), trajectory, **limits)
    compare(ours.texture, kit, f"{case}/samples", limits)


def check_sde(
    kit: Kit, case: str, path: list[Tensor], velocity: Velocity, config: SamplerConfig
) -> None:
    """All but the last step; that one, of theirs, is of the length and at the time that it has without the shift."""
    trajectory = kit[f"{case}/trajectory"]
    ours = torch.stack(path[1:-1])
    torch.testing.assert_close(ours, trajectory[: len(ours)], **TENSOR)
    clock = 1 - config.last_step
    x, t = path[-2], torch.tensor([clock])
    own = velocity({"texture": x}, clock, clock)["texture"]
    assert config.diffusion == "linear"
    share = own + (1 - clock) * scaled_score("linear", own, x, t) / (1 - clock)
    compare(x + config.last_step * share, kit, f"{case}/samples")
    assert math.isclose(1 - clock, kit.case["cases"][case]["network_call_t"][-1], abs_tol=1e-6)
