"""REGLUE's compressor and SemVAE against kits of their official code."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok.hub.formats import open_checkpoint, read_statistics
from semtok.hub.import_coder import import_compressor, import_semvae, read_semvae
from semtok.methods.coders import feature_cosine
from semtok.methods.reglue import Compressor
from semtok.methods.semvae import SemVAE, cosine_loss
from semtok.methods.vae import kl_loss
from semtok.sampler.latents import Latents, Posterior, on_texture_grid
from semtok.statistics import StreamingMoments
from semtok.teachers import TeacherFeatures

TENSOR, SUM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}


@pytest.fixture(params=kits("reglue_compressor"))
def reglue(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture(params=kits("semvae"))
def semvae(request) -> Kit:
    return load_kit(request.param)


# REGLUE's compressor -----------------------------------------------------------------------------


def compressor(kit: Kit) -> Compressor:
    """From the training script's file; the bare weights must say the same."""
    files = kit.case["files"]
    statistics = read_statistics(kit.folder / files["norm_stats"])
    ours, bare = (
        import_compressor(open_checkpoint(kit.folder / files[f]).state, statistics, place=f)
        for f in ("checkpoint", "weights")
    )
    state = bare.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    widths = [ours.shape.feature_channels, *ours.shape.hidden, ours.shape.channels]
    assert widths == kit.case["constructor"]["kwargs"]["build_channel_list"]
    return ours


def features(kit: Kit, case: str) -> Tensor:
    names = sorted(n for n in kit.tensors if n.startswith(f"{case}/layer_"))
    layers = tuple(kit[name] for name in names)
    return TeacherFeatures(layers, layers[-1].mean(dim=(2, 3))).joined


def test_parity_reglue_compressor_both_ways(reglue):
    ours = compressor(reglue)
    with torch.no_grad():
        latent = ours.encoder(reglue["forward/x"])
        torch.testing.assert_close(latent, reglue["forward/latent"], **TENSOR)
        torch.testing.assert_close(ours.decoder(latent), reglue["forward/reconstruction"], **TENSOR)


def test_parity_reglue_compressor_from_raw_layers(reglue):
    ours, raw = compressor(reglue), features(reglue, "raw")
    tokens = raw.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, reglue["raw/tokens"], **TENSOR)
    with torch.no_grad():
        standardised = ours.standardise(raw)
        torch.testing.assert_close(standardised, reglue["raw/standardised"], **TENSOR)
        mean, std = ours.encode(raw)
        torch.testing.assert_close(mean, reglue["raw/latent"], **TENSOR)
        assert not std.any(), "the published compressor does not sample"
        error = F.mse_loss(ours.standardise(ours.decode(mean)), standardised)
        torch.testing.assert_close(error, reglue["raw/val_mse"], atol=0, rtol=1e-4)


def test_parity_reglue_compressor_statistics(reglue):
    moments = StreamingMoments()
    for half in features(reglue, "stats").split(3):
        moments.add(half)
    torch.testing.assert_close(moments.mean.float(), reglue["stats/mean"], **TENSOR)
    torch.testing.assert_close(moments.std.float(), reglue["stats/std"], **TENSOR)


def test_parity_reglue_compressor_on_the_texture_grid(reglue):
    parts = {"texture": reglue["joint/vae_latents"], "semantic": reglue["joint/compressed"]}
    ours = on_texture_grid(Latents(parts))
    torch.testing.assert_close(ours["semantic"], reglue["joint/resized"], **TENSOR)
    stacked = torch.cat(list(ours.values()), dim=1)
    torch.testing.assert_close(stacked, reglue["joint/x_joint"], **TENSOR)


