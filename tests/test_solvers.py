"""The sampler's solvers against torchdiffeq and against the papers' formulas, steps and all."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

import tiny
from semtok.hub.dit_settings import sampler_for
from semtok.hub.file_settings import FileSettings
from semtok.sampler.architecture import DiTArchitecture, architecture
from semtok.sampler.dit import DiT
from semtok.sampler.draws import SampleNoise
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.sampler.sampling import (
    SamplerConfig,
    integrate,
    sample_latents,
    time_grid,
    velocity_function,
)
from semtok.sampler.transport import Schedule, coefficients, diffusion_coefficient

TOGETHER = Schedule({"texture": 0.0})
LEADING = Schedule({"texture": 0.3, "semantic": 0.0})
FORMS = ("sigma", "linear", "constant", "decreasing", "increasing-decreasing")


class Flow:
    """A velocity of two parts that bends differently for each image, and how often it was asked."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mix = 1.5 * torch.randn(11, 11, generator=generator, dtype=torch.float64)
        self.scale = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0], dtype=torch.float64)
        noise = torch.randn(5, 11, generator=generator, dtype=torch.float64)
        self.start = self.parts(noise * self.scale.unsqueeze(1))
        self.asked: list[int] = []

    @staticmethod
    def parts(x: Tensor) -> dict[str, Tensor]:
        return {"texture": x[:, :8].reshape(-1, 2, 2, 2), "semantic": x[:, 8:]}

    @staticmethod
    def stacked(parts: Any) -> Tensor:
        return torch.cat([parts["texture"].flatten(1), parts["semantic"]], dim=1)

    def at(self, x: Tensor, clock: Tensor) -> Tensor:
        return torch.tanh(x @ self.mix) * 2 * (3 * clock).sin() - x * (-2 * clock).exp()

    def __call__(self, state: Any, clock: Any, decide: Any, rows: Any = None) -> dict[str, Tensor]:
        x = self.stacked(state)
        self.asked.append(len(x))
        now = torch.as_tensor(clock, dtype=torch.float64).reshape(-1, 1)
        return self.parts(self.at(x, now))

    def masked(self, moves: Callable[[float], dict[str, bool]]) -> Callable[..., Tensor]:
        """As torchdiffeq asks for it, of the parts that move at a clock reading."""

        def slope(clock: Tensor, x: Tensor) -> Tensor:
            speed, moving = self.parts(self.at(x, clock)), moves(float(clock))
            self.asked.append(len(x))
            return self.stacked({n: v if moving[n] else 0 * v for n, v in speed.items()})

        return slope


def by_torchdiffeq(flow: Flow, x: Tensor, config: SamplerConfig) -> Tensor:
    """From border to border as ``integrate`` does, or masked at every call."""
    edges = [0.0, *LEADING.borders, LEADING.length] if config.split_at_borders else [0.0, 1.3]
    for begin, end in zip(edges, edges[1:], strict=False):
        moved = LEADING.moved(begin, end)
        split = config.split_at_borders
        slope = flow.masked(lambda now, m=moved, s=split: m if s else LEADING.active(now))
        span = torch.tensor([begin, end], dtype=torch.float64)
        x = odeint(slope, x, span, method="dopri5", rtol=config.rtol, atol=config.atol)[-1]
    return x


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_each_image_goes_by_torchdiffeqs_steps_for_it_alone(split, rtol):
    config = SamplerConfig(method="dopri5", rtol=rtol, split_at_borders=split)
    flow = Flow()
    x = flow.stacked(flow.start)
    alone = [by_torchdiffeq(flow, x[i : i + 1], config) for i in range(5)]
    one_by_one = len(flow.asked)
    flow.asked.clear()
    ends = flow.stacked(integrate(flow, flow.start, config, schedule=LEADING))
    torch.testing.assert_close(ends, torch.cat(alone), atol=1e-7, rtol=0)
    # Together it is hardly more calls than the image with most steps needs; arrived ones drop out.
    assert len(flow.asked) < one_by_one / 2 and sum(flow.asked) == one_by_one


