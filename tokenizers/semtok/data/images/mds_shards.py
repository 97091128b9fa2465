"""Shards in the MDS format: samples and whole columns of a file, and files from a store, checked as they come.

A shard begins with the number of its samples and where each begins and ends, as uint32. A sample begins with the sizes
of its columns of no fixed size, and the columns follow, in the order of their names.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from semtok.data.images.labels import Labels
from semtok.data.images.mds_index import NUMBERS, FileInfo, MdsIndex, Shard
from semtok.data.local_copies import LocalCopies
from semtok.data.remote import answered, file_system, protocol, within
from semtok.errors import UserError
from semtok.extras import need
from semtok.privacy import without_secrets
from semtok.storage import cache_folder, digest, first_line

T = TypeVar("T")

KEPT = 40
"""Shards that stay on the local disk at least: those that the order draws from at a time, and the next ones."""

_TRIES = 10
_DIGESTS = {name for name in hashlib.algorithms_available if "shake" not in name}
"""What Python computes; the lengths of SHAKE's are not told."""
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""Pillow's modes of pixels that a PNG file can hold."""


class MdsFiles:
    """The files of a set's shards: where they lie, or copies of those that lie behind a URL or are compressed.

    Args:
        most_bytes: of the copies; ``KEPT`` shards stay in any case.
    """

    def __init__(self, index: MdsIndex, most_bytes: float) -> None:
        self.index = index
        largest = max((shard.raw_data.bytes for shard in index.shards), default=0)
        folder = cache_folder("mds") / digest(index.place, index.state, size=8)
        most_bytes = max(most_bytes, KEPT * largest)
        self._copies = LocalCopies(
            folder, most_bytes, place=f"data.path: {without_secrets(index.place)}"
        )

    def told(self, number: int) -> str:
        """Where a shard lies, without what of a URL is secret."""
        return without_secrets(within(self.index.place, self.index.shards[number].stored.basename))

    def check(self) -> None:
        """Looks at what can be known of files before they are read.

        Raises:
            UserError: a file on disk is missing or of another size; or a shard is compressed, and what decompresses it
                is not installed.
        """
        for shard in self.index.shards:
            if shard.compression is not None:
                need(
                    "streaming",
                    "mosaicml-streaming",
                    extra="mds",
                    place=f"data.path: {shard.stored.basename} is compressed ({shard.compression}) and ",
                )
                # Once, before loader processes are forked: it takes seconds.
                import streaming.base.compression  # noqa: F401
            if not protocol(self.index.place):
                _check_size(self.index.place, shard.stored)

    def file(self, number: int) -> Path:
        """Where a shard lies uncompressed; it is fetched first where it has to be.

        Raises:
            UserError: it can't be had, or it is not what the index says.
        """
        shard, place = self.index.shards[number], self.index.place
        if shard.zip_data is None and not protocol(place):
            return Path(within(place, shard.raw_data.basename))
        name = f"{digest(shard.stored.basename, shard.state)}.mds"
        return self._copies.make(
            name,
            shard.raw_data.bytes,
            lambda temporary: _fetch(place, shard, temporary, f"data.path: {self.told(number)}"),
        )

    def opened(self, number: int, read: Callable[[Path], T]) -> T:
        """What is read of a shard's file.

        Raises:
            UserError: it can't be had, or ``read`` raises it.
        """
        for _ in range(_TRIES):
            file = self.file(number)
            try:
                return read(file)
            except OSError as error:
                if not isinstance(error, FileNotFoundError) or file.parent != self._copies.folder:
                    raise UserError(
                        f"data.path: {file}: {error.strerror}; see to the disk"
                    ) from None
                # Another process of this machine made room for its own.
        raise UserError(
            f"data.path: {without_secrets(self.index.place)}: others remove shards from {self._copies.folder} before "
            "they are read; set another SEMTOK_CACHE"
        )


def _check_size(place: str, info: FileInfo) -> None:
    file = within(place, info.basename)
    try:
        size = os.stat(file).st_size
    except OSError as error:
        raise UserError(f"data.path: {file}: {error.strerror}; copy it again") from None
    if size != info.bytes:
        raise UserError(
            f"data.path: {file}: has {size} bytes, and {info.bytes} by the index; copy it again"
        )


def _fetch(place: str, shard: Shard, temporary: Path, told: str) -> None:
    url = within(place, shard.stored.basename)
    system = file_system(url)
    answered(lambda: system.get_file(url, str(temporary)), url, place=told)
    check_file(temporary, shard.stored, told)
    if shard.compression is not None:
        temporary.write_bytes(_decompressed(shard.compression, temporary.read_bytes(), told))
        check_file(temporary, shard.raw_data, told)


def _decompressed(compression: str, content: bytes, place: str) -> bytes:
    from streaming.base.compression import decompress

    try:
        return decompress(compression, content)
    except Exception as error:  # the packages behind it have errors of their own
        raise UserError(f"{place}: can't be decompressed ({first_line(error)})") from None


def check_file(file: Path, info: FileInfo, place: str) -> None:
    """Compares a file with what an index says of it: size, and digests where there are any.

    Args:
        place: starts every message.

    Raises:
        UserError: it is another.
    """
    size = file.stat().st_size
    if size != info.bytes:
        raise UserError(
            f"{place}: has {size} bytes, and {info.bytes} by the index; put it there again"
        )
    known = [name for name in info.hashes if name in _DIGESTS]
    for name in known or list(info.hashes)[:1]:
        if _digest(file, name, place) != info.hashes[name]:
            raise UserError(f"{place}: has another {name} than by the index; put it there again")


