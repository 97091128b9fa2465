"""Averages of weights that follow a training."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from semtok.training.sharding import own_part


class ModelEMA(nn.Module):
    """A copy of a module that follows it: parameters averaged, buffers copied. Where a module inside has a true
    ``averages_buffers``, its floating-point buffers are averaged like parameters.

    Args:
        module: is followed; its parameters stay the same objects from now on.
        decay: the average's share in each update, in [0, 1).
        warmup: the decay after n updates is min(decay, (1 + n) / (10 + n)), so that short runs are not
            dominated by the first weights; else it is the same from the first update.
        copied: makes the copy; where processes share the module out, the copy's parameters too.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        warmup: bool = True,
        copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> None:
        super().__init__()
        self.module = copied(module).requires_grad_(False).eval()
        self.decay, self.warmup = decay, warmup
        self.num_updates = 0
        # Looked up once: to walk through a large network takes milliseconds, and each step would.
        self._mine = [own_part(each) for each in self.module.parameters()]
        self._theirs = [own_part(each) for each in module.parameters()]
        self._averaged, self._copied = [], []  # buffers, by where both stand
        for mine, theirs in zip(self.module.modules(), module.modules(), strict=True):
            follows = getattr(theirs, "averages_buffers", False)
            for name, buffer in theirs._buffers.items():
                if buffer is not None:
                    of = self._averaged if follows and buffer.is_floating_point() else self._copied
                    of.append((mine._buffers, theirs._buffers, name))

    def train(self, mode: bool = True) -> "ModelEMA":
        return super().train(False)

    @torch.no_grad()
    def restart(self) -> None:
        """Begins anew from the module as it is: for what was measured into it after this copy was made."""
        for mine, theirs in zip(self._mine, self._theirs, strict=True):
            mine.copy_(theirs)
        self._copy([*self._averaged, *self._copied])

    @torch.no_grad()
    def update(self) -> None:
        """Moves towards the module's present weights; a few fused kernels, no host synchronisation."""
        share = 1 - self._next_decay()
        torch._foreach_lerp_(self._mine, self._theirs, share)
        for mine, theirs, name in self._averaged:
            mine[name].lerp_(theirs[name], share)
        self._copy(self._copied)
        self.num_updates += 1

    def _next_decay(self) -> float:
        """The average's share in the next update."""
        if self.warmup:
            return min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        return self.decay

    def _copy(self, buffers: list[tuple[dict, dict, str]]) -> None:
        for mine, theirs, name in buffers:
            mine[name].copy_(theirs[name], non_blocking=True)
