"""Sets of images to score: files, ADM archives, sources and generators, read a batch at a time."""

import contextlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from semtok.data.images.folder import Folder, Names
from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.drawn_sets import (
    IMAGES_KEY,
    check_complete,
    image_files,
    image_size_of,
    read_labels,
    read_protocol,
)
from semtok.images import Uint8Rule, to_uint8
from semtok.sampler.sampling import SamplerConfig
from semtok.storage import DAMAGE, as_damage, first_line

DRAWN_AT_ONCE = 32
"""Images in a batch of a generator's, by default in every command: rounding depends on it."""


@dataclass(frozen=True)
class ImageSet:
    """Images of one size, in a fixed order.

    Attributes:
        name: where they come from, in a few words.
        identity: what they are, for caches.
        open: begins a pass: uint8 batches (B, 3, H, W).
        protocol: how ``sample`` drew them, where the set says so.
        places: of each image in the folder's ``image_files``; None: the order is that of the archive or source.
    """

    name: str
    identity: str
    num_images: int
    image_size: tuple[int, int]
    open: Callable[[], Iterator[Tensor]]
    protocol: dict[str, Any] | None = None
    places: Sequence[int] | None = None


def images_of_source(source: ImageSource, num_images: int, *, batch_size: int = 64) -> ImageSet:
    """``source.chosen(num_images)``. A pass raises UserError at a file that can't be read."""
    chosen = source.chosen(num_images)

    def batches() -> Iterator[Tensor]:
        for batch in chosen_images(source, len(chosen), batch_size=batch_size):
            if batch.skipped:
                raise UserError(
                    f"{batch.skipped[0].name}: can't be read as an image ({batch.skipped[0].reason}); remove it"
                )
            yield batch.images

    size = f"{source.image_size[0]}x{source.image_size[1]}"
    name = f"{source.name}, {len(chosen)} images at {size}"
    identity = f"{source.identity} {len(chosen)} of {len(source)} at {size}"
    return ImageSet(name, identity, len(chosen), source.image_size, batches)


def images_of_folder(path: Path, image_size: tuple[int, int] | None = None) -> ImageSet:
    """All images in a folder and in those within it.

    Args:
        image_size: (height, width) to crop to, as ADM does; None: they must be of one size.

    Raises:
        UserError: no images there, of several sizes, or fewer than its protocol tells of.
    """
    names = image_files(path)
    if not names:
        raise UserError(f"{path}: no images there")
    protocol = read_protocol(path)
    check_complete(path, len(names), protocol)
    size = image_size or _common_size(path, names)
    source = Folder(
        path,
        Names(names),
        np.arange(len(names)),
        torch.zeros(len(names), dtype=torch.int64),
        class_names=(path.name,),
        image_size=size,
        flip=False,
    )
    images = images_of_source(source, len(source))
    return replace(images, protocol=protocol, places=source.chosen(len(source)))


def labels_of_set(path: Path, images: ImageSet) -> list[int] | None:
    """The classes that files say images were drawn for, in the order of ``images``; None: they do not say.

    Raises:
        UserError: other than a number for each image.
    """
    labels = read_labels(path, images.num_images)
    if labels is None or images.places is None:
        return labels
    return [labels[place] for place in images.places]


def _common_size(folder: Path, names: Sequence[str]) -> tuple[int, int]:
    sizes: dict[tuple[int, int], Path] = {}
    for name in names:
        sizes.setdefault(image_size_of(folder / name), folder / name)
        if len(sizes) > 1:
            (a, one), (b, other) = sizes.items()
            raise UserError(
                f"{other} is {b[1]}x{b[0]}, {one.name} {a[1]}x{a[0]}; images to score are of one size"
            )
    return next(iter(sizes))


def images_of_npz(path: Path, *, batch_size: int = 64) -> ImageSet:
    """The images of an ADM archive, ``arr_0`` uint8 (N, H, W, 3), streamed from the file.

    Raises:
        UserError: no such file, damaged, or of other content.
    """
    with _reading(path), zipfile.ZipFile(path) as archive, _member(archive, path) as file:
        shape, fortran, dtype = _header(file)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran or not shape[0]:
        raise UserError(
            f"{path}: {IMAGES_KEY} is {dtype} {shape}; expected uint8 (N, height, width, 3)"
        )
    num, height, width, _ = shape

    def batches() -> Iterator[Tensor]:
        with _reading(path), zipfile.ZipFile(path) as archive, _member(archive, path) as file:
            _header(file)
            for first in range(0, num, batch_size):
                count = min(batch_size, num - first)
                content = file.read(count * height * width * 3)
                array = np.frombuffer(bytearray(content), np.uint8)
                images = torch.from_numpy(array.reshape(count, height, width, 3))
                yield images.permute(0, 3, 1, 2).contiguous()

    state = path.stat()
    identity = f"{path.absolute()} {state.st_size} {state.st_mtime_ns}"
    name, size = f"{path.name}, {num} images", (height, width)
    return ImageSet(name, identity, num, size, batches, read_protocol(path))


def images_of_generator(
    generator: Generator,
    labels: Sequence[int],
    *,
    seed: int,
    sampler: SamplerConfig | None = None,
    weak: Generator | None = None,
    batch_size: int = DRAWN_AT_ONCE,
    uint8: Uint8Rule = "round",
) -> ImageSet:
    """What a generator draws for these labels, as uint8 as files hold it."""

    def batches() -> Iterator[Tensor]:
        for first in range(0, len(labels), batch_size):
            own = labels[first : first + batch_size]
            pixels = generator.sample(own, seed=seed, first=first, sampler=sampler, weak=weak)
            yield to_uint8(pixels, uint8)

    return ImageSet("generated", "", len(labels), generator.image_size, batches)


def labels_for(num_images: int, num_classes: int, *, balanced: bool, seed: int) -> list[int]:
    """Labels of a set to be scored: each class as often as the others, or drawn uniformly.

    Published scores differ by that choice: most papers draw, SFD and RAE balance, which lowers FID by
    0.1 to 0.2 (SFD, arXiv 2512.04926, table 13).
    """
    if balanced:
        return [i % num_classes for i in range(num_images)]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_classes, (num_images,), generator=generator).tolist()


def _member(archive: zipfile.ZipFile, path: Path) -> zipfile.ZipExtFile:
    name = f"{IMAGES_KEY}.npy"
    if name not in archive.namelist():
        raise UserError(f"{path}: holds no {IMAGES_KEY}; expected an archive as ADM's samples")
    return archive.open(name)


def _header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], bool, np.dtype]:
    with as_damage():
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What reading an archive can raise, as one line."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (*DAMAGE, zlib.error, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cut short or damaged ({first_line(error)})") from None
