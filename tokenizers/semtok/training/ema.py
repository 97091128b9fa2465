"""Exponential moving average of weights."""

import copy

import torch
from torch import nn


class ModelEMA(nn.Module):
    """A copy of a module that follows it: parameters averaged, buffers copied.

    The decay warms up as min(decay, (1 + n) / (10 + n)) after n updates, so that short runs are
    not dominated by the first weights.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(module).requires_grad_(False).eval()
        self.decay = decay
        self.num_updates = 0

    def train(self, mode: bool = True) -> "ModelEMA":
        return super().train(False)

    @torch.no_grad()
    def restart(self, module: nn.Module) -> None:
        """Begins anew from the module as it is: for what was measured into it after this copy was made."""
        self.module.load_state_dict(module.state_dict())

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves towards the module's present weights; a few fused kernels, no host synchronisation."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.num_updates += 1
