"""Sets of drawn images on disk, as ``sample`` writes them: what they say of themselves, and ADM's archives.

A folder holds ``000000.png`` and so on, ``labels.json`` (the class of each), and ``protocol.json`` (how they were
drawn). An archive holds the same as ``arr_0``, ``arr_1`` and ``protocol``, the text of that file.
"""

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from semtok.data.images.decoding import NO_IMAGE, decode, image_suffixes
from semtok.errors import UserError
from semtok.storage import DAMAGE, as_damage, first_line, new_file, read_json

PROTOCOL_FILE, LABELS_FILE = "protocol.json", "labels.json"
IMAGES_KEY, LABELS_KEY, PROTOCOL_KEY = "arr_0", "arr_1", "protocol"
_ORIENTATION = 0x0112  # of EXIF
_READ_AT_ONCE = 64
_READERS = 8


def read_protocol(path: Path) -> dict[str, Any] | None:
    """How a set was drawn, as ``sample`` wrote it down; None: a set of others, which does not say.

    Args:
        path: a folder, or an ``.npz``.

    Raises:
        UserError: what is there under that name can't be read as such.
    """
    if path.is_dir():
        place = path / PROTOCOL_FILE
        content = read_json(place) if place.is_file() else None
    else:
        place = path
        try:
            with as_damage(), np.load(path, allow_pickle=False) as archive:
                text = archive[PROTOCOL_KEY].item() if PROTOCOL_KEY in archive else "null"
                content = json.loads(text)
        except DAMAGE as error:
            raise UserError(f"{path}: its protocol can't be read ({first_line(error)})") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(f"{place}: expected a protocol, a mapping, as 'sample' writes it")
    return content


def protocol_text(protocol: dict[str, Any]) -> str:
    """What stands in ``protocol.json``, and in an archive."""
    return json.dumps(protocol, indent=2) + "\n"


def read_labels(path: Path, num_images: int) -> list[int] | None:
    """The class of each image of a set, in the order of ``image_files`` or of an archive; None: it does not say.

    Args:
        path: a folder, or an ``.npz``.

    Raises:
        UserError: other than so many numbers.
    """
    place: object = path / LABELS_FILE
    if path.is_dir():
        labels = read_json(path / LABELS_FILE) if (path / LABELS_FILE).is_file() else None
    else:
        place = f"{path}: {LABELS_KEY}"
        try:
            with as_damage(), np.load(path, allow_pickle=False) as archive:
                labels = archive[LABELS_KEY].tolist() if LABELS_KEY in archive else None
        except DAMAGE as error:
            raise UserError(f"{place}: can't be read ({first_line(error)})") from None
    if labels is None:
        return None
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{place}: expected a list of class numbers")
    if len(labels) != num_images:
        raise UserError(f"{place}: {len(labels)} labels, but there are {num_images} images")
    return labels


def image_files(folder: Path) -> list[str]:
    """Names of all images in a folder and in those within it, with ``/``; hidden files are none.

    The order goes by the numbers in names: 2 comes before 10.
    """
    names = [
        os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
        for place, _, files in os.walk(folder)
        for name in files
        if os.path.splitext(name)[1].lower() in image_suffixes() and not name.startswith(".")
    ]
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    """The key of an order: text apart from numbers, which come first by their value."""
    # Equal numbers, 1 and 01, are told apart by the last entry.
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(int(p), "") if p.isdecimal() else (-1, p) for p in parts] + [(-2, name)]


def check_complete(folder: Path, num_images: int, protocol: dict[str, Any] | None) -> None:
    """Raises UserError where a folder's protocol tells of another number of images."""
    wanted = (protocol or {}).get("num_images", num_images)
    if wanted != num_images:
        raise UserError(
            f"{folder}: holds {num_images} of {wanted} images; the command that began it draws the others"
        )


