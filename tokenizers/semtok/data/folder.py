"""Folders of images: one folder per class, or all in one."""

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field
from torchvision.datasets.folder import IMG_EXTENSIONS

from semtok.data.attributes import ImageAttributes, read_attributes
from semtok.data.source import DataConfig, ImageBatch, ImageSource
from semtok.errors import UserError

_VALIDATION_NAMES = ("val", "validation", "valid", "test")


class FolderConfig(DataConfig):
    """Settings of a folder of images.

    Layouts: ``train/``, beside ``val/`` or alone (each as follows), one sub-folder per class
    (torchvision's ``ImageFolder``), or images in one folder, which then is one class.
    """

    kind: Literal["folder"] = "folder"
    path: str
    flip: bool = True
    """Mirror training images at random."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the images that is held out where the folder has no ``val/``."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Chooses the held-out images where the folder has no ``val/``."""
    attributes: str | None = None
    """A table of what the images show, for probes: CSV (a header; the first column names the image), CelebA's
    ``list_attr_celeba.txt``, or ``predicate-matrix-binary.txt`` of Animals with Attributes 2."""


class Folder(ImageSource):
    """Images by file name order. Unreadable files are replaced by the next readable one.

    Args:
        files: (path, class index), sorted.
        attributes: of these files, in their order; None where nothing is known.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        *,
        root: Path,
        class_names: tuple[str, ...],
        image_size: tuple[int, int],
        flip: bool,
        attributes: ImageAttributes | None = None,
    ) -> None:
        self.files, self.root = list(files), root
        self.class_names, self.image_size, self.flip = class_names, image_size, flip
        self.attributes = attributes.categories if attributes is not None else {}
        self._values = attributes.values if attributes is not None else None
        self.name = f"{root.name} ({len(self.files)} images)"
        self._unreadable: set[int] = set()

    @property
    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for path, _ in self.files:
            state = path.stat()
            name = path.relative_to(self.root).as_posix()
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
        return f"{self.name} {digest.hexdigest()}"

    @classmethod
    def open(cls, config: FolderConfig) -> tuple["Folder", "Folder"]:
        """The training and the held-out part of a folder.

        Raises:
            UserError: no such folder, no readable image in either part, or a table of attributes that
                does not fit.
        """
        root = Path(config.path)
        if not root.is_dir():
            raise UserError(f"data.path: no such folder '{config.path}'; pass data.path=…")
        held_out = next((root / name for name in _VALIDATION_NAMES if (root / name).is_dir()), None)
        if (root / "train").is_dir() and held_out is not None:
            classes, files = _scan(root / "train", flat_name=root.name)
            validation_classes, validation_files = _scan(held_out, flat_name=root.name)
            unknown = sorted(set(validation_classes) - set(classes))
            if unknown:
                raise UserError(
                    f"data.path: {held_out} has classes that training lacks: {', '.join(unknown[:5])}"
                )
            renumbered = [
                (path, classes.index(validation_classes[label])) for path, label in validation_files
            ]
            parts = (files, renumbered)
        else:
            folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
            only_train = folders == ["train"]
            classes, files = _scan(root / "train" if only_train else root, flat_name=root.name)
            parts = _split(files, config.validation_fraction, config.seed)
        attributes = _attributes(config, parts, root, classes)
        sources = tuple(
            cls(
                part,
                root=root,
                class_names=classes,
                image_size=config.image_size,
                flip=config.flip,
                attributes=known,
            )
            for part, known in zip(parts, attributes, strict=True)
        )
        for source in sources:
            source.check_readable()
        return sources[0], sources[1]

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, num_images: int) -> list[int]:
        # Sorted by class: the first images would be of few classes.
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(self), generator=generator)[:num_images].tolist()

    def load(self, indices: Sequence[int]) -> ImageBatch:
        images, rows, skipped = [], [], []
        for index in indices:
            image, used = self._read(index, skipped)
            images.append(torch.from_numpy(image).permute(2, 0, 1))
            rows.append(used)
        attributes = {}
        if self._values is not None:
            columns = self._values[rows].unbind(1)
            attributes = dict(zip(self.attributes, columns, strict=True))
        labels = torch.tensor([self.files[row][1] for row in rows])
        return ImageBatch(torch.stack(images), labels, attributes, tuple(skipped))

    def check_readable(self) -> None:
        """Raises UserError where no file can be read; stops at the first that can."""
        if not self.files:
            raise UserError(
                f"data.path: no images in '{self.root}' (or too few to hold some out); "
                f"expected files such as {', '.join(IMG_EXTENSIONS[:3])}"
            )
        self._read(0, [])

    def _read(self, index: int, skipped: list[str]) -> tuple[np.ndarray, int]:
        """The image at ``index``, or the next readable one, as uint8 (H, W, 3), and whose it is."""
        for offset in range(len(self.files)):
            candidate = (index + offset) % len(self.files)
            path = self.files[candidate][0]
            if candidate not in self._unreadable:
                try:
                    return _decode(path, self.image_size), candidate
                except (
                    OSError,
                    UnidentifiedImageError,
                    SyntaxError,
                    ValueError,
                    Image.DecompressionBombError,
                ):
                    self._unreadable.add(candidate)
            skipped.append(str(path))
        raise UserError(
            f"data.path: none of the {len(self.files)} image files in '{self.root}' can be read"
        )


def _scan(root: Path, *, flat_name: str) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
    """Class names and (path, class) of all image files, sorted by name.

    Args:
        flat_name: of the one class where there are no sub-folders.
    """
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    groups = [(folder.name, _images_under(folder)) for folder in folders]
    groups = [(name, files) for name, files in groups if files]
    flat = sorted(p for p in root.iterdir() if p.is_file() and p.suffix.lower() in IMG_EXTENSIONS)
    if flat and groups:
        raise UserError(
            f"data.path: '{root}' holds images both in itself and in sub-folders; use one layout"
        )
    if not groups:
        groups = [(flat_name, flat)]
    files = [(path, label) for label, (_, paths) in enumerate(groups) for path in paths]
    return tuple(name for name, _ in groups), files


def _images_under(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file()
    )


def _split(
    files: list[tuple[Path, int]], fraction: float, seed: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    num_held_out = round(len(files) * fraction) or min(1, len(files) - 1)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = set(order[:num_held_out])
    return [f for i, f in enumerate(files) if i not in held_out], [
        files[i] for i in sorted(held_out)
    ]


def _attributes(
    config: FolderConfig,
    parts: tuple[list[tuple[Path, int]], list[tuple[Path, int]]],
    root: Path,
    class_names: tuple[str, ...],
) -> tuple[ImageAttributes | None, ImageAttributes | None]:
    """The attributes of both parts, with the same categories."""
    train, held_out = parts
    if config.attributes is None or not train or not held_out:  # an empty part is told of later
        return None, None
    known = read_attributes(Path(config.attributes), [*train, *held_out], root, class_names)
    return (
        ImageAttributes(known.categories, known.values[: len(train)]),
        ImageAttributes(known.categories, known.values[len(train) :]),
    )


def _decode(path: Path, image_size: tuple[int, int]) -> np.ndarray:
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")  # Pillow's notes about odd but readable files
        image = ImageOps.exif_transpose(image)  # cameras store which way is up beside the pixels
        if image.mode.startswith("I;16"):  # Pillow would clip where 8 bits need the upper byte
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        return np.array(adm_center_crop(image.convert("RGB"), image_size))


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
