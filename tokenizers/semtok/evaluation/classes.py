"""Do generated images show the class that was asked for? A classifier that knows real images tells."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.evaluation.generation import FeatureNetwork
from semtok.evaluation.probe import logistic_regression
from semtok.lock import made_once
from semtok.progress import waiting
from semtok.storage import new_file, read_tensors, write_tensors

_MOST_STEPS = 1000
_FITTED = ("classes_", "coef_", "intercept_")
"""What scikit-learn's classifier reads by."""
MEASURES = (
    f"multinomial logistic regression (scikit-learn, L-BFGS, at most {_MOST_STEPS} iterations) on a frozen network's "
    "pooled features, standardised, fitted on real training images"
)
CLASS_SHARE = "shown class"
"""Share of generated images that a judge reads as their class."""

ClassReader = Callable[[np.ndarray], np.ndarray]
"""A classifier of a frozen network's pooled features: (B, D) to labels int64 (B,)."""


@dataclass(frozen=True)
class Judge:
    """Who tells whether images show their class.

    Attributes:
        network: sees the images.
        read: their classes, in what it sees; None: there are none, and it serves for distances alone.
        measures: how it came to know them, in words.
        num_fitted: real images that it learned them from.
    """

    network: FeatureNetwork
    read: ClassReader | None
    measures: str
    num_fitted: int = 0


def class_reader(
    features: np.ndarray, labels: np.ndarray, *, cache: Path | None = None
) -> ClassReader:
    """Learns the labels (N,) of real images from their features (N, D).

    Args:
        cache: a folder, where it is kept; a file in it is of one set of features and labels. None: it is not kept.

    Raises:
        ValueError: they are all of one class.
    """
    if len(set(labels.tolist())) < 2:
        raise ValueError("images of one class only; nothing to tell apart")
    if cache is None:
        return _reader(_fitted(features, labels))
    file = cache / f"{_key(features, labels)}.safetensors"

    def make() -> dict[str, Tensor]:
        fitted = _fitted(features, labels)
        with new_file(file) as temporary:
            write_tensors(temporary, fitted)
        return fitted

    what = "a command that fits this reader of classes"
    return _reader(made_once(file, what, read=_kept, make=make))


@waiting("fitting the reader of classes")
def _fitted(features: np.ndarray, labels: np.ndarray) -> dict[str, Tensor]:
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    model = logistic_regression((features - mean) / std, labels, most_steps=_MOST_STEPS)
    arrays = {"mean": mean, "std": std} | {name: getattr(model, name) for name in _FITTED}
    # As files hold them, since rounding depends on the order in memory.
    return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}


def _reader(fitted: Mapping[str, Tensor]) -> ClassReader:
    from sklearn.linear_model import LogisticRegression  # late, see logistic_regression

    model = LogisticRegression()
    for name in _FITTED:
        setattr(model, name, fitted[name].numpy())
    mean, std = fitted["mean"].numpy(), fitted["std"].numpy()
    return lambda seen: model.predict((seen - mean) / std)


def _key(features: np.ndarray, labels: np.ndarray) -> str:
    """Of all that a reader depends on."""
    key = hashlib.blake2b(digest_size=12)
    versions = [version(name) for name in ("scikit-learn", "scipy", "numpy")]
    for array in (features, labels):
        versions.append(f"{array.dtype} {array.shape}")
        key.update(np.ascontiguousarray(array))
    key.update("\n".join([MEASURES, *versions]).encode())
    return key.hexdigest()


def _kept(file: Path) -> dict[str, Tensor] | None:
    """What a cache's file holds; None: nothing of use."""
    fitted = read_tensors(file)
    return fitted if fitted.keys() == {"mean", "std", *_FITTED} else None


def accuracy(read: np.ndarray, labels: np.ndarray) -> tuple[float, dict[int, float]]:
    """Share of images that are read as their label, in all and for each label."""
    right = read == labels
    return float(right.mean()), {
        int(n): float(right[labels == n].mean()) for n in np.unique(labels)
    }


@torch.no_grad()
def features_and_labels(
    network: FeatureNetwork, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[np.ndarray, np.ndarray]:
    """What a network sees in images, uint8 or pixels, and their labels: (N, D) and (N,)."""
    pairs = [
        (network.see(images)["pooled"].cpu().numpy(), labels.numpy()) for images, labels in batches
    ]
    features, labels = zip(*pairs, strict=True)
    return np.concatenate(features), np.concatenate(labels)


def real_batches(source: ImageSource, num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``source.chosen(num_images)`` with their labels."""
    what = f"features ({source.name})"
    for batch in chosen_images(source, num_images, batch_size=64, what=what):
        yield batch.images, batch.labels
