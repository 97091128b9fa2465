"""Networks that processes share out: each holds its part of weights, gradients, optimiser and average (FSDP2).

torch's ``fully_shard`` is called directly, beside accelerate. Accelerate shares out one network, in one call with its
optimiser. Here learners are prepared one by one, and one may call another's methods.
"""

import copy
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from semtok.errors import UserError
from semtok.objective import Objective
from semtok.training.train_config import TrainConfig


def check_sharding(objective: Objective, config: TrainConfig) -> None:
    """Raises UserError where the settings ask to share out networks, and these can't be."""
    if config.sharding == "none":
        return
    shared = objective.sharded_blocks()
    if not shared:
        raise UserError(
            "train.sharding: fsdp2 shares out diffusion transformers, and none trains here; leave it out"
        )
    for name in shared:
        for key, parameter in objective.learners[name].named_parameters():
            if not parameter.ndim:
                raise UserError(
                    f"train.sharding: fsdp2 can't share out {key}, a single number; pass train.sharding=none, or take "
                    "a network without it (diffusion.network.value_residual=false)"
                )
    for name in objective.learners:
        if config.optimiser and objective.optimiser_config(name, config.optimiser).name == "muon":
            raise UserError(
                f"train.sharding: muon, the optimiser of '{name}', needs whole matrices, which fsdp2 shares out; use "
                "adamw, or pass train.sharding=none"
            )


class Sharding:
    """Shares out learners, and gives what is needed whole.

    With ``train.sharding=none``, and where there are no processes that a launcher started, nothing is shared out.

    Args:
        objective: its learners are shared out in place. They go to the device a block at a time, so that no device
            holds a whole one.
        device: of this process.

    Raises:
        UserError: see ``check_sharding``.
    """

    def __init__(self, objective: Objective, config: TrainConfig, device: torch.device) -> None:
        check_sharding(objective, config)
        self._like: nn.Module | None = None
        self._names: set[str] = set()
        if config.sharding == "none" or not (dist.is_available() and dist.is_initialized()):
            return
        self._like = _without_weights(objective.averaged_module())
        # Of blocks that return views, which nothing here changes in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # Autocast casts the same weights for the same products: gathered in bf16 they are half as much to send.
        gathered_in = torch.bfloat16 if config.precision == "bf16" else None
        for name, blocks in objective.sharded_blocks().items():
            learner = objective.learners[name]
            for block in blocks:
                fully_shard(block, mesh=mesh, mp_policy=_policy(gathered_in))
            fully_shard(learner, mesh=mesh, mp_policy=_policy(None))
            for method in getattr(learner, "called_by_others", ()):
                register_fsdp_forward_method(learner, method)
            self._names.add(name)

    def shares(self, learner: str) -> bool:
        """Whether a learner is shared out."""
        return learner in self._names

    def copied(self, averaged: nn.Module) -> nn.Module:
        """A copy of ``Objective.averaged_module``, whose parameters are shared out as that one's are."""
        if self._like is None:
            return copy.deepcopy(averaged)
        return _filled(self._like, averaged, Tensor.clone)

    def whole(self, averaged: nn.Module) -> nn.Module:
        """``Objective.averaged_module``, or a copy of it, with whole weights; itself where nothing is shared out.

        Otherwise it is a new module, in eval mode, and all processes have to ask.
        """
        if self._like is None:
            return averaged
        return _filled(self._like, averaged, lambda weight: whole_tensor(weight).clone()).eval()


def _policy(gathered_in: torch.dtype | None) -> MixedPrecisionPolicy:
    """Gradients are summed in float32; what goes in and comes out is autocast's to cast."""
    return MixedPrecisionPolicy(
        param_dtype=gathered_in, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters have shapes and no contents."""
    empty = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), requires_grad=False)
        for each in module.parameters()
    }
    return copy.deepcopy(module, empty)


@torch.no_grad()
def _filled(like: nn.Module, module: nn.Module, contents: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of ``like`` with what is made of the other's parameters, and with its buffers."""
    result = copy.deepcopy(like)
    for mine, theirs in zip(result.modules(), module.modules(), strict=True):
        for name, parameter in theirs._parameters.items():
            if parameter is not None:
                made = contents(parameter.detach())
                mine._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in theirs._buffers.items():
            mine._buffers[name] = buffer.clone() if buffer is not None else None
    return result


def whole_tensor(tensor: Tensor) -> Tensor:
    """Of a tensor that is shared out all of it, for which all processes have to ask; else the tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Of a tensor that is shared out this process's part, in the same memory; else the tensor."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def shared_as(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, shared out as another of its shape is; no process asks another."""
    if not isinstance(like, DTensor):
        return whole
    mesh = like.device_mesh
    parts = whole.chunk(mesh.size())  # the last ones may be missing
    rank = mesh.get_local_rank()
    own = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(
        own.to(like.device, copy=True),  # torch copies no DTensor of a view
        mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )
