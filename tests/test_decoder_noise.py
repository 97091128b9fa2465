"""Noise for the decoder: its laws, that it belongs to images and not to batches, and the phase on clean latents."""

from pathlib import Path

import pytest
import torch

import tiny
from semtok import Tokenizer, UserError
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.methods.decoder_noise import DecoderNoiseConfig, noise_for_decoder
from semtok.recipe import parse_recipe
from semtok.sampler.draws import Draws


def draws(num: int, first: int = 0, whole: int | None = None) -> Draws:
    cpu = torch.device("cpu")
    return Draws(seed=3, step=5, global_batch=whole or num, first=first, num=num, device=cpu)


@pytest.mark.parametrize("law", ["additive", "mixed"])
@pytest.mark.parametrize("shape", [(4, 8, 8), (16, 12), (7,)])
def test_each_image_has_a_level_of_its_own_and_noise_of_that_strength(law, shape):
    config = DecoderNoiseConfig(law=law, strength=3.0)
    z = torch.full((6, *shape), 10.0)
    level = draws(6).uniform("decoder_noise_level", (1,) * len(shape))
    noise = draws(6).normal("decoder_noise", shape)
    expected = z * (1 if law == "additive" else 1 - level) + 3 * level * noise
    torch.testing.assert_close(noise_for_decoder(z, config, draws(6)), expected)
    assert len(set(level.flatten().tolist())) == 6 and level.min() >= 0 and level.max() < 1


@pytest.mark.parametrize("law", ["additive", "mixed"])
def test_noise_does_not_depend_on_the_division_of_the_batch(law):
    config, z = DecoderNoiseConfig(law=law, strength=0.8), torch.randn(12, 4, 2, 2)
    whole = noise_for_decoder(z, config, draws(12))
    parts = [noise_for_decoder(z[i : i + 4], config, draws(4, i, 12)) for i in (0, 4, 8)]
    assert torch.equal(torch.cat(parts), whole)


def test_noise_is_in_float32_whatever_the_latents_are_in():
    config = DecoderNoiseConfig(law="mixed", strength=1.0)
    assert noise_for_decoder(torch.ones(4, 3).bfloat16(), config, draws(4)).dtype == torch.float32


# In training -------------------------------------------------------------------------------------

NOISE = {"law": "mixed", "strength": 3.0}


@pytest.mark.parametrize("method", ["vae", "send_vae"])
def test_the_decoder_gets_noise_and_nothing_else_does(method):
    objective = tiny.build({"name": method, "decoder_noise": NOISE})
    learner, inputs = objective.learners["autoencoder"], tiny.batch(objective)
    q, z, x_hat = learner.autoencode(inputs["pixels"], tiny.draws())
    noised = noise_for_decoder(z, learner.config.decoder_noise, tiny.draws())
    torch.testing.assert_close(x_hat, learner.autoencoder.decode(noised).sample)
    drawn = q.mean + q.std * tiny.draws().normal("posterior", tuple(q.mean.shape[1:]))
    torch.testing.assert_close(z, drawn)
    found = objective.validate(learner.autoencoder, inputs["pixels"], inputs, indices=range(4))
    plain = tiny.build({"name": method})
    expected = plain.validate(
        plain.learners["autoencoder"].autoencoder, inputs["pixels"], inputs, indices=range(4)
    )
    assert torch.equal(found["psnr"], expected["psnr"]), "validation has none"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("noise") / "run"
    method = {"name": "vae", "decoder_noise": NOISE, "kl_weight": 1e-4}
    train_tokenizer(parse_recipe(tiny.content(method, steps=2), "tiny"), folder)
    return folder


def test_the_decoder_alone_goes_on_without_noise_on_the_same_latents(run, tmp_path):
    method = {"name": "vae", "vae": str(run), "train": "decoder"}
    train_tokenizer(parse_recipe(tiny.content(method, steps=2), "tiny"), tmp_path / "clean")
    noisy, clean = (Tokenizer.from_pretrained(folder) for folder in (run, tmp_path / "clean"))
    assert clean.has_latents_of(noisy)
    pixels = tiny.batch_of_shapes(4)
    with torch.no_grad():
        latents = noisy.posterior(pixels).mean
        assert torch.equal(latents.texture, clean.posterior(pixels).mean.texture)
        assert not torch.equal(noisy.decode(latents), clean.decode(latents))


def test_the_decoder_alone_learns_from_noised_latents_too(run):
    """As RAE's does, whose encoder stays as it is."""
    objective = tiny.build(
        {"name": "vae", "vae": str(run), "train": "decoder", "decoder_noise": NOISE}
    )
    learner, inputs = objective.learners["autoencoder"], tiny.batch(objective)
    step = learner(inputs, tiny.draws(), 0, {})
    sum(term.value.mean() for term in step.terms.values()).backward()
    moved = {n for n, p in learner.autoencoder.named_parameters() if p.grad is not None}
    assert moved and all(n.startswith(("decoder.", "post_quant_conv.")) for n in moved)


@pytest.mark.parametrize(
    ("noise", "words"),
    [
        (NOISE | {"mask": {}}, "method.decoder_noise.mask"),
        (NOISE | {"strength": 0}, "strength"),
        ({"law": "additive"}, "strength"),
        ({"law": "other", "strength": 1}, "law"),
    ],
)
def test_settings_that_take_no_effect_are_refused(noise, words):
    with pytest.raises(UserError, match=words):
        parse_recipe(tiny.content({"name": "vae", "decoder_noise": noise}), "tiny")
