"""Noise for the decoder: it learns to decode latents that a generator gets slightly wrong.

RAE (arXiv 2510.11690) adds Gaussian noise of a random strength to the latents that its decoder trains on.
DeTok (arXiv 2507.15856) moves them towards noise, and also hides patches of the image from the encoder. Ours is the
share of hidden patches being drawn per image.
"""

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from semtok.sampler.draws import Draws
from semtok.settings import Config

# Settings ----------------------------------------------------------------------------------------


class PatchMaskConfig(Config):
    """Which share of an image's patch tokens the encoder doesn't see: max(0, U(lowest, highest)), drawn per image."""

    lowest: float = Field(-0.1, ge=-1, lt=1)
    """Of the uniform law; below 0 some images stay whole."""
    highest: float = Field(0.7, gt=0, lt=1)
    """Of the uniform law."""

    @model_validator(mode="after")
    def _in_order(self) -> "PatchMaskConfig":
        if self.lowest >= self.highest:
            raise ValueError(f"lowest {self.lowest} is to be less than highest {self.highest}")
        return self


class DecoderNoiseConfig(Config):
    """Noise on the raw latents that a decoder trains on; validation and exports have none."""

    law: Literal["additive", "mixed"]
    """With u ~ U(0, 1) per image and ε ~ N(0, I): ``additive`` is z + u strength ε (RAE, and a variant of DeTok);
    ``mixed`` is (1 - u) z + u strength ε (DeTok)."""
    strength: float = Field(gt=0)
    """Largest standard deviation of the noise, in the unit of raw latents: 0.8 in RAE, 3 in DeTok. Latents of a
    VAE may have any scale: see the standard deviation that its export states."""
    mask: PatchMaskConfig | None = None
    """Patches that the encoder does not see in training (DeTok), where it works on patch tokens; None: it sees all."""


# What it does ------------------------------------------------------------------------------------


def noise_for_decoder(z: Tensor, config: DecoderNoiseConfig, draws: Draws) -> Tensor:
    """Raw latents (B, ...) of any shape with noise on them, in float32; one level u per image."""
    level = draws.uniform("decoder_noise_level", (1,) * (z.ndim - 1))  # first, as in RAE
    noise = config.strength * level * draws.normal("decoder_noise", tuple(z.shape[1:]))
    kept = 1 - level if config.law == "mixed" else 1
    return kept * z.float() + noise


def patch_mask(num: int, config: PatchMaskConfig, draws: Draws) -> Tensor:
    """Which of an image's patch tokens the encoder does not see: bool (B, num).

    Each image hides the drawn share, rounded to whole tokens, at places drawn without replacement.
    """
    share = config.lowest + (config.highest - config.lowest) * draws.uniform("patch_mask_share")
    hidden = (share.clamp(min=0) * num).round()
    rank = draws.uniform("patch_mask", (num,)).argsort(dim=1).argsort(dim=1)
    return rank < hidden[:, None]
