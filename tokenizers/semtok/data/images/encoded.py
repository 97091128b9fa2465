"""Images that are stored encoded: decoding, cropping, holding some out, replacing what can't be read."""

import io
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from semtok.data.images.attributes import ImageAttributes
from semtok.data.remote import LASTING, persist
from semtok.data.source import DataConfig, ImageBatch, ImageSource, Skipped
from semtok.errors import UserError

T = TypeVar("T")
VALIDATION_NAMES = ("val", "validation", "valid", "test")
"""What held-out parts are called, the likeliest first."""

_NO_IMAGE = (
    OSError,  # Pillow's own, UnidentifiedImageError among them: what is decoded is in memory
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
)
"""What decoding raises where a file is no image, or cut short."""


class StoredConfig(DataConfig):
    """Settings that all stored images share."""

    flip: bool = True
    """Mirror training images at random."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the images that is held out where there is no part of its own for that."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Chooses the held-out images where there is no part of its own for that."""


class StoredImages(ImageSource):
    """Encoded images of one store. Unreadable ones are replaced by the next readable one.

    Unreadable is what can't be decoded, is not there, or may not be read. Where a disk or a server fails, it is
    asked again, and then the error ends the run: an image must not differ from process to process.

    Args:
        rows: which of the store's images these are.
        labels: int64 (N,), class of each.
        place: the store, for messages.
        title: the store in a few words, for logs and cards.
        attributes: of these images, in their order; None where nothing is known.
    """

    expected: str
    """What images are expected to lie in, for messages."""

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
        attributes: ImageAttributes | None = None,
    ) -> None:
        self.rows, self.labels, self.place = rows, labels, place
        self.class_names, self.image_size, self.flip = class_names, image_size, flip
        known = attributes or ImageAttributes({}, torch.zeros(len(labels), 0, dtype=torch.int64))
        self.attributes, self._values = known.categories, known.values
        self.name = f"{title} ({len(labels)} images)"
        self._unreadable: set[int] = set()

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
    ) -> tuple[Self, Self]:
        """The training and the held-out images of a store.

        Args:
            store: what the class takes before the rows.
            parts: rows of each.
            labels, attributes: of all rows.

        Raises:
            UserError: no image of a part can be read.
        """
        train, held_out = (
            cls(
                *store,
                rows,
                labels[rows],
                class_names=class_names,
                image_size=config.image_size,
                flip=config.flip,
                attributes=attributes.rows(rows) if attributes is not None else None,
            )
            for rows in parts
        )
        train.check_readable()
        held_out.check_readable()
        return train, held_out

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

    def chosen(self, num_images: int) -> list[int]:
        # Often sorted by class: the first images would be of few classes.
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self), generator=generator)[:num_images].tolist()

    def load(self, indices: Sequence[int]) -> ImageBatch:
        wanted = [index for index in dict.fromkeys(indices) if index not in self._unreadable]
        found = self.contents(wanted) if wanted else []  # a server is asked for all at once
        contents = dict(zip(wanted, found, strict=True))
        images, rows, skipped = [], [], []
        for position, index in enumerate(indices):
            unreadable: list[str] = []
            image, used = self._read(index, contents, unreadable)
            skipped += [Skipped(position, name) for name in unreadable]
            images.append(torch.from_numpy(image).permute(2, 0, 1))
            rows.append(used)
        attributes = dict(zip(self.attributes, self._values[rows].unbind(1), strict=True))
        return ImageBatch(torch.stack(images), self.labels[rows], attributes, tuple(skipped))

    def check_readable(self) -> None:
        """Raises UserError where no image can be read; stops at the first that can."""
        if not len(self):
            raise UserError(
                f"data.path: no images in '{self.place}' (or too few to hold some out); "
                f"expected {self.expected}"
            )
        self._read(0, {}, [])

    def _cropped(self, image: Image.Image) -> np.ndarray:
        return np.array(adm_center_crop(image, self.image_size))

    def _read(
        self, index: int, contents: dict[int, Path | bytes], skipped: list[str]
    ) -> tuple[np.ndarray, int]:
        """The image at ``index``, or the next readable one, as uint8 (H, W, 3), and whose it is."""
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if candidate not in self._unreadable:
                if candidate not in contents:
                    contents[candidate] = self.contents([candidate])[0]
                image = read_image(contents[candidate], self._cropped)
                if image is not None:
                    return image, candidate
                self._unreadable.add(candidate)
            skipped.append(self.image_name(candidate))
        raise UserError(f"data.path: none of the {len(self)} images in '{self.place}' can be read")


def announce(message: str) -> None:
    """Prints what is about to take long, in the first of the processes that a launcher has started."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


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


def read_image(content: Path | bytes, turn: Callable[[Image.Image], T]) -> T | None:
    """What becomes of the image of a file, or of what it holds; None where it is unreadable.

    Args:
        turn: a whole RGB image into what is wanted of it.

    Raises:
        UserError: the disk fails, also when it is asked again.
    """
    if isinstance(content, Path):
        try:
            content = persist(content.read_bytes, str(content))
        except LASTING:
            return None
        except OSError as error:
            raise UserError(f"data.path: {content}: {error.strerror}; see to the disk") from None
    try:
        return turn(_whole(content))
    except _NO_IMAGE:
        return None


def decode(content: bytes, image_size: tuple[int, int]) -> np.ndarray:
    """Reads an image as the camera held it, transparency on white, cropped as ADM does.

    Args:
        content: what an image file holds.
        image_size: (height, width) in pixels.

    Returns:
        uint8 (H, W, 3).

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: it is no image, or cut short.
    """
    return np.array(adm_center_crop(_whole(content), image_size))


def _whole(content: bytes) -> Image.Image:
    """The RGB image of a file, as ``decode`` reads it, uncropped."""
    file = io.BytesIO(content)
    with warnings.catch_warnings(action="ignore"), Image.open(file) as image:  # odd but readable
        image = ImageOps.exif_transpose(image)  # cameras store which way is up beside the pixels
        if image.mode.startswith("I;16"):  # Pillow would clip where 8 bits need the upper byte
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        return image.convert("RGB")


def adm_center_crop(image: Image.Image, image_size: tuple[int, int]) -> Image.Image:
    """The crop of ADM (Dhariwal and Nichol 2021), for any target (height, width).

    Halved with a box filter while both sides are at least twice the target, resized bicubically so
    that it just covers the target, then cropped at the centre with offsets rounded down.
    """
    height, width = image_size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    image = image.resize(size, resample=Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
