"""Images that are stored encoded: holding some out, replacing what can't be read."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from semtok.data.images.attributes import ImageAttributes
from semtok.data.images.decoding import Unreadable, decode, read_image
from semtok.data.left_out import LeftOut
from semtok.data.order import permutation
from semtok.data.source import Crop, DataConfig, ImageBatch, ImageSource, Key, Skipped, mirror
from semtok.errors import UserError


class StoredConfig(DataConfig):
    """Settings that all stored images share."""

    flip: bool = True
    """Mirror training images at random."""
    crop: Crop = "center"
    """Of training images: ``center`` is ADM's crop; ``random`` resizes the smaller side to the size and crops anywhere,
    anew in each epoch. Whatever else looks at images (validation, statistics, scores, caches) sees ADM's crop."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the images that is held out where there is no part of its own for that."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Chooses the held-out images where there is no part of its own for that."""
    num_images: int | None = Field(None, ge=1)
    """So many of the training images are used, a fixed random choice, the same for every ``train.seed``. A smaller
    choice is part of a larger one. The held-out images and the classes stay as they are. None: all."""

    @property
    def draws_crops(self) -> bool:
        return self.crop == "random"

    @model_validator(mode="after")
    def _no_cache_of_random_crops(self) -> "StoredConfig":
        if self.draws_crops and self.cache not in ("auto", "none"):
            raise ValueError(
                f"data.cache: {self.cache} would hold one crop of each image, and data.crop=random sees another in "
                "each epoch; pass data.cache=none or data.crop=center"
            )
        return self


