"""Linear probing: what can be read off the latents by a linear layer.

After Send-VAE (arXiv 2601.05823, section 4.4): a linear classifier on the flattened latents of the
frozen tokenizer, one for each attribute, and the F1 score. The paper leaves open what follows, so these
choices are ours; ``MEASURES`` states them and is stored with every score.

- The latents are the posterior's mean, not a sample, and standardised as the tokenizer does it.
- The optimiser is L-BFGS on a logistic loss; the L2 strength is chosen on training images.
- The decision is the likeliest category: a threshold of one half where there are two.
- F1 is that of the second category where there are two ('1' of 0/1 or -1/1), and otherwise the mean over
  the categories that occur among the true or the predicted ones; 0 where neither has the second.
- Every attribute counts alike in the mean.
- Balanced accuracy is the mean over the categories that the held-out images show, and so is its chance.
- Where attributes belong to classes (Animals with Attributes), both parts hold images of all classes.
"""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.evaluation.protocol import PixelDigest
from semtok.images import to_pixels
from semtok.progress import progress
from semtok.tokenizer import Tokenizer

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

_STRENGTHS = (0.001, 0.01, 0.1)
CLASS = "(class)"
"""The images' class among their attributes."""
_NUM_RESAMPLES = 1000
_SEED = 0
MEASURES = (
    "multinomial logistic regression (scikit-learn, L-BFGS, at most 300 iterations) on the flattened standardised "
    f"latents (posterior mean); inverse L2 strength chosen by balanced accuracy from {_STRENGTHS} on a quarter of the "
    "training images; F1 of the second of two categories, otherwise macro F1, and balanced accuracy on held-out "
    f"images; 95 % percentile intervals from {_NUM_RESAMPLES} bootstrap resamples of the held-out images; images of a "
    "folder in a random order of fixed seed"
)


@dataclass(frozen=True)
class LatentTable:
    """Latents of many images, and what is known of the images.

    Attributes:
        features: float32 (N, F), all parts flattened.
        attributes: per name int64 (N,).
        num_categories: per name, how many there are in all; not each need occur.
        digest: of the images, see ``PixelDigest``.
    """

    features: np.ndarray
    attributes: dict[str, np.ndarray]
    num_categories: dict[str, int]
    digest: str = ""

    def num_shown(self, attribute: str) -> int:
        """How many of an attribute's categories these images show."""
        return len(np.unique(self.attributes[attribute]))


@dataclass(frozen=True)
class AttributeScore:
    """How well an attribute is read, or the mean of several; all in [0, 1].

    Attributes:
        f1: on the held-out images.
        f1_interval: its 95 % bootstrap interval.
        balanced_accuracy: on the held-out images.
        resampled_f1: float64 (1000,), on each resample; the same images in all attributes.
    """

    f1: float
    f1_interval: tuple[float, float]
    balanced_accuracy: float
    resampled_f1: np.ndarray = field(repr=False, compare=False)


@torch.no_grad()
def latent_table(
    tokenizer: Tokenizer,
    source: ImageSource,
    num_images: int,
    batch_size: int = 64,
    *,
    classes: bool = False,
) -> LatentTable:
    """Encodes ``num_images`` images of a source, or all there are.

    Args:
        classes: the class is an attribute too, by the name ``CLASS``.

    Raises:
        ValueError: the source knows no attributes of its images.
    """
    known = dict(source.attributes) | ({CLASS: source.class_names} if classes else {})
    if not known:
        raise ValueError(f"{source.name} has no attributes to probe for")
    features, attributes = [], {name: [] for name in known}
    digest = PixelDigest()
    what = f"encoding {source.name}"
    for batch in chosen_images(source, num_images, batch_size=batch_size, what=what):
        digest.add(batch.images)
        latents = tokenizer.encode(to_pixels(batch.images), value_range=(-1, 1))
        features.append(
            torch.cat([part.flatten(1) for part in latents.values()], dim=1).cpu().numpy()
        )
        shown = dict(batch.attributes) | ({CLASS: batch.labels} if classes else {})
        for name, values in shown.items():
            attributes[name].append(values.numpy())
    return LatentTable(
        np.concatenate(features),
        {name: np.concatenate(v) for name, v in attributes.items()},
        {name: len(categories) for name, categories in known.items()},
        str(digest),
    )


def probe(
    train: LatentTable, held_out: LatentTable, only: Iterable[str] | None = None
) -> dict[str, AttributeScore]:
    """Held-out scores of each attribute, by ``MEASURES``.

    Args:
        only: names of attributes; None: all.

    Returns:
        Scores by name, without the attributes of which either part shows one category alone: where all held-out
        images are of one, a constant answer is always right.
    """
    names = train.attributes if only is None else only
    names = [n for n in names if train.num_shown(n) > 1 and held_out.num_shown(n) > 1]
    predicted = {}
    with progress("fitting the probe", len(names), "attributes") as advance:
        for name in names:
            predicted[name] = _predict(train, held_out.features, name)
            advance(1)
    if not predicted:
        return {}
    true = {name: held_out.attributes[name] for name in predicted}
    f1, resampled = _f1_scores(true, predicted, train.num_categories)
    return {
        name: AttributeScore(
            f1[name],
            _interval(resampled[name]),
            _balanced_accuracy(true[name], predicted[name]),
            resampled[name],
        )
        for name in predicted
    }


