"""Every learner's optimiser: how all of them step, and what a checkpoint keeps of them."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.objective import Objective
from semtok.optimiser import OptimiserConfig
from semtok.sampler.roles import find_hidden_matrices
from semtok.training.muon import MuonWithAdamW
from semtok.training.sharding import whole_tensor
from semtok.training.train_config import TrainConfig


def check_optimisers(objective: Objective, config: TrainConfig) -> None:
    """Raises UserError where the settings ask for Muon, and no learner has a matrix for it."""
    if config.optimiser is None or config.optimiser.name != "muon":
        return
    if next(find_hidden_matrices(objective.learners), None) is None:
        raise UserError(
            "train.optimiser.name: muon is for the matrices of transformers, and no network that trains here has "
            "one; leave it out"
        )


def _optimiser(
    learner: nn.Module, parameters: list[nn.Parameter], settings: OptimiserConfig
) -> torch.optim.Optimizer:
    matrices = list(find_hidden_matrices(learner)) if settings.name == "muon" else []
    if matrices:
        taken = {id(matrix.parameter) for matrix in matrices}
        return MuonWithAdamW([p for p in parameters if id(p) not in taken], matrices, settings)
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class Optimisers:
    """An optimiser and a schedule of the learning rate for each learner, and one scale of losses for all in fp16.

    Attributes:
        parameters: that train, by learner, in the order of its optimiser's state.
    """

    def __init__(self, objective: Objective, config: TrainConfig, accelerator: Accelerator) -> None:
        check_optimisers(objective, config)
        self.objective, self.config, self.accelerator = objective, config, accelerator
        # Looked up once: to walk through a large network takes milliseconds, and each step would.
        self.parameters = {
            name: [each for each in learner.parameters() if each.requires_grad]
            for name, learner in objective.learners.items()
        }
        self._optimisers = {name: self._made(name) for name in self.parameters}
        self._schedules = {
            name: torch.optim.lr_scheduler.LambdaLR(
                optimiser.optimizer, lambda step: config.learning_rate_factor(step)
            )
            for name, optimiser in self._optimisers.items()
        }

    def _made(self, name: str) -> Any:
        assert self.config.optimiser is not None, "TrainConfig asks for one where there are steps"
        settings = self.objective.optimiser_config(name, self.config.optimiser)
        optimiser = _optimiser(self.objective.learners[name], self.parameters[name], settings)
        return self.accelerator.prepare_optimizer(optimiser)

    def __getitem__(self, learner: str) -> Any:
        return self._optimisers[learner]

    def step(self, learners: Iterable[str]) -> dict[str, Tensor]:
        """Clips the gradients of these learners, takes a step of each, and drops the gradients.

        Returns:
            the gradients' norms before clipping, to log.
        """
        scaler, norms = self.accelerator.scaler, {}
        for name in learners:
            optimiser = self._optimisers[name]
            if scaler is not None:
                scaler.unscale_(optimiser.optimizer)
            if self.config.clip_norm is not None:
                norm = nn.utils.clip_grad_norm_(self.parameters[name], self.config.clip_norm)
                # With fp16 the loss scale is found by letting gradients overflow; that is no failure.
                if scaler is None:
                    norms[f"grad_norm/{name}"] = whole_tensor(norm)
            if scaler is None:
                optimiser.step()
            else:  # accelerate's step would move the scale between one learner and the next
                scaler.step(optimiser.optimizer)
            self._schedules[name].step()
            optimiser.zero_grad()
        if scaler is not None:
            scaler.update()
        return norms

    def learning_rates(self) -> dict[str, float]:
        """Of each learner's next step; of Muon's matrices too where theirs is another."""
        rates = {}
        for name, schedule in self._schedules.items():
            rates[name], *other = schedule.get_last_lr()
            rates |= {f"{name}_matrices": rate for rate in other if rate != rates[name]}
        return rates

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps, under keys of its own."""
        scaler = self.accelerator.scaler
        return {
            "optimisers": {name: o.state_dict() for name, o in self._optimisers.items()},
            "schedules": {name: s.state_dict() for name, s in self._schedules.items()},
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what ``state_dict`` gave; further keys may stand beside."""
        for name, optimiser in self._optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
            self._schedules[name].load_state_dict(state["schedules"][name])
            self._plan_anew(name)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _plan_anew(self, name: str) -> None:
        """Sets the rate of the next step, which was planned otherwise where the run has more steps now."""
        schedule = self._schedules[name]
        factor = self.config.learning_rate_factor(schedule.last_epoch)
        rates = [base * factor for base in schedule.base_lrs]
        for group, rate in zip(self._optimisers[name].param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
