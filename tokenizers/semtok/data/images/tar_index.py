"""Where in tar files the images of a WebDataset lie, found in one pass over each and kept for the next time."""

import json
import os
import random
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from semtok.data.images.encoded import announce
from semtok.data.remote import StoredFile, file_system, reading_errors, reason
from semtok.errors import UserError
from semtok.storage import DAMAGE, cache_folder, digest, first_line, new_file

_ENDINGS = tuple(ending.removeprefix(".") for ending in IMG_EXTENSIONS)
_BLOCK = 512  # bytes; of tar
_READ_AHEAD = 2**22  # bytes: small members come in few requests, large ones are passed over
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that WebDataset keeps for itself
_LAYOUT = "1"  # of the kept files
FIELDS = ("member", "offset", "size", "label")
"""What the index says of each image."""


def index_shards(shards: Sequence[StoredFile], image_key: str | None) -> list[np.ndarray]:
    """Where the images of each shard lie; shards that were indexed before are not read again.

    Several processes that start together share the work, as each begins with other shards and leaves out what it
    finds done.

    Args:
        image_key: ending of the images, where samples hold several.

    Returns:
        for each shard, in its order: ``member``, the name in the archive, and ``label``, both in UTF-8, a label empty
        where there is none; ``offset`` and ``size`` of the image, int64, in bytes of the file.

    Raises:
        UserError: a file is damaged, cut short, or no tar file; a sample holds several images; labels of a sample
            can't be read.
    """
    files = [_kept_at(shard, image_key) for shard in shards]
    todo = [i for i, file in enumerate(files) if not file.is_file()]
    if todo:
        announce(
            f"indexing {len(todo)} tar files, once; the index is kept in {cache_folder('tars')}"
        )
    random.Random(os.getpid()).shuffle(todo)

    def index(i: int) -> None:
        if not files[i].is_file():
            _made(shards[i], image_key, files[i])

    with ThreadPoolExecutor(16) as pool:
        made, quiet = pool.map(index, todo), not sys.stderr.isatty()
        try:
            for _ in tqdm(made, desc="tar files", total=len(todo), disable=quiet):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first error is told at once
            raise
    return [_kept(shard, image_key, file) for shard, file in zip(shards, files, strict=True)]


def _kept_at(shard: StoredFile, image_key: str | None) -> Path:
    key = digest(_LAYOUT, shard.place, shard.state, image_key or "")
    return cache_folder("tars") / f"{key}.npy"


def _made(shard: StoredFile, image_key: str | None, file: Path) -> np.ndarray:
    index = _index(shard, image_key)
    with new_file(file) as temporary:
        np.save(temporary, index)
    return index


def _kept(shard: StoredFile, image_key: str | None, file: Path) -> np.ndarray:
    try:
        return np.load(file, allow_pickle=False)
    except DAMAGE:
        return _made(shard, image_key, file)


# One tar file -------------------------------------------------------------------------------------


def _index(shard: StoredFile, image_key: str | None) -> np.ndarray:
    rows = []
    system = file_system(shard.place)
    reading = {"block_size": _READ_AHEAD, "cache_type": "readahead"}
    try:
        with system.open(shard.place, "rb", **reading) as file:
            for sample in _samples(file, shard.place):
                image = _image_of(sample, image_key)
                if image is not None:
                    name = image.name.encode("utf-8", "surrogateescape")
                    rows.append((name, image.offset_data, image.size, _label_of(sample)))
    except UserError:
        raise
    except tarfile.TarError as error:
        raise UserError(
            f"data.path: {shard.place}: damaged, cut short, or no uncompressed tar file "
            f"({first_line(error)}); fetch it again or write it anew"
        ) from None
    except reading_errors(shard.place) as error:
        raise UserError(f"data.path: {shard.place}: {reason(error)}") from None
    widths = [max((len(row[column]) for row in rows), default=1) for column in (0, 3)]
    fields = [("member", f"S{widths[0]}"), ("offset", "<i8"), ("size", "<i8")]
    return np.array(rows, dtype=[*fields, ("label", f"S{max(1, widths[1])}")])


def _samples(file: BinaryIO, place: str) -> Iterator[dict[str, Any]]:
    """What WebDataset makes one sample of: neighbours whose names are equal up to the first dot.

    Yields:
        by ending, where a member lies, or of labels what it holds.
    """
    from webdataset.tariterators import group_by_keys

    def members() -> Iterator[dict[str, Any]]:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # of millions, they would fill the memory
                if member.isreg() and not _METADATA.match(member.name):
                    is_label = member.name.lower().endswith((".cls", ".json"))
                    data = archive.extractfile(member).read() if is_label else member
                    yield {"fname": member.name, "data": data, "__url__": place}
            file.seek(archive.offset)  # tarfile takes damage between members for the end
            if file.read(_BLOCK) != bytes(_BLOCK):
                raise tarfile.ReadError(f"no end mark at byte {archive.offset}")

    try:
        yield from group_by_keys(members())
    except ValueError as error:  # its arguments after the first are what WebDataset was at
        raise ValueError(error.args[0]) from None


def _image_of(sample: dict[str, Any], image_key: str | None) -> tarfile.TarInfo | None:
    if image_key is not None:
        return sample.get(image_key.lower())
    found = [ending for ending in sample if ending in _ENDINGS]
    if len(found) > 1:
        raise _error(sample, f"holds several images; choose by data.image_key={found[0]}")
    return sample[found[0]] if found else None


def _label_of(sample: dict[str, Any]) -> bytes:
    """What ``.cls`` holds, or ``label`` in ``.json``, as text; empty where there is neither."""
    try:
        if "cls" in sample:
            return sample["cls"].decode("utf-8").strip().encode()
        about = json.loads(sample["json"]) if "json" in sample else None
    except ValueError as error:
        raise _error(sample, f"its label can't be read ({first_line(error)}); mend it") from None
    label = about.get("label") if isinstance(about, dict) else None
    if label is None:
        return b""
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise _error(sample, f"label {label!r} is neither a number nor text; mend it")
    return str(label).strip().encode()


def _error(sample: dict[str, Any], message: str) -> UserError:
    return UserError(f"data.path: {sample['__url__']}: sample '{sample['__key__']}': {message}")
