"""Predictors of how well latents will be generated: closed forms, invariances, and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from semtok import Tokenizer
from semtok.commands import evaluate
from semtok.commands.cli import run
from semtok.commands.evaluate_predictors import _print
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.evaluation.equivariance import equivariance_errors, transforms
from semtok.evaluation.predictors import (
    PREDICTORS,
    PROBE,
    cknna,
    coefficient_of_variation,
    density_uniformity,
    evaluate_latents,
    gini,
    high_frequency_share,
    noise_sensitivity,
    self_similarity,
)
from semtok.evaluation.velocity import velocity_irreducible_variance
from semtok.images import to_pixels
from semtok.privacy import fit_to_show
from semtok.recipe import parse_recipe
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.teachers import Teacher, TeacherConfig

SOURCE = Shapes(ShapesConfig(size=32), train=False)


def orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("semtok.evaluation.predictors.NUM_MAPS", 1)


@pytest.fixture(scope="module")
def reglue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose latents have texture, semantic and global parts, for 16x16 images."""
    folder = tmp_path_factory.mktemp("latents") / "reglue"
    method = {"name": "reglue", "compressor": {"hidden": [8], "channels": 4}}
    train_tokenizer(parse_recipe(tiny.content(method), "tiny"), folder)
    return folder


# Nearest neighbours ------------------------------------------------------------------------------


def test_cknna_is_1_for_the_same_features_rotated_and_scaled():
    features = torch.randn(60, 12)
    assert cknna(features, features) == pytest.approx(1, abs=1e-9)
    assert cknna(features, 3 * features @ orthogonal(12)) == pytest.approx(1, abs=1e-4)
    assert cknna(features.view(60, 3, 2, 2), features) == pytest.approx(1, abs=1e-9), "flattened"


def test_cknna_falls_with_noise_to_about_0_for_independent_features():
    features, noise = torch.randn(2, 500, 16)
    values = [cknna(features, features + strength * noise) for strength in (0, 0.5, 1, 2)]
    assert all(a > b + 0.05 for a, b in zip(values, values[1:], strict=False))
    assert abs(cknna(features, noise)) < 0.05
    assert cknna(features, noise) == pytest.approx(cknna(noise, features), abs=1e-4)


def test_cknna_by_loops():
    n, k = 9, 4
    a, b = torch.randn(n, 5, dtype=torch.float64), torch.randn(n, 5, dtype=torch.float64)
    kernels = [
        torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T for x in (a, b)
    ]

    def near(kernel: Tensor, i: int) -> set[int]:
        others = [j for j in range(n) if j != i]
        return set(sorted(others, key=lambda j: -float(kernel[i, j]))[:k])

    def alignment(first: Tensor, second: Tensor) -> float:
        k1, k2 = torch.zeros_like(first), torch.zeros_like(second)
        for i in range(n):
            for j in near(first, i) & near(second, i):
                k1[i, j], k2[i, j] = first[i, j], second[i, j]
        one = torch.ones(n, dtype=torch.float64)
        value = torch.trace(k1 @ k2) + (one @ k1 @ one) * (one @ k2 @ one) / (n - 1) / (n - 2)
        return float(value - 2 / (n - 2) * (one @ k1 @ k2 @ one)) / (n * (n - 3))

    first, second = kernels
    norm = (alignment(first, first) * alignment(second, second)) ** 0.5
    assert cknna(a, b, k) == pytest.approx(alignment(first, second) / norm, rel=1e-9)


def test_cknna_of_what_has_no_neighbours_is_refused():
    with pytest.raises(ValueError, match="10 neighbours needs at least 11 images, got 10"):
        cknna(torch.randn(10, 4), torch.randn(10, 4))
    with pytest.raises(ValueError, match="features of 20 and of 19 images"):
        cknna(torch.randn(20, 4), torch.randn(19, 4))
    with pytest.raises(ValueError, match="do not vary"):
        cknna(torch.zeros(20, 4), torch.randn(20, 4))


# Space -------------------------------------------------------------------------------------------


def test_self_similarity_is_1_for_the_teachers_tokens_under_an_orthogonal_map():
    tokens = torch.randn(3, 16, 4, 5)
    turned = torch.einsum("dc, bchw -> bdhw", 2 * orthogonal(16), tokens)
    shared = 5 * torch.randn(3, 16, 1, 1)  # what all positions have in common does not count
    torch.testing.assert_close(self_similarity(turned + shared, tokens), torch.ones(3))


