"""What latents promise before a diffusion model is trained on them.

Each predictor was found, in the paper that it names, to go with how well a diffusion model generates
in a tokenizer's latents; none replaces generating. ``PREDICTORS`` says what each means.

Latents are standardised, and draws from the posterior, since draws are what a generator learns. An
image's noise belongs to its place in the set, so that the size of batches changes nothing.
"""

from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from scipy.fft import dctn
from threadpoolctl import threadpool_limits
from torch import Tensor

from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.equivariance import equivariance_errors
from semtok.evaluation.protocol import PixelDigest
from semtok.evaluation.velocity import velocity_irreducible_variance
from semtok.images import to_pixels
from semtok.progress import progress
from semtok.sampler.draws import SampleNoise
from semtok.sampler.latents import Latents, on_texture_grid
from semtok.settings import Config, parse, read_yaml
from semtok.teachers import Teacher, TeacherFeatures
from semtok.tokenizer import Tokenizer

NUM_NEIGHBOURS = 10
SIGMA = 0.2
MOST_COMPARED = 4000
MOST_MAPPED = 1000
NUM_MAPS = 3
_PASS = "comparing latents with the teacher's features"


class Predictor(Config):
    """What a number about latents tells."""

    label: str
    """Its name in tables."""
    better: Literal["higher", "lower"]
    """Which latents should be easier to generate."""
    meaning: str
    """What it measures and what that predicts, in a sentence."""
    source: str
    """Of the measure, and of the finding."""


PROBE = "probe_f1"
"""Of the predictors, the one that needs attributes and is ``evaluation.probe``'s."""
_TEXTS = Path(str(files("semtok") / "assets" / "predictors.yaml"))
PREDICTORS = {
    name: parse(Predictor, texts, f"{_TEXTS}: {name}") for name, texts in read_yaml(_TEXTS).items()
}


# Agreement with a teacher ------------------------------------------------------------------------


def cknna(a: Tensor, b: Tensor, k: int = NUM_NEIGHBOURS) -> float:
    """Centred kernel nearest-neighbour alignment of two sets of features of the same images.

    Alignment of the kernels of cosines, on pairs that are among the k nearest in both sets:
    HSIC(a, b) / √(HSIC(a, a) HSIC(b, b)). As published in the code of Huh et al. 2024 (arXiv
    2405.07987, ``platonic-rep``), with the unbiased estimator of Song et al. 2012, equation 5.

    Args:
        a, b: (N, ...), flattened. The number depends on N and k: compare those of the same.
        k: neighbours, without the image itself.

    Returns:
        1 for equal neighbourhoods and cosines, about 0 for independent features.

    Raises:
        ValueError: too few images, or features without any neighbourhoods.
    """
    least = max(k, 3) + 1
    if len(a) != len(b):
        raise ValueError(f"features of {len(a)} and of {len(b)} images")
    if len(a) < least:
        raise ValueError(f"CKNNA with {k} neighbours needs at least {least} images, got {len(a)}")
    first, second = _cosines(a), _cosines(b)
    near_first, near_second = _nearest(first, k), _nearest(second, k)
    both = near_first & near_second
    own = _hsic(first * near_first, first * near_first)
    other = _hsic(second * near_second, second * near_second)
    if not (own > 0 and other > 0):
        raise ValueError("CKNNA: features that do not vary, or too few images")
    return float(_hsic(first * both, second * both) / (own * other).sqrt())


def self_similarity(maps: Tensor, tokens: Tensor) -> Tensor:
    """How far positions of an image are alike in both maps: (B,), each in [-1, 1].

    The correlation, over all pairs of positions, of the cosines between the maps' vectors; VA-VAE
    (arXiv 2501.01423) trains by the difference of these cosines. Each image's mean over positions is
    taken off first, as iREPA (arXiv 2512.10794) does: what a teacher's tokens all share would else
    make all their cosines nearly 1. Images without any structure count 0.

    Args:
        maps: (B, C, h, w), resampled to the tokens' grid, so that all tokenizers are compared there.
        tokens: the teacher's (B, D, rows, columns).

    Raises:
        ValueError: fewer than three tokens.
    """
    size = tokens.shape[-2:]
    if size.numel() < 3:
        raise ValueError(
            f"a teacher's grid of {size[0]}x{size[1]} has no spatial structure; images must be larger"
        )
    maps = maps.float()
    if maps.shape[-2:] != size:
        maps = F.interpolate(maps, size=size, mode="bilinear", antialias=True)
    first, second = (_pairs_of_positions(x) for x in (maps, tokens.float()))
    return F.cosine_similarity(first, second, dim=1)