def is_whole(file: Path, image_size: tuple[int, int]) -> bool:
    """Whether a file is there, a PNG in colour of this (height, width), and its checksums are right."""
    try:
        with as_damage(), Image.open(file, formats=["PNG"]) as image:
            fits = image.mode == "RGB" and (image.height, image.width) == image_size
            image.verify()
    except NO_IMAGE:
        return False
    return fits


def read_images(
    folder: Path, names: Sequence[str], image_size: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Each image, uint8 (H, W, 3); holds no more than a few dozen.

    Args:
        names: see ``image_files``.
        image_size: (height, width) of all.

    Raises:
        UserError: an image that is damaged, or of another size.
    """

    def read(name: str) -> np.ndarray:
        size = image_size_of(folder / name, verify=True)
        if size != image_size:
            (h, w), (height, width) = size, image_size
            raise UserError(
                f"{folder / name} is {w}x{h}, others {width}x{height}; images of a set are of one size"
            )
        try:
            return decode((folder / name).read_bytes(), size)
        except NO_IMAGE as error:
            raise _unreadable(folder / name, error) from None

    with ThreadPoolExecutor(_READERS) as readers:  # Pillow decodes beside Python
        for first in range(0, len(names), _READ_AT_ONCE):
            yield from readers.map(read, names[first : first + _READ_AT_ONCE])


def image_size_of(file: Path, *, verify: bool = False) -> tuple[int, int]:
    """(height, width) of an image file, the right way up.

    Args:
        verify: compare the checksums that it has, which PNG files do, with its content.

    Raises:
        UserError: it is none, or damaged.
    """
    try:
        if verify:
            with as_damage(), Image.open(file) as image:
                image.verify()  # of an image of which nothing else was read yet
        with as_damage(), Image.open(file) as image:
            turned = image.getexif().get(_ORIENTATION, 1) >= 5  # as cameras note it
            return (image.width, image.height) if turned else (image.height, image.width)
    except NO_IMAGE as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: can't be read as an image ({first_line(error)})")


def write_archive(
    path: Path,
    folder: Path,
    *,
    shuffle: int | None = None,
    num_images: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> int:
    """Packs a folder's images as ADM's evaluation reads them, holding no more than a few dozen; the number of images.

    The same images give the same bytes, which tell of no time.

    Args:
        path: an ``.npz``: ``arr_0`` uint8 (N, H, W, 3), and where the folder has them ``arr_1`` int64 (N,), the
            labels, and ``protocol``, its text.
        shuffle: seed of a random order, for sets that are sorted by class, as the Inception Score is of
            consecutive parts; None: the order of ``image_files``.
        num_images: how many there have to be, with labels and protocol; None: as many as the protocol says.
        progress: is told the number of images that were packed.

    Raises:
        UserError: no images, another number than that, damaged ones, or several sizes.
    """
    names = image_files(folder)
    if not names:
        raise UserError(f"{folder}: no images there")
    protocol = read_protocol(folder)
    check_complete(
        folder, len(names), protocol if num_images is None else {"num_images": num_images}
    )
    labels = read_labels(folder, len(names))
    if num_images is not None and (labels is None or protocol is None):
        raise UserError(f"{folder}: its labels or protocol are gone; the same command goes on")
    image_size = image_size_of(folder / names[0])
    if shuffle is not None:
        order = np.random.default_rng(shuffle).permutation(len(names)).tolist()
        names = [names[i] for i in order]
        labels = [labels[i] for i in order] if labels is not None else None
        protocol = protocol | {"shuffle": shuffle} if protocol is not None else None
    shape = (len(names), *image_size, 3)
    with new_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with _member(archive, IMAGES_KEY) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in read_images(folder, names, image_size):
                file.write(image.tobytes())
                progress(1)
        if labels is not None:
            with _member(archive, LABELS_KEY) as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64))
        if protocol is not None:
            with _member(archive, PROTOCOL_KEY) as file:
                np.lib.format.write_array(file, np.array(protocol_text(protocol)))
    return len(names)


def _member(archive: zipfile.ZipFile, key: str) -> IO[bytes]:
    return archive.open(f"{key}.npy", "w", force_zip64=True)
