"""Differentiable augmentation (Zhao et al. 2020): a discriminator judges images that were shifted, recoloured and cut.

Real and generated images are changed alike, and gradients flow through the change, so that the discriminator can't
learn the training images by heart and the decoder does not learn the change.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from semtok.sampler.draws import Draws
from semtok.settings import Config


class AugmentConfig(Config):
    """Changes of the images that a discriminator judges, drawn for each image."""

    probability: float = Field(1.0, gt=0, le=1)
    """With which each of the three kinds is done, drawn once for the whole batch."""
    translation: float = Field(0.125, ge=0, lt=1)
    """Largest shift along each side, as a share of it; what comes in is grey. 0: none."""
    colour: bool = True
    """Whether brightness changes by up to 0.5, saturation from 0 to 2 times, contrast from half to 1.5 times."""
    cutout: float = Field(0.0, ge=0, lt=1)
    """Side of the grey square that is cut out, as a share of the image's; RAE has none. 0: none."""

    @model_validator(mode="after")
    def _changes_something(self) -> "AugmentConfig":
        if not (self.translation or self.colour or self.cutout):
            raise ValueError(
                "translation 0, colour false and cutout 0 change nothing; give one of them, or leave augment out"
            )
        return self

    def changes(self, image_size: tuple[int, int]) -> bool:
        """Whether anything is left of that on images of (height, width), where shares are whole pixels."""
        shares = (self.translation, self.cutout)
        return self.colour or any(round(side * share) for side in image_size for share in shares)


def augment(pixels: Tensor, config: AugmentConfig, draws: Draws, name: str) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1], changed, in float32.

    Args:
        name: of these images among the step's draws.
    """
    gates = torch.cat([draws.uniform_of_step(f"{name}_{kind}") for kind in range(3)])
    return augmented(pixels, config, gates, draws.uniform(name, (7,)))


def augmented(pixels: Tensor, config: AugmentConfig, gates: Tensor, numbers: Tensor) -> Tensor:
    """The same by given uniform numbers.

    Args:
        gates: (3,), of translation, colour and cutout, each done where its number is at most ``probability``.
        numbers: (B, 7): shifts down and right, brightness, saturation, contrast, and the cutout's row and column.
    """
    pixels, rows = pixels.float(), numbers.float().unbind(dim=1)
    changed = _translate(pixels, config.translation, rows[0], rows[1])
    pixels = torch.where(gates[0] <= config.probability, changed, pixels)
    if config.colour:
        changed = _recolour(pixels, rows[2], rows[3], rows[4])
        pixels = torch.where(gates[1] <= config.probability, changed, pixels)
    changed = _cut_out(pixels, config.cutout, rows[5], rows[6])
    return torch.where(gates[2] <= config.probability, changed, pixels)


def _translate(pixels: Tensor, share: float, down: Tensor, right: Tensor) -> Tensor:
    """Shifts by whole pixels, of which all within the share are equally likely."""
    if not share:
        return pixels
    (height, width), device = pixels.shape[-2:], pixels.device
    most = [round(side * share) for side in (height, width)]
    shifts = [(u * (2 * m + 1)).floor() - m for u, m in zip((down, right), most, strict=True)]
    # One pixel of padding, where everything from outside is read.
    y, x = (
        (torch.arange(side, device=device) + shift[:, None] + 1).clamp(0, side + 1).long()
        for side, shift in zip((height, width), shifts, strict=True)
    )
    padded = F.pad(pixels, (1, 1, 1, 1)).permute(0, 2, 3, 1)
    image = torch.arange(len(pixels), device=device)[:, None, None]
    return padded[image, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


def _recolour(pixels: Tensor, brightness: Tensor, saturation: Tensor, contrast: Tensor) -> Tensor:
    brightness, saturation, contrast = (
        u.view(-1, 1, 1, 1) for u in (brightness, saturation, contrast)
    )
    pixels = pixels + (brightness - 0.5)
    grey = pixels.mean(dim=1, keepdim=True)
    pixels = (pixels - grey) * (saturation * 2) + grey
    mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
    return (pixels - mean) * (contrast + 0.5) + mean


def _cut_out(pixels: Tensor, share: float, row: Tensor, column: Tensor) -> Tensor:
    """Sets a rectangle to 0, of which a part may lie outside the image."""
    inside = []
    for side, u in zip(pixels.shape[-2:], (row, column), strict=True):
        size = round(side * share)
        first = (u * (side + 1 - size % 2)).floor() - size // 2
        place = torch.arange(side, device=pixels.device)
        inside.append((place >= first[:, None]) & (place < first[:, None] + size))
    return pixels * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])
