"""Writes images in the MDS format of MosaicML Streaming: as its ``MDSWriter`` would, to the byte, and so that it goes
on where it was stopped.

Shards are written one after the other, each whole or not there, with a note of what the index is to say of it and of
the image that comes next. The index is written last.
"""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from semtok.data.images.encoded import StoredImages
from semtok.data.images.labels import UNLABELLED, Labels
from semtok.data.images.mds_columns import COLUMNS, Columns, write_columns
from semtok.data.images.mds_index import INDEX, LABEL, MdsIndex, Shard, read_index
from semtok.data.images.mds_shards import check_file
from semtok.data.remote import LASTING, persist
from semtok.errors import UserError
from semtok.progress import progress
from semtok.storage import DAMAGE, as_damage, new_file, read_json, write_json

IMAGE = "image"
_HASH = "sha256"
_AT_ONCE = 64  # images that are read
LARGEST = 2**31
"""Bytes of an image, and of a shard that holds several: the format tells of places as uint32."""


class MdsWriter:
    """Writes the images of a source, as they are encoded, with their labels and attributes.

    Args:
        source: the images, in its order.
        folder: of the shards.
        shard_bytes: at most, unless one image is larger.
    """

    def __init__(self, source: StoredImages, folder: Path, *, shard_bytes: int) -> None:
        self.source, self.folder, self.shard_bytes = source, folder, shard_bytes
        names = source.class_names
        self._is_labelled = names != UNLABELLED
        are_numbers = names == tuple(map(str, range(len(names))))
        self.columns = {IMAGE: "bytes"} | dict.fromkeys(source.attributes, "str")
        if self._is_labelled:
            self.columns[LABEL] = "int" if are_numbers else "str"
        taken = {IMAGE, LABEL} & set(source.attributes)
        if taken:
            raise UserError(
                f"data.attributes: '{min(taken)}' is the name of another column; rename the attribute"
            )
        self.columns = dict(sorted(self.columns.items()))

    def write(self, what: str) -> MdsIndex:
        """Writes what is not there yet.

        Args:
            what: is written, for a line of progress.

        Returns:
            the index of what is there now.

        Raises:
            UserError: an image can't be read, or is too large.
            OSError: the disk can't be written, or is full; the same call goes on.
        """
        entries, first = self._done()
        with progress(what, len(self.source)) as advance:
            advance(first)
            samples: list[bytes] = []
            size = self._empty_size
            for row, sample in enumerate(self._samples(first), start=first):
                if samples and size + len(sample) + 4 > self.shard_bytes:
                    entries.append(self._write_shard(len(entries), samples, row))
                    advance(len(samples))
                    samples, size = [], self._empty_size
                samples.append(sample)
                size += len(sample) + 4
            if samples:
                entries.append(self._write_shard(len(entries), samples, len(self.source)))
                advance(len(samples))
        return self._finish(entries)

    def _done(self) -> tuple[list[dict[str, Any]], int]:
        """What the index is to say of shards that are there, and the image that comes next."""
        entries, first = [], 0
        while True:
            number = len(entries)
            try:
                note = read_json(self._note(number))
                with as_damage():
                    shard = Shard.model_validate_json(json.dumps(note["shard"]))
                    following = int(note["next"])
                check_file(self._file(number), shard.raw_data, "")
                first = following
            except DAMAGE:  # UserError is one: the note or the shard is not there, or another
                return entries, first
            entries.append(note["shard"])

    def _write_shard(self, number: int, samples: list[bytes], following: int) -> dict[str, Any]:
        sizes = np.array([0, *map(len, samples)], dtype=np.int64)
        head, about = 4 * (len(samples) + 2), self._about
        bounds = sizes.cumsum() + head + len(about)
        parts = [np.uint32(len(samples)).tobytes(), bounds.astype("<u4").tobytes(), about, *samples]
        digest = hashlib.new(_HASH)
        file = self._file(number)
        with new_file(file) as temporary, temporary.open("wb") as output:
            for part in parts:
                digest.update(part)
                output.write(part)
        raw = {
            "basename": file.name,
            "bytes": int(bounds[-1]),
            "hashes": {_HASH: digest.hexdigest()},
        }
        shard = {"samples": len(samples), "raw_data": raw, "zip_data": None} | self._settings
        write_json(self._note(number), {"shard": shard, "next": following})
        return shard

    def _finish(self, entries: list[dict[str, Any]]) -> MdsIndex:
        """The index is there when all else is."""
        shards = tuple(Shard.model_validate_json(json.dumps(entry)) for entry in entries)
        state = MdsIndex.state_of(shards)
        with new_file(self.folder / COLUMNS) as temporary:
            write_columns(temporary, self._known(), state=state)
            temporary.chmod(0o644)  # safetensors closes its files to others
        with new_file(self.folder / INDEX) as temporary:
            temporary.write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))
        self.remove_notes(len(entries))
        index = read_index(str(self.folder))
        assert index is not None and index.state == state
        return index

    def remove_notes(self, num_shards: int) -> None:
        """Removes what was noted of shards, which the index tells now."""
        for number in range(num_shards):
            self._note(number).unlink(missing_ok=True)

    def _known(self) -> Columns:
        """Labels and attributes, for the file beside the index."""
        labels, names = {}, None
        if self._is_labelled:
            names = self.source.class_names
            labels[LABEL] = Labels(names, self.source.labels.numpy())
        for name, categories in self.source.attributes.items():
            labels[name] = Labels(categories, self.source.attribute_values(name).numpy())
        return Columns(labels, names)

    def _samples(self, first: int) -> Iterator[bytes]:
        """Encoded samples from one on."""
        fixed = {name: columns.values for name, columns in self._known().labels.items()}
        codes = {name: columns.codes for name, columns in self._known().labels.items()}
        with ThreadPoolExecutor(16) as pool:
            for start in range(first, len(self.source), _AT_ONCE):
                rows = range(start, min(start + _AT_ONCE, len(self.source)))
                images = pool.map(_bytes, self.source.contents(rows))
                for row, image in zip(rows, images, strict=True):
                    if len(image) > LARGEST:
                        raise UserError(
                            f"{self.source.image_name(row)}: {len(image)} bytes are more than a shard can hold; "
                            "leave it out"
                        )
                    cells = {name: fixed[name][codes[name][row]] for name in codes}
                    yield self._sample(image, cells)

    def _sample(self, image: bytes, cells: dict[str, str]) -> bytes:
        sizes, contents = [], []
        for name, encoding in self.columns.items():
            if encoding == "int":
                content = np.int64(cells[name]).tobytes()
            else:
                content = image if name == IMAGE else cells[name].encode()
                sizes.append(len(content))
            contents.append(content)
        return np.array(sizes, dtype="<u4").tobytes() + b"".join(contents)

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "version": 2,
            "format": "mds",
            "compression": None,
            "hashes": [_HASH],
            "size_limit": self.shard_bytes,
            "column_names": list(self.columns),
            "column_encodings": list(self.columns.values()),
            "column_sizes": [
                8 if encoding == "int" else None for encoding in self.columns.values()
            ],
        }

    @property
    def _about(self) -> bytes:
        return json.dumps(self._settings, sort_keys=True).encode()

    @property
    def _empty_size(self) -> int:
        return 8 + len(self._about)

    def _file(self, number: int) -> Path:
        return self.folder / f"shard.{number:05}.mds"

    def _note(self, number: int) -> Path:
        return self.folder / f".shard.{number:05}.json"


def _bytes(content: Path | bytes) -> bytes:
    if not isinstance(content, Path):
        return content
    try:
        return persist(content.read_bytes, str(content))
    except LASTING as error:
        raise UserError(f"data.path: {content}: {error.strerror}; put it back") from None
    except OSError as error:
        raise UserError(f"data.path: {content}: {error.strerror}; see to the disk") from None
