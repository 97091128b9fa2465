"""Random numbers that do not depend on how work is divided: of a training step, and of samples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """Random numbers of one step, as a function of (seed, step, position in the global batch).

    So they are the same whatever the number of processes or micro-batches, and resuming needs no
    saved generator. Each use has a name, and its own stream.

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

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        return self._slice(
            torch.randn(
                self.global_batch, *shape, generator=self._generator(name), device=self.device
            )
        )

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Uniform numbers in [0, 1), (B, *shape)."""
        return self._slice(
            torch.rand(
                self.global_batch, *shape, generator=self._generator(name), device=self.device
            )
        )

    def _slice(self, values: Tensor) -> Tensor:
        return values[self.first : self.first + self.num]

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{self.step}/{name}".encode(), digest_size=8).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest) >> 1)


class SampleNoise:
    """Random numbers that belong to samples, not to batches.

    Sample i of a seed sees the same numbers whatever it shares a batch or a process with.

    Args:
        seed: of the whole set.
        indices: which samples of the set these are.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._generators = []
        for index in indices:
            digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
            self._generators.append(
                torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            )

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (B, *shape)."""
        pinned = self.device.type == "cuda"  # only from there is it copied without waiting
        rows = torch.empty(len(self._generators), *shape, device="cpu", pin_memory=pinned)
        for row, generator in zip(rows, self._generators, strict=True):
            torch.randn(shape, generator=generator, out=row)
        return rows.to(self.device, non_blocking=pinned)
