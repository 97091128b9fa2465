"""Running statistics of latents while they change: what Send-VAE and REPA-E standardise by in training."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningStandardiser(nn.Module):
    """Standardises latents per channel by running statistics (momentum 0.1, eps 1e-4).

    The statistics carry no gradient. In training each batch updates them first, over all
    processes, so that several agree with one on the whole batch; the first batch sets them, unless
    ``start`` has.
    """

    averages_buffers = True
    """An average of weights follows these statistics as it does weights, see ``ModelEMA``."""

    def __init__(self, channels: int, momentum: float = 0.1, eps: float = 1e-4) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def start(self, mean: Tensor, std: Tensor) -> None:
        """Begins from known statistics (C,), which the first batch then moves instead of setting them."""
        self.mean.copy_(mean)
        self.var.copy_(std.square())
        self.num_updates.fill_(1)

    @property
    def std(self) -> Tensor:
        """What latents less the mean are divided by, (C,)."""
        return (self.var + self.eps).sqrt()

    def forward(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) to about zero mean and unit variance."""
        if self.training:
            mean, var, _ = _moments(z.detach())
            self._follow(mean, var)
        return self.by_running(z)

    def by_running(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, h, w), standardised by the statistics as they are."""
        return _standardised(z, self.mean, self.var, self.eps)

    def by_batch(self, z: Tensor) -> Tensor:
        """Latents without gradient, standardised by the batch's own statistics, over all processes; the running ones
        follow, by the unbiased variance. So does a batch norm in training."""
        mean, var, count = _moments(z)
        self._follow(mean, var * (count / (count - 1)))
        return _standardised(z, mean, var, self.eps)

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        # Decided on the device: reading the counter here would make the host wait.
        momentum = torch.where(self.num_updates == 0, 1.0, self.momentum)
        self.mean.lerp_(mean, momentum)
        self.var.lerp_(var, momentum)
        self.num_updates += 1


def _standardised(z: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (z - mean[:, None, None]) * (var[:, None, None] + eps).rsqrt()


@torch.no_grad()
def _moments(z: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and variance per channel of the latents (B, C, h, w) of all processes, and how many numbers those are of."""
    # Each process centres by its own mean: E[z²] - E[z]² would leave rounding of a large mean alone.
    own = torch.stack([z.mean(dim=(0, 2, 3)), z.var(dim=(0, 2, 3), correction=0)])
    every = [own]
    if dist.is_initialized() and dist.get_world_size() > 1:
        every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own)
    means, variances = torch.stack(every, dim=1)
    mean, var = means.mean(dim=0), variances.mean(dim=0) + means.var(dim=0, correction=0)
    return mean, var, len(every) * (z.numel() // z.shape[1])
