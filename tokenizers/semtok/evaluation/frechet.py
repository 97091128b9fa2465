"""The Fréchet distance between two sets of images, in the features of any network.

FID (Heusel et al. 2017) is this distance in the features of one Inception network; in a teacher's
features it is called by the teacher's name (FD-DINOv2, Stein et al. 2023; FD-demo with the embedded
one), never FID.
"""

import torch

from semtok.statistics import StreamingMoments


def frechet_distance(a: StreamingMoments, b: StreamingMoments) -> float:
    """|μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½) of the Gaussians with these moments.

    The covariances are the unbiased ones, as in the published FID code.

    Args:
        a, b: with covariances, of features (N, D).

    Raises:
        ValueError: fewer than two observations, or features of different widths.
    """
    if min(a.count, b.count) < 2:
        raise ValueError("a Fréchet distance needs at least two images on each side")
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of width {len(a.mean)} and of width {len(b.mean)}")
    first, second = (m.matrix * (m.count / (m.count - 1)) for m in (a, b))
    # tr (Σa Σb)^½ is the sum of the roots of the eigenvalues of the symmetric Σa^½ Σb Σa^½.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ second @ root).clamp_min(0).sqrt().sum()
    gap = (a.mean - b.mean).square().sum()
    return float(gap + first.trace() + second.trace() - 2 * product)
