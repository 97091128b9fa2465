"""Joint diffusion against kits of official code: REGLUE's SiT and SFD's LightningDiT.

Losses run through the training learner itself, on the kit's recorded random numbers.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok.diffusion.diffusion_config import DiffusionConfig, REPAConfig
from semtok.diffusion.training import DiTLearner
from semtok.hub.checkpoints import read_checkpoint
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_dit import ImportedDiT, import_dit, our_name
from semtok.objective import StepOutput
from semtok.sampler.guidance import GuidanceConfig, guided_velocity
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.sampler.sampling import SamplerConfig, integrate, velocity_function
from semtok.sampler.transport import Schedule, TimeConfig
from semtok.statistics import StreamingMoments
from semtok.teachers import TeacherFeatures

TENSOR, SUM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}


@pytest.fixture(params=kits("reglue_sit"))
def reglue(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture(params=kits("sfd_lightningdit"))
def sfd(request) -> Kit:
    return load_kit(request.param)


def imported(kit: Kit, which: str = "", spec: LatentSpec | None = None) -> ImportedDiT:
    """From the checkpoint as the training script writes it; the bare weights must say the same."""
    files = kit.case["files"]
    state = open_checkpoint(kit.folder / files[f"{which}checkpoint"]).state
    bare = open_checkpoint(kit.folder / files[f"{which}weights"]).state
    assert state.keys() == bare.keys() and all(torch.equal(state[n], bare[n]) for n in state)
    kwargs = kit.case[f"{which}constructor"]["kwargs"]
    return import_dit(state, place=kit.folder.name, heads=kwargs["num_heads"], spec=spec)


class Recorded:
    """The random numbers of a kit, in the place of ``Draws``."""

    def __init__(self, **numbers: Tensor) -> None:
        self.numbers = {name.replace("__", "/"): values for name, values in numbers.items()}

    def __call__(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        if name.startswith("posterior/"):
            return torch.zeros(1, *shape)
        return self.numbers[name]

    normal = uniform = __call__


def run_learner(
    dit: ImportedDiT, config: DiffusionConfig, inputs: dict[str, Any], draws: Recorded
) -> tuple[DiTLearner, StepOutput]:
    target = inputs["features"].patches[-1]
    learner = DiTLearner(config, dit.network, target.shape[1])
    learner.projector = dit.projectors[0]
    output = learner(inputs, draws, 0, {})
    sum(term.weight * term.value.mean() for term in output.terms.values()).backward()
    return learner, output


def exact(parts: dict[str, Tensor]) -> Posterior:
    latents = Latents(parts)
    return Posterior(latents, latents.map(torch.zeros_like))


def check_gradients(learner: DiTLearner, kit: Kit, case: str) -> None:
    ours = {name.removeprefix("network."): p for name, p in learner.named_parameters()}
    ours = {name.replace("projector.", "projectors.0."): p for name, p in ours.items()}
    names = kit.case["cases"][case]["grad_norm_names"]
    for name, expected in zip(names, kit[f"{case}/grad_norms"], strict=True):
        torch.testing.assert_close(
            ours[our_name(name)].grad.norm(),
            expected,
            atol=1e-6,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )


# REGLUE ------------------------------------------------------------------------------------------


def split(x: Tensor, vector: Tensor) -> dict[str, Tensor]:
    return {"texture": x[:, :4], "semantic": x[:, 4:], "global": vector}


def test_parity_reglue_sit_forward(reglue):
    dit = imported(reglue)
    names = [(part.name, part.channels) for part in dit.network.spec.parts]
    assert names == [("texture", 4), ("semantic", 16), ("global", 48)]
    depth = reglue.case["constructor"]["kwargs"]["encoder_depth"]
    output = dit.network(
        split(reglue["forward/x_t"], reglue["forward/cls_token"]),
        {"texture": 1 - reglue["forward/t"]},
        reglue["forward/y"],
        hidden_after=depth,
    )
    stacked = torch.cat([output.velocity.texture, output.velocity["semantic"]], dim=1)
    torch.testing.assert_close(-stacked, reglue["forward/velocity"], **TENSOR)
    torch.testing.assert_close(-output.velocity["global"], reglue["forward/cls_output"], **TENSOR)
    projected = dit.projectors[0](output.hidden)
    torch.testing.assert_close(projected, reglue["forward/projected_0"], **TENSOR)


@pytest.mark.parametrize("case", ["loss", "loss_train_mode"])
def test_parity_reglue_sit_losses_and_gradients(reglue, case):
    weights = reglue.settings(case)["coefficients"]
    train = case == "loss_train_mode"
    config = DiffusionConfig(
        network="SiT-T/2",  # the network itself is the imported one
        leads={"texture": 0.0, "semantic": 0.0, "global": 0.0},
        loss_weights={
            "texture": weights["denoising"],
            "semantic": weights["dino"],
            "global": weights["cls"],
        },
        cosine_weight=0.0,
        class_dropout=0.1 if train else 0.0,
        repa=REPAConfig(
            weight=weights["proj"],
            depth=reglue.case["constructor"]["kwargs"]["encoder_depth"],
            with_global=True,
        ),
    )
    targets = reglue[f"{case}/z_0"]
    patches = targets[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    inputs = {
        "posterior": exact(split(reglue[f"{case}/images"], reglue[f"{case}/cls_token"])),
        "labels": reglue[f"{case}/y"],
        "features": TeacherFeatures((patches,), targets[:, 0]),
    }
    noise = split(reglue[f"{case}/noises"], reglue[f"{case}/noises_cls"])
    drops = reglue[f"{case}/label_drop_draw"] if train else torch.ones(len(targets))
    draws = Recorded(
        time=1 - reglue[f"{case}/t"],
        class_dropout=drops,
        **{f"noise__{name}": values for name, values in noise.items()},
    )
    learner, output = run_learner(imported(reglue), config, inputs, draws)
    terms = {name: term.value for name, term in output.terms.items()}
    torch.testing.assert_close(terms["velocity/texture"], reglue[f"{case}/denoising_loss"], **SUM)
    torch.testing.assert_close(terms["velocity/semantic"], reglue[f"{case}/dino_loss"], **SUM)
    torch.testing.assert_close(
        terms["velocity/global"], reglue[f"{case}/denoising_loss_cls"], **SUM
    )
    # Ours is 1 - cosine, theirs the negative cosine.
    torch.testing.assert_close(terms["alignment"].mean() - 1, reglue[f"{case}/proj_loss"], **TENSOR)
    total = sum(term.weight * term.value.mean() for term in output.terms.values())
    torch.testing.assert_close(total - weights["proj"], reglue[f"{case}/total_loss"], **TENSOR)
    check_gradients(learner, reglue, case)


def test_parity_reglue_sit_posterior(reglue):
    mean, std = reglue["posterior/moments"].chunk(2, dim=1)
    posterior = Posterior(Latents({"texture": mean}), Latents({"texture": std}))
    sample = posterior.sample_with({"texture": reglue["posterior/noise"]})
    torch.testing.assert_close(sample.texture * 0.18215, reglue["posterior/latents"], **TENSOR)


@pytest.mark.parametrize("case", ["sde_no_cfg", "sde_vae_cfg_false", "sde_vae_cfg_true"])
def test_parity_reglue_sit_sampler(reglue, case):
    settings, dit = reglue.settings(case), imported(reglue)
    scale, interval = settings["cfg_scale"], (1 - settings["guidance_high"], 1.0)
    together = Schedule({"texture": 0.0, "semantic": 0.0, "global": 0.0})
    guidance = GuidanceConfig(scale=scale, interval=interval)
    if settings["vae_cfg"] == "true":
        # Published quirk: conditional + w (conditional - null), on the image latents alone, …
        scales = {"texture": scale + 1, "global": settings["cls_cfg_scale"]}
        guidance = GuidanceConfig(scale=scales, interval=interval)
    config = SamplerConfig(method="sde", steps=settings["num_steps"], guidance=guidance)
    y = reglue[f"{case}/y"]
    velocity = velocity_function(dit.network, y, together, guidance)
    everything = GuidanceConfig(scale=scale, interval=interval)
    last = velocity_function(dit.network, y, together, everything)

    def drift(state: Any, clock: float, decide: float) -> Any:
        # … but in the last step ordinary guidance of all parts.
        return (last if clock > 0.95 else velocity)(state, clock, decide)

    numbers: Iterator[Tensor] = iter(
        values
        for x, vector in zip(reglue[f"{case}/noise_x"], reglue[f"{case}/noise_cls"], strict=True)
        for values in split(x, vector).values()
    )
    start = split(reglue[f"{case}/latents"], reglue[f"{case}/cls_latents"])
    with torch.no_grad():
        ours = integrate(drift, start, config, schedule=together, noise=lambda _: next(numbers))
    stacked = torch.cat([ours.texture, ours["semantic"]], dim=1)
    torch.testing.assert_close(stacked, reglue[f"{case}/samples"], **TENSOR)
    assert next(numbers, None) is None, "every recorded number was used"


# SFD ---------------------------------------------------------------------------------------------

LEADING = Schedule.from_leads({"texture": 0.0, "semantic": 0.3})


def sfd_network(kit: Kit, which: str = "") -> ImportedDiT:
    channels = kit.case["constructor"]["kwargs"]["semantic_chans"]
    total = kit.case[f"{which}constructor"]["kwargs"]["in_channels"]
    parts = (PartSpec("texture", total - channels, 16), PartSpec("semantic", channels, 16))
    return imported(kit, which, LatentSpec(parts))


def halves(kit: Kit, x: Tensor) -> dict[str, Tensor]:
    kwargs = kit.case["constructor"]["kwargs"]
    texture = kwargs["in_channels"] - kwargs["semantic_chans"]
    return {"texture": x[:, :texture], "semantic": x[:, texture:]}


def stacked(parts: dict[str, Tensor] | Latents) -> Tensor:
    return torch.cat([parts["texture"], parts["semantic"]], dim=1)


def test_parity_sfd_forward(sfd):
    dit, depth = sfd_network(sfd), sfd.case["constructor"]["kwargs"]["repa_depth"]
    assert dit.network.timed_parts == ("semantic", "texture")
    x = halves(sfd, sfd["forward/x"])
    times = {"texture": sfd["forward/t_tex"], "semantic": sfd["forward/t_sem"]}
    output = dit.network(x, times, sfd["forward/y"], hidden_after=depth)
    torch.testing.assert_close(stacked(output.velocity), sfd["forward/output"], **TENSOR)
    projected = dit.projectors[0](output.hidden)[:1]
    torch.testing.assert_close(projected, sfd["forward/repa_projected"], **TENSOR)
    weak = sfd_network(sfd, "autoguidance_").network(x, times, sfd["forward/y"])
    torch.testing.assert_close(
        stacked(weak.velocity), sfd["forward/autoguidance_model_output"], **TENSOR
    )


def guided(kit: Kit, case: dict[str, Any], scale: Any, weak: Any = None) -> Tensor:
    begin = case["cfg_interval_start"] if case["cfg_interval"] else 0.0
    guidance = GuidanceConfig(scale=scale, interval=(begin, 1.0))
    now = {"texture": case["t_tex"], "semantic": case["t_sem"]}
    times = {name: torch.full((1,), t) for name, t in now.items()}
    with torch.no_grad():
        velocity = guided_velocity(
            sfd_network(kit).network,
            halves(kit, kit["cfg/x"]),
            times,
            kit["cfg/y"],
            guidance.active(now),
            weak=weak,
        )
    return stacked(velocity)


def test_parity_sfd_guidance(sfd):
    settings = sfd.settings("cfg")
    for case in settings["cases"]:
        ours = guided(sfd, case, settings["cfg_scale"])
        torch.testing.assert_close(ours, sfd[f"cfg/{case['name']}"][:1], **TENSOR)


def test_parity_sfd_autoguidance(sfd):
    settings, weak = sfd.settings("autoguidance"), sfd_network(sfd, "autoguidance_").network
    separate = settings["separate_scales"]
    scales = {"semantic": separate["cfg_scale_sem"], "texture": separate["cfg_scale_tex"]}
    for case in sfd.settings("cfg")["cases"]:
        name = f"autoguidance/{case['name']}"
        ours = guided(sfd, case, settings["cfg_scale"], weak)
        torch.testing.assert_close(ours, sfd[name], **TENSOR)
        ours = guided(sfd, case, scales, weak)
        torch.testing.assert_close(ours, sfd[f"{name}_separate_scales"], **TENSOR)


def test_parity_sfd_losses_and_gradients(sfd):
    settings, dit = sfd.settings("loss"), sfd_network(sfd)
    kwargs = sfd.case["constructor"]["kwargs"]
    share = kwargs["semantic_chans"] / kwargs["in_channels"]
    config = DiffusionConfig(
        network="SiT-T/2",  # the network itself is the imported one
        time=TimeConfig(law="logit_normal"),
        leads={"texture": 0.0, "semantic": kwargs["semfirst_delta_t"]},
        loss_weights={"texture": 1 - share, "semantic": settings["semantic_weight"] * share},
        cosine_weight=1.0,
        class_dropout=0.1,
        repa=REPAConfig(weight=settings["repa_weight"], depth=kwargs["repa_depth"]),
    )
    target = sfd["loss/feature_dino"]
    inputs = {
        "posterior": exact(halves(sfd, sfd["loss/x1"])),
        "labels": sfd["loss/y"],
        "features": TeacherFeatures((target,), target.mean(dim=(2, 3))),
    }
    noise = halves(sfd, sfd["loss/x0"])
    draws = Recorded(
        time=sfd["loss/t_normal"],
        class_dropout=sfd["loss/label_drop_draw"],
        **{f"noise__{name}": values for name, values in noise.items()},
    )
    learner, output = run_learner(dit, config, inputs, draws)
    times = config.schedule.times(sfd["loss/t_normal"].sigmoid() * config.schedule.length)
    torch.testing.assert_close(times["texture"], sfd["loss/t_tex"], **TENSOR)
    torch.testing.assert_close(times["semantic"], sfd["loss/t_sem"], **TENSOR)
    terms = output.terms
    velocity = sum(
        terms[f"velocity/{n}"].weight * terms[f"velocity/{n}"].value
        for n in ("texture", "semantic")
    )
    torch.testing.assert_close(velocity, sfd["loss/loss"], **SUM)
    torch.testing.assert_close(terms["cosine"].value, sfd["loss/cos_loss"], **SUM)
    torch.testing.assert_close(terms["alignment"].value, sfd["loss/repa_loss"], **SUM)
    total = sum(term.weight * term.value.mean() for term in terms.values())
    torch.testing.assert_close(total, sfd["loss/total_loss"], **SUM)
    check_gradients(learner, sfd, "loss")


def sfd_sample(kit: Kit, case: str, **changes: Any) -> tuple[Latents, list[Tensor]]:
    """Samples as published; gives the end and the states on the way."""
    settings, dit = kit.settings(case), sfd_network(kit)
    begin = settings["cfg_interval_start"] if settings["cfg_interval"] else 0.0
    scale: Any = settings.get("cfg_scale", 1.0)
    if "cfg_scale_sem" in settings:
        scale = {"semantic": settings["cfg_scale_sem"], "texture": settings["cfg_scale_tex"]}
    config = SamplerConfig(
        method=settings["sampling_method"],
        steps=settings["num_steps"] - 1,
        rtol=settings["rtol"],
        atol=settings["atol"],
        guidance=GuidanceConfig(scale=scale, interval=(begin, 1.0)),
        split_at_borders=False,
        error_over="batch",
    ).model_copy(update=changes)
    weak = sfd_network(kit, "autoguidance_").network if settings["guide"] == "ag" else None
    velocity = velocity_function(dit.network, kit[f"{case}/y"], LEADING, config.guidance, weak=weak)
    states: list[Tensor] = []
    with torch.no_grad():
        end = integrate(
            velocity,
            halves(kit, kit[f"{case}/z"][:1]),
            config,
            schedule=LEADING,
            watch=lambda clock, state: states.append(stacked(state)),
        )
    return end, states


@pytest.mark.parametrize("case", ["ode_euler", "ode_euler_cfg", "ode_euler_autoguidance"])
def test_parity_sfd_euler(sfd, case):
    end, states = sfd_sample(sfd, case)
    torch.testing.assert_close(torch.stack(states), sfd[f"{case}/trajectory"], **TENSOR)
    torch.testing.assert_close(end.texture, sfd[f"{case}/texture_latents"], **TENSOR)


# At rtol 1e-3 rounding decides the first step sizes and the masked velocity jumps: published and own
# samples each lie up to 3e-2 beside the exact solution. The tight case is the one that judges; torchdiffeq
# itself gives samples 5e-4 from these once it computes in float64.
@pytest.mark.parametrize(("case", "limit"), [("ode_dopri5_tight", 5e-4), ("ode_dopri5", 8e-2)])
@pytest.mark.parametrize("split", [False, True])
def test_parity_sfd_dopri5(sfd, case, limit, split):
    end, _ = sfd_sample(sfd, case, split_at_borders=split)
    torch.testing.assert_close(stacked(end), sfd[f"{case}/samples"], atol=limit, rtol=0)


def test_parity_sfd_latents_on_disk(sfd):
    """Its stored latents standardise as ours do, but for its unbiased standard deviation."""
    folder = sfd.folder / sfd.case["files"]["latents_dir"]
    shard = safetensors.torch.load_file(next(folder.glob("*.safetensors")))
    parts = []
    for name, file in (("latents", "latents_stats.pt"), ("latents_sv", "latents_sv_stats.pt")):
        moments, values = StreamingMoments(), shard[name]
        moments.add(values)
        count = values.numel() / values.shape[1]
        published = read_checkpoint(folder / file)
        unbiased = moments.std * (count / (count - 1)) ** 0.5
        torch.testing.assert_close(moments.mean.float(), published["mean"].flatten(), **TENSOR)
        torch.testing.assert_close(unbiased.float(), published["std"].flatten(), **TENSOR)
        parts.append((values - published["mean"]) / published["std"])
    ours = torch.cat(parts, dim=1)
    torch.testing.assert_close(ours, sfd["dataset/plain_feature"], **TENSOR)
