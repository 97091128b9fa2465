"""One pass over images: for what is measured, validated or computed once."""

from collections.abc import Iterator, Sequence
from itertools import chain, zip_longest

import numpy as np
import torch

from semtok.data.order import load_batches
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.processes import gather, num_processes, process_index
from semtok.progress import progress


def read_images(
    source: ImageSource,
    keys: Sequence[Key],
    *,
    batch_size: int,
    what: str | None = None,
    together: int | None = None,
) -> Iterator[tuple[list[int], ImageBatch]]:
    """Reads images once over all processes: each loads its share, and none of another's.

    A share is consecutive in ``keys``; where images lie in blocks, those of a block come one after the other, in
    one process, and from one of its loader processes, so that each block is fetched once. Processes go on batch
    by batch, and one that failed is noticed by all before the next; call this within ``processes.together``.

    Args:
        keys: images of the source; the same in all processes.
        what: is done with them, for a line of progress; None: there is none.
        together: so many consecutive keys are read by one process, in batches of their own; None: no keys
            belong together.

    Yields:
        Where the images of the batch stand in ``keys``, and the images.

    Raises:
        UserError: where the source raises it, or another process failed.
    """
    order, groups = _reading_order(source, keys, together)
    workers = 0 if source.is_cheap else source.num_workers
    lanes = max(1, workers) if source.block_size is not None else 1
    share = _split(groups, num_processes())[process_index()]
    parts = [
        _batches(order[share][lane], groups[share][lane], batch_size, together is not None)
        for lane in _split(groups[share], lanes)
    ]
    # Loader processes take batches in turn, so that each gets a lane for itself.
    plan = list(chain.from_iterable(zip_longest(*parts, fillvalue=[])))
    loaded = load_batches(
        source,
        [[keys[i] for i in batch] for batch in plan],
        num_workers=min(workers, len(plan)),
        pin_memory=torch.cuda.is_available(),
    )
    own = [batch for batch in plan if batch]
    with progress(what, len(keys)) as advance:
        for number in range(max(gather(len(own)))):
            sizes = gather(len(own[number]) if number < len(own) else 0)
            if number < len(own):
                yield own[number], next(loaded)
            advance(sum(sizes))


def chosen_images(
    source: ImageSource, num_images: int, *, batch_size: int, what: str | None = None
) -> Iterator[ImageBatch]:
    """``source.chosen(num_images)``, unflipped and cropped at the centre, all in this process and in that order.

    Args:
        what: is done with them, for a line of progress; None: there is none.
    """
    chosen = source.chosen(num_images)
    # Each loader process would fetch the blocks anew.
    workers = 0 if source.is_cheap or source.block_size is not None else source.num_workers
    firsts = range(0, len(chosen), batch_size)
    loaded = load_batches(
        source,
        [[Key(index) for index in chosen[first : first + batch_size]] for first in firsts],
        num_workers=min(workers, len(firsts)),
        pin_memory=torch.cuda.is_available(),
    )
    with progress(what, len(chosen)) as advance:
        for batch in loaded:
            yield batch
            advance(len(batch.labels))


def _reading_order(
    source: ImageSource, keys: Sequence[Key], together: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Places in ``keys`` in the order of reading, and of each the number of the group that it is of, rising."""
    places = np.arange(len(keys))
    if together is not None:
        return places, places // together
    if source.block_size is None:
        return places, places
    indices = np.array([key.index for key in keys], dtype=np.int64)
    if isinstance(source.block_size, int):
        blocks = indices // source.block_size
    else:
        blocks = np.searchsorted(np.cumsum(source.block_size), indices, side="right")
    _, first, inverse = np.unique(blocks, return_index=True, return_inverse=True)
    seen = first[inverse]  # where in ``keys`` the block is met first
    order = np.argsort(seen, kind="stable")
    return order, seen[order]


def _split(groups: np.ndarray, num_parts: int) -> list[slice]:
    """Consecutive parts of about equal size that tear no group apart; some may be empty."""
    starts = np.append(np.flatnonzero(np.diff(groups, prepend=-1)), len(groups))
    wanted = np.arange(num_parts + 1) * len(groups) // num_parts
    after = np.searchsorted(starts, wanted)
    before = np.maximum(after - 1, 0)
    is_nearer = wanted - starts[before] < starts[after] - wanted
    cuts = np.where(is_nearer, starts[before], starts[after]).tolist()
    return [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def _batches(
    places: np.ndarray, groups: np.ndarray, batch_size: int, apart: bool
) -> list[list[int]]:
    """Consecutive places, a list for each batch.

    Args:
        apart: no batch holds places of two groups.
    """
    starts = np.flatnonzero(np.diff(groups)) + 1 if apart else []
    return [
        part[first : first + batch_size].tolist()
        for part in np.split(places, starts)
        for first in range(0, len(part), batch_size)
    ]
