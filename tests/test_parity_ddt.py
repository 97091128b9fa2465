"""DDT against kits of its official code: the network, the training loss through the learner, samplers."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.learner import DiTLearner
from semtok.diffusion.repa import REPAConfig
from semtok.hub.formats import open_checkpoint, recognise
from semtok.hub.headed_dit import import_headed_dit, our_name
from semtok.hub.import_dit import ImportedDiT
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.sampler.sampling import SamplerConfig, integrate, velocity_function
from semtok.sampler.transport import Schedule, TimeConfig
from semtok.teachers import TeacherFeatures

TENSOR, NORM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 1e-7, "rtol": 1e-5}
ALONE = Schedule({"texture": 0.0})


@pytest.fixture(params=kits("ddt"))
def kit(request) -> Kit:
    return load_kit(request.param)


def network(kit: Kit, weights: str = "ema") -> ImportedDiT:
    """From the checkpoint as the training script writes it; the bare weights are its averaged ones."""
    files, own = kit.case["files"], kit.case["constructor"]["kwargs"]
    checkpoint = open_checkpoint(kit.folder / files["checkpoint"], weights)
    assert recognise(checkpoint) == ("ddt",)
    state = checkpoint.state
    if weights == "ema":
        bare = open_checkpoint(kit.folder / files["weights"])
        assert recognise(bare) == ("ddt",)
        assert all(torch.equal(state[n], bare.state[n]) for n in bare.state)
    dit = import_headed_dit(
        state,
        place=kit.folder.name,
        spec=LatentSpec((PartSpec("texture", own["in_channels"], 8),)),
        encoder_blocks=own["num_encoder_blocks"],
    )
    shape = dit.network.config
    assert (shape.heads, shape.patch_size) == (own["num_groups"], own["patch_size"])
    assert shape.depth + shape.head.depth == own["num_blocks"]
    assert dit.network.num_classes == own["num_classes"]
    return dit


def compare(ours: Tensor, kit: Kit, name: str, limits: dict[str, float] = TENSOR) -> None:
    torch.testing.assert_close(ours, kit[name], **limits, msg=lambda m: f"{name}: {m}")


@torch.no_grad()
def test_parity_ddt_forward(kit):
    dit, x, t, y = network(kit).network, *(kit[f"forward/{n}"] for n in ("x", "t", "y"))
    output = dit({"texture": x}, {"texture": t}, y)
    compare(output.velocity.texture, kit, "forward/velocity")
    compare(output.state, kit, "forward/state")
    for name, times in (("velocity_same_state", t), ("velocity_reused_state", kit["forward/t2"])):
        again = dit({"texture": x}, {"texture": times}, y, state=output.state)
        compare(again.velocity.texture, kit, f"forward/{name}")
    rows = kit["forward/x_rect"]
    num = len(rows)
    output = dit({"texture": rows}, {"texture": t[:num]}, y[:num])
    compare(output.velocity.texture, kit, "forward/velocity_rect")


# Losses ------------------------------------------------------------------------------------------


class Recorded:
    """The random numbers of a case, in the place of ``Draws``."""

    _NAMES = {"class_dropout": "label_drop_draw", "time": "t_draw", "noise/texture": "noise"}

    def __init__(self, kit: Kit, case: str, num: int) -> None:
        self.kit, self.case, self.num, self.global_batch = kit, case, num, num

    def __call__(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        if name.startswith("posterior/"):
            return torch.zeros(1, *shape)
        return self.kit[f"{self.case}/{self._NAMES[name]}"]

    normal = uniform = __call__


@pytest.mark.parametrize("case", ["loss", "loss_other_grid"])
def test_parity_ddt_losses_and_gradients(kit, case):
    settings, dit = kit.settings(case), network(kit, "model")
    config = DiffusionConfig(
        network="SiT-T/2",  # the network itself is the imported one
        time=TimeConfig(law="logit_normal" if settings["lognorm_t"] else "uniform"),
        leads={"texture": 0.0},
        cosine_weight=0.0,
        class_dropout=settings["null_condition_p"],
        repa=REPAConfig(weight=settings["feat_loss_weight"], depth=settings["align_layer"]),
    )
    learner = DiTLearner(config, dit.network, settings["proj_encoder_dim"])
    learner.projector = dit.projectors[0]
    tokens, clean = kit[f"{case}/features"], Latents({"texture": kit[f"{case}/latents"]})
    side = round(tokens.shape[1] ** 0.5)
    patches = tokens.transpose(1, 2).unflatten(2, (side, side))
    patch = dit.network.config.patch_size
    grid = tuple(n // patch for n in clean.texture.shape[-2:])
    if grid != (side, side):  # theirs is resampled without antialiasing, ours with
        patches = F.interpolate(patches, size=grid, mode="bilinear")
    inputs: dict[str, Any] = {
        "posterior": Posterior(clean, clean.map(torch.zeros_like)),
        "labels": kit[f"{case}/y"],
        "features": TeacherFeatures((patches,), tokens.mean(dim=1)),
    }
    output = learner(inputs, Recorded(kit, case, len(tokens)), 0, {})
    compare(output.terms["velocity/texture"].value.mean(), kit, f"{case}/fm_loss")
    compare(output.terms["alignment"].value.mean(), kit, f"{case}/cos_loss")
    loss = sum(term.weight * term.value.mean() for term in output.terms.values())
    compare(loss, kit, f"{case}/loss")
    loss.backward()
    check_gradients(dit, kit, case)


def check_gradients(dit: ImportedDiT, kit: Kit, case: str) -> None:
    own, ours = kit.case["cases"][case], dict(dit.network.named_parameters())
    left = {name for name in ours}
    for name, norm in zip(own["grad_norm_names"], kit[f"{case}/grad_norms"], strict=True):
        mine = our_name(name, dit.network.config.depth)
        gate, value = mine.endswith("mlp.w1.weight"), mine.endswith("mlp.w3.weight")
        mine = re.sub(r"mlp\.w[13]\.", "mlp.w12.", mine).replace("mlp.w2.", "mlp.w3.")
        left.discard(mine)
        gradient = ours[mine].grad
        if gate or value:
            gradient = gradient.chunk(2)[int(value)]
        torch.testing.assert_close(
            gradient.norm(), norm, **NORM, msg=lambda m, n=name: f"{case}, {n}: {m}"
        )
    assert not left
    names = own["proj_grad_norm_names"]
    ours = {f"0.{name}": p for name, p in dit.projectors[0].named_parameters()}
    for name, norm in zip(names, kit[f"{case}/proj_grad_norms"], strict=True):
        torch.testing.assert_close(ours[name].grad.norm(), norm, **NORM)


# Samplers ----------------------------------------------------------------------------------------


def sampler(settings: dict[str, Any]) -> SamplerConfig:
    assert settings["guidance_fn"] == "simple_guidance_fn"
    begin, end = settings["guidance_interval"]
    # Theirs is open at both ends, ours closed; no reading of a clock is that near to one of them.
    interval = (begin + 1e-6, min(end, 1.0) - 1e-6)
    is_sde = settings["step_fn"] == "sde_step_fn"
    expected = ("sde_mean_step_fn", True) if is_sde else ("ode_step_fn", False)
    assert (settings["last_step_fn"], settings["w_scheduler"]) == expected
    last = settings["last_step"]
    lasts = (
        {"last_step": last or 1 / settings["num_steps"]} if is_sde else {"euler_last_step": last}
    )
    return SamplerConfig(
        method="sde" if is_sde else "euler",
        steps=settings["num_steps"],
        shift=settings["timeshift"],
        diffusion="linear",
        state_refresh_rate=settings["state_refresh_rate"],
        guidance=GuidanceConfig(scale=settings["guidance"], interval=interval),
        **lasts,
    )


@torch.no_grad()
def test_parity_ddt_samplers(kit):
    for case in (name for name in kit.case["cases"] if name.startswith("euler")):
        check_sampler(kit, case)


def check_sampler(kit: Kit, case: str) -> None:
    config, dit, own = sampler(kit.settings(case)), network(kit).network, kit.case["cases"][case]
    calls: list[tuple[float, bool]] = []

    def noted(module: Any, words: tuple, named: dict[str, Any]) -> None:
        calls.append((words[1]["texture"][0].item(), named.get("state") is not None))

    hook = dit.register_forward_pre_hook(noted, with_kwargs=True)
    velocity = velocity_function(
        dit,
        kit[f"{case}/y"],
        ALONE,
        config.guidance,
        state_refresh_rate=config.state_refresh_rate,
    )
    noise: Iterator[Tensor] = iter(kit.tensors.get(f"{case}/noise", ()))
    clock: list[float] = []
    ours = integrate(
        velocity,
        {"texture": kit[f"{case}/noise_start"]},
        config,
        schedule=ALONE,
        shift=config.shift,
        noise=lambda _: next(noise),
        watch=lambda now, _: clock.append(now),
    )
    hook.remove()
    torch.testing.assert_close(clock, own["timesteps"], atol=1e-6, rtol=0)
    compare(ours.texture, kit, f"{case}/samples")
    assert next(noise, None) is None, "every recorded number was used"
    # Their batch has both halves in every step; ours asks for the null label where guidance begins with a step that
    # leaves the blocks before the head out, at the reading of the step that ran them.
    own_calls = list(dict.fromkeys((round(t, 6), reused) for t, reused in calls))
    theirs = [(round(t, 6), reused) for t, reused in own["network_call_t_and_state_reused"]]
    assert [reused for _, reused in own_calls] == [reused for _, reused in theirs]
    torch.testing.assert_close([t for t, _ in own_calls], [t for t, _ in theirs], atol=2e-6, rtol=0)
