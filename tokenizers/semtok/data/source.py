"""What every image source offers, whatever it reads from."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor

from semtok.data.left_out import LeftOut
from semtok.sampler.latents import Posterior
from semtok.settings import Config
from semtok.teachers import StoredFeatures

Crop = Literal["center", "random"]
"""Which part of an image training sees where its shape is another than asked for."""


class Key(NamedTuple):
    """What is read of a source: an image, and how it is to be seen.

    Attributes:
        index: in ``range(len(source))``.
        mirrored: left to right.
        crop: (vertical, horizontal) place of a random crop, each in [0, 1): from the top or left to the bottom or
            right; None: the crop at the centre.
    """

    index: int
    mirrored: bool = False
    crop: tuple[float, float] | None = None


class Skipped(NamedTuple):
    """An image that could not be read.

    Attributes:
        position: in the batch, where another image stands for it.
        name: where it lies.
        reason: why, in a few words; empty where a cache tells of it, which does not keep that.
    """

    position: int
    name: str
    reason: str = ""


class DataConfig(Config):
    """Settings that every kind of image source shares."""

    kind: str
    """How the images are stored: ``shapes`` (embedded drawn scenes), ``folder``, ``tars``, ``parquet`` or
    ``mds``."""
    size: int | tuple[int, int]
    """Height and width in pixels; one number means square."""
    licence: str | None = None
    """Of the images, for the model card, such as ``CC-BY-SA-4.0``; None: the card says that it is unknown."""
    num_workers: int = Field(0, ge=0)
    """Loader processes per training process, in training and in every pass over the images (statistics,
    validation, caches, scores); 0 loads in the training process."""
    cache: str = "auto"
    """Of a diffusion transformer's latents: a folder, where they are kept once they were computed;
    ``auto`` makes one under ``runs/`` where every image will be seen often; ``none`` computes them in
    each step. Tokenizers are trained on images, and pass this by."""

    @field_validator("size")
    @classmethod
    def _positive(cls, size: int | tuple[int, int]) -> int | tuple[int, int]:
        if min((size,) if isinstance(size, int) else size) < 1:
            raise ValueError(f"expected pixels, at least 1, got {size}")
        return size

    @property
    def draws_crops(self) -> bool:
        """Whether training sees another crop of an image in each epoch, which no cache can hold."""
        return False

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


@dataclass(frozen=True)
class ImageBatch:
    """Images with what is known about them.

    Attributes:
        images: uint8 (B, 3, H, W); None where cached features or latents stand for them.
        labels: int64 (B,), in ``range(source.num_classes)``.
        attributes: per attribute name int64 (B,), an index into ``source.attributes[name]``.
        skipped: images that could not be read and were replaced by the next readable one: at each position
            first the image that belongs there, then the others on the way to a readable one.
        features: what a teacher saw in the images, where it is cached, as the cache holds it.
        latents: a tokenizer's posterior of the images, where it is cached; of any floating type.
    """

    images: Tensor | None
    labels: Tensor
    attributes: dict[str, Tensor] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    features: StoredFeatures | None = None
    latents: Posterior | None = None

    def pin_memory(self) -> "ImageBatch":
        """A copy in page-locked memory, for asynchronous transfer to a GPU."""
        return ImageBatch(
            self.images.pin_memory() if self.images is not None else None,
            self.labels.pin_memory(),
            {name: values.pin_memory() for name, values in self.attributes.items()},
            self.skipped,
            self.features.map(Tensor.pin_memory) if self.features is not None else None,
            self.latents.map(Tensor.pin_memory) if self.latents is not None else None,
        )


class ImageSource(ABC):
    """A finite, indexed set of labelled images of one size.

    ``load`` is a pure function of the indices, so the order of the data is decided elsewhere and
    a resumed run sees what the uninterrupted run would have seen.
    """

    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]]
    """Category names of each attribute that probes may ask for; empty where none are known."""
    flip: bool
    """Whether training may mirror an image left to right."""
    crop: Crop = "center"
    """Which part of an image training sees; whatever else looks at images sees the centre."""
    name: str
    """A few words for logs and cards."""
    block_size: int | tuple[int, ...] | None = None
    """Images that lie together where one can only be had with the others, or the number of each block's, in
    order; training then draws from a few blocks at a time. None: any order costs the same."""
    is_cheap: bool = False
    """Whether loading costs less than handing batches from process to process: then no worker helps."""
    num_workers: int = 0
    """Loader processes that a pass over the images may use; see ``DataConfig``."""
    left_out: LeftOut | None = None
    """What of the given data this source, and the held-out one that was opened with it, do not use; None: nothing
    can be left out."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def identity(self) -> str:
        """What the images are, for caches: two sources of one identity load the same."""
        return self.name

    @property
    def file_states(self) -> dict[str, str]:
        """Of the files that a resumed run has to find as it left them, by name; empty: nobody looks."""
        return {}

    @property
    def labels_state(self) -> str:
        """What changes when an image of this part comes, goes, or gets another class; empty: nobody looks."""
        return ""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Reads the images with these indices, each in ``range(len(self))``."""

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        """The class of each of these images, int64 (B,). No image is read where the source knows them without."""
        parts = (indices[first : first + 64] for first in range(0, len(indices), 64))
        return torch.cat([self.load(part).labels for part in parts])

    def chosen(self, num_images: int) -> list[int]:
        """Indices of that many images, or of all, for whoever looks at a part for the whole.

        The first ones, unless the order means something: then a fixed random choice, in random order.
        """
        return list(range(min(num_images, len(self))))

    def load_keys(self, keys: Sequence[Key]) -> ImageBatch:
        """Reads images as their keys say; only a source whose ``crop`` is random is asked for random crops."""
        assert all(key.crop is None for key in keys), f"{self.name} has no random crops"
        return mirror(self.load([key.index for key in keys]), keys)


def mirror(batch: ImageBatch, keys: Sequence[Key]) -> ImageBatch:
    """Images left to right where their key says so."""
    mirrored = torch.tensor([key.mirrored for key in keys])[:, None, None, None]
    if not mirrored.any():
        return batch
    return replace(batch, images=torch.where(mirrored, batch.images.flip(-1), batch.images))
