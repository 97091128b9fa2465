"""Folders of images: one folder per class, or all in one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from semtok.data.images.attributes import ImageAttributes, read_attributes
from semtok.data.images.encoded import VALIDATION_NAMES, StoredConfig, StoredImages, held_out_split
from semtok.errors import UserError


class FolderConfig(StoredConfig):
    """Settings of a folder of images.

    Layouts: ``train/``, beside ``val/`` or alone (each as follows), one sub-folder per class
    (torchvision's ``ImageFolder``), or images in one folder, which then is one class.
    """

    kind: Literal["folder"] = "folder"
    path: str
    attributes: str | None = None
    """A table of what the images show, for probes: CSV (a header; the first column names the image), CelebA's
    ``list_attr_celeba.txt``, or ``predicate-matrix-binary.txt`` of Animals with Attributes 2."""


class Folder(StoredImages):
    """Images by file name order.

    Args:
        files: (path, class index), sorted.
        attributes: of these files, in their order; None where nothing is known.
    """

    expected = f"files such as {', '.join(IMG_EXTENSIONS[:3])}"

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
        super().__init__(
            torch.tensor([label for _, label in self.files], dtype=torch.int64),
            place=str(root),
            title=root.name,
            class_names=class_names,
            image_size=image_size,
            flip=flip,
            attributes=attributes,
        )

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
        validation = next((root / n for n in VALIDATION_NAMES if (root / n).is_dir()), None)
        if (root / "train").is_dir() and validation is not None:
            classes, files = _scan(root / "train", flat_name=root.name)
            validation_classes, validation_files = _scan(validation, flat_name=root.name)
            unknown = sorted(set(validation_classes) - set(classes))
            if unknown:
                raise UserError(
                    f"data.path: {validation} has classes that training lacks: {', '.join(unknown[:5])}"
                )
            renumbered = [
                (path, classes.index(validation_classes[label])) for path, label in validation_files
            ]
            parts = (files, renumbered)
        else:
            folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
            only_train = folders == ["train"]
            classes, files = _scan(root / "train" if only_train else root, flat_name=root.name)
            rows = held_out_split(len(files), config.validation_fraction, config.seed)
            parts = tuple([files[row] for row in part] for part in rows)
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

    def contents(self, indices: Sequence[int]) -> list[Path]:
        return [self.files[index][0] for index in indices]

    def image_name(self, index: int) -> str:
        return str(self.files[index][0])


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
