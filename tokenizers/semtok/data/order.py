"""The order in which training sees the data, and the loader that follows it."""

import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from semtok.data.source import Crop, ImageBatch, ImageSource, Key
from semtok.errors import UserError


@dataclass(frozen=True)
class DataOrder:
    """Which images make up which step: a function of (seed, images seen).

    Every epoch is a new permutation of the whole set and steps run across epoch borders, so no
    image is repeated or left out within an epoch, and a resumed run continues the sequence.

    Attributes:
        num_images: size of the set.
        batch_size: images per optimiser step, over all processes and micro-batches.
        flip: mirror each image with probability one half, chosen anew in each epoch.
        block_size: see ``ImageSource.block_size``. An epoch then takes the blocks in random order and
            shuffles the images of ``BLOCKS_AT_A_TIME`` of them together.
        crop: where it is random, each image's place of the crop is chosen anew in each epoch.
    """

    num_images: int
    batch_size: int
    seed: int
    flip: bool
    block_size: int | tuple[int, ...] | None = None
    crop: Crop = "center"

    def keys(self, step: int, first: int = 0, num: int | None = None) -> list[Key]:
        """The global batch of a step (0-based), or a part of it, which costs what the part does.

        Args:
            first, num: which places of the global batch; by default all of them.
        """
        num = self.batch_size - first if num is None else num
        assert 0 <= first <= first + num <= self.batch_size, "not in the batch"
        keys: list[Key] = []
        position = step * self.batch_size + first
        while len(keys) < num:
            epoch, offset = divmod(position + len(keys), self.num_images)
            images, mirrored, crops = _epoch(self, epoch)
            chosen = slice(offset, offset + num - len(keys))
            places = [None] * len(images[chosen])
            if crops is not None:
                places = [(down, right) for down, right in crops[chosen].tolist()]
            seen = zip(images[chosen].tolist(), mirrored[chosen].tolist(), places, strict=True)
            keys += [Key(*each) for each in seen]
        return keys


@lru_cache(maxsize=1)
def _epoch(order: DataOrder, epoch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The images of an epoch, which are mirrored, and the places (N, 2) of their crops where these are random."""
    generator = torch.Generator().manual_seed(order.seed * 1_000_003 + epoch)
    images = permutation(order.num_images, order.block_size, generator)
    mirrored = torch.rand(order.num_images, generator=generator) < 0.5
    crops = None
    if order.crop == "random":
        crops = torch.rand(order.num_images, 2, generator=generator, dtype=torch.float64)
    return images, mirrored if order.flip else torch.zeros_like(mirrored), crops


BLOCKS_AT_A_TIME = 16


def permutation(
    num_images: int, block_size: int | tuple[int, ...] | None, generator: torch.Generator
) -> torch.Tensor:
    """Every image once, in random order: int64 (num_images,).

    Args:
        block_size: see ``ImageSource.block_size``; images of ``BLOCKS_AT_A_TIME`` blocks are shuffled together.
    """
    if block_size is None:
        return torch.randperm(num_images, generator=generator)
    sizes = block_size if isinstance(block_size, int) else list(block_size)
    blocks = torch.arange(num_images).split(sizes)
    shuffled = torch.randperm(len(blocks), generator=generator).tolist()
    parts = []
    for first in range(0, len(blocks), BLOCKS_AT_A_TIME):
        window = torch.cat([blocks[b] for b in shuffled[first : first + BLOCKS_AT_A_TIME]])
        parts.append(window[torch.randperm(len(window), generator=generator)])
    return torch.cat(parts)


@dataclass(frozen=True)
class BatchSlice:
    """This process's share of the global batch: ``accumulate`` micro-batches of equal size."""

    batch_size: int
    accumulate: int
    process_index: int
    num_processes: int

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.accumulate * self.num_processes)

    def first(self, micro_step: int) -> int:
        """Where this process's micro-batch starts in the global batch."""
        return (micro_step * self.num_processes + self.process_index) * self.micro_batch_size


def training_batches(
    source: ImageSource,
    order: DataOrder,
    share: BatchSlice,
    *,
    first_step: int,
    last_step: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[ImageBatch]:
    """Micro-batches of this process for steps [first_step, last_step), in order.

    Raises:
        UserError: while iterating, where the source raises it, also in a loader process.
    """

    def batches() -> Iterator[list[Key]]:
        for step in range(first_step, last_step):
            for micro_step in range(share.accumulate):
                yield order.keys(step, share.first(micro_step), share.micro_batch_size)

    return load_batches(source, batches(), num_workers=num_workers, pin_memory=pin_memory)


def load_batches(
    source: ImageSource, batches: Iterable[list[Key]], *, num_workers: int, pin_memory: bool
) -> Iterator[ImageBatch]:
    """Loads batches, given as keys, in their order; loader processes start in this call, and take them in turn.

    Keys of no image take a turn and give no batch.

    Raises:
        UserError: while iterating, where the source raises it, also in a loader process.
    """
    loader = DataLoader(
        _Batches(source),
        batch_size=None,
        sampler=batches,
        num_workers=num_workers,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # leaves the global one, which resuming restores, alone
        worker_init_fn=_leave_signals_to_the_run,
    )
    return _batches(iter(loader))


def _leave_signals_to_the_run(_: int) -> None:
    """Clusters and terminals signal loader processes too; without them a run could not end its step.

    A run that ends asks them to end, and by SIGTERM only where they don't: so the second one is obeyed.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def _batches(loaded: Iterator[ImageBatch | UserError | None]) -> Iterator[ImageBatch]:
    for batch in loaded:
        if isinstance(batch, UserError):
            # Loader processes end now, not when the traceback that holds this frame does.
            del loaded
            raise batch
        if batch is not None:
            yield batch


class _Batches(Dataset[Any]):
    """A source as a dataset of which one item is a whole batch."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __getitem__(self, keys: list[Key]) -> ImageBatch | UserError | None:
        try:
            return self.source.load_keys(keys) if keys else None
        except UserError as error:  # out of a loader process would come a page of traceback
            return error