@pytest.mark.parametrize("split", [True, False])
def test_one_error_over_the_batch_is_torchdiffeqs_batch(split):
    config = SamplerConfig(method="dopri5", split_at_borders=split, error_over="batch")
    flow = Flow()
    expected = by_torchdiffeq(flow, flow.stacked(flow.start), config)
    times = len(flow.asked)
    flow.asked.clear()
    ends = flow.stacked(integrate(flow, flow.start, config, schedule=LEADING))
    torch.testing.assert_close(ends, expected, atol=1e-9, rtol=0)
    assert flow.asked == [5] * times
    fewer = {name: part[:3] for name, part in flow.start.items()}
    other = flow.stacked(integrate(flow, fewer, config, schedule=LEADING))
    assert (other - expected[:3]).abs().max() > 1e-6, "an image depends on its batch"


@pytest.mark.parametrize("method", ["heun2", "midpoint", "euler"])
@pytest.mark.parametrize("steps", [1, 7, 13, 26])
@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_fixed_steps_over_the_borders_are_torchdiffeqs(method, steps, shift):
    """Also the last step, and each evaluation masked by its own time."""
    config = SamplerConfig(method=method, steps=steps, split_at_borders=False)
    flow = Flow()
    grid = time_grid(steps, LEADING, shift=shift, last_step=None, split=False)
    expected = odeint(
        flow.masked(LEADING.active),
        flow.stacked(flow.start),
        torch.tensor(grid, dtype=torch.float64),
        method=method,
    )
    seen: list[Tensor] = []
    integrate(
        flow,
        flow.start,
        config,
        schedule=LEADING,
        shift=shift,
        watch=lambda clock, state: seen.append(flow.stacked(state)),
    )
    torch.testing.assert_close(torch.stack(seen), expected, atol=1e-9, rtol=0)


def test_a_velocity_that_is_not_finite_is_told_in_one_line():
    flow = lambda state, *_: {"texture": state["texture"] * math.nan}  # noqa: E731
    start = {"texture": torch.ones(2, 1, 2, 2)}
    with pytest.raises(ValueError, match="^dopri5's steps shrink to nothing at 0 on the clock"):
        integrate(flow, start, SamplerConfig(method="dopri5"), schedule=TOGETHER)


# Guidance at each image's own time ---------------------------------------------------------------


def network() -> DiT:
    torch.manual_seed(0)
    shape = DiTArchitecture(depth=2, width=32, heads=2)
    spec = LatentSpec((PartSpec("texture", 4, 8), PartSpec("semantic", 3, 8)))
    timed = ("semantic", "texture")
    return tiny.awake(DiT(shape, spec, num_classes=3, timed_parts=timed)).eval()


@torch.no_grad()
def test_images_of_one_call_are_guided_each_by_its_own_time():
    model, labels = network(), torch.tensor([0, 1, 2, 0])
    guidance = GuidanceConfig(
        scale={"texture": 3.0, "semantic": 2.0}, interval=(0.25, 0.8), num_channels=3
    )
    velocity = velocity_function(model, labels, LEADING, guidance)
    state = {"texture": torch.randn(3, 4, 4, 4), "semantic": torch.randn(3, 3, 4, 4)}
    clock, rows = torch.tensor([0.3, 0.9, 1.2]), torch.tensor([1, 3, 0])
    together = velocity(state, clock, clock, rows)
    for place, (now, row) in enumerate(zip(clock.tolist(), rows.tolist(), strict=True)):
        own = velocity_function(model, labels[row : row + 1], LEADING, guidance)
        alone = own({n: x[place : place + 1] for n, x in state.items()}, now, now)
        for name, part in alone.items():
            torch.testing.assert_close(together[name][place : place + 1], part)


def test_an_image_of_dopri5_is_itself_in_any_batch_with_guidance_in_an_interval():
    model, labels = network(), torch.tensor([0, 1, 2, 1])
    guidance = GuidanceConfig(scale=2.0, interval=(0.3, 1.0))
    config = SamplerConfig(method="dopri5", guidance=guidance)
    calls: list[int] = []
    model.register_forward_hook(lambda *call: calls.append(len(call[1][0]["texture"])))

    def drawn(*places: int) -> Tensor:
        noise, own = SampleNoise(5, places, torch.device("cpu")), labels[list(places)]
        return sample_latents(model, noise, own, (4, 4), config, schedule=LEADING).texture

    whole, together = drawn(0, 1, 2, 3), len(calls)
    alone = torch.cat([drawn(i) for i in range(4)])
    torch.testing.assert_close(whole, alone, atol=2e-3, rtol=0)  # the guided velocity jumps
    assert together < (len(calls) - together) / 2


