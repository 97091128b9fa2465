"""Noise for the decoder: its laws, that it belongs to images and not to batches, and the phase on clean latents."""

import pytest
import torch

from semtok.methods.decoder_noise import (
    DecoderNoiseConfig,
    PatchMaskConfig,
    noise_for_decoder,
    patch_mask,
)
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


def test_hidden_patches_are_the_drawn_share_of_each_image():
    config = PatchMaskConfig()
    hidden = patch_mask(100, config, draws(400))
    share = (-0.1 + 0.8 * draws(400).uniform("patch_mask_share")).clamp(min=0)
    assert hidden.dtype == torch.bool
    assert torch.equal(hidden.sum(dim=1), (100 * share).round().long())
    assert 0.08 < float((share == 0).float().mean()) < 0.18, "an eighth of images stay whole"
    often = hidden.float().mean(dim=0)  # every place is hidden about as often
    assert often.min() > 0.2 and often.max() < 0.42


def test_a_law_without_room_is_refused():
    with pytest.raises(ValueError, match="lowest 0.5 is to be less than highest 0.2"):
        PatchMaskConfig(lowest=0.5, highest=0.2)
