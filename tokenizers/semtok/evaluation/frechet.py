"""The Fréchet distance between two sets of images, in the features of any network.

FID (Heusel et al. 2017) is this distance in the features of one Inception network; in a teacher's
features it is called by the teacher's name (FD-DINOv2, Stein et al. 2023; FD-demo with the embedded
one), never FID.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from semtok.statistics import StreamingMoments


@dataclass(frozen=True)
class Gaussian:
    """A normal distribution of features, on the CPU: one side may have been read from a file, the other seen on a GPU.

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
        unbiased = moments.matrix * (moments.count / (moments.count - 1))
        return cls(moments.mean.cpu(), unbiased.cpu())


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


def relative_frechet(distances: Mapping[str, float], real: Mapping[str, float]) -> dict[str, float]:
    """FDr: Fréchet distances in the features of several networks as one score, and its parts.

    FDr = mean over networks of FD(generated, reference) / FD(held-out real images, reference). It is 1 where generated
    images are as far from the reference as real ones that the generator never saw. A distance of few images is biased
    upwards, so both are of equally many. After FDr^k of "Representation Fréchet Loss" (arXiv 2604.28190); the networks,
    the images and their number are ours, so the numbers are not the paper's.

    Args:
        distances: FD(generated, reference), by the network's name.
        real: FD(held-out real images, reference), of the same networks.

    Returns:
        ``FDr``, and the ratio of each network as ``FDr-NAME``.

    Raises:
        ValueError: fewer than two networks, or a held-out distance of 0.
    """
    if len(distances) < 2 or distances.keys() != real.keys():
        raise ValueError(f"FDr is over two networks or more, got {', '.join(distances)}")
    equal = [name for name in distances if real[name] <= 0]
    if equal:
        raise ValueError(f"FDr: held-out images and the reference are the same to {equal[0]}")
    parts = {f"FDr-{name}": distances[name] / real[name] for name in distances}
    return {"FDr": sum(parts.values()) / len(parts)} | parts
