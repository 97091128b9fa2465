"""The part of a flow's regression target that no network can predict, on a set of latents.

Velocity irreducible variance is proposed as a predictor in arXiv 2606.03578.
"""

from torch import Tensor

NUM_TIMES = 32


def velocity_irreducible_variance(
    latents: Tensor, noise: Tensor, num_times: int = NUM_TIMES
) -> float:
    """E over t ~ U(0, 1) of E[Var(x₁ - x₀ | x_t)], per number of the latents.

    x_t = t x₁ + (1 - t) x₀ with x₀ ~ N(0, I) and x₁ one of these latents, each as likely as the others. Given x_t,
    x₁ - x₀ is (x₁ - x_t) / (1 - t), and x₁ has a softmax over the set for its law: the variance is exact for the set,
    not for the images behind it. The expectations are a mean over middles of equal spans of t, and over one x_t of
    each latent, of one noise at every t.

    A set is told apart the sooner the larger latents are, and the later the more there are: compare numbers of as many
    images, and of latents with as many numbers. Standard normal latents of one number, and many, have about π / 2.

    Args:
        latents: (N, ...), flattened, standardised.
        noise: standard normal numbers of that shape.
    """
    z, x0 = (x.flatten(1).double().cpu() for x in (latents, noise))
    gram, cross = z @ z.T, x0 @ z.T
    square = gram.diagonal()
    total = 0.0
    for i in range(num_times):
        t = (i + 0.5) / num_times
        # -|x_t - t z_j|² / 2 but for what is the same for every j
        near = t * (t * gram + (1 - t) * cross) - t**2 * square / 2
        share = (near / (1 - t) ** 2).softmax(dim=1)
        variance = share @ square - ((share @ gram) * share).sum(dim=1)
        total += float(variance.clamp(min=0).mean()) / (1 - t) ** 2
    return total / num_times / z.shape[1]
