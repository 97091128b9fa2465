"""Copies of files of a store on this machine's disk: whole or not there, checked, and no more than asked for.

Processes of one machine share them. One fetches a file, and those that want it too wait for it. The lock is the
system's, so that it ends with the process, however that ends.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Collection
from pathlib import Path

from semtok.errors import UserError
from semtok.lock import one_by_one
from semtok.storage import cache_folder, digest, new_file

_LEFT_BEHIND = 3600.0
"""Seconds after which a temporary file is one of a process that was killed."""


class LocalCopies:
    """A folder of copies, of which the oldest make room for the next.

    Args:
        folder: where they lie; nothing else does.
        most_bytes: of all of them together; a file that is larger alone is kept alone.
        place: the store, which starts every message.
    """

    def __init__(self, folder: Path, most_bytes: float, *, place: str) -> None:
        self.folder, self.most_bytes, self._place = folder, most_bytes, place

    def make(
        self,
        name: str,
        num_bytes: int,
        write: Callable[[Path], object],
        *,
        held: Collection[Path] = (),
    ) -> Path:
        """A file that was there or is made now.

        Args:
            name: of the file; another content has another name.
            num_bytes: of the file.
            write: makes it at a temporary place, and raises where it comes out otherwise.
            held: files that don't make room.

        Raises:
            UserError: there is no room, or ``write`` raises it.
        """
        file = self.folder / name
        with one_by_one(cache_folder("locks") / digest(str(file), size=8)):
            if not file.is_file():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._make_room(num_bytes, held)
                if num_bytes > shutil.disk_usage(self.folder).free:
                    raise UserError(
                        f"{self._place}: no room for a shard in {self.folder}; set SEMTOK_CACHE"
                    )
                # fsspec's own caches write in place, where another process would read half a file.
                with new_file(file) as temporary:
                    write(temporary)
                # Others may have come meanwhile, for which room was made at the same time.
                self._make_room(0, {*held, file})
        return file

    def _make_room(self, num_bytes: int, held: Collection[Path]) -> None:
        """For so many more bytes, among what this and earlier runs left."""
        copies: list[tuple[float, str, int]] = []
        for file in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                about = file.stat()
                if not file.name.startswith("."):
                    copies.append((about.st_mtime, file.name, about.st_size))
                elif time.time() - about.st_mtime > _LEFT_BEHIND:
                    file.unlink()
        left = sum(size for _, _, size in copies) + num_bytes
        for _, name, size in sorted(copies):
            if left > self.most_bytes and self.folder / name not in held:
                (self.folder / name).unlink(missing_ok=True)
                left -= size
