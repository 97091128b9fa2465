"""Do generated images show the class that was asked for? A classifier that knows real images tells."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.evaluation.generation import FeatureNetwork
from semtok.evaluation.probe import logistic_regression
from semtok.progress import waiting

MEASURES = (
    "multinomial logistic regression (scikit-learn, L-BFGS, at most 1000 iterations) on a frozen network's pooled "
    "features, standardised, fitted on real training images"
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


@waiting("fitting the reader of classes")
def class_reader(features: np.ndarray, labels: np.ndarray) -> ClassReader:
    """Learns the labels (N,) of real images from their features (N, D).

    Raises:
        ValueError: they are all of one class.
    """
    if len(set(labels.tolist())) < 2:
        raise ValueError("images of one class only; nothing to tell apart")
    mean, std = features.mean(axis=0), features.std(axis=0) + 1e-6
    model = logistic_regression((features - mean) / std, labels, most_steps=1000)
    return lambda seen: model.predict((seen - mean) / std)


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
