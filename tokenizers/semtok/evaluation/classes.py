"""Do generated images show the class that was asked for? A classifier that knows real images tells."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from semtok.data.loading import chosen_batches
from semtok.data.source import ImageSource
from semtok.images import to_pixels
from semtok.teachers import Teacher

PROTOCOL = (
    "multinomial logistic regression (scikit-learn, L-BFGS, at most 1000 iterations) on the teacher's pooled "
    "features, standardised, fitted on real training images"
)


@dataclass(frozen=True)
class ClassReader:
    """A classifier of images, from a frozen teacher's pooled features."""

    teacher: Teacher
    model: LogisticRegression
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, teacher: Teacher, source: ImageSource, num_images: int) -> "ClassReader":
        """Learns the source's labels from ``source.chosen(num_images)``.

        Raises:
            ValueError: they are all of one class.
        """
        pairs = [
            (_features(teacher, batch.images), batch.labels.numpy())
            for batch in chosen_batches(source, 64, num_images)
        ]
        x, y = (np.concatenate(column) for column in zip(*pairs, strict=True))
        if len(set(y.tolist())) < 2:
            raise ValueError(f"{source.name}: images of one class only; nothing to tell apart")
        mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
        with warnings.catch_warnings():
            # Stopping at the last iteration is part of the protocol.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = LogisticRegression(max_iter=1000).fit((x - mean) / std, y)
        return cls(teacher, model, mean, std)

    def read(self, images: Tensor) -> np.ndarray:
        """Labels int64 (B,) of images, uint8 or pixels (B, 3, H, W)."""
        return self.model.predict((_features(self.teacher, images) - self.mean) / self.std)


def accuracy(
    reader: ClassReader, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[float, dict[int, float]]:
    """Share of images that are read as their label, in all and for each label.

    Args:
        batches: (images, labels).
    """
    read, labels = [], []
    for images, wanted in batches:
        read.append(reader.read(images))
        labels.append(wanted.numpy())
    right, label = np.concatenate(read) == np.concatenate(labels), np.concatenate(labels)
    by_label = {int(n): float(right[label == n].mean()) for n in np.unique(label)}
    return float(right.mean()), by_label


def real_batches(source: ImageSource, num_images: int) -> Iterator[tuple[Tensor, Tensor]]:
    """``source.chosen(num_images)`` with their labels."""
    for batch in chosen_batches(source, 64, num_images):
        yield batch.images, batch.labels


@torch.no_grad()
def _features(teacher: Teacher, images: Tensor) -> np.ndarray:
    device = teacher.mean.device
    return teacher.features(to_pixels(images, device=device)).pooled.float().cpu().numpy()
