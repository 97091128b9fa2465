"""How features are compared with a teacher's, in every method that aligns."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def alignment_loss(
    predicted: Tensor, target: Tensor, kind: Literal["cosine", "cosine_mse"] = "cosine"
) -> Tensor:
    """1 - cosine, averaged over positions: (B,), in float32.

    (REPA's published code logs the negative cosine, which is less by 1 and has the same gradient.)

    Args:
        predicted: (B, D, h, w).
        target: the teacher's tokens (B, D, h', w'), resampled bilinearly where the grids differ.
        kind: ``cosine_mse`` gives the mean of that and of the mean squared error.
    """
    predicted, target = predicted.float(), target.float()
    if predicted.shape[-2:] != target.shape[-2:]:
        target = F.interpolate(target, size=predicted.shape[-2:], mode="bilinear", antialias=True)
    cosine = (1 - F.cosine_similarity(predicted, target, dim=1)).mean(dim=(1, 2))
    if kind == "cosine":
        return cosine
    return (cosine + (predicted - target).square().mean(dim=(1, 2, 3))) / 2
