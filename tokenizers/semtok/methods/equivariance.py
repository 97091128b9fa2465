"""Equivariance of latents: a decoder sees them scaled and turned, and is to give the scaled and turned image.

EQ-VAE, arXiv 2502.09509. There is no term of its own: in some steps the losses of the VAE compare the decoded,
transformed latents with the transformed image. As published, a step takes one of three ways:

- with ``probability``, the latents of the whole image are scaled and turned before the decoder;
- of the other steps, with ``low_resolution_probability``, the image is scaled before the encoder and not turned;
- else nothing is transformed.

The losses are published as sums over the pixels that are compared, so that a smaller target weighs less, by its share
of the image; so here. What differs: the way, the scale and the turn belong to the optimiser step, in all processes and
micro-batches, and the discriminator is shown what the autoencoder made in this step, where the published one has a
step of its own.
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from semtok.sampler.draws import Draws
from semtok.settings import Config
from semtok.transforms import scaled, turned, whole_scales

# Settings ----------------------------------------------------------------------------------------


class EquivarianceConfig(Config):
    """How often, and how, latents and images are transformed. The defaults are EQ-VAE's."""

    probability: float = Field(0.5, gt=0, le=1)
    """Of a step whose latents are scaled and turned."""
    low_resolution_probability: float = Field(0.25, ge=0, le=1)
    """Of the other steps: of one whose images are scaled before the encoder."""
    scales: tuple[float, ...] = tuple(s / 32 for s in range(8, 32))
    """Factors of height and width, each as likely as the others. Those that leave the grid of the latents not whole are
    left out, and named when training starts."""
    turns: tuple[Literal[0, 1, 2, 3], ...] = (1, 2, 3)
    """Clockwise quarter turns, each as likely as the others; [0] turns nothing. 1 and 3 need square images."""
    anisotropic: bool = False
    """Scale height and width by factors of their own, where latents are transformed."""
    turned: Literal["together", "each"] = "together"
    """Whether all images of a step are turned alike, as published, or each by a turn of its own. They share their scale
    in any case: images of several sizes make no batch."""

    @model_validator(mode="after")
    def _has_an_effect(self) -> "EquivarianceConfig":
        wrong = [s for s in self.scales if not 0 < s <= 1]
        if wrong or not self.scales:
            raise ValueError(f"scales: {wrong or 'none'}; expected factors above 0, up to 1")
        if not self.turns:
            raise ValueError("turns: none; pass [0] to turn nothing")
        if set(self.scales) == {1.0} and set(self.turns) == {0}:
            raise ValueError("scales [1] with turns [0] change nothing; pass others")
        low = "low_resolution_probability takes no effect with {}; pass 0 for it"
        if self.low_resolution_probability and self.probability == 1:
            raise ValueError(low.format("probability 1"))
        if self.low_resolution_probability and set(self.scales) == {1.0}:
            raise ValueError(low.format("scales [1]"))
        if self.turned == "each" and len(set(self.turns)) == 1:
            raise ValueError("turned: each takes no effect where turns has a single one")
        if self.turned == "each" and self.anisotropic:
            raise ValueError(
                "turned: each with anisotropic would make images of several shapes; pass one of the two"
            )
        return self


# What a step sees --------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """What one step does with images and latents.

    Attributes:
        factors: of height and width.
        turns: clockwise quarters, of all maps or of each.
        encodes_scaled: whether images are scaled before the encoder; else latents are transformed after it.
    """

    factors: tuple[float, float] = (1.0, 1.0)
    turns: int | Tensor = 0
    encodes_scaled: bool = False

    def encoded(self, x: Tensor) -> Tensor:
        """The images that the encoder gets."""
        return scaled(x, self.factors) if self.encodes_scaled else x

    def decoded(self, z: Tensor) -> Tensor:
        """The latents that the decoder gets, of those of the encoder; images in the same way."""
        return z if self.encodes_scaled else turned(scaled(z, self.factors), self.turns)

    def target(self, x: Tensor) -> Tensor:
        """What the decoder is to give for images x: x itself where nothing is transformed."""
        return self.decoded(self.encoded(x))


class Views:
    """The view of each step, as a function of its draws.

    Args:
        config: None: no step transforms anything.
        stride: image pixels per latent cell along each side.
        cells: what both sides of a scaled grid must be a multiple of.
    """

    def __init__(self, config: EquivarianceConfig | None, stride: int, cells: int = 1) -> None:
        self.config, self._pixels = config, stride * cells

    def __call__(self, image_size: tuple[int, int], draws: Draws) -> View:
        """Of images of (height, width)."""
        config = self.config
        if config is None:
            return View()
        if draws.number_of_step("equivariance") < config.probability:
            height = self._pick(self._scales(*image_size[: 1 if config.anisotropic else 2]), draws)
            width = height
            if config.anisotropic:
                width = self._pick(self._scales(image_size[1]), draws, "equivariance/width")
            return View((height, width), self._turns(config, draws))
        if draws.number_of_step("equivariance/low_resolution") < config.low_resolution_probability:
            scale = self._pick(self._scales(*image_size), draws)
            return View((scale, scale), encodes_scaled=True)
        return View()

    def check(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError where images of (height, width) can't be transformed."""
        if self.config is None:
            return
        height, width = image_size
        odd = sorted({t for t in self.config.turns if t % 2})
        if height != width and odd:
            raise ValueError(
                f"method.equivariance.turns: {odd} need square images, and these are {height}x{width}; pass "
                "method.equivariance.turns=[2], or [0]"
            )
        if not self._scales(height, width):
            raise ValueError(
                f"method.equivariance.scales: none leaves images of {height}x{width} whole on a grid of "
                f"{self._pixels} pixels; pass multiples of 1/{height // self._pixels}"
            )

    def smallest(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the smallest images that are compared."""
        if self.config is None:
            return image_size
        sides = ((n,) if self.config.anisotropic else image_size for n in image_size)
        height, width = (
            round(min(self._scales(*own)) * n) for n, own in zip(image_size, sides, strict=True)
        )
        return height, width

    def notes(self, image_size: tuple[int, int]) -> list[str]:
        """Which scales are left out, in a line."""
        if self.config is None:
            return []
        used = self._scales(*image_size)
        unused = [f"{s:g}" for s in self.config.scales if s not in used]
        grid = "x".join(str(n // self._pixels) for n in image_size)
        return unused and [
            f"method.equivariance.scales: {len(used)} are used, {', '.join(f'{s:g}' for s in used)}; left out, as they "
            f"don't keep a grid of {grid} whole: {', '.join(unused)}"
        ]

    def _scales(self, *sides: int) -> tuple[float, ...]:
        return whole_scales(self.config.scales, *(n / self._pixels for n in sides))

    @staticmethod
    def _pick(of: tuple, draws: Draws, name: str = "equivariance/scale"):
        return of[int(draws.number_of_step(name) * len(of))]

    def _turns(self, config: EquivarianceConfig, draws: Draws) -> int | Tensor:
        if config.turned == "together":
            return self._pick(config.turns, draws, "equivariance/turn")
        chosen = draws.uniform("equivariance/turn") * len(config.turns)
        return sum((chosen.long() == i) * turn for i, turn in enumerate(config.turns))
