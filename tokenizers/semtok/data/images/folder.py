"""Folders of images: one folder per class, or all in one."""

import hashlib
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from semtok.data.images.attributes import read_attributes
from semtok.data.images.encoded import VALIDATION_NAMES, StoredConfig, StoredImages, split_rows
from semtok.data.images.states import folder_states
from semtok.data.left_out import LeftOut
from semtok.errors import UserError


class FolderConfig(StoredConfig):
    """Settings of a folder of images.

    Layouts: ``train/``, beside ``val/`` or alone (each as follows), one sub-folder per class
    (torchvision's ``ImageFolder``), or images in one folder, which then is one class.
    """

    kind: Literal["folder"] = "folder"
    path: str
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

    expected = f"files such as {', '.join(IMG_EXTENSIONS[:3])}"

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
        validation = next((n for n in VALIDATION_NAMES if (root / n).is_dir()), None)
        try:
            if (root / "train").is_dir() and validation is not None:
                classes, names, labels = _scan(root, "train/")
                own, *held_out = _scan(root, f"{validation}/")
                unknown = sorted(set(own) - set(classes))
                if unknown:
                    raise UserError(
                        f"data.path: {root / validation} has classes that training lacks: {', '.join(unknown[:5])}"
                    )
                num_train: int | None = len(names)
                names += held_out[0]
                labels += [classes.index(own[label]) for label in held_out[1]]
            else:
                only_train = _folders(root) == ["train"]
                classes, names, labels = _scan(root, "train/" if only_train else "")
                num_train = None
        except OSError as error:
            raise UserError(f"data.path: {error.filename}: {error.strerror}") from None
        parts = split_rows(len(names), num_train, config)
        attributes, left_out = None, LeftOut()
        if config.attributes is not None and all(map(len, parts)):  # an empty part is told of later
            attributes = read_attributes(Path(config.attributes), names, left_out)
        numbers = torch.tensor(labels, dtype=torch.int64)
        opened = cls.parts_of(
            (root, Names(names)), parts, numbers, config, class_names=classes, attributes=attributes
        )
        for source in opened:
            source.left_out = left_out
        return opened

    def contents(self, indices: Sequence[int]) -> list[Path]:
        return [self.file(index) for index in indices]

    def file(self, index: int) -> Path:
        """Where the image at ``index`` lies."""
        return self.root / os.fsdecode(self.names[self.rows[index]])

    def image_name(self, index: int) -> str:
        return str(self.file(index))


def _scan(root: Path, part: str) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Class names; and of all image files, sorted, the name relative to ``root`` and the class.

    Args:
        part: of the folder, empty or ending in ``/``.

    Raises:
        OSError: a folder can't be read.
    """
    groups = [(name, _images(root, f"{part}{name}/")) for name in _folders(root / part)]
    groups = [(name, files) for name, files in groups if files]
    flat = _images(root, part, nested=False)
    if flat and groups:
        raise UserError(
            f"data.path: '{root / part}' holds images both in itself and in sub-folders; use one layout"
        )
    if not groups:
        groups = [(root.name, flat)]
    labels = [label for label, (_, files) in enumerate(groups) for _ in files]
    return tuple(name for name, _ in groups), [n for _, files in groups for n in files], labels


def _folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _images(root: Path, part: str, *, nested: bool = True) -> list[str]:
    """The image files of a part of a folder, sorted; what the folders tell of a file is enough to know it."""
    names, todo = [], [part]
    while todo:
        inside = todo.pop()
        try:
            entries = list(os.scandir(root / inside))
        except PermissionError:  # lost+found, where a disk is one set
            continue
        for entry in entries:
            name = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                todo += [f"{name}/"] if nested else []
            elif os.path.splitext(name)[1].lower() in IMG_EXTENSIONS and entry.is_file():
                names.append(name)
    return sorted(names, key=lambda name: name.split("/"))
