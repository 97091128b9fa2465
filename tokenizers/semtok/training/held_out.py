"""Metrics and pictures of held-out images, on the way and at the end of a training."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from semtok.data.passes import read_images
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.objective import Batch, Objective
from semtok.processes import gather, together


@dataclass(frozen=True)
class HeldOut:
    """Held-out images, and what an objective makes of them.

    Attributes:
        batch_size: images at once.
        prepared: of what the source loaded, the batch on the device and the objective's inputs.
    """

    objective: Objective
    source: ImageSource
    batch_size: int
    prepared: Callable[[ImageBatch], tuple[Batch, dict[str, Any]]]

    def picture(self, averaged: nn.Module, num_images: int) -> Tensor | None:
        """What the objective shows of some images, uint8 (3, H, W); None: it shows nothing."""
        images = self.source.load(self.source.chosen(num_images))
        with self.evaluating():
            batch, inputs = self.prepared(images)
            return self.objective.picture(averaged, batch.pixels, inputs)

    def metrics(self, averaged: nn.Module, num_images: int) -> dict[str, float]:
        """Means over images, which processes share."""
        sums: dict[str, Tensor] = {}
        count = 0
        keys = [Key(i) for i in self.source.chosen(num_images)]
        with together(), self.evaluating():
            for places, images in read_images(
                self.source, keys, batch_size=self.batch_size, what="validating"
            ):
                batch, inputs = self.prepared(images)
                values = self.objective.validate(averaged, batch.pixels, inputs, indices=places)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0) + value.double().sum()
                count += len(batch)
        parts = gather((count, {name: float(value) for name, value in sums.items()}))
        total = sum(num for num, _ in parts)
        names = dict.fromkeys(name for _, part in parts for name in part)
        return {n: sum(part.get(n, 0.0) for _, part in parts) / total for n in names}

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context no module of the objective trains."""
        modes = [(module, module.training) for module in self.objective.modules()]
        self.objective.eval()
        try:
            with torch.no_grad():  # without autocast: in float32, as what is exported is used
                yield
        finally:
            for module, mode in modes:
                module.training = mode