def test_self_similarity_is_about_0_for_independent_maps_and_0_for_blank_ones():
    tokens = torch.randn(3, 16, 8, 8)
    assert self_similarity(torch.randn(3, 16, 8, 8), tokens).abs().max() < 0.1
    assert not self_similarity(torch.zeros(3, 4, 8, 8), tokens).any()


def test_self_similarity_compares_on_the_teachers_grid():
    tokens = torch.randn(2, 6, 4, 4)
    fine = tokens.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    assert self_similarity(fine, tokens).min() > 0.8
    with pytest.raises(ValueError, match="grid of 1x2 has no spatial structure"):
        self_similarity(fine, torch.randn(2, 6, 1, 2))


@pytest.mark.parametrize(
    ("size", "expected"), [((8, 8), 48 / 63), ((7, 5), 23 / 34), ((1, 6), 3 / 5)]
)
def test_the_spectrum_of_white_noise_is_the_share_of_high_frequencies(size, expected):
    share = high_frequency_share(torch.randn(500, 8, *size) + 100)
    assert share.shape == (500,) and float(share.mean()) == pytest.approx(expected, abs=0.01)


def test_gradients_are_low_frequencies_and_checkerboards_high_ones():
    ramp = torch.arange(16.0)
    gradient = (ramp[:, None] + 2 * ramp).expand(1, 3, 16, 16)
    board = ((ramp[:, None] + ramp) % 2).expand(1, 3, 16, 16)
    assert high_frequency_share(gradient) < 0.01 and high_frequency_share(board) > 0.9
    fine, coarse = ((ramp // w % 2).expand(1, 1, 16, 16) for w in (1, 8))
    assert high_frequency_share(torch.cat([fine, coarse], dim=1)) == pytest.approx(0.5, abs=0.05)
    assert high_frequency_share(torch.full((1, 3, 4, 4), 7.0)) == 0
    assert high_frequency_share(torch.randn(1, 3, 1, 1)) == 0


# Noise -------------------------------------------------------------------------------------------


def test_noise_sensitivity_of_linear_decoders_has_a_closed_form():
    latents = Latents({"texture": torch.randn(400, 6, 4, 4), "global": torch.randn(400, 5)})
    noise = latents.map(torch.randn_like)
    identity = noise_sensitivity(lambda z: z.texture[:, :3], latents, noise)
    expected = noise.texture[:, :3].square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(identity.float(), expected, rtol=1e-4, atol=0)

    weights = torch.randn(3, 6)
    for sigma in (0.1, 0.7):  # a linear decoder's does not depend on sigma
        ours = noise_sensitivity(
            lambda z: torch.einsum("dc, bchw -> bdhw", weights, z.texture), latents, noise, sigma
        )
        expected = weights.square().sum() / 3
        assert float(ours.square().mean()) == pytest.approx(float(expected), rel=0.05)


def test_noise_on_parts_that_are_not_decoded_does_nothing(reglue):
    tokenizer = Tokenizer.from_pretrained(reglue)
    assert tokenizer.spec.names == ("texture", "semantic", "global")
    with torch.no_grad():
        latents = tokenizer.encode(tiny.batch_of_shapes(3))
        noise = dict(latents.map(torch.randn_like))
        assert noise_sensitivity(tokenizer.decode, latents, noise).min() > 0
        noise["texture"] = torch.zeros_like(noise["texture"])
        assert not noise_sensitivity(tokenizer.decode, latents, noise).any()


# Equivariance --------------------------------------------------------------------------------------


class Mean(Tokenizer):
    """Latents that are means over cells of 4x4 pixels, and a decoder that repeats them: turns commute with both.

    Args:
        stripe: added to the latents of even columns, which turning moves to rows.
    """

    def __init__(self, stripe: float = 0.0, **more: Any) -> None:
        super().__init__(LatentSpec((PartSpec("texture", 3, 4),)), method="mean", **more)
        self.stripe = stripe
        self.num_measured_images.fill_(1)  # mean 0, deviation 1

    def posterior_raw(self, pixels: Tensor, features: Any = None) -> Posterior:
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        mean[..., ::2] += self.stripe
        return Posterior(Latents({"texture": mean}), Latents({"texture": torch.zeros_like(mean)}))

    def decode_raw(self, raw: Latents) -> Tensor:
        return raw.texture.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)

    def save_networks(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError

    @classmethod
    def load_networks(cls, folder: Path, config: Any) -> "Mean":
        raise NotImplementedError


def coarse(num: int, size: tuple[int, int]) -> Tensor:
    """Images that are constant on cells, so that such latents hold all of them."""
    cells = torch.rand(num, 3, size[0] // 4, size[1] // 4) * 2 - 1
    return cells.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def test_what_commutes_with_turns_has_no_error_under_them_and_a_stripe_has_its_own():
    pixels = coarse(3, (16, 16))
    for stripe in (0.0, 0.5):
        tokenizer = Mean(stripe)
        errors = equivariance_errors(
            tokenizer, pixels, tokenizer.encode(pixels, value_range=(-1, 1))
        )
        turning = {n: e for n, e in errors.items() if "turning" in n}
        assert set(turning) == {"encoder_turning_error", "decoder_turning_error"}
        # Turned by a quarter, half of the places differ; by half a turn of four columns, all.
        expected = stripe * (2 * 0.5**0.5 + 1) / 3
        torch.testing.assert_close(turning["encoder_turning_error"], torch.full((3,), expected))


def test_errors_under_scaling_are_those_of_the_scaled_image():
    pixels, tokenizer = coarse(2, (16, 16)), Mean()
    latents = tokenizer.encode(pixels, value_range=(-1, 1))
    errors = equivariance_errors(tokenizer, pixels, latents)
    expected = []
    for size in (8, 12):
        small = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear")
        wanted = torch.nn.functional.interpolate(
            latents.texture, (size // 4, size // 4), mode="bilinear"
        )
        shown = tokenizer.decode_raw(Latents({"texture": wanted}))
        expected.append((shown - small).square().mean(dim=(1, 2, 3)).sqrt())
    torch.testing.assert_close(errors["decoder_scaling_error"], torch.stack(expected).mean(dim=0))


def test_images_are_transformed_as_their_size_allows():
    tokenizer = Mean()
    for size, kinds, turns in (((16, 16), 2, 3), ((8, 16), 2, 1), ((4, 4), 1, 3)):
        found = transforms(tokenizer.spec.stride, size)
        assert len(found) == kinds and len(found["turning"]) == turns
        pixels = coarse(2, size)
        errors = equivariance_errors(
            tokenizer, pixels, tokenizer.encode(pixels, value_range=(-1, 1))
        )
        assert len(errors) == 2 * kinds


def test_statistics_of_each_place_are_no_error_under_turns_and_leave_no_scaling():
    tokenizer = Mean(positions={"texture": (4, 4)})
    tokenizer.texture_mean.uniform_(-1, 1)
    tokenizer.texture_std.uniform_(0.5, 2)
    pixels = coarse(3, (16, 16))
    errors = equivariance_errors(tokenizer, pixels, tokenizer.encode(pixels, value_range=(-1, 1)))
    assert set(errors) == {"encoder_turning_error", "decoder_turning_error"}
    for error in errors.values():
        torch.testing.assert_close(error, torch.zeros(3), atol=1e-5, rtol=0)


# Velocity ------------------------------------------------------------------------------------------


def test_velocity_variance_of_normal_numbers_has_a_closed_form():
    """E Var = ∫ λ / (λ t² + (1 - t)²) dt = π √λ / 2 for numbers of variance λ."""
    numbers, noise = torch.randn(2, 400, 1)
    numbers /= numbers.std()
    for scale in (0.5, 1.0):
        found = velocity_irreducible_variance(scale * numbers, noise, num_times=16)
        assert found == pytest.approx(scale * np.pi / 2, rel=0.08)


def test_velocity_variance_by_loops():
    z, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    total = 0.0
    for t in (0.25, 0.75):
        for i in range(5):
            x = t * z[i] + (1 - t) * noise[i]
            weights = torch.stack(
                [(-(x - t * each).square().sum() / (2 * (1 - t) ** 2)).exp() for each in z]
            )
            weights /= weights.sum()
            velocity = (z - x) / (1 - t)
            mean = (weights[:, None] * velocity).sum(dim=0)
            total += float((weights[:, None] * (velocity - mean).square()).sum())
    expected = total / (2 * 5 * 3)
    assert velocity_irreducible_variance(z, noise, num_times=2) == pytest.approx(expected)
    assert velocity_irreducible_variance(z[:1], noise[:1]) == pytest.approx(0, abs=1e-12)


# Density -----------------------------------------------------------------------------------------


def test_gini_and_variation_by_hand():
    assert gini(np.full(7, 3.0)) == pytest.approx(0) and gini(np.eye(8)[3]) == pytest.approx(7 / 8)
    assert gini(np.array([4, 1, 3, 2])) == pytest.approx(0.25)
    values = np.random.default_rng(0).gamma(2.0, size=50)
    differences = np.abs(values[:, None] - values).mean()
    assert gini(values) == pytest.approx(differences / (2 * values.mean()))
    assert gini(5 * values) == pytest.approx(gini(values))
    assert coefficient_of_variation(np.array([1.0, 3.0])) == pytest.approx(0.5)
    assert coefficient_of_variation(np.full(4, 2.0)) == 0


def test_density_is_the_mean_over_maps(monkeypatch):
    features = torch.rand(40, 3)
    single = [density_uniformity(features, seed=seed) for seed in (4, 5)]
    monkeypatch.setattr("semtok.evaluation.predictors.NUM_MAPS", 2)
    assert density_uniformity(features, seed=4) == pytest.approx(tuple(np.mean(single, axis=0)))


def test_density_belongs_to_its_seed_and_clusters_are_less_even():
    even = torch.rand(150, 2)
    crowd = torch.cat([0.01 * torch.rand(75, 2), torch.rand(75, 2)])
    scores = [density_uniformity(x, seed=1) for x in (even, even, crowd)]
    assert scores[0] == scores[1] and all(0 < value < 1 for value in scores[0])
    assert scores[2][0] > scores[0][0] and scores[2][1] > scores[0][1]
    for bad in (torch.rand(3, 2), torch.ones(20, 2)):
        with pytest.raises(ValueError, match="at least four images, and latents that vary"):
            density_uniformity(bad)


# A tokenizer -------------------------------------------------------------------------------------


def test_scores_belong_to_the_seed_and_not_to_batches():
    tokenizer, teacher = Tokenizer.from_pretrained("demo"), Teacher(TeacherConfig())
    runs = [
        evaluate_latents(tokenizer, SOURCE, 40, teacher, seed=seed, batch_size=size)
        for seed, size in ((0, 40), (0, 40), (0, 7), (1, 40))
    ]
    assert runs[0] == runs[1] and list(PREDICTORS) == [PROBE, *runs[0]]
    for name, value in runs[0].items():
        spread = 0.1 if name.startswith("density") else 1e-4  # rounding turns a map
        assert runs[2][name] == pytest.approx(value, abs=spread), name
    assert runs[3]["noise_sensitivity"] != runs[0]["noise_sensitivity"]


def test_scores_are_those_of_all_images_at_once():
    tokenizer, teacher = Tokenizer.from_pretrained("demo"), Teacher(TeacherConfig())
    with torch.no_grad():  # a posterior so narrow that its draws are its means
        tokenizer.autoencoder.quant_conv.bias[8:] -= 30
    scores = evaluate_latents(tokenizer, SOURCE, 24, teacher, batch_size=10)
    pixels = to_pixels(SOURCE.load(range(24)).images)
    with torch.no_grad():
        latents, seen = tokenizer.encode(pixels).texture, teacher.features(pixels)
    expected = {
        "cknna": cknna(latents, seen.pooled),
        "self_similarity": float(self_similarity(latents, seen.patches[-1]).mean()),
        "high_frequency_share": float(high_frequency_share(latents).mean()),
    }
    assert {n: scores[n] for n in expected} == pytest.approx(expected, abs=1e-3)


def test_many_images_are_not_all_compared_nor_mapped(monkeypatch):
    monkeypatch.setattr("semtok.evaluation.predictors.MOST_COMPARED", 20)
    monkeypatch.setattr("semtok.evaluation.predictors.MOST_MAPPED", 15)
    tokenizer, teacher = Tokenizer.from_pretrained("demo"), Teacher(TeacherConfig())
    few, many = (
        evaluate_latents(tokenizer, SOURCE, num, teacher, batch_size=12) for num in (20, 40)
    )
    same = [name for name in few if few[name] == pytest.approx(many[name], abs=1e-6)]
    few_only = {"cknna", "velocity_variance"}
    assert few_only <= set(same) <= few_only | {"density_gini", "density_cv"}


# The command -------------------------------------------------------------------------------------


def test_the_command_compares_tokenizers_and_says_what_numbers_mean(reglue, tmp_path, capsys):
    output = tmp_path / "latents.json"
    arguments = ["latents", "--tokenizer", "demo", str(reglue), "--num-held-out", "40"]
    arguments += ["--num-train", "60"]
    arguments += ["--data", "kind=shapes", "size=16", "--output", str(output)]
    assert run(evaluate.main, arguments) == 0
    printed = capsys.readouterr().out
    for predictor in PREDICTORS.values():
        assert f"{predictor.label}: {predictor.meaning} ({predictor.source})" in printed
    written = json.loads(output.read_text())
    assert written["num_images"] == 40 and written["teacher"] == "demo" and written["seed"] == 0
    assert written["predictors"]["cknna"]["better"] == "higher"
    plain, semantic = written["scores"]["demo"], written["scores"][str(fit_to_show(str(reglue)))]
    assert plain.keys() == semantic.keys() == PREDICTORS.keys()
    assert all(np.isfinite([*plain.values(), *semantic.values()]))
    assert semantic["cknna"] > plain["cknna"], "it holds the teacher's pooled token"


def test_what_is_not_measured_of_one_tokenizer_is_shown_of_others(tmp_path, capsys):
    rae = tmp_path / "rae"
    tiny.tokenizer("rae", "none", False).save_pretrained(rae)
    arguments = ["--num-held-out", "12", "--num-train", "30", "--data", "kind=shapes", "size=16"]
    assert run(evaluate.main, ["latents", "--tokenizer", "demo", str(rae), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "-: not measured, as these latents can't be scaled" in printed
    assert re.search(r"encoder's error under scaling +lower +\d\.\d{4} +-$", printed, re.MULTILINE)
    first_without = {"rae": {"cknna": 0.5}, "demo": {"cknna": 0.1, "encoder_scaling_error": 0.25}}
    _print(first_without, "latents")
    printed = capsys.readouterr().out
    assert re.search(r"encoder's error under scaling +lower +- +0\.2500$", printed, re.MULTILINE)


def test_wrong_options_are_one_line(tmp_path, capsys):
    for arguments, words in (
        (["--num-held-out", "10"], "give at least 11"),
        (["--seed", "-1"], "--seed: expected at least 0"),
        (["--num-held-out", "0"], "--num-held-out at least 1"),
        (["--output", str(tmp_path)], "--output"),
        (["--data", "kind=shapes", "size=30"], "image size 30x30 is not divisible"),
        (["--teacher", "demoo"], "timm knows no model 'demoo'"),
    ):
        assert run(evaluate.main, ["latents", "--tokenizer", "demo", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and "\n" not in error


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda seen: replace(seen, pooled=seen.pooled * torch.nan), "'demo': its features"),
        (lambda seen: seen.map(lambda x: torch.full_like(x, torch.inf)), "'demo': its features"),
        (lambda seen: replace(seen, pooled=torch.zeros_like(seen.pooled)), "do not vary"),
        (lambda seen: replace(seen, patches=(seen.patches[-1][..., :1, :1],)), "grid of 1x1"),
    ],
)
def test_teachers_that_can_not_be_compared_are_one_line(monkeypatch, capsys, broken, words):
    original = Teacher.features

    def features(self: Teacher, pixels: Tensor, **settings: Any) -> Any:
        return broken(original(self, pixels, **settings))

    monkeypatch.setattr(Teacher, "features", features)
    assert run(evaluate.main, ["latents", "--tokenizer", "demo", "--num-held-out", "12"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "--tokenizer demo: " in error and "\n" not in error


def test_latents_that_are_not_finite_are_one_line(monkeypatch, capsys):
    original = Tokenizer.posterior

    def posterior(self: Tokenizer, images: Tensor, features: Any = None) -> Any:
        found = original(self, images, features)
        return replace(found, mean=found.mean.map(lambda x: x * torch.nan))

    monkeypatch.setattr(Tokenizer, "posterior", posterior)
    assert run(evaluate.main, ["latents", "--tokenizer", "demo", "--num-held-out", "12"]) == 2
    error = capsys.readouterr().err.strip()
    assert "part 'texture': latents that are not finite" in error and "\n" not in error