def _cosines(features: Tensor) -> Tensor:
    unit = F.normalize(features.flatten(1).double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(0)  # HSIC's unbiased estimator has no diagonal


def _nearest(cosines: Tensor, k: int) -> Tensor:
    """Whether column j is among the k nearest of row i: bool (N, N)."""
    others = cosines.clone().fill_diagonal_(-torch.inf)
    return torch.zeros_like(cosines, dtype=torch.bool).scatter_(1, others.topk(k).indices, True)


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    """The unbiased estimator for kernels (N, N) whose diagonals are 0."""
    n = len(a)
    through = a.sum(dim=0) @ b.sum(dim=1)  # the sum of the product a b
    value = (a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * through / (n - 2)
    return value / (n * (n - 3))


def _pairs_of_positions(maps: Tensor) -> Tensor:
    """Centred cosines of all pairs: (B, C, h, w) to (B, pairs)."""
    tokens = rearrange(maps, "b c h w -> b (h w) c")
    unit = F.normalize(tokens - tokens.mean(dim=1, keepdim=True), dim=2)
    rows, columns = torch.triu_indices(*2 * (tokens.shape[1],), offset=1, device=maps.device)
    cosines = (unit @ unit.mT)[:, rows, columns]
    return cosines - cosines.mean(dim=1, keepdim=True)


# Diffusability -----------------------------------------------------------------------------------


def high_frequency_share(maps: Tensor) -> Tensor:
    """Share, (B,) in [0, 1], of energy from half the Nyquist frequency on, along either axis.

    That is what half the resolution can't hold. After Skorokhodov et al. 2025 (arXiv 2502.14831) in
    the discrete cosine transform, to which an image's borders are no edges. Each channel's mean over
    positions is taken off; images without anything else count 0.

    Args:
        maps: (B, C, h, w).
    """
    spectrum = torch.from_numpy(dctn(maps.double().cpu().numpy(), axes=(-2, -1), norm="ortho"))
    energy = spectrum.square().sum(dim=1)
    energy[:, 0, 0] = 0
    rows, columns = (torch.arange(n) / n for n in energy.shape[-2:])  # 1 is Nyquist
    high = torch.maximum(rows[:, None], columns) >= 0.5
    total = energy.sum(dim=(1, 2))
    return (energy * high).sum(dim=(1, 2)) / total.where(total > 0, 1)


def noise_sensitivity(
    decode: Callable[[Latents], Tensor],
    latents: Latents,
    noise: Mapping[str, Tensor],
    sigma: float = SIGMA,
) -> Tensor:
    """Root mean square change of the decoded images by noise on the latents, per unit of noise: (B,).

    RAE (arXiv 2510.11690) trains its decoder on noised latents to lower it. Parts that decoding does
    not use change nothing.

    Args:
        decode: latents to pixels (B, 3, H, W) in [-1, 1].
        noise: standard normal numbers for each part.
        sigma: the noise's standard deviation; that of the latents is 1.
    """
    noised = Latents({name: part + sigma * noise[name] for name, part in latents.items()})
    change = decode(noised).double() - decode(latents).double()
    return change.square().mean(dim=(1, 2, 3)).sqrt() / sigma


# Density -----------------------------------------------------------------------------------------


def gini(values: np.ndarray) -> float:
    """Inequality of positive values (N,): 0 where all are equal, 1 - 1/N where one has everything."""
    n, ordered = len(values), np.sort(values.astype(np.float64))
    return float(2 * (np.arange(1, n + 1) * ordered).sum() / (n * ordered.sum()) - (n + 1) / n)


def coefficient_of_variation(values: np.ndarray) -> float:
    """Population standard deviation over the mean, of positive values (N,)."""
    values = values.astype(np.float64)
    return float(values.std() / values.mean())


def density_uniformity(features: Tensor, seed: int = 0) -> tuple[float, float]:
    """Gini coefficient and coefficient of variation of the images' density in the latents.

    After VA-VAE (arXiv 2501.01423): a kernel density estimate on a t-SNE map. Ours are the details:
    scikit-learn's settings with perplexity 30 (less for fewer than 91 images), Scott's bandwidth,
    densities at the images themselves. Rounding errors of its input suffice to turn a map into
    another one, so both numbers are means over ``NUM_MAPS`` maps.

    Args:
        features: (N, ...), flattened.
        seed: of the first map; each further one has the next.

    Raises:
        ValueError: fewer than four images, or all alike.
    """
    from scipy.stats import gaussian_kde  # late: seconds to import, and tables read this module too
    from sklearn.manifold import TSNE

    rows = features.flatten(1).float().cpu().numpy()
    if len(rows) < 4 or not rows.std(axis=0).any():
        raise ValueError("a density needs at least four images, and latents that vary")
    scores = []
    with progress("mapping latents", NUM_MAPS, "maps") as advance:
        for i in range(NUM_MAPS):
            tsne = TSNE(perplexity=min(30.0, (len(rows) - 1) / 3), random_state=seed + i)
            with threadpool_limits(1):  # sums over several threads differ from run to run
                points = tsne.fit_transform(rows).T.astype(np.float64)
            density = gaussian_kde(points)(points)
            scores.append((gini(density), coefficient_of_variation(density)))
            advance(1)
    first, second = np.mean(scores, axis=0)
    return float(first), float(second)


# All of it ---------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate_latents(
    tokenizer: Tokenizer,
    source: ImageSource,
    num_images: int,
    teacher: Teacher,
    *,
    seed: int = 0,
    batch_size: int = 32,
    digest: PixelDigest | None = None,
) -> dict[str, float]:
    """Every predictor of ``PREDICTORS`` but the probe on ``source.chosen(num_images)``, in one pass.

    Images are never held beyond a batch; latents of at most ``MOST_COMPARED`` images are. CKNNA is of these,
    density and velocity variance of the first ``MOST_MAPPED``; these see all parts of the latents, flattened together.
    Self-similarity and spectrum see the spatial parts as a generator does: on the texture's grid, channels together.
    Noise is added to every part. Errors under scaling and turning are of the posterior's means; one that images of this
    size do not have is left out. All others are means over images.

    Args:
        teacher: whose last layer is compared. Where it also trained the tokenizer, agreement
            tells that this succeeded, which another teacher may see otherwise.
        seed: of the draws, the noise and the maps.
        digest: takes in the images.

    Raises:
        ValueError: fewer than ``NUM_NEIGHBOURS + 1`` images, a teacher's grid without structure, or
            latents that do not vary.
        UserError: features or latents that are not finite.
    """
    device = tokenizer.texture_mean.device
    flat: list[Tensor] = []
    pooled: list[Tensor] = []
    start: list[Tensor] = []  # of flows
    by_image: dict[str, list[Tensor]] = {}
    count = 0
    batches = chosen_images(source, num_images, batch_size=batch_size, what=_PASS)
    images = (batch.images for batch in batches)
    for batch in digest.watch(images) if digest is not None else images:
        pixels = to_pixels(batch, device=device)
        features = teacher.features(pixels)
        noise = SampleNoise(seed, range(count, count + len(pixels)), device)
        posterior = tokenizer.posterior(pixels)
        shapes = {name: tuple(part.shape[1:]) for name, part in posterior.mean.items()}
        latents = posterior.sample_with({name: noise(shape) for name, shape in shapes.items()})
        _check_finite(latents, features, teacher)
        added = {name: noise(shape) for name, shape in shapes.items()}
        values = _of_each(tokenizer, latents, features, added)
        values |= equivariance_errors(tokenizer, pixels, posterior.mean)
        for name, value in values.items():
            by_image.setdefault(name, []).append(value.double().cpu())
        if count < MOST_COMPARED:
            flat.append(torch.cat([part.flatten(1) for part in latents.values()], dim=1).cpu())
            pooled.append(features.pooled.cpu())
        if count < MOST_MAPPED:
            start.append(noise((flat[-1].shape[1],)).cpu())
        count += len(pixels)

    if not count:
        raise ValueError("no images to evaluate latents on")
    compared = torch.cat(flat)[:MOST_COMPARED]
    scores = {"cknna": cknna(compared, torch.cat(pooled)[:MOST_COMPARED])}
    scores |= {name: float(torch.cat(values).mean()) for name, values in by_image.items()}
    return scores | _of_few(compared[:MOST_MAPPED], torch.cat(start)[:MOST_MAPPED], seed)


def _of_each(
    tokenizer: Tokenizer, latents: Latents, features: TeacherFeatures, noise: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of draws from the posterior, one value per image (B,)."""
    maps = torch.cat([x for x in on_texture_grid(latents).values() if x.ndim == 4], dim=1)
    return {
        "self_similarity": self_similarity(maps, features.patches[-1]),
        "high_frequency_share": high_frequency_share(maps),
        "noise_sensitivity": noise_sensitivity(tokenizer.decode, latents, noise),
    }


def _of_few(latents: Tensor, noise: Tensor, seed: int) -> dict[str, float]:
    """Of latents (N, D) together; noise of that shape."""
    unevenness, variation = density_uniformity(latents, seed)
    return {
        "density_gini": unevenness,
        "density_cv": variation,
        "velocity_variance": velocity_irreducible_variance(latents, noise),
    }


def _check_finite(latents: Latents, features: TeacherFeatures, teacher: Teacher) -> None:
    if not all(bool(torch.isfinite(x).all()) for x in (features.patches[-1], features.pooled)):
        raise UserError(
            f"teacher '{teacher.config.name}': its features of these images are not finite; "
            "choose another teacher, or other weights of it"
        )
    for name, part in latents.items():
        if not bool(torch.isfinite(part).all()):
            raise UserError(f"part '{name}': latents that are not finite; train the tokenizer anew")
