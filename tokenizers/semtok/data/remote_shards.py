"""Shards in an object store or behind a web server: each is fetched whole when its first row is asked for.

The order of training keeps to a few shards at a time (``ImageSource.block_size``), so that a node holds
those few and no more, whatever the size of the store.
"""

import hashlib
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from semtok.data.remote import file_system, reading_errors, reason
from semtok.data.shards import Shards, open_shard, shard_checksum
from semtok.errors import UserError
from semtok.extras import need
from semtok.storage import cache_folder, new_file

KEPT = 40
"""Shards on the local disk: those that the order draws from at a time, and the next ones."""


class RemoteShards(Shards):
    """A finished folder of shards at a URL that fsspec knows: http, s3, gs, hf.

    Args:
        url: of the folder.
        place: starts every message.
        kept: shards on the local disk, at least as many as the order draws from at a time.

    Raises:
        UserError: none there, or not to be reached.
    """

    def __init__(self, url: str, place: str, *, kept: int = KEPT) -> None:
        self.url, self.kept = url.rstrip("/"), kept
        digest = hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()
        self.local = cache_folder("shards") / digest
        self._held: OrderedDict[int, dict[str, tuple[Tensor, np.ndarray]]] = OrderedDict()
        super().__init__(Path(self.url), place)
        self._place = f"{place}: {self.url}"

    def _read_index(self) -> Any:
        return read_remote_json(f"{self.url}/index.json", "data.cache")

    def _open_all(self) -> None:
        """Nothing is there yet."""

    def _shard(self, number: int) -> dict[str, tuple[Tensor, np.ndarray]]:
        if number not in self._held:
            self._held[number] = open_shard(self._fetched(number))
        self._held.move_to_end(number)
        while len(self._held) > self.kept:
            old, _ = self._held.popitem(last=False)
            # What is mapped stays readable; another process that wants it fetches it again.
            (self.local / self.entries[old]["file"]).unlink(missing_ok=True)
        return self._held[number]

    def _fetched(self, number: int) -> Path:
        entry = self.entries[number]
        file = self.local / entry["file"]
        if file.is_file() and file.stat().st_size == entry["bytes"]:
            return file
        self.local.mkdir(parents=True, exist_ok=True)
        if entry["bytes"] > shutil.disk_usage(self.local).free:
            raise UserError(f"{self._place}: no room for a shard in {self.local}; set SEMTOK_CACHE")
        url = f"{self.url}/{entry['file']}"
        with new_file(file) as temporary:
            try:
                file_system(url).get_file(url, str(temporary))
            except reading_errors(url) as error:
                raise UserError(f"{self._place}: {entry['file']}: {reason(error)}") from None
            if shard_checksum(temporary) != entry["checksum"]:
                raise UserError(f"{self._place}: {entry['file']} came with another checksum")
        return file

    def verify(self) -> None:
        """Each shard is compared with its checksum when it is fetched."""


def is_url(place: object) -> bool:
    """Whether a place is not on this machine's disks."""
    return "://" in str(place)


def read_remote_json(url: str, place: str) -> Any:
    """What a JSON file at a URL holds.

    Raises:
        UserError: it can't be read.
    """
    need("fsspec", "fsspec", extra="data", place=f"{place}: {url} ")
    try:
        return json.loads(file_system(url).cat_file(url))
    except reading_errors(url) as error:
        raise UserError(f"{place}: {url}: {reason(error)}") from None