# The SDE's diffusion coefficient -----------------------------------------------------------------


def test_the_forms_of_the_diffusion_coefficient():
    t = torch.tensor([0.0, 0.25, 0.5, 0.9])
    expected = {
        "sigma": (t * math.pi / 2).cos(),
        "linear": 1 - t,
        "constant": torch.ones(4),
        "decreasing": torch.tensor([1.0, 0.7286, 0.25, 0.0006]),
        "increasing-decreasing": torch.tensor([0.0, 0.5, 1.0, 0.0955]),
    }
    assert tuple(expected) == FORMS
    for form, values in expected.items():
        ours = diffusion_coefficient(form, "cosine", t)
        torch.testing.assert_close(ours, values, atol=1e-4, rtol=0)
    assert torch.equal(*(diffusion_coefficient(form, "linear", t) for form in FORMS[:2]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_every_form_ends_in_the_datas_distribution(form, path):
    """Data N(1.5, 0.4²), whose velocity is known; all forms have the same marginals."""
    mean, std = 1.5, 0.4

    def velocity(state: Any, clock: Any, *_: Any) -> dict[str, Tensor]:
        x = state["texture"]
        c = coefficients(path, torch.full((1,), clock))
        ratio = (x - c.alpha * mean) / ((c.alpha * std).square() + c.sigma.square())
        return {
            "texture": c.d_alpha * (mean + c.alpha * std**2 * ratio) + c.d_sigma * c.sigma * ratio
        }

    generator = torch.Generator().manual_seed(0)
    draw = lambda _: torch.randn(6000, 1, 1, 1, generator=generator)  # noqa: E731
    # A long last step, whose drift goes without its noise, would narrow the ends.
    config = SamplerConfig(method="sde", steps=100, last_step=0.002, diffusion=form)
    start = {"texture": draw(None)}
    ends = integrate(velocity, start, config, schedule=TOGETHER, path=path, noise=draw).texture
    assert ends.mean() == pytest.approx(mean, abs=0.03)
    assert ends.std() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize(("form", "is_repas"), [("linear", True), ("sigma", False)])
def test_repas_steps_on_the_cosine_path_by_its_own_formulas(form, is_repas):
    """Written in its time, from noise 1 to data 0: drift v - w score / 2, w = 2t, noise sqrt(w |dt|)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 4, 3, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    begin, noise = draw(), [draw() for _ in range(3)]
    field = lambda x, t: torch.tanh(2 * x) * (1 + t)  # noqa: E731  velocity in REPA's time
    x, grid = begin, [*torch.linspace(1, 0.04, 4, dtype=torch.float64).tolist(), 0.0]
    for i, (now, following) in enumerate(zip(grid, grid[1:], strict=False)):
        angle, dt = now * math.pi / 2, following - now
        alpha, sigma = math.cos(angle), math.sin(angle)
        d_alpha, d_sigma = -math.pi / 2 * sigma, math.pi / 2 * alpha
        v, ratio, w = field(x, now), alpha / d_alpha, 2 * now
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        x = x + (v - w * score / 2) * dt
        if i < 3:  # the last step keeps the drift and adds no noise
            x = x + math.sqrt(w * -dt) * noise[i]
    draws = iter(noise)
    ours = integrate(
        lambda state, clock, *_: {"texture": -field(state["texture"], 1 - clock)},
        {"texture": begin},
        SamplerConfig(method="sde", steps=4, diffusion=form),
        schedule=TOGETHER,
        path="cosine",
        noise=lambda _: next(draws),
    ).texture
    assert torch.allclose(ours, x, atol=1e-5) == is_repas


def test_a_form_that_is_infinite_where_sampling_starts_is_refused():
    with pytest.raises(ValueError, match="SBDM's is infinite at pure noise"):
        SamplerConfig(method="sde", diffusion="SBDM")


def test_imported_networks_sample_with_their_familys_form():
    network = architecture("SiT-XL/2")

    def form(name):
        return sampler_for(name, network, FileSettings("file")).diffusion

    assert {form(name) for name in ("sit", "redi", "lightningdit", "sfd")} == {"sigma"}
    assert {form(name) for name in ("repa", "reg", "reglue", "repa-e")} == {"linear"}
