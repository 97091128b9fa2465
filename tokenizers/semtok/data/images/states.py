"""What a run notes of the images that it begins with, so that a resumed one finds them as they were."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np

from semtok.errors import printable

MOST_NAMED = 10_000
"""Of so many files each is noted; of more, each folder as a whole."""
_AT_ONCE = 512  # files that a thread asks for


def folder_states(root: Path, names: Sequence[bytes]) -> dict[str, str]:
    """The state of files by their names, or where they are many, by folder.

    Names and sizes count, and neither when a file was written nor where the folder lies: it may be moved or copied.

    Args:
        names: of the files, relative to ``root``.
    """
    sized = zip(names, _sizes(root, names), strict=True)
    if len(names) <= MOST_NAMED:
        return {printable(os.fsdecode(name)): f"{size} bytes" for name, size in sized}
    digests: dict[bytes, hashlib._Hash] = {}
    counts: dict[bytes, int] = {}
    for name, size in sized:
        folder = name.rpartition(b"/")[0]
        if folder not in digests:
            digests[folder], counts[folder] = hashlib.blake2b(digest_size=8), 0
        digests[folder].update(b"%s %d\n" % (name, size))
        counts[folder] += 1
    return {
        f"{printable(os.fsdecode(folder))}/": f"{counts[folder]} images {digest.hexdigest()}"
        for folder, digest in digests.items()
    }


def _sizes(root: Path, names: Sequence[bytes]) -> Iterator[int]:
    """Bytes of each file; -1 where it is not there."""
    place = os.fsencode(root)

    def sizes(first: int) -> list[int]:
        found = []
        for row in range(first, min(first + _AT_ONCE, len(names))):
            try:
                found.append(os.stat(os.path.join(place, names[row])).st_size)
            except OSError:
                found.append(-1)
        return found

    with ThreadPoolExecutor(
        16
    ) as pool:  # a file system behind a network answers each in a millisecond
        yield from chain.from_iterable(pool.map(sizes, range(0, len(names), _AT_ONCE)))


def index_state(index: np.ndarray) -> str:
    """The state of a tar file, from what its index says of its images: names, labels, places and sizes."""
    digest = hashlib.blake2b(digest_size=8)
    for field in index.dtype.names or ():
        values = index[field]
        # As text, so that it does not depend on how wide the longest one is.
        content = b"\n".join(values.tolist()) if values.dtype.kind == "S" else values.tobytes()
        digest.update(content + b"\0")
    return f"{len(index)} images {digest.hexdigest()}"


def joined(states: Iterable[tuple[str, str]]) -> dict[str, str]:
    """States by name; files that share a name, in several folders, are told of together."""
    known: dict[str, str] = {}
    for name, state in states:
        known[name] = f"{known[name]}, {state}" if name in known else state
    return known
