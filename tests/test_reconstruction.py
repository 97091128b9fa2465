"""Reconstruction scores against libraries and closed forms, and the command that prints them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semtok import Tokenizer
from semtok.commands import evaluate
from semtok.commands.cli import run
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.evaluation.frechet import Gaussian, frechet_distance
from semtok.evaluation.reconstruction import PROTOCOLS, evaluate_reconstruction
from semtok.images import to_pixels, to_uint8
from semtok.statistics import StreamingMoments

SOURCE = Shapes(ShapesConfig(size=32), train=False)


def gaussian(features: torch.Tensor) -> Gaussian:
    seen = StreamingMoments(covariance=True)
    for part in features.split(100):
        seen.add(part)
    return Gaussian.of(seen)


# The Fréchet distance ----------------------------------------------------------------------------


def test_the_frechet_distance_is_torch_fidelitys_on_the_same_features():
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    a = torch.randn(500, 12) @ torch.randn(12, 12)
    b = torch.randn(400, 12) @ torch.randn(12, 12) + 1
    statistics = [fid.fid_features_to_statistics(x.double()) for x in (a, b)]
    expected = fid.fid_statistics_to_metric(*statistics, verbose=False)
    ours = frechet_distance(gaussian(a), gaussian(b))
    assert ours == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)


def test_the_frechet_distance_of_gaussians_has_a_closed_form():
    shift, scale = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.0, 2.0, 3.0])
    base = torch.randn(4000, 3, dtype=torch.float64)
    base = torch.linalg.qr(base - base.mean(dim=0))[0] * (len(base) - 1) ** 0.5  # covariance is 1
    ours = frechet_distance(gaussian(base), gaussian(base * scale + shift))
    expected = shift.square().sum() + (scale - 1).square().sum()
    assert ours == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(gaussian(base), gaussian(base)) == pytest.approx(0, abs=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_a_gpu_saw_has_a_distance_to_what_was_read_from_a_file():
    features = torch.randn(50, 6)
    assert frechet_distance(gaussian(features.cuda()), gaussian(features)) < 1e-6


def test_singular_covariances_have_a_distance_and_single_images_none():
    flat = torch.randn(50, 2) @ torch.randn(2, 6)
    assert frechet_distance(gaussian(flat), gaussian(flat)) == pytest.approx(0, abs=1e-4)
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(gaussian(flat[:1]), gaussian(flat))
    with pytest.raises(ValueError, match="width 6 and of width 5"):
        frechet_distance(gaussian(flat), gaussian(flat[:, :5]))


# A tokenizer -------------------------------------------------------------------------------------


def test_scores_are_means_over_images_of_what_libraries_say():
    from torchmetrics.functional.image import peak_signal_noise_ratio

    tokenizer = Tokenizer.from_pretrained("demo")
    report = evaluate_reconstruction(tokenizer, SOURCE, 10, batch_size=4)
    pixels = to_pixels(SOURCE.load(range(10)).images)
    with torch.no_grad():
        decoded = tokenizer.decode(tokenizer.encode(pixels))
    expected = [
        float(peak_signal_noise_ratio(to_uint8(a).float(), to_uint8(b).float(), data_range=255.0))
        for a, b in zip(decoded, pixels, strict=True)
    ]
    assert report.psnr.tolist() == pytest.approx(expected, abs=2e-2)
    assert report.scores["psnr"] == pytest.approx(float(np.mean(expected)), abs=1e-2)
    whole = evaluate_reconstruction(tokenizer, SOURCE, 10, batch_size=10)
    assert whole.scores["ssim"] == pytest.approx(report.scores["ssim"], abs=1e-4)


def test_latents_are_described_by_hand_and_dead_channels_found():
    tokenizer = Tokenizer.from_pretrained("demo")
    report = evaluate_reconstruction(tokenizer, SOURCE, 64)
    part = report.parts["texture"]
    assert part.mean.abs().max() < 0.2 and (part.std - 1).abs().max() < 0.2 and part.num_dead == 0
    with torch.no_grad():
        raw = tokenizer.posterior_raw(to_pixels(SOURCE.load(range(64)).images))
    mean, std = raw.mean.texture.double(), raw.std.texture.double()
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, std),
        torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(std)),
    )
    assert part.kl_bits == pytest.approx(float(nats.mean()) / np.log(2), rel=1e-4)
    with torch.no_grad():
        tokenizer.texture_std[3] *= 1e4
    assert evaluate_reconstruction(tokenizer, SOURCE, 8).parts["texture"].num_dead == 1


def test_a_worse_decoder_scores_worse_everywhere():
    from semtok.teachers import Teacher, TeacherConfig

    teacher = Teacher(TeacherConfig())
    extractors = {"FD-demo": lambda images: teacher.features(to_pixels(images)).pooled}
    good, bad = Tokenizer.from_pretrained("demo"), Tokenizer.from_pretrained("demo")
    with torch.no_grad():
        bad.autoencoder.decoder.conv_out.weight.mul_(0.5)
    scores = [
        evaluate_reconstruction(t, SOURCE, 96, extractors=extractors).scores for t in (good, bad)
    ]
    assert scores[0]["psnr"] > scores[1]["psnr"] and scores[0]["ssim"] > scores[1]["ssim"]
    assert scores[0]["FD-demo"] < scores[1]["FD-demo"]


def test_draws_are_repeatable_and_differ_from_the_mean():
    tokenizer = Tokenizer.from_pretrained("demo")
    with torch.no_grad():  # a posterior that is wide enough to show
        tokenizer.autoencoder.quant_conv.bias[8:] += 6
    runs = [
        evaluate_reconstruction(
            tokenizer, SOURCE, 6, protocol=replace(PROTOCOLS["adm"], sample=s), seed=seed
        ).scores["psnr"]
        for s, seed in ((True, 0), (True, 0), (True, 1), (False, 0))
    ]
    assert runs[0] == runs[1] and len(set(runs)) == 3


# The command -------------------------------------------------------------------------------------


def test_the_command_prints_what_it_can_and_says_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    output, grid = tmp_path / "scores.json", tmp_path / "grid.png"
    arguments = ["reconstruction", "--tokenizer", "demo", "--num-held-out", "40"]
    arguments += ["--output", str(output), "--grid", str(grid)]
    assert run(evaluate.main, arguments) == 0
    printed = capsys.readouterr().out
    for words in (
        "PSNR, dB",
        "FD-demo",
        "texture: KL, bits per dimension",
        "LPIPS is missing: vgg's",
    ):
        assert words in printed
    assert "rFID is missing: " in printed and "put them there, or --download" in printed
    scores = json.loads(output.read_text())
    assert scores["scores"]["demo"]["psnr"] > 25 and set(scores["unavailable"]) == {"lpips", "rFID"}
    assert len(scores["scores"]["demo"]["latents"]["texture"]["mean"]) == 8
    assert Image.open(grid).size[0] > Image.open(grid).size[1], "eight columns, two rows"


def test_rfid_runs_where_its_weights_lie(tmp_path, capsys, monkeypatch):
    """On random weights in the place of the published ones: the loading and the wiring are real."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *a, **k: None)
    network = module.FeatureExtractorInceptionV3("inception", ["2048"])
    monkeypatch.undo()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / Path(module.URL_INCEPTION_V3).name
    file.parent.mkdir()
    torch.save(network.state_dict(), file)
    arguments = ["reconstruction", "--tokenizer", "demo", "--num-held-out", "4"]
    assert run(evaluate.main, [*arguments, "--output", str(tmp_path / "x.json")]) == 0
    scores = json.loads((tmp_path / "x.json").read_text())
    assert (
        scores["scores"]["demo"]["rFID"] >= -1e-6
        and "rFID is missing" not in capsys.readouterr().out
    )
    file.write_bytes(b"damaged")
    assert run(evaluate.main, arguments) == 0
    assert "rFID is missing: Inception's weights at" in capsys.readouterr().out


def test_wrong_options_are_one_line(tmp_path, capsys):
    for arguments, words in (
        (["--num-held-out", "0"], "--num-held-out at least 1"),
        (["--num-held-out", "1"], "--num-held-out: a Fréchet distance needs at least 2 images"),
        (
            ["--data", "kind=shapes", "size=32", "num_validation_images=1"],
            "--data: there is one held-out image: a Fréchet distance needs at least 2 images",
        ),
        (["--grid", str(tmp_path)], "--grid"),
        (["--data", "kind=shapes", "size=30"], "image size 30x30 is not divisible"),
        (["--teacher", "demoo"], "timm knows no model 'demoo'"),
    ):
        assert run(evaluate.main, ["reconstruction", "--tokenizer", "demo", *arguments]) == 2
        error = capsys.readouterr().err.strip()
        assert words in error and "\n" not in error
