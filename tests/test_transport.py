"""Paths, laws of time, leads and samplers, on distributions whose flow is known exactly."""

import pytest
import torch
from torch import Tensor

from semtok.sampler.draws import Draws, SampleNoise
from semtok.sampler.sampling import SamplerConfig, integrate, time_grid
from semtok.sampler.transport import (
    Schedule,
    TimeConfig,
    coefficients,
    interpolate,
    scaled_score,
    shift_times,
)

TOGETHER = Schedule({"texture": 0.0})
MEAN, STD = 1.5, 0.4  # of the data in each coordinate


SHAPE = {"texture": (1, 1, 1)}


def gaussian_velocity(path: str, x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity E[α̇ x1 + σ̇ x0 | x_t] where data are N(MEAN, STD²) and noise is N(0, 1)."""
    c = coefficients(path, t.view(-1, 1, 1, 1))
    variance = (c.alpha * STD).square() + c.sigma.square()
    centred = x - c.alpha * MEAN
    data = MEAN + c.alpha * STD**2 / variance * centred
    noise = c.sigma / variance * centred
    return c.d_alpha * data + c.d_sigma * noise


def gaussian_flow(path: str = "linear"):
    def velocity(state, clock, decide, rows=None):
        x = state["texture"]
        t = clock.to(x) if isinstance(clock, Tensor) else torch.full((len(x),), clock)
        return {"texture": gaussian_velocity(path, x, t)}

    return velocity


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_paths_start_at_noise_end_at_data_and_move_by_their_velocity(path):
    data, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    zero, one = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(interpolate(path, data, noise, zero)[0], noise)
    torch.testing.assert_close(interpolate(path, data, noise, one)[0], data)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    x, velocity = interpolate(path, data, noise, t)
    ahead = interpolate(path, data, noise, t + 1e-6)[0]
    torch.testing.assert_close((ahead - x) / 1e-6, velocity, atol=1e-4, rtol=1e-4)
    # For one pair the score is minus the noise over σ.
    torch.testing.assert_close(scaled_score(path, velocity, x, t), -noise)
    if path == "cosine":
        c = coefficients(path, t)
        torch.testing.assert_close(c.alpha.square() + c.sigma.square(), one)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_score_of_a_gaussian(path):
    x, t = torch.randn(4, 1, 2, 2), torch.tensor([0.0, 0.3, 0.7, 0.95])
    c = coefficients(path, t.view(-1, 1, 1, 1))
    variance = (c.alpha * STD).square() + c.sigma.square()
    expected = -(x - c.alpha * MEAN) / variance
    ours = scaled_score(path, gaussian_velocity(path, x, t), x, t)
    torch.testing.assert_close(ours, c.sigma * expected)


def draws(num: int) -> Draws:
    return Draws(seed=0, step=3, global_batch=num, first=0, num=num, device=torch.device("cpu"))


def test_laws_of_time():
    uniform = TimeConfig().draw(draws(20_000), SHAPE)
    assert uniform.min() >= 0 and uniform.max() <= 1
    torch.testing.assert_close(
        uniform.quantile(torch.tensor([0.25, 0.5, 0.75])),
        torch.tensor([0.25, 0.5, 0.75]),
        atol=0.015,
        rtol=0,
    )
    normal = TimeConfig(law="logit_normal", mean=0.5, std=0.8).draw(draws(20_000), SHAPE).logit()
    assert normal.mean() == pytest.approx(0.5, abs=0.03) and normal.std() == pytest.approx(
        0.8, abs=0.03
    )
    half = Draws(seed=0, step=3, global_batch=8, first=4, num=4, device=torch.device("cpu"))
    assert torch.equal(TimeConfig().draw(half, SHAPE), TimeConfig().draw(draws(8), SHAPE)[4:])


def test_time_shifts():
    t = torch.linspace(0, 1, 11)
    assert shift_times(t, 1) is t
    torch.testing.assert_close(shift_times(shift_times(t, 3.0), 1 / 3.0), t)
    assert (shift_times(t, 3.0)[1:-1] < t[1:-1]).all()
    # Esser et al. 2024, eq. 23, is written in the noise's time.
    s = 1 - t
    torch.testing.assert_close(1 - shift_times(t, 3.0), 3 * s / (1 + 2 * s))
    latents = {"texture": (60, 16, 16), "semantic": (3, 16, 16), "global": (256,)}
    assert TimeConfig(shift="dimension").shift_for(latents) == 2.0
    assert TimeConfig(shift="spatial_dimension").shift_for(latents) == (63 / 16) ** 0.5
    assert TimeConfig(shift=3.0).shift_for(latents) == 3.0
    shifted = TimeConfig(shift=3.0).draw(draws(9), SHAPE)
    torch.testing.assert_close(shifted, shift_times(TimeConfig().draw(draws(9), SHAPE), 3.0))


# Leads -------------------------------------------------------------------------------------------


def test_without_leads_all_parts_share_the_clock():
    schedule = Schedule.from_leads({"texture": 0.0, "semantic": 0.0})
    clock = torch.tensor([0.2, 0.7])
    assert schedule.length == 1 and schedule.is_synchronous and schedule.borders == ()
    assert all(time is clock for time in schedule.times(clock).values()), "and that costs nothing"


def test_a_lead_of_three_tenths_is_semantic_first_diffusion():
    schedule = Schedule.from_leads({"texture": 0.0, "semantic": 0.3})
    assert schedule.length == pytest.approx(1.3)
    assert schedule.borders == pytest.approx((0.3, 1.0))
    clock = torch.tensor([0.0, 0.3, 0.65, 1.0, 1.3])
    times = schedule.times(clock)
    torch.testing.assert_close(times["semantic"], clock.clamp(max=1))
    torch.testing.assert_close(times["texture"], (clock - 0.3).clamp(min=0))
    assert schedule.moved(0.0, 0.3) == {"texture": False, "semantic": True}
    assert schedule.moved(0.3, 1.0) == {"texture": True, "semantic": True}
    assert schedule.moved(1.0, 1.3) == {"texture": True, "semantic": False}


@pytest.mark.parametrize("method", ["euler", "heun", "heun2", "midpoint", "dopri5"])
@pytest.mark.parametrize("steps", [1, 7, 13])
@pytest.mark.parametrize("lead", [0.0, 0.3, 1.0])
def test_every_part_moves_for_exactly_one_unit_of_time(method, steps, lead):
    """Under a velocity of 1 each part ends at 1, whatever steps the borders fall into."""
    schedule = Schedule.from_leads({"texture": 0.0, "semantic": lead})
    start = {"texture": torch.zeros(2, 1, 2, 2), "semantic": torch.zeros(2, 3)}
    one = {name: torch.ones_like(part) for name, part in start.items()}
    config = SamplerConfig(method=method, steps=steps)
    end = integrate(lambda *_: dict(one), start, config, schedule=schedule)
    for name, part in end.items():
        torch.testing.assert_close(part, one[name])


def test_time_grids():
    assert time_grid(4, TOGETHER, shift=1, last_step=None) == [0, 0.25, 0.5, 0.75, 1]
    stochastic = time_grid(4, TOGETHER, shift=1, last_step=0.04)
    assert stochastic == pytest.approx([0, 0.32, 0.64, 0.96, 1])
    shifted = time_grid(4, TOGETHER, shift=3, last_step=None)
    assert shifted == pytest.approx([0, 0.1, 0.25, 0.5, 1])


# Samplers ----------------------------------------------------------------------------------------


def exact_end(noise: Tensor) -> Tensor:
    """Where the probability flow carries noise to, for Gaussian data."""
    return MEAN + STD * noise


@pytest.mark.parametrize(
    ("method", "path", "limit"),
    [
        ("euler", "linear", 0.05),
        ("heun", "linear", 2e-3),
        ("heun2", "linear", 2e-3),
        ("midpoint", "linear", 2e-3),
        ("dopri5", "linear", 2e-3),
        ("heun", "cosine", 5e-3),
    ],
)
def test_ode_samplers_carry_noise_to_where_the_flow_ends(method, path, limit):
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    config = SamplerConfig(method=method, steps=50, rtol=1e-5)
    ends = integrate(gaussian_flow(path), {"texture": noise}, config, schedule=TOGETHER, path=path)
    assert (ends.texture - exact_end(noise)).abs().max() < limit


def test_twice_the_steps_halve_eulers_error_and_quarter_heuns():
    noise = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def error(method: str, steps: int) -> float:
        config = SamplerConfig(method=method, steps=steps)
        ends = integrate(gaussian_flow(), {"texture": noise.double()}, config, schedule=TOGETHER)
        return (ends.texture - exact_end(noise)).abs().max().item()

    assert error("euler", 40) / error("euler", 80) == pytest.approx(2, rel=0.15)
    for method in ("heun", "heun2"):
        assert error(method, 40) / error(method, 80) == pytest.approx(4, rel=0.25)
    assert error("heun2", 40) < error("heun", 40), "its last step is of second order too"


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_the_sde_ends_in_the_datas_distribution(path):
    noise = SampleNoise(0, range(4000), torch.device("cpu"))
    start = {"texture": noise((1, 1, 1))}
    config = SamplerConfig(method="sde", steps=100)
    ends = integrate(
        gaussian_flow(path), start, config, schedule=TOGETHER, path=path, noise=noise
    ).texture
    assert ends.mean() == pytest.approx(MEAN, abs=0.03)
    assert ends.std() == pytest.approx(STD, rel=0.06)
    # Unlike the ODE it forgets where it came from.
    correlation = torch.corrcoef(torch.stack([ends.flatten(), start["texture"].flatten()]))[0, 1]
    assert abs(correlation) < 0.5


def test_noise_belongs_to_the_sample_and_not_to_the_batch():
    cpu = torch.device("cpu")
    whole, tail = SampleNoise(7, range(6), cpu), SampleNoise(7, range(4, 6), cpu)
    for shape in ((2, 3), (5,)):
        assert torch.equal(whole(shape)[4:], tail(shape))
    assert not torch.equal(SampleNoise(8, [0], cpu)((4,)), SampleNoise(7, [0], cpu)((4,)))
