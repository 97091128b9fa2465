"""The Fréchet distance between two sets of images, in the features of any network.

FID (Heusel et al. 2017) is this distance in the features of one Inception network; in a teacher's
features it is called by the teacher's name (FD-DINOv2, Stein et al. 2023; FD-demo with the embedded
one), never FID.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from semtok.statistics import StreamingMoments


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of features.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), the unbiased one, as in the published FID code.
    """

    mean: Tensor
    covariance: Tensor

    @classmethod
    def of(cls, moments: StreamingMoments) -> "Gaussian":
        """The one with these moments, which must hold covariances.

        Raises:
            ValueError: fewer than two observations.
        """
        if moments.count < 2:
            raise ValueError("a Fréchet distance needs at least two images on each side")
        return cls(moments.mean, moments.matrix * (moments.count / (moments.count - 1)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), at least 0: rounding alone takes a set's distance to itself below.

    Raises:
        ValueError: features of different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} and of width {len(b.mean)}")
    # tr (Σa Σb)^½ is the sum of the roots of the eigenvalues of the symmetric Σa^½ Σb Σa^½.
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean - b.mean).square().sum()
    return max(0.0, float(gap + a.covariance.trace() + b.covariance.trace() - 2 * product))
