"""Where in tar files the images of a WebDataset lie, found in one pass over each and kept for the next time."""

import json
import os
import random
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from semtok.data.images.decoding import image_suffixes
from semtok.data.images.tar_members import HasLinks, Links, Place, find_links, read_samples
from semtok.data.left_out import LeftOut
from semtok.data.remote import StoredFile, file_system, reading_errors, reason
from semtok.errors import UserError
from semtok.progress import announce, progress
from semtok.storage import DAMAGE, as_damage, cache_folder, digest, first_line, new_file

_READ_AHEAD = 2**22  # bytes: small members come in few requests, large ones are passed over
_LAYOUT = "2"  # of the kept files
FIELDS = ("member", "offset", "size", "label")
"""What the index says of each image."""
Notes = list[tuple[str, int, list[str]]]
"""See ``LeftOut.entries``."""


def index_shards(
    shards: Sequence[StoredFile], image_key: str | None, left_out: LeftOut
) -> list[np.ndarray]:
    """Where the images of each shard lie; shards that were indexed before are not read again.

    Several processes that start together share the work, as each begins with other shards and leaves out what it
    finds done.

    Args:
        image_key: ending of the images, where samples hold several.
        left_out: what shards hold beside images and labels is added.

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

    with (
        progress("indexing tar files", len(todo), "files") as advance,
        ThreadPoolExecutor(16) as pool,
    ):
        made = pool.map(index, todo)
        try:
            for _ in made:
                advance(1)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # the first error is told at once
            raise
    indices = []
    for shard, file in zip(shards, files, strict=True):
        index, notes = _kept(shard, image_key, file)
        indices.append(index)
        left_out.include(notes)
    return indices


def _kept_at(shard: StoredFile, image_key: str | None) -> Path:
    key = digest(_LAYOUT, shard.place, shard.state, image_key or "")
    return cache_folder("tars") / f"{key}.npy"


def _made(shard: StoredFile, image_key: str | None, file: Path) -> tuple[np.ndarray, Notes]:
    index, left_out = _index(shard, image_key)
    notes = left_out.entries()
    with new_file(file) as temporary, open(temporary, "wb") as kept:
        np.save(kept, index)
        np.save(kept, np.array(json.dumps(notes)))
    return index, notes


def _kept(shard: StoredFile, image_key: str | None, file: Path) -> tuple[np.ndarray, Notes]:
    try:
        with as_damage(), open(file, "rb") as kept:
            index, notes = (np.load(kept, allow_pickle=False) for _ in range(2))
            return index, json.loads(str(notes))
    except DAMAGE:
        return _made(shard, image_key, file)


# One tar file -------------------------------------------------------------------------------------


def _index(shard: StoredFile, image_key: str | None) -> tuple[np.ndarray, LeftOut]:
    system = file_system(shard.place)
    reading = {"block_size": _READ_AHEAD, "cache_type": "readahead"}
    try:
        with system.open(shard.place, "rb", **reading) as file:
            try:
                rows, left_out = _rows(file, shard.place, image_key, None)
            except HasLinks:  # few files have any, and others are read once
                rows, left_out = _rows(file, shard.place, image_key, find_links(file))
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
    index = np.array(rows, dtype=[*fields, ("label", f"S{max(1, widths[1])}")])
    return index, left_out


def _rows(
    file: BinaryIO, place: str, image_key: str | None, links: Links | None
) -> tuple[list[tuple[bytes, int, int, bytes]], LeftOut]:
    """What the index says of each image, and what else there is."""
    rows, left_out = [], LeftOut()
    for sample in read_samples(file, place, links, left_out):
        image, label = _image_of(sample, image_key), _label_of(sample, left_out)
        _note_members(sample, image, left_out)
        if image is not None:
            name = image.name.encode("utf-8", "surrogateescape")
            rows.append((name, image.offset, image.size, label))
    return rows, left_out


def _image_of(sample: dict[str, Any], image_key: str | None) -> Place | None:
    if image_key is not None:
        return sample.get(image_key.lower())
    found = [ending for ending in sample if f".{ending}" in image_suffixes()]
    if len(found) > 1:
        raise _error(sample, f"holds several images; choose by data.image_key={found[0]}")
    return sample[found[0]] if found else None


def _label_of(sample: dict[str, Any], left_out: LeftOut) -> bytes:
    """What ``.cls`` holds, or ``label`` in ``.json``, as text; empty where there is neither."""
    name = f"{sample['__key__']}.json"
    try:
        given = sample["cls"].decode("utf-8-sig").strip().encode() if "cls" in sample else b""
        about = json.loads(sample["json"]) if "json" in sample else None
    except ValueError as error:
        raise _error(sample, f"its label can't be read ({first_line(error)}); mend it") from None
    label = about.get("label") if isinstance(about, dict) else None
    if given:
        if about is not None:
            left_out.add("members .json beside .cls", name)
        return given
    if label is None:
        if about is not None:
            keys = ", ".join(list(about)[:5]) if isinstance(about, dict) else type(about).__name__
            left_out.add("members .json without 'label'", f"{name}: {keys}")
        return b""
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise _error(sample, f"label {label!r} is neither a number nor text; mend it")
    return str(label).strip().encode()


def _note_members(sample: dict[str, Any], image: Place | None, left_out: LeftOut) -> None:
    """Counts what a sample holds beside an image and its label."""
    if image is None and ("cls" in sample or "json" in sample):
        left_out.add("samples with a label and no image", sample["__key__"])
    for ending, member in sample.items():
        if isinstance(member, Place) and member is not image:
            last = ending.rpartition(".")[2]
            is_image = f".{last}" in image_suffixes()
            kind = "images of other endings (data.image_key=…)" if is_image else f"members .{last}"
            left_out.add(kind, member.name)


def _error(sample: dict[str, Any], message: str) -> UserError:
    return UserError(f"data.path: {sample['__url__']}: sample '{sample['__key__']}': {message}")
