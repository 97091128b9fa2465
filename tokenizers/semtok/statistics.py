"""Means, variances and covariances of data that never stands in memory whole."""

import torch
from torch import Tensor

from semtok.processes import gather, num_processes


def are_sound(mean: Tensor, std: Tensor) -> bool:
    """Whether latents that are standardised by these are neither 0 nor no numbers. Of tensors without contents nothing
    speaks against it."""
    if mean.is_meta:
        return True
    return bool((std > 0).all() & std.isfinite().all() & mean.isfinite().all())


class StreamingMoments:
    """Mean and variance per channel, or the whole covariance, in one pass and in float64.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque (1979), which stays exact
    where the mean is large against the spread.

    Args:
        covariance: keep the full matrix, not its diagonal alone.
    """

    def __init__(self, *, covariance: bool = False) -> None:
        self.covariance = covariance
        self.count = 0
        self._mean = torch.zeros(())
        self._squares = torch.zeros(())  # of deviations: (C,), or (C, C) for the covariance

    def add(self, values: Tensor) -> None:
        """Takes in values (B, C, ...); every position beside the channel axis is one observation."""
        rows = values.double().transpose(0, 1).flatten(1)  # (C, observations)
        mean = rows.mean(dim=1)
        deviations = rows - mean[:, None]
        squares = deviations @ deviations.T if self.covariance else deviations.square().sum(dim=1)
        self._merge(rows.shape[1], mean, squares)

    def over_processes(self) -> "StreamingMoments":
        """The moments of what all processes have seen; the same on each of them."""
        if num_processes() == 1:
            return self
        device = self._mean.device
        total = StreamingMoments(covariance=self.covariance)
        for count, mean, squares in gather((self.count, self._mean.cpu(), self._squares.cpu())):
            total._merge(count, mean.to(device), squares.to(device))
        return total

    @property
    def mean(self) -> Tensor:
        """(C,), float64."""
        return self._mean

    @property
    def std(self) -> Tensor:
        """Population standard deviation (C,), float64."""
        variance = self._squares.diagonal() if self.covariance else self._squares
        return (variance / self.count).sqrt()

    @property
    def matrix(self) -> Tensor:
        """Population covariance (C, C), float64."""
        if not self.covariance:
            raise ValueError("these moments hold variances alone; pass covariance=True")
        return self._squares / self.count

    def _merge(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if not count:
            return
        if not self.count:
            self.count, self._mean, self._squares = count, mean, squares
            return
        total, delta = self.count + count, mean - self._mean
        between = torch.outer(delta, delta) if self.covariance else delta.square()
        self._mean = self._mean + delta * (count / total)
        self._squares = self._squares + squares + between * (self.count * count / total)
        self.count = total