class StoredImages(ImageSource):
    """Encoded images of one store. Unreadable ones are replaced by the next readable one.

    Unreadable is what can't be decoded, is not there, or may not be read. Where a disk or a server fails, it is
    asked again, and then the error ends the run: an image must not differ from process to process.

    Args:
        rows: which of the store's images these are.
        labels: int64 (N,), class of each.
        place: the store, for messages.
        title: the store in a few words, for logs and cards.
        crop: of these images in training.
        attributes: of these images, in their order; None where nothing is known.
        chosen_of: of how many images these were chosen; None: they are all of their part.
    """

    expected: str
    """What images are expected to lie in, for messages."""
    part: Literal["stored", "training", "held-out"] = "stored"
    """Which part of the set these are, for their name and messages."""

    def __init__(
        self,
        rows: np.ndarray,
        labels: Tensor,
        *,
        place: str,
        title: str,
        class_names: tuple[str, ...],
        image_size: tuple[int, int],
        flip: bool,
        crop: Crop = "center",
        attributes: ImageAttributes | None = None,
        chosen_of: int | None = None,
    ) -> None:
        self.rows, self.labels, self.place = rows, labels, place
        self.class_names, self.image_size = class_names, image_size
        self.flip, self.crop = flip, crop
        known = attributes or ImageAttributes({}, torch.zeros(len(labels), 0, dtype=torch.int64))
        self.attributes, self._values = known.categories, known.values
        self._title = title
        self._count = str(len(labels)) if chosen_of is None else f"{len(labels)} of {chosen_of}"
        self._unreadable: dict[int, str] = {}  # and why

    @property
    def name(self) -> str:
        what = "held-out images" if self.part == "held-out" else "images"
        return f"{self._title} ({self._count} {what})"

    @classmethod
    def parts_of(
        cls,
        store: Sequence[Any],
        parts: Sequence[np.ndarray],
        labels: Tensor,
        config: StoredConfig,
        *,
        class_names: tuple[str, ...],
        attributes: ImageAttributes | None,
        left_out: LeftOut | None = None,
    ) -> tuple[Self, Self]:
        """The training and the held-out images of a store.

        Args:
            store: what the class takes before the rows.
            parts: rows of each.
            labels, attributes: of all rows.
            left_out: what the store holds beside them.

        Raises:
            UserError: no image of a part can be read, or ``config.num_images`` are more than there are.
        """

        def part(rows: np.ndarray, crop: Crop, chosen_of: int | None = None) -> Self:
            return cls(
                *store,
                rows,
                labels[rows],
                class_names=class_names,
                image_size=config.image_size,
                flip=config.flip,
                crop=crop,
                attributes=attributes.rows(rows) if attributes is not None else None,
                chosen_of=chosen_of,
            )

        train, held_out = part(parts[0], config.crop), part(parts[1], "center")
        if config.num_images is not None:
            rows = train.chosen_rows(config.num_images)
            if len(rows) < len(train):
                whole, train = train, part(rows, config.crop, chosen_of=len(train))
                unseen = set(whole.labels.tolist()) - set(train.labels.tolist())
                for label in sorted(unseen) if left_out is not None else ():
                    left_out.add("classes without an image in data.num_images", class_names[label])
        train.left_out = held_out.left_out = left_out
        train.part, held_out.part = "training", "held-out"
        train.check_readable()
        held_out.check_readable()
        return train, held_out

    def chosen_rows(self, num_images: int) -> np.ndarray:
        """Of the store, the rows of ``chosen(num_images)``, sorted.

        Raises:
            UserError: there are fewer images.
        """
        if num_images > len(self):
            raise UserError(
                f"data.num_images: {num_images} is more than the {len(self)} training images in '{self.place}'; pass "
                f"{len(self)} or fewer, or leave it out to take all"
            )
        return np.sort(self.rows[self.chosen(num_images)])

    @abstractmethod
    def contents(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        """Files, or what they would hold; the images at these indices.

        Raises:
            UserError: the store itself can't be read (an unreadable image is no such case).
        """

    @abstractmethod
    def image_name(self, index: int) -> str:
        """Where the image at ``index`` lies, for messages."""

    def __len__(self) -> int:
        return len(self.labels)

    def attribute_values(self, name: str) -> Tensor:
        """int64 (N,): of each image an index into ``attributes[name]``."""
        return self._values[:, list(self.attributes).index(name)]

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        return self.labels[list(indices)]

    @property
    def labels_state(self) -> str:
        digest = hashlib.blake2b(np.ascontiguousarray(self.rows, dtype=np.int64), digest_size=8)
        digest.update(self.labels.numpy().tobytes())
        return f"{len(self)} images {digest.hexdigest()}"

    def chosen(self, num_images: int) -> list[int]:
        # Often sorted by class: the first images would be of few classes. Where images lie in blocks, they are taken as
        # training takes them: of images from everywhere, each would cost its whole block.
        generator = torch.Generator().manual_seed(0)
        return permutation(len(self), self.block_size, generator)[:num_images].tolist()

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return self._load([Key(index) for index in indices])

    def load_keys(self, keys: Sequence[Key]) -> ImageBatch:
        if self.crop == "center":
            return super().load_keys(keys)
        return mirror(self._load(keys), keys)

    def _load(self, keys: Sequence[Key]) -> ImageBatch:
        """Reads images, cropped as their keys say."""
        indices = [key.index for key in keys]
        wanted = [index for index in dict.fromkeys(indices) if index not in self._unreadable]
        found = self.contents(wanted) if wanted else []  # a server is asked for all at once
        contents = dict(zip(wanted, found, strict=True))
        images, rows, skipped = [], [], []
        for position, key in enumerate(keys):
            unreadable: list[int] = []
            image, used = self._read(key, contents, unreadable)
            skipped += [
                Skipped(position, self.image_name(other), self._unreadable[other])
                for other in unreadable
            ]
            images.append(torch.from_numpy(image).permute(2, 0, 1))
            rows.append(used)
        attributes = dict(zip(self.attributes, self._values[rows].unbind(1), strict=True))
        return ImageBatch(torch.stack(images), self.labels[rows], attributes, tuple(skipped))

    def check_readable(self) -> None:
        """Raises UserError where no image can be read; stops at the first that can."""
        if not len(self):
            beside = f"; left out: {self.left_out.line()}" if self.left_out else ""
            raise UserError(
                f"data.path: no images in '{self.place}' (or too few to hold some out); "
                f"expected {self.expected}{beside}"
            )
        self._read(Key(0), {}, [])

    def _read(
        self, key: Key, contents: dict[int, Path | bytes], skipped: list[int]
    ) -> tuple[np.ndarray, int]:
        """The image of a key, or the next readable one, unmirrored, as uint8 (H, W, 3), and whose it is."""
        for offset in range(len(self)):
            candidate = (key.index + offset) % len(self)
            if candidate not in self._unreadable:
                if candidate not in contents:
                    contents[candidate] = self.contents([candidate])[0]
                cropped = partial(decode, image_size=self.image_size, place=key.crop)
                image = read_image(contents[candidate], cropped)
                if not isinstance(image, Unreadable):
                    return image, candidate
                self._unreadable[candidate] = image.reason
            skipped.append(candidate)
        raise UserError(
            f"data.path: none of the {len(self)} {self.part} images in '{self.place}' can be read; "
            f"{self.image_name(skipped[0])}: {self._unreadable[skipped[0]]}"
            "; mend it, or remove it to have others in this part"
        )


def split_rows(
    num_images: int, num_train: int | None, config: StoredConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a store to train on, and rows held out.

    Args:
        num_train: behind so many rows the held-out part begins; None: the settings choose one, and of two rows
            or more at least one is in each.
    """
    if num_train is not None:
        return np.arange(num_train), np.arange(num_train, num_images)
    num_held_out = round(num_images * config.validation_fraction) or min(1, num_images - 1)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(num_images, generator=generator).numpy()
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])
