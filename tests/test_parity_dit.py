"""SiT, REPA and LightningDiT against kits of their official code: networks, losses, samplers."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok.diffusion.learner import cosine_loss, squared_error
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_dit import ImportedDiT, import_dit, our_name
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.sampling import SamplerConfig, integrate, velocity_function
from semtok.sampler.transport import Schedule, interpolate, shift_times
from semtok.teachers import alignment_loss

TOGETHER = Schedule({"texture": 0.0})
TENSOR, SUM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}


@pytest.fixture(params=kits("sit"))
def sit(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture(params=kits("repa_sit"))
def repa(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture(params=kits("lightningdit"))
def lightningdit(request) -> Kit:
    return load_kit(request.param)


def imported(kit: Kit) -> ImportedDiT:
    """From the checkpoint as the training script writes it; the bare weights must say the same."""
    state = open_checkpoint(kit.folder / kit.case["files"]["checkpoint"]).state
    bare = (
        open_checkpoint(kit.folder / kit.case["files"]["weights"]).state
        if "weights" in kit.case["files"]
        else state
    )
    assert state.keys() == bare.keys() and all(torch.equal(state[n], bare[n]) for n in state)
    return import_dit(state, place=kit.folder.name, heads=kit.heads)


def predict(dit: ImportedDiT, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return dit.network({"texture": x}, {"texture": t}, y).velocity.texture


def sample(
    dit: ImportedDiT,
    y: Tensor,
    z: Tensor,
    config: SamplerConfig,
    noise: Tensor | None = None,
    shift: float = 1.0,
    clocks: list[float] | None = None,
) -> Tensor:
    """Samples from given noise; ``noise`` (steps, B, ...) is what the SDE adds. Notes the clock of each call."""
    draws: Iterator[Tensor] = iter(noise if noise is not None else [])
    velocity = velocity_function(dit.network, y, TOGETHER, config.guidance)

    def noted(state: Any, clock: Any, *rest: Any) -> Any:
        if clocks is not None:
            clocks.append(float(clock[0]) if isinstance(clock, Tensor) else clock)
        return velocity(state, clock, *rest)

    with torch.no_grad():
        return integrate(
            noted,
            {"texture": z},
            config,
            schedule=TOGETHER,
            shift=shift,
            noise=lambda _: next(draws),
        ).texture


def gradient_norms(dit: ImportedDiT, names: list[str]) -> dict[str, Tensor]:
    """Norms under the official names. The import turns and negates weights, which keeps norms."""
    ours = dict(dit.network.named_parameters()) | {
        f"projectors.{n}": p for n, p in dit.projectors.named_parameters()
    }
    return {name: ours[our_name(name)].grad.norm() for name in names}


def check_gradients(dit: ImportedDiT, kit: Kit, case: str) -> None:
    names = kit.case["cases"][case]["grad_norm_names"]
    ours = gradient_norms(dit, names)
    expected = kit[f"{case}/grad_norms"]
    for name, value in zip(names, expected, strict=True):
        torch.testing.assert_close(
            ours[name], value, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# SiT ---------------------------------------------------------------------------------------------


def test_parity_sit_forward(sit):
    ours = predict(imported(sit), sit["forward/x_t"], sit["forward/t"], sit["forward/y"])
    torch.testing.assert_close(ours, sit["forward/velocity"], **TENSOR)


def test_parity_sit_loss_and_gradients(sit):
    dit, t = imported(sit), sit["loss/t"]
    x_t, velocity = interpolate("linear", sit["loss/x1"], sit["loss/x0"], t)
    torch.testing.assert_close(x_t, sit["loss/x_t"], **TENSOR)
    pred = predict(dit, x_t, t, sit["loss/y"])
    torch.testing.assert_close(pred, sit["loss/pred"], **TENSOR)
    loss = squared_error(pred, velocity)
    torch.testing.assert_close(loss, sit["loss/loss"], **SUM)
    loss.mean().backward()
    check_gradients(dit, sit, "loss")


def test_parity_sit_guidance_of_three_channels(sit):
    scale = sit.settings("forward_with_cfg")["cfg_scale"]
    dit = imported(sit)
    guidance = GuidanceConfig(scale=scale, num_channels=3)
    y, x, t = (sit[f"forward_with_cfg/{n}"] for n in "yxt")
    expected = sit["forward_with_cfg/output"][: len(x)]
    for row, clock in enumerate(t.tolist()):  # the official batch mixes times
        own = slice(row, row + 1)
        velocity = velocity_function(dit.network, y[own], TOGETHER, guidance)
        with torch.no_grad():
            ours = velocity({"texture": x[own]}, clock, clock)["texture"]
        torch.testing.assert_close(ours, expected[own], **TENSOR)


@pytest.mark.parametrize("case", ["ode_euler", "ode_euler_cfg"])
def test_parity_sit_euler(sit, case):
    settings = sit.settings(case)
    config = SamplerConfig(
        method="euler",
        steps=settings["num_steps"] - 1,
        guidance=GuidanceConfig(scale=settings["cfg"], num_channels=3),
    )
    ours = sample(imported(sit), sit[f"{case}/y"], sit[f"{case}/z"], config)
    torch.testing.assert_close(ours, sit[f"{case}/samples"], **TENSOR)


@pytest.mark.parametrize(("case", "limit"), [("ode_dopri5_tight", 3e-4), ("ode_dopri5_cfg", 6e-3)])
def test_parity_sit_dopri5(sit, case, limit):
    settings = sit.settings(case)
    config = SamplerConfig(
        method="dopri5",
        rtol=settings["rtol"],
        atol=settings["atol"],
        error_over="batch",
        guidance=GuidanceConfig(scale=settings["cfg"], num_channels=3),
    )
    ours = sample(imported(sit), sit[f"{case}/y"], sit[f"{case}/z"], config)
    torch.testing.assert_close(ours, sit[f"{case}/samples"], atol=limit, rtol=0)


@pytest.mark.parametrize("case", ["sde_euler_mean", "sde_euler_mean_cfg"])
def test_parity_sit_sde(sit, case):
    settings = sit.settings(case)
    config = SamplerConfig(
        method="sde",
        steps=settings["num_steps"],
        last_step=settings["last_step_size"],
        guidance=GuidanceConfig(scale=settings["cfg"], num_channels=3),
    )
    z = sit[f"{case}/z"]
    noise = sit[f"{case}/noise"][:, : len(z)]
    ours = sample(imported(sit), sit[f"{case}/y"], z, config, noise)
    torch.testing.assert_close(ours, sit[f"{case}/samples"], **TENSOR)


# REPA: the other direction of time ---------------------------------------------------------------


def test_parity_repa_forward(repa):
    dit = imported(repa)
    depth = repa.case["constructor"]["kwargs"]["encoder_depth"]
    output = dit.network(
        {"texture": repa["forward/x_t"]},
        {"texture": 1 - repa["forward/t"]},
        repa["forward/y"],
        hidden_after=depth,
    )
    torch.testing.assert_close(-output.velocity.texture, repa["forward/velocity"], **TENSOR)
    for i, projector in enumerate(dit.projectors):
        torch.testing.assert_close(
            projector(output.hidden), repa[f"forward/projected_{i}"], **TENSOR
        )


@pytest.mark.parametrize("case", ["loss", "loss_train_mode"])
def test_parity_repa_losses_and_gradients(repa, case):
    dit, t = imported(repa), 1 - repa[f"{case}/t"]
    depth = repa.case["constructor"]["kwargs"]["encoder_depth"]
    labels = repa["loss/y"] if case == "loss" else repa[f"{case}/effective_y"]
    x_t, velocity = interpolate("linear", repa[f"{case}/images"], repa[f"{case}/noises"], t)
    if case == "loss":
        torch.testing.assert_close(x_t, repa["loss/x_t"], **TENSOR)
    output = dit.network({"texture": x_t}, {"texture": t}, labels, hidden_after=depth)
    denoising = squared_error(output.velocity.texture, velocity)
    torch.testing.assert_close(denoising, repa[f"{case}/denoising_loss"], **SUM)
    side = round(output.hidden.shape[1] ** 0.5)
    as_map = lambda tokens: tokens.transpose(1, 2).unflatten(2, (side, side))  # noqa: E731
    alignment = torch.stack(
        [
            alignment_loss(as_map(head(output.hidden)), as_map(repa[f"{case}/z_{i}"]))
            for i, head in enumerate(dit.projectors)
        ]
    ).mean()
    # Ours is 1 - cosine, theirs the negative cosine.
    torch.testing.assert_close(alignment - 1, repa[f"{case}/proj_loss"], **TENSOR)
    total = denoising.mean() + repa.settings(case)["proj_coeff"] * alignment
    total.backward()
    check_gradients(dit, repa, case)


@pytest.mark.parametrize("case", ["ode_no_cfg", "ode_euler", "ode_heun", "sde_no_cfg", "sde"])
def test_parity_repa_samplers(repa, case):
    settings = repa.settings(case)
    low, high = settings["guidance_low"], settings["guidance_high"]
    config = SamplerConfig(
        method="sde" if settings["kind"] == "sde" else "heun" if settings["heun"] else "euler",
        steps=settings["num_steps"],
        guidance=GuidanceConfig(scale=settings["cfg_scale"], interval=(1 - high, 1 - low)),
    )
    noise = repa[f"{case}/noise"] if settings["kind"] == "sde" else None
    ours = sample(imported(repa), repa[f"{case}/y"], repa[f"{case}/latents"], config, noise)
    torch.testing.assert_close(ours, repa[f"{case}/samples"], **TENSOR)


# LightningDiT ------------------------------------------------------------------------------------


def test_parity_lightningdit_forward(lightningdit):
    ours = predict(imported(lightningdit), *(lightningdit[f"forward/{n}"] for n in "xty"))
    torch.testing.assert_close(ours, lightningdit["forward/velocity"], **TENSOR)


def test_parity_lightningdit_guidance(lightningdit):
    settings, dit = lightningdit.settings("cfg"), imported(lightningdit)
    x, y = lightningdit["cfg/x"], lightningdit["cfg/y"]
    for case in settings["cases"]:
        begin = case["cfg_interval_start"] if case["cfg_interval"] else 0.0
        guidance = GuidanceConfig(
            scale=settings["cfg_scale"], interval=(begin, 1.0), num_channels=3
        )
        with torch.no_grad():
            velocity = velocity_function(dit.network, y, TOGETHER, guidance)
            ours = velocity({"texture": x}, case["t"], case["t"])["texture"]
        expected = lightningdit[f"cfg/{case['name']}"][: len(x)]
        torch.testing.assert_close(ours, expected, **TENSOR)


def test_parity_lightningdit_losses_and_gradients(lightningdit):
    kit, dit = lightningdit, imported(lightningdit)
    t = kit["loss/t_normal"].sigmoid()
    torch.testing.assert_close(t, kit["loss/t"], **TENSOR)
    x_t, velocity = interpolate("linear", kit["loss/x1"], kit["loss/x0"], t)
    pred = predict(dit, x_t, t, kit["loss/y"])
    mse, cosine = squared_error(pred, velocity), cosine_loss(pred, velocity)
    torch.testing.assert_close(mse, kit["loss/loss"], **SUM)
    torch.testing.assert_close(cosine, kit["loss/cos_loss"], **SUM)
    total = mse.mean() + cosine.mean()
    torch.testing.assert_close(total, kit["loss/total_loss"], **SUM)
    total.backward()
    check_gradients(dit, kit, "loss")


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("ode_euler", 5e-5),
        ("ode_euler_cfg_shift", 5e-5),
        ("ode_dopri5_tight", 5e-5),
        ("ode_dopri5", 5e-5),
    ],
)
def test_parity_lightningdit_samplers(lightningdit, case, limit):
    settings = lightningdit.settings(case)
    config = SamplerConfig(
        method=settings["sampling_method"],
        steps=settings["num_steps"] - 1,
        rtol=settings["rtol"],
        atol=settings["atol"],
        error_over="batch",
        guidance=GuidanceConfig(
            scale=settings["cfg"], interval=(settings["cfg_interval_start"], 1.0), num_channels=3
        ),
    )
    clocks: list[float] = []
    shift = 1 / settings["timestep_shift"] if settings["timestep_shift"] else 1.0
    ours = sample(
        imported(lightningdit),
        lightningdit[f"{case}/y"],
        lightningdit[f"{case}/z"],
        config,
        shift=shift,
        clocks=clocks,
    )
    torch.testing.assert_close(ours, lightningdit[f"{case}/samples"], atol=limit, rtol=0)
    # The network is asked as often and at the same times: the solver's steps are the published ones.
    asked = lightningdit.case["cases"][case]["network_call_t"]
    torch.testing.assert_close(clocks, asked, atol=1e-3, rtol=2e-2)


def test_parity_lightningdit_time_shift(lightningdit):
    settings = lightningdit.case["cases"]["ode_euler_cfg_shift"]
    grid = torch.linspace(0, 1, settings["settings"]["num_steps"])
    ours = shift_times(grid, 1 / settings["settings"]["timestep_shift"])
    torch.testing.assert_close(ours, torch.tensor(settings["time_grid_float32"]))
