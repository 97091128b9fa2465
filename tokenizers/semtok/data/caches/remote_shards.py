"""Shards in an object store or behind a web server: each is fetched whole when its first row is asked for.

The order of training keeps to a few shards at a time (``ImageSource.block_size``), so that a node holds
those few and no more, whatever the size of the store.
"""

from functools import cached_property
from pathlib import Path
from typing import Any

from semtok.data.caches.shards import INDEX, Shard, Shards, open_shard, shard_checksum
from semtok.data.local_copies import LocalCopies
from semtok.data.remote import answered, file_system, read_remote_json, within
from semtok.errors import UserError
from semtok.storage import cache_folder, digest

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

    _way_out = "put it there again"

    def __init__(self, url: str, place: str, *, kept: int = KEPT) -> None:
        self.url, self.kept, self._user_place = url.rstrip("/"), kept, place
        # Another signature opens the same files.
        self.local = cache_folder("shards") / digest(url.partition("?")[0].rstrip("/"), size=8)
        super().__init__(self.url, place)

    def _read_index(self) -> Any:
        return read_remote_json(within(self.url, INDEX), self._user_place)

    @cached_property
    def _copies(self) -> LocalCopies:
        most_bytes = self.kept * max(entry["bytes"] for entry in self.entries)
        return LocalCopies(self.local, most_bytes, place=self._place)

    def _check_files(self) -> None:
        """Nothing is there yet."""

    def local_file(self, number: int) -> Path:
        """Where a shard lies once it was fetched; another content has another name."""
        entry = self.entries[number]
        name = digest(f"{entry['file']} {entry['checksum']}")
        return self.local / f"{name}.safetensors"

    def _shard(self, number: int) -> Shard:
        if number not in self._held:
            self._held[number] = self._opened(number)
        self._held.move_to_end(number)
        while len(self._held) > self.kept:
            old, _ = self._held.popitem(last=False)
            # What is mapped stays readable; another process that wants it fetches it again.
            self.local_file(old).unlink(missing_ok=True)
        return self._held[number]

    def _opened(self, number: int) -> Shard:
        for _ in range(10):
            try:
                file = self._fetched(number)
                return self._like_others(open_shard(file, self._num_rows(number)), file)
            except (FileNotFoundError, RuntimeError):  # torch's, where it goes while it is opened
                if self.local_file(number).is_file():
                    raise
                # Another process of this machine had no more use for it.
        raise UserError(
            f"{self._place}: others remove shards from {self.local} before they are read; set another SEMTOK_CACHE"
        )

    def _fetched(self, number: int) -> Path:
        entry, file = self.entries[number], self.local_file(number)
        if file.is_file() and shard_checksum(file) != entry["checksum"]:
            file.unlink(missing_ok=True)
        url, place = within(self.url, entry["file"]), f"{self._place}: {entry['file']}"
        system = file_system(url)

        def fetch(temporary: Path) -> None:
            answered(lambda: system.get_file(url, str(temporary)), url, place=place)
            if shard_checksum(temporary) != entry["checksum"]:
                raise UserError(f"{place} came with another checksum")

        held = {self.local_file(number) for number in self._held}
        return self._copies.make(file.name, entry["bytes"], fetch, held=held)

    def verify(self) -> None:
        """Each shard is compared with its checksum when it is fetched."""
