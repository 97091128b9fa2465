"""Random numbers that do not depend on how work is divided: of a training step, and of samples."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_CHUNK = 8  # places of the global batch that share a generator


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, as a function of (seed, step, place in the global batch).

    So they are the same whatever the number of processes or micro-batches, and resuming needs no
    saved generator. Each use has a name, and its own stream. Places are drawn in chunks, each with a
    generator of its own, and a process draws only the chunks in which it has places.

    Attributes:
        global_batch: images per optimiser step, over all processes and micro-batches.
        first, num: this micro-batch's slice of the global batch.
    """

    seed: int
    step: int
    global_batch: int
    first: int
    num: int
    device: torch.device

    def __post_init__(self) -> None:
        assert 0 <= self.first <= self.first + self.num <= self.global_batch, "not in the batch"

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        return self._draw(name, shape, torch.Tensor.normal_)

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return self._draw(name, shape, torch.Tensor.uniform_)

    def uniform_of_step(self, name: str) -> Tensor:
        """One uniform number in [0, 1) for all places of the step, (1,)."""
        generator = torch.Generator(self.device).manual_seed(_seed(self.seed, self.step, name))
        return torch.rand(1, generator=generator, device=self.device)

    def number_of_step(self, name: str) -> float:
        """One uniform number in [0, 1) of the step, for what the host decides: no device is asked or waited for."""
        return float(replace(self, device=torch.device("cpu")).uniform_of_step(name))

    def of_previous(self) -> "Draws":
        """Those of the place before the first one, of the last place where that is the first of all."""
        return replace(self, first=(self.first - 1) % self.global_batch, num=1)

    def _draw(self, name: str, shape: tuple[int, ...], fill: Callable[..., Tensor]) -> Tensor:
        begin, end = self.first // _CHUNK, -(-(self.first + self.num) // _CHUNK)
        rows = torch.empty((end - begin) * _CHUNK, *shape, device=self.device)
        generator = torch.Generator(self.device)
        for chunk, own in enumerate(rows.split(_CHUNK), start=begin):
            fill(own, generator=generator.manual_seed(_seed(self.seed, self.step, name, chunk)))
        offset = self.first - begin * _CHUNK
        return rows[offset : offset + self.num]


class SampleNoise:
    """Random numbers that belong to samples, not to batches.

    Sample i of a seed sees the same numbers whatever it shares a batch or a process with.

    Args:
        seed: of the whole set.
        indices: which samples of the set these are.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._generators = [torch.Generator().manual_seed(_seed(seed, index)) for index in indices]

    @classmethod
    def of_seeds(cls, seeds: Sequence[int], device: torch.device) -> "SampleNoise":
        """Samples that each have a seed of their own, of whose set they are the first."""
        noise = cls(0, (), device)
        noise._generators = [torch.Generator().manual_seed(_seed(seed, 0)) for seed in seeds]
        return noise

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        pinned = self.device.type == "cuda"  # only from there is it copied without waiting
        rows = torch.empty(len(self._generators), *shape, device="cpu", pin_memory=pinned)
        for row, generator in zip(rows, self._generators, strict=True):
            torch.randn(shape, generator=generator, out=row)
        return rows.to(self.device, non_blocking=pinned)


def _seed(*what: int | str) -> int:
    """A generator's seed for what its numbers are for."""
    digest = hashlib.blake2b("/".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
