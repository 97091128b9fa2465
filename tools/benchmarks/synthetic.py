"""Latents without images: what a diffusion transformer's step costs depends on shapes alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.random_inputs import POOL, RandomSource
from semtok.data.source import ImageBatch
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.teachers import StoredFeatures, TeacherFeatures
from semtok.tokenizer import Tokenizer

_GRID = 16  # tokens along a side of DINOv2 at 224x224


@dataclass(frozen=True)
class Published:
    """Latents of 256x256 images as a paper has them, and what its transformer is trained by.

    Attributes:
        diffusion: settings beside the network.
        target_width: D of REPA's targets; None: there is no REPA.
    """

    spec: LatentSpec
    diffusion: Mapping[str, Any]
    target_width: int | None


_F8D4, _F16D32 = PartSpec("texture", 4, 8), PartSpec("texture", 32, 16)
_SEMANTIC, _CLS = PartSpec("semantic", 16, 16), PartSpec("global", 768, None)
PUBLISHED = {
    "sit": Published(LatentSpec((_F8D4,)), {"repa": False}, None),
    "repa": Published(LatentSpec((_F8D4,)), {"repa": {"weight": 0.5}}, 768),
    "reg": Published(
        LatentSpec((_F8D4, _CLS)),
        {"repa": {"weight": 0.5, "with_global": True}, "loss_weights": {"global": 0.03}},
        768,
    ),
    "redi": Published(LatentSpec((_F8D4, PartSpec("semantic", 8, 16))), {"repa": False}, None),
    "reglue": Published(
        LatentSpec((_F8D4, _SEMANTIC, _CLS)),
        {"repa": {"weight": 0.5, "with_global": True}, "loss_weights": {"global": 0.03}},
        768,
    ),
    "sr-dit": Published(
        LatentSpec((_F16D32, _CLS)),
        {"repa": {"weight": 0.5, "with_global": True}, "loss_weights": {"global": 0.03}},
        768,
    ),
    "rae": Published(LatentSpec((PartSpec("texture", 768, 16),)), {"repa": False}, None),
    "lightningdit": Published(LatentSpec((_F16D32,)), {"repa": False, "cosine_weight": 1.0}, None),
    "sfd": Published(
        LatentSpec((_F16D32, _SEMANTIC)),
        {"repa": {"weight": 1.0, "depth": 2}, "leads": {"semantic": 0.3}, "cosine_weight": 1.0},
        768,
    ),
}


def transformer_inputs(
    spec: LatentSpec, batch_size: int, device: torch.device | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Noise, times and labels of 256x256 images, as a transformer of these latents takes them."""
    grid = spec.shape("texture", (256, 256))[1:]
    x = {
        part.name: torch.randn(
            batch_size, part.channels, *(grid if part.is_spatial else ()), device=device
        )
        for part in spec.parts
    }
    time = torch.full((batch_size,), 0.5, device=device)
    return x, dict.fromkeys(x, time), torch.zeros(batch_size, dtype=torch.int64, device=device)


class SpecTokenizer(Tokenizer):
    """A tokenizer that says what its latents look like, and has none."""

    def __init__(self, spec: LatentSpec) -> None:
        super().__init__(spec, method="synthetic")
        self.num_measured_images.fill_(1)

    def posterior_raw(self, pixels: Tensor, features: TeacherFeatures | None = None) -> Posterior:
        raise NotImplementedError("batches come with latents")

    def decode_raw(self, raw: Latents) -> Tensor:
        raise NotImplementedError("there is no decoder")

    def save_networks(self, folder: Path) -> dict[str, Any]:
        raise NotImplementedError("there is nothing to save")

    @classmethod
    def load_networks(cls, folder: Path, config: Mapping[str, Any]) -> "SpecTokenizer":
        raise NotImplementedError("there is nothing to load")


class SyntheticLatents(RandomSource):
    """Random posteriors, labels and targets, in the types that a cache has them in."""

    name = "synthetic latents"

    def __init__(self, published: Published) -> None:
        super().__init__((256, 256))
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(POOL, *shape, generator=generator).half()

        shapes = {
            p.name: published.spec.shape(p.name, self.image_size) for p in published.spec.parts
        }
        self._mean = {name: draw(*shape) for name, shape in shapes.items()}
        self._std = {
            name: torch.full_like(part, 0.1 if name == "texture" else 0.0)
            for name, part in self._mean.items()
        }
        width = published.target_width
        self._features = None
        if width is not None:
            self._features = StoredFeatures((draw(width, _GRID, _GRID),), draw(width))

    def load(self, indices: Sequence[int]) -> ImageBatch:
        rows = torch.tensor(indices) % POOL

        def take(part: Tensor) -> Tensor:
            return part[rows]

        features = self._features.map(take) if self._features is not None else None
        latents = Posterior(Latents(self._mean).map(take), Latents(self._std).map(take))
        return ImageBatch(None, self.labels(indices), features=features, latents=latents)
