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

from semtok.data.caches.shards import INDEX, Shards, open_shard, shard_checksum
from semtok.data.remote import answered, file_system
from semtok.errors import UserError
from semtok.extras import need
from semtok.storage import cache_folder, first_line, new_file

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
        self.url, self.kept, self._user_place = url.rstrip("/"), kept, place
        digest = hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()
        self.local = cache_folder("shards") / digest
        self._held: OrderedDict[int, dict[str, tuple[Tensor, np.ndarray]]] = OrderedDict()
        super().__init__(Path(self.url), place)

    def _named(self) -> str:
        return self.url

    def _read_index(self) -> Any:
        return read_remote_json(f"{self.url}/{INDEX}", self._user_place)

    def _open_all(self) -> None:
        """Nothing is there yet."""

    def _shard(self, number: int) -> dict[str, tuple[Tensor, np.ndarray]]:
        if number not in self._held:
            self._held[number] = self._opened(number)
        self._held.move_to_end(number)
        while len(self._held) > self.kept:
            old, _ = self._held.popitem(last=False)
            # What is mapped stays readable; another process that wants it fetches it again.
            (self.local / self.entries[old]["file"]).unlink(missing_ok=True)
        return self._held[number]

    def _opened(self, number: int) -> dict[str, tuple[Tensor, np.ndarray]]:
        for _ in range(3):
            try:
                return open_shard(self._fetched(number))
            except FileNotFoundError:  # another process of this machine had no more use for it
                continue
        return open_shard(self._fetched(number))

    def _fetched(self, number: int) -> Path:
        entry = self.entries[number]
        file = self.local / entry["file"]
        if file.is_file() and shard_checksum(file) == entry["checksum"]:
            return file
        self.local.mkdir(parents=True, exist_ok=True)
        self._remove_old()
        if entry["bytes"] > shutil.disk_usage(self.local).free:
            raise UserError(f"{self._place}: no room for a shard in {self.local}; set SEMTOK_CACHE")
        url = f"{self.url}/{entry['file']}"
        with new_file(file) as temporary:
            system = file_system(url)
            answered(
                lambda: system.get_file(url, str(temporary)),
                url,
                place=f"{self._place}: {entry['file']}",
            )
            if shard_checksum(temporary) != entry["checksum"]:
                raise UserError(f"{self._place}: {entry['file']} came with another checksum")
        return file

    def _remove_old(self) -> None:
        """Removes what earlier runs left, so that no more than ``kept`` lie there."""
        held = {self.entries[number]["file"] for number in self._held}
        others = [file for file in self.local.glob("*.safetensors") if file.name not in held]
        room = max(0, self.kept - len(held) - 1)
        newest = sorted(others, key=lambda file: (_changed(file), file.name), reverse=True)
        for file in newest[room:]:
            file.unlink(missing_ok=True)

    def _damaged(self, error: BaseException) -> str:
        if str(error).startswith(self._place):
            return str(error)
        return f"{self._place} is damaged ({first_line(error)}); put it there again"

    def verify(self) -> None:
        """Each shard is compared with its checksum when it is fetched."""


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:  # another process was faster
        return 0.0


def is_url(place: object) -> bool:
    """Whether a place is not on this machine's disks."""
    return "://" in str(place)


def read_remote_json(url: str, place: str) -> Any:
    """What a JSON file at a URL holds.

    Raises:
        UserError: it can't be read.
    """
    need("fsspec", "fsspec", extra="data", place=f"{place}: {url} ")
    system = file_system(url)
    content = answered(lambda: system.cat_file(url), url, place=f"{place}: {url}")
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{place}: {url}: {first_line(error)}") from None