def test_parity_reglue_compressor_with_image_moments(reglue):
    coder = compressor(reglue)
    with torch.no_grad():
        compressed, std = coder.encode(features(reglue, "joint_raw"))
    torch.testing.assert_close(compressed, reglue["joint_raw/compressed"], **TENSOR)
    mean, deviation = reglue["joint_raw/moments"].chunk(2, dim=1)  # std, not log-variance
    scale = 0.18215
    posterior = Posterior(
        Latents({"texture": mean * scale, "semantic": compressed}),
        Latents({"texture": deviation * scale, "semantic": std}),
    )
    noise = {"texture": reglue["joint_raw/noise"], "semantic": torch.randn_like(compressed)}
    ours = on_texture_grid(posterior.sample_with(noise))
    torch.testing.assert_close(ours["texture"], reglue["joint_raw/vae_latents"], **TENSOR)
    stacked = torch.cat(list(ours.values()), dim=1)
    torch.testing.assert_close(stacked, reglue["joint_raw/x_joint"], **TENSOR)


# SemVAE ------------------------------------------------------------------------------------------


def coder(kit: Kit) -> SemVAE:
    files, kwargs = kit.case["files"], kit.case["constructor"]["kwargs"]
    checkpoint, weights = (
        open_checkpoint(kit.folder / files[f]) for f in ("checkpoint", "weights")
    )
    heads = read_semvae(checkpoint.settings)
    ours = import_semvae(checkpoint.state, place="checkpoint", heads=heads)
    assert ours.shape.heads == kwargs["transformer_heads"], "read from the settings in the file"
    bare = import_semvae(weights.state, place="weights", heads=ours.shape.heads)
    state = bare.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    return ours


def as_map(tokens: Tensor) -> Tensor:
    side = round(tokens.shape[1] ** 0.5)
    return tokens.transpose(1, 2).unflatten(2, (side, side))


def as_tokens(maps: Tensor) -> Tensor:
    return maps.flatten(2).transpose(1, 2)


def test_parity_semvae_encodes_and_decodes(semvae):
    ours, x = coder(semvae), as_map(semvae["encode/x"])
    with torch.no_grad():
        mean, logvar = ours.moments(x)
        std = ours.encode(x)[1]
        decoded = ours.decode(mean)
    torch.testing.assert_close(as_tokens(mean), semvae["encode/mean"], **TENSOR)
    torch.testing.assert_close(as_tokens(logvar), semvae["encode/logvar"], **TENSOR)
    torch.testing.assert_close(as_tokens(std), semvae["encode/std"], **TENSOR)
    torch.testing.assert_close(kl_loss(mean, logvar), semvae["encode/kl"], **SUM)
    sample = mean + std * semvae["encode/noise"]
    torch.testing.assert_close(sample, semvae["encode/z_map"], **TENSOR)
    torch.testing.assert_close(as_tokens(decoded), semvae["encode/decoded_mean"], **TENSOR)


def test_parity_semvae_losses_and_gradients(semvae):
    ours, x = coder(semvae), as_map(semvae["loss/x"])
    mean, logvar = ours.moments(x)
    restored = ours.decode(mean + (0.5 * logvar).exp() * semvae["loss/noise"])
    torch.testing.assert_close(as_tokens(restored), semvae["loss/reconstruction"], **TENSOR)
    error = F.mse_loss(restored, x)
    torch.testing.assert_close(error, semvae["loss/mse"], **SUM)
    # The published training compares channels over tokens; its evaluation compares tokens.
    cosine = cosine_loss(restored, x, "tokens").mean()
    torch.testing.assert_close(cosine, semvae["loss/cos_loss"], **SUM)
    similarity = feature_cosine(restored, x).mean()
    torch.testing.assert_close(similarity, semvae["loss/eval_cosine_similarity"], **SUM)
    kl = kl_loss(mean, logvar).mean()
    torch.testing.assert_close(kl, semvae["loss/kl_loss"], **SUM)
    weights = semvae.settings("loss")
    total = (
        weights["mse_weight"] * error + weights["cos_weight"] * cosine + weights["kl_weight"] * kl
    )
    torch.testing.assert_close(total, semvae["loss/total_loss"], **SUM)
    total.backward()
    names = semvae.case["cases"]["loss"]["grad_norm_names"]
    parameters = dict(ours.named_parameters())
    for name, expected in zip(names, semvae["loss/grad_norms"], strict=True):
        torch.testing.assert_close(
            parameters[name].grad.norm(),
            expected,
            atol=1e-6,
            rtol=1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