def free_texts(train: ImageSource, held_out: ImageSource) -> list[str]:
    """Attributes with nearly as many categories as images, such as names and captions, which say what no other image
    shows: more than half as many."""
    num_images = len(train) + len(held_out)
    return [name for name, known in train.attributes.items() if 2 * len(known) > num_images]


def mean_score(scores: Mapping[str, AttributeScore]) -> AttributeScore:
    """The mean over attributes; its interval is that of the mean on each resample.

    Args:
        scores: from one call of ``probe``; at least one.
    """
    resampled = np.mean([score.resampled_f1 for score in scores.values()], axis=0)
    return AttributeScore(
        float(np.mean([score.f1 for score in scores.values()])),
        _interval(resampled),
        float(np.mean([score.balanced_accuracy for score in scores.values()])),
        resampled,
    )


def probed(
    tokenizer: Tokenizer,
    train: ImageSource,
    held_out: ImageSource,
    num_train: int,
    num_held_out: int,
) -> AttributeScore | None:
    """The mean over all attributes but free text; None where the images have none that can be probed for."""
    names = [name for name in train.attributes if name not in free_texts(train, held_out)]
    if not names:
        return None
    tables = (
        latent_table(tokenizer, train, num_train),
        latent_table(tokenizer, held_out, num_held_out),
    )
    scores = probe(*tables, only=names)
    return mean_score(scores) if scores else None


def _predict(train: LatentTable, features: np.ndarray, attribute: str) -> np.ndarray:
    x, y = train.features, train.attributes[attribute]
    num_fit = len(x) * 3 // 4

    def score(strength: float) -> float:
        fitted = logistic_regression(x[:num_fit], y[:num_fit], most_steps=300, strength=strength)
        return _balanced_accuracy(y[num_fit:], fitted.predict(x[num_fit:]))

    # Where the fitted part shows one category, nothing tells the strengths apart.
    can_choose = len(np.unique(y[:num_fit])) > 1
    best = max(_STRENGTHS, key=score) if can_choose else _STRENGTHS[0]
    return logistic_regression(x, y, most_steps=300, strength=best).predict(features)


def logistic_regression(
    x: np.ndarray, y: np.ndarray, *, most_steps: int, strength: float = 1.0
) -> "LogisticRegression":
    """A classifier of rows (N, D) by labels (N,), fitted without warnings: stopping at its last iteration is part of
    the protocols, and small folders have many classes of few images.

    Args:
        most_steps: iterations of L-BFGS.
        strength: the inverse of the L2 penalty's.
    """
    # Late: a second to import, and training imports this module for the scores on the way, which are seldom asked for.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="The number of unique classes")
        # Of finite numbers: wide kernels compute on what lies beside them, and the processor notes that.
        warnings.filterwarnings("ignore", message=".*encountered in matmul")
        return LogisticRegression(C=strength, max_iter=most_steps).fit(x, y)


def _balanced_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    from sklearn.metrics import balanced_accuracy_score  # late, as above

    with warnings.catch_warnings():
        # A rare category may be predicted and yet be missing from a small part.
        warnings.simplefilter("ignore", UserWarning)
        return float(balanced_accuracy_score(true, predicted))


# F1, and how it varies with the held-out images --------------------------------------------------


def _f1_scores(
    true: Mapping[str, np.ndarray],
    predicted: Mapping[str, np.ndarray],
    num_categories: Mapping[str, int],
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """F1 of each attribute, and F1 on each resample of the images.

    A resample is a count of each image, so the counts that F1 asks for are one product of matrices.

    Args:
        true: per attribute int64 (N,).
        predicted: likewise.

    Returns:
        Per attribute F1, and float64 (1000,).
    """
    columns = []
    for name in true:
        identity = np.eye(num_categories[name], dtype=np.float32)
        is_true, is_predicted = identity[true[name]], identity[predicted[name]]
        columns += [is_true * is_predicted, is_true, is_predicted]
    indicators = np.concatenate(columns, axis=1)  # (N, 3 * categories of all attributes)
    weights = _resample_counts(len(indicators))
    counts = np.concatenate([indicators.sum(0)[None], *(w @ indicators for w in weights)])
    borders = np.cumsum([column.shape[1] for column in columns])[:-1]
    parts = np.split(counts.astype(np.float64), borders, axis=1)
    f1 = {name: _f1(*parts[3 * i : 3 * i + 3]) for i, name in enumerate(true)}
    return {n: float(v[0]) for n, v in f1.items()}, {n: v[1:] for n, v in f1.items()}


def _resample_counts(num: int) -> Iterable[np.ndarray]:
    """How often each of ``num`` images is drawn: float32 (R, num), in parts that sum to 1000 rows.

    Float32 counts exactly up to 2^24 images.
    """
    rng = np.random.default_rng(_SEED)
    at_once = max(1, 4_000_000 // num)
    for first in range(0, _NUM_RESAMPLES, at_once):
        rows = min(at_once, _NUM_RESAMPLES - first)
        drawn = rng.integers(num, size=(rows, num)) + num * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * num)
        yield counts.reshape(rows, num).astype(np.float32)


def _f1(hits: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """F1 (R,) from counts (R, K) of images rightly, truly and seemingly of each category."""
    seen = true + predicted
    f1 = 2 * hits / np.maximum(seen, 1)
    if f1.shape[1] == 2:
        return f1[:, 1]
    return f1.sum(axis=1) / (seen > 0).sum(axis=1)


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return float(low), float(high)
