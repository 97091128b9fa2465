"""Folders of images: one folder per class, or all in one."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from semtok.data.images.attributes import read_attributes
from semtok.data.images.encoded import StoredConfig, StoredImages, split_rows
from semtok.data.images.labels import NUMBER, Labels, number_classes
from semtok.data.images.layout import Part, class_name, find_parts
from semtok.data.images.states import folder_states
from semtok.data.left_out import LeftOut
from semtok.errors import UserError


class FolderConfig(StoredConfig):
    """Settings of a folder of images.

    Layouts: ``train/``, beside ``val/`` or without it (each as follows), one sub-folder per class (torchvision's
    ``ImageFolder``), or images in one folder, which then is one class. Classes that are all numbers are numbered by
    them, others by their order.
    """

    kind: Literal["folder"] = "folder"
    path: str
    """The folder, with a sub-folder per class, or ``train/`` and ``val/`` with those, or images alone."""
    attributes: str | None = None
    """A CSV table of what the images show, for probes: a header, and the first column names the image."""


class Names(Sequence[bytes]):
    """File names, as two arrays: as many objects would take ten times the memory, in every loader process.

    Args:
        names: paths relative to one folder, with ``/``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.text = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return self.text[self.ends[row] : self.ends[row + 1]].tobytes()


class Folder(StoredImages):
    """Images by file name order.

    Args:
        root: the folder.
        names: of all its images.
        rows, labels, about: see ``StoredImages``.
    """

    expected = "files such as .png, .jpg and .webp"

    def __init__(
        self, root: Path, names: Names, rows: np.ndarray, labels: torch.Tensor, **about: Any
    ) -> None:
        super().__init__(rows, labels, place=str(root), title=root.name, **about)
        self.root, self.names = root, names

    @cached_property
    def identity(self) -> str:
        digest = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            name = self.names[row]
            state = os.stat(os.path.join(os.fsencode(self.root), name))
            digest.update(b"%s %d %d\n" % (name, state.st_size, state.st_mtime_ns))
        return f"{self.name} {digest.hexdigest()}"

    @property
    def file_states(self) -> dict[str, str]:
        return folder_states(self.root, self.names)

    @classmethod
    def open(cls, config: FolderConfig) -> tuple["Folder", "Folder"]:
        """The training and the held-out part of a folder.

        Raises:
            UserError: no such folder, or one that can't be read, no readable image in either part, or a table of
                attributes that does not fit.
        """
        root = Path(config.path)
        if not root.is_dir():
            raise UserError(f"data.path: no such folder '{config.path}'; pass data.path=…")
        if root.name in ("", ".."):
            root = root.resolve()  # its name is said in logs and cards
        left_out = LeftOut()
        try:
            train, held_out = find_parts(root, left_out)
        except OSError as error:
            raise UserError(f"data.path: {error.filename}: {error.strerror}") from None
        if held_out is not None:
            _check_layouts(root, train, held_out, left_out)
        elif not train and train.place:
            raise _empty(root, train, left_out, "put images there, or rename the folder")
        names, said = _listed(root, train)
        num_train = len(names) if held_out is not None else None
        if held_out is not None:
            more, also_said = _listed(root, held_out)
            names, said = names + more, said + also_said
        class_names, labels = (class_name(root.name),), torch.zeros(len(said), dtype=torch.int64)
        if train.classes:
            class_names, labels = _numbered(root, said, num_train)
        _note_empty(class_names, labels, left_out)
        parts = split_rows(len(names), num_train, config)
        attributes = None
        if config.attributes is not None and all(map(len, parts)):  # an empty part is told of later
            attributes = read_attributes(Path(config.attributes), names, left_out)
        return cls.parts_of(
            (root, Names(names)),
            parts,
            labels,
            config,
            class_names=class_names,
            attributes=attributes,
            left_out=left_out,
        )

    def contents(self, indices: Sequence[int]) -> list[Path]:
        return [self.file(index) for index in indices]

    def file(self, index: int) -> Path:
        """Where the image at ``index`` lies."""
        return self.root / os.fsdecode(self.names[self.rows[index]])

    def image_name(self, index: int) -> str:
        return str(self.file(index))


def _empty(root: Path, part: Part, left_out: LeftOut, way_out: str) -> UserError:
    beside = f"; left out: {left_out.line()}" if left_out else ""
    return UserError(f"data.path: no images in '{root / part.place}'; {way_out}{beside}")


def _check_layouts(root: Path, train: Part, held_out: Part, left_out: LeftOut) -> None:
    """Raises UserError where a part is empty, or one has classes and the other has none."""
    if not train:
        raise _empty(root, train, left_out, "put images there")
    if not held_out:
        away = "put images there, or remove it, so that some of the others are held out"
        raise _empty(root, held_out, left_out, away)
    if bool(train.classes) == bool(held_out.classes):
        return
    sorted_, flat = (train, held_out) if train.classes else (held_out, train)
    raise UserError(
        f"data.path: {root / sorted_.place} has a folder for each class, and {root / flat.place} holds "
        f"{len(flat.flat)} images without classes; sort these into class folders, or pass "
        f"data.path={root / train.place} to hold some of its own images out"
    )


def _listed(root: Path, part: Part) -> tuple[list[str], list[str]]:
    """Of each image of a part its name and its class; without classes, the folder's name."""
    classes = part.classes or {class_name(root.name): part.flat}
    names = [name for files in classes.values() for name in files]
    return names, [label for label, files in classes.items() for _ in files]


def _numbered(
    root: Path, said: Sequence[str], num_train: int | None
) -> tuple[tuple[str, ...], torch.Tensor]:
    """Class names, and the class of each image, as every store numbers them.

    Args:
        said: class of each image, by name.
        num_train: behind so many images the held-out part begins; None: it has no part of its own.
    """
    values, codes = np.unique(np.array(said, dtype=object), return_inverse=True)
    numbers = [int(value) for value in values if NUMBER.fullmatch(value)]
    if len(numbers) == len(values) > len(set(numbers)):
        raise UserError(f"data.path: '{root}': two class folders have one number; rename one")
    labels = Labels(tuple(values), codes.astype(np.int64))
    known = None if num_train is None else range(num_train)
    return number_classes(labels, known, place=str(root), held_out="data.path")


def _note_empty(class_names: Sequence[str], labels: torch.Tensor, left_out: LeftOut) -> None:
    """Tells of class numbers that no folder has."""
    seen = set(labels.unique().tolist())
    for number, name in enumerate(class_names):
        if number not in seen:
            left_out.add("class numbers without images", name)
