"""Muon for the hidden matrices of a network, AdamW for all else, as one optimiser."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from semtok.optimiser import OptimiserConfig
from semtok.sampler.roles import HiddenMatrix


class MuonWithAdamW(torch.optim.Optimizer):
    """Steps hidden matrices by ``torch.optim.Muon``, and other parameters by ``torch.optim.AdamW``.

    Muon: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon). Its ``param_groups`` are two, the other
    parameters and the weights that hold matrices, each with its learning rate. They hold whole weights, so that
    clipping, the scale of losses and schedules need not know of matrices within. In fp16 a step is left out for both
    or for none, and the host waits for the device to know.

    Args:
        others: parameters for AdamW; may be empty.
        matrices: of the other parameters, at least one.
    """

    # GradScaler then leaves it to ``step`` to heed an overflow, by the attribute ``found_inf``.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        others: Sequence[nn.Parameter],
        matrices: Sequence[HiddenMatrix],
        settings: OptimiserConfig,
    ) -> None:
        rates = (settings.learning_rate, settings.matrix_learning_rate or settings.learning_rate)
        weights = [matrix.parameter for matrix in matrices]
        groups = zip((others, weights), rates, strict=True)
        super().__init__([{"params": list(params), "lr": rate} for params, rate in groups], {})
        # Parameters of their own, for torch takes no views; what they view is said anew in each step.
        self._slices = [
            (matrix, [nn.Parameter(part) for part in matrix.split(matrix.parameter.detach())])
            for matrix in matrices
        ]
        self._adamw = torch.optim.AdamW(
            [{"params": list(others)}],
            lr=rates[0],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._muon = torch.optim.Muon(
            [own for _, slices in self._slices for own in slices],
            lr=rates[1],
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
            adjust_lr_fn=settings.adjust_lr_fn,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step of every parameter that has a gradient."""
        assert closure is None, "the loss is computed before"
        assert getattr(self, "grad_scale", None) is None, "gradients are unscaled before clipping"
        overflown = getattr(self, "found_inf", None)
        if overflown is not None and overflown.item():
            return
        for matrix, slices in self._slices:
            weight = matrix.parameter
            if weight.grad is None:
                continue
            pairs = zip(matrix.split(weight.detach()), matrix.split(weight.grad), strict=True)
            for own, (part, gradient) in zip(slices, pairs, strict=True):
                own.data, own.grad = part, gradient
        for group, inner in zip(self.param_groups, (self._adamw, self._muon), strict=True):
            inner.param_groups[0]["lr"] = group["lr"]
            inner.step()
        self._muon.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: both optimisers' own."""
        return {"adamw": self._adamw.state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what ``state_dict`` gave; the learning rates of the groups stay."""
        self._adamw.load_state_dict(state_dict["adamw"])
        self._muon.load_state_dict(state_dict["muon"])
