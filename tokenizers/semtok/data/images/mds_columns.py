"""Labels and attributes of a set in the MDS format, which lie within its shards: read once, and kept.

The format has no place for them but the samples. So ``convert`` writes a small file of them beside the index, and of
sets without one all shards are read once.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from semtok.data.images.labels import Labels
from semtok.data.images.mds_index import MdsIndex
from semtok.data.images.mds_shards import MdsFiles, read_columns, sample_bounds
from semtok.data.remote import read_if_there, within
from semtok.progress import announce, progress
from semtok.storage import DAMAGE, as_damage, cache_folder, digest, new_file, write_tensors

COLUMNS = "columns.safetensors"
"""The file beside the index."""
_AT_ONCE = 8  # shards


class Columns(NamedTuple):
    """Columns of all samples of an index.

    Attributes:
        labels: of each column, by name.
        class_names: in the order of their numbers; None: nothing tells it.
    """

    labels: dict[str, Labels]
    class_names: tuple[str, ...] | None = None


def load_columns(files: MdsFiles, names: Sequence[str]) -> Columns:
    """Columns of numbers or text, from the file beside the index, from what was kept, or from the shards.

    Raises:
        UserError: a shard can't be read.
    """
    index = files.index
    if not names:
        return Columns({})
    beside = _beside(index)
    if beside is not None and set(names) <= set(beside.labels):
        return beside
    kept = [
        cache_folder("mds-columns")
        / f"{digest(index.place, index.state, str(n), *names)}.safetensors"
        for n in range(len(index.shards))
    ]
    found = [_kept(file) for file in kept]
    todo = [number for number, columns in enumerate(found) if columns is None]
    if todo:
        announce(
            f"reading {', '.join(names)} of {len(todo)} shards, once; kept in {cache_folder('mds-columns')}"
        )

    def read(number: int) -> dict[str, Labels]:
        shard = index.shards[number]
        place = f"data.path: {files.told(number)}"
        columns = files.opened(
            number,
            lambda file: read_columns(file, sample_bounds(file, shard, place), shard, names, place),
        )
        with new_file(kept[number]) as temporary:
            write_columns(temporary, Columns(columns), state=index.state)
        return columns

    with progress(f"reading {', '.join(names)}", len(todo), "shards") as advance:
        pool = ThreadPoolExecutor(_AT_ONCE)
        try:
            for number, columns in zip(todo, pool.map(read, todo), strict=True):
                found[number] = columns
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)  # the first error is told at once
    parts = [columns for columns in found if columns is not None]
    return Columns({name: joined_labels([part[name] for part in parts]) for name in names})


def joined_labels(parts: Sequence[Labels]) -> Labels:
    """The labels of parts that follow each other."""
    values = tuple(sorted({value for part in parts for value in part.values}))
    known = {value: code for code, value in enumerate(values)}
    codes = [
        np.array([known[value] for value in part.values], dtype=np.int64)[part.codes]
        for part in parts
        if len(part.codes)
    ]
    return Labels(values, np.concatenate(codes) if codes else np.zeros(0, dtype=np.int64))


def write_columns(path: Path, columns: Columns, *, state: str) -> None:
    """Writes columns of an index.

    Args:
        state: of the index.
    """
    about = {
        "state": state,
        "values": json.dumps({name: labels.values for name, labels in columns.labels.items()}),
        "class_names": json.dumps(columns.class_names),
    }
    codes = {
        name: torch.from_numpy(labels.codes.astype(np.int32))
        for name, labels in columns.labels.items()
    }
    write_tensors(path, codes, about)


def _beside(index: MdsIndex) -> Columns | None:
    """What the file beside the index holds; None: there is none, or it is of other shards or damaged."""
    content = read_if_there(within(index.place, COLUMNS))
    if content is None:
        return None
    with suppress(*DAMAGE), as_damage():
        return _columns(content, index.state, index.num_samples)
    return None


def _kept(file: Path) -> dict[str, Labels] | None:
    with suppress(*DAMAGE), as_damage():  # then the shard is read anew
        return _columns(file.read_bytes(), None, None).labels
    return None


def _columns(content: bytes, state: str | None, num_samples: int | None) -> Columns:
    """What a file of columns holds.

    Raises:
        one of ``DAMAGE``: it is damaged, of another state, or of another number of samples.
    """
    length = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + length])["__metadata__"]
    if state is not None and about["state"] != state:
        raise ValueError("of other shards")
    values: Mapping[str, list[str]] = json.loads(about["values"])
    labels = {}
    for name, codes in safetensors.torch.load(content).items():
        known = tuple(values[name])
        fits = num_samples is None or tuple(codes.shape) == (num_samples,)
        within_ = codes.dtype == torch.int32 and (
            not len(codes) or (int(codes.min()) >= 0 and int(codes.max()) < len(known))
        )
        if not fits or not within_ or not all(isinstance(value, str) for value in known):
            raise ValueError("damaged")
        labels[name] = Labels(known, codes.numpy().astype(np.int64))
    class_names = json.loads(about["class_names"])
    return Columns(labels, None if class_names is None else tuple(map(str, class_names)))
