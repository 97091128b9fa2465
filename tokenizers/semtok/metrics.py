"""Image metrics, one value per sample."""

import torch
from torch import Tensor

from semtok.images import to_uint8


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,), on uint8 images as files would hold them.

    Args:
        reconstruction, pixels: (B, 3, H, W) in [-1, 1].
    """
    a, b = to_uint8(reconstruction).float(), to_uint8(pixels).float()
    mse = (
        (a - b).square().mean(dim=(1, 2, 3)).clamp_min(1e-4)
    )  # equal images: 88 dB instead of infinity
    return 10 * torch.log10(255**2 / mse)


def ssim(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Structural similarity (B,) of Wang et al. 2004 by torchmetrics, data range 2.

    On images in [-1, 1], as the published figures of this field were measured (LightningDiT's
    evaluation code); SSIM of the same images in [0, 1] is another number.

    Args:
        reconstruction, pixels: (B, 3, H, W) in [-1, 1].
    """
    # Late, as importing torchmetrics takes seconds that most commands need not spend.
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(
        reconstruction.float(), pixels.float(), data_range=(-1.0, 1.0), reduction="none"
    )
