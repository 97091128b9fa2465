"""Images that are stored encoded: decoding, cropping, holding some out, replacing what can't be read."""

import hashlib
import io
import os
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from pydantic import Field, model_validator
from torch import Tensor

from semtok.data.images.attributes import ImageAttributes
from semtok.data.remote import LASTING, persist
from semtok.data.source import Crop, DataConfig, ImageBatch, ImageSource, Key, Skipped, mirror
from semtok.errors import UserError

T = TypeVar("T")
VALIDATION_NAMES = ("val", "validation", "valid", "test")
"""What held-out parts are called, the likeliest first."""

NO_IMAGE = (
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
    crop: Crop = "center"
    """Of training images: ``center`` is ADM's crop; ``random`` resizes the smaller side to the size and crops anywhere,
    anew in each epoch. Whatever else looks at images (validation, statistics, scores, caches) sees ADM's crop."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the images that is held out where there is no part of its own for that."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Chooses the held-out images where there is no part of its own for that."""

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
        crop: Crop = "center",
        attributes: ImageAttributes | None = None,
    ) -> None:
        self.rows, self.labels, self.place = rows, labels, place
        self.class_names, self.image_size = class_names, image_size
        self.flip, self.crop = flip, crop
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
                crop=crop,
                attributes=attributes.rows(rows) if attributes is not None else None,
            )
            for rows, crop in zip(parts, (config.crop, "center"), strict=True)
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

    @property
    def labels_state(self) -> str:
        digest = hashlib.blake2b(np.ascontiguousarray(self.rows, dtype=np.int64), digest_size=8)
        digest.update(self.labels.numpy().tobytes())
        return f"{len(self)} images {digest.hexdigest()}"

    def chosen(self, num_images: int) -> list[int]:
        # Often sorted by class: the first images would be of few classes.
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self), generator=generator)[:num_images].tolist()

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
            unreadable: list[str] = []
            image, used = self._read(key, contents, unreadable)
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
        self._read(Key(0), {}, [])

    def _read(
        self, key: Key, contents: dict[int, Path | bytes], skipped: list[str]
    ) -> tuple[np.ndarray, int]:
        """The image of a key, or the next readable one, unmirrored, as uint8 (H, W, 3), and whose it is."""
        for offset in range(len(self)):
            candidate = (key.index + offset) % len(self)
            if candidate not in self._unreadable:
                if candidate not in contents:
                    contents[candidate] = self.contents([candidate])[0]
                crop = partial(_cropped, image_size=self.image_size, place=key.crop)
                image = read_image(contents[candidate], crop)
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
    except NO_IMAGE:
        return None


def decode(
    content: bytes, image_size: tuple[int, int], place: tuple[float, float] | None = None
) -> np.ndarray:
    """Reads an image as the camera held it, transparency on white, cropped.

    Args:
        content: what an image file holds.
        image_size: (height, width) in pixels.
        place: see ``random_crop``; None: cropped as ADM does.

    Returns:
        uint8 (H, W, 3).

    Raises:
        OSError, SyntaxError, ValueError, DecompressionBombError: it is no image, or cut short.
    """
    return _cropped(_whole(content), image_size, place)


def _cropped(
    image: Image.Image, image_size: tuple[int, int], place: tuple[float, float] | None
) -> np.ndarray:
    if place is None:
        return np.array(adm_center_crop(image, image_size))
    return random_crop(image, image_size, place)


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


def random_crop(
    image: Image.Image, image_size: tuple[int, int], place: tuple[float, float]
) -> np.ndarray:
    """The crop that taming-transformers' ``ImagePaths`` draws (``taming/data/base.py``), on which LightningDiT's
    autoencoders are trained, for any target (height, width).

    Resized so that it just covers the target, then cropped. The resizing is OpenCV's bilinear one, which is used there:
    each pixel is read from four, however much the image shrinks.

    Args:
        image: RGB.
        place: (vertical, horizontal), each in [0, 1); where they are uniform, so are the places of the crop.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = image_size
    scale = max(width / image.width, height / image.height)
    size = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float()
    resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False)
    top, left = (
        int((side - target + 1) * u)
        for side, target, u in zip(size, image_size, place, strict=True)
    )
    cropped = resized[0, :, top : top + height, left : left + width]
    return rearrange(cropped.round().to(torch.uint8), "c h w -> h w c").numpy()
