"""Noise for the decoder: it learns to decode latents that a generator gets slightly wrong.

RAE (arXiv 2510.11690) adds Gaussian noise of a random strength to the latents that its decoder trains on.
DeTok (arXiv 2507.15856) moves them towards noise. It also hides patches of the image from the encoder in training,
which has no place here: no encoder that trains works on patch tokens.
"""

from typing import Literal

from pydantic import Field
from torch import Tensor

from semtok.sampler.draws import Draws
from semtok.settings import Config

# Settings ----------------------------------------------------------------------------------------


class DecoderNoiseConfig(Config):
    """Noise on the raw latents that a decoder trains on; validation and exports have none."""

    law: Literal["additive", "mixed"]
    """With u ~ U(0, 1) per image and ε ~ N(0, I): ``additive`` is z + u strength ε (RAE, and a variant of DeTok);
    ``mixed`` is (1 - u) z + u strength ε (DeTok)."""
    strength: float = Field(gt=0)
    """Largest standard deviation of the noise, in the unit of raw latents: 0.8 in RAE, 3 in DeTok. Latents of a
    VAE may have any scale: see the standard deviation that its export states."""


# What it does ------------------------------------------------------------------------------------


def noise_for_decoder(z: Tensor, config: DecoderNoiseConfig, draws: Draws) -> Tensor:
    """Raw latents (B, ...) of any shape with noise on them, in float32; one level u per image."""
    level = draws.uniform("decoder_noise_level", (1,) * (z.ndim - 1))  # first, as in RAE
    noise = config.strength * level * draws.normal("decoder_noise", tuple(z.shape[1:]))
    kept = 1 - level if config.law == "mixed" else 1
    return kept * z.float() + noise