def _digest(file: Path, name: str, place: str) -> str:
    if name in _DIGESTS:
        with file.open("rb") as content:
            return hashlib.file_digest(content, name).hexdigest()
    need("streaming", "mosaicml-streaming", extra="mds", place=f"{place}: its digest {name} ")
    from streaming.base.hashing import get_hash

    try:
        return get_hash(name, file.read_bytes())
    except ValueError as error:
        raise UserError(f"{place}: {first_line(error)}") from None


# One shard ----------------------------------------------------------------------------------------


def sample_bounds(file: Path, shard: Shard, place: str) -> np.ndarray:
    """Where the samples of a shard begin and end: int64 (samples + 1,), in bytes of the file.

    Raises:
        UserError: they do so nowhere.
    """
    head = 4 * (shard.samples + 2)
    with file.open("rb") as content:
        told = np.frombuffer(content.read(head), dtype="<u4").astype(np.int64)
    # A file that was cut since it was looked at tells of fewer.
    fits = len(told) == shard.samples + 2 and told[0] == shard.samples
    bounds = told[1:]
    if (
        not fits
        or bounds[0] < head
        or bounds[-1] > shard.raw_data.bytes
        or (np.diff(bounds) < 0).any()
    ):
        raise damaged(place)
    return bounds


def damaged(place: str) -> UserError:
    """The error of a shard that is not as the format has it."""
    return UserError(
        f"{place}: damaged, or changed since this run began; put it there again, or write it anew"
    )


def read_samples(
    file: Path, rows: Sequence[int], bounds: np.ndarray, shard: Shard, column: str, place: str
) -> list[bytes]:
    """What a column holds in these samples.

    Args:
        bounds: see ``sample_bounds``.

    Raises:
        UserError: a sample is damaged.
    """
    found = []
    number = shard.column_names.index(column)
    variable = np.array([not size for size in shard.column_sizes])
    head = 4 * int(variable.sum())
    sizes = np.array([size or 0 for size in shard.column_sizes], dtype=np.int64)
    with file.open("rb", buffering=0) as content:
        for row in rows:
            begin, end = int(bounds[row]), int(bounds[row + 1])
            sample = os.pread(content.fileno(), end - begin, begin)
            if len(sample) != end - begin or len(sample) < head:
                raise damaged(place)
            sizes[variable] = np.frombuffer(sample[:head], dtype="<u4")
            if head + sizes.sum() != len(sample):
                raise damaged(place)
            first = head + int(sizes[:number].sum())
            found.append(sample[first : first + int(sizes[number])])
    return found


def read_columns(
    file: Path, bounds: np.ndarray, shard: Shard, names: Sequence[str], place: str
) -> dict[str, Labels]:
    """Whole columns of numbers or text, as text.

    Raises:
        UserError: a sample is damaged.
    """
    if not shard.samples:
        return {name: Labels((), np.zeros(0, dtype=np.int64)) for name in names}
    content = np.memmap(file, dtype=np.uint8, mode="r")
    begins, ends = bounds[:-1], bounds[1:]
    variable = [not size for size in shard.column_sizes]
    head = 4 * sum(variable)
    if ends[-1] > len(content) or (ends - begins < head).any():
        raise damaged(place)
    sizes, told = [], begins
    for size in shard.column_sizes:
        if size:
            sizes.append(np.full(shard.samples, size, dtype=np.int64))
        else:
            sizes.append(_gathered(content, told, 4).view("<u4")[:, 0].astype(np.int64))
            told = told + 4
    if (begins + head + sum(sizes) != ends).any():
        raise damaged(place)
    columns = {}
    for name in names:
        number = shard.column_names.index(name)
        first = begins + head + sum(sizes[:number], np.zeros(1, dtype=np.int64))
        columns[name] = _texts(content, first, sizes[number], shard.column_encodings[number], place)
    return columns


def _gathered(content: np.ndarray, begins: np.ndarray, size: int) -> np.ndarray:
    """uint8 (samples, size)."""
    return np.ascontiguousarray(content[begins[:, None] + np.arange(size)])


def _texts(
    content: np.ndarray, begins: np.ndarray, sizes: np.ndarray, encoding: str, place: str
) -> Labels:
    if encoding in NUMBERS:
        kind = np.dtype(NUMBERS[encoding])
        numbers = _gathered(content, begins, kind.itemsize).view(kind)[:, 0]
        values, codes = np.unique(numbers, return_inverse=True)
        return Labels(tuple(str(value) for value in values.tolist()), codes.astype(np.int64))
    cells = [
        content[a : a + n].tobytes() for a, n in zip(begins.tolist(), sizes.tolist(), strict=True)
    ]
    known = {cell: code for code, cell in enumerate(sorted(set(cells)))}
    try:
        values = tuple(cell.decode() for cell in known)
    except UnicodeDecodeError:
        raise damaged(place) from None
    return Labels(values, np.array([known[cell] for cell in cells], dtype=np.int64))


def image_file(content: bytes, encoding: str) -> bytes:
    """An image as a file: what is one stays as it is, and pixels (``pil``) become a PNG file.

    What is neither stays as it is, and whoever decodes it says so.
    """
    if encoding != "pil":
        return content
    width, height, length = np.frombuffer(content[:12].ljust(12, b"\0"), dtype="<u4").tolist()
    mode = content[12 : 12 + length].decode("ascii", "replace") if length < 8 else ""
    pixels = content[12 + length :]
    bits = {"1": 1, "LA": 16, "RGB": 24, "RGBA": 32, "I;16": 16}.get(mode, 8)
    # Looked at first: Pillow makes the image before it compares.
    if mode not in _MODES or not 0 < (width * bits + 7) // 8 * height == len(pixels):
        return content
    file = io.BytesIO()
    Image.frombytes(mode, (width, height), pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()
