"""What the processes of one run agree on beside gradients: running statistics, and when to stop."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from semtok import stopping
from semtok.processes import PATIENCE


class RunningStatistics:
    """Running means and variances of normalisation layers, which each process takes on its own share.

    Training reads none of them, so it is enough to average them once per step: then what is
    validated, kept in a checkpoint and resumed from is one network.
    """

    def __init__(self, network: nn.Module) -> None:
        self._layers = [
            layer
            for layer in network.modules()
            if isinstance(layer, _NormBase) and layer.running_mean is not None
        ]

    @torch.no_grad()
    def average(self) -> None:
        """Averages them over all processes, in one call. The host does not wait for it on a GPU."""
        if not self._layers or not dist.is_initialized() or dist.get_world_size() == 1:
            return
        own = [s for layer in self._layers for s in (layer.running_mean, layer.running_var)]
        means = torch.cat(own)
        dist.all_reduce(means)
        means /= dist.get_world_size()
        torch._foreach_copy_(own, means.split([len(statistic) for statistic in own]))


class StopVote:
    """Asked after every step whether all processes are to stop, as a signal came to one of them.

    Several processes have to stop after the same step. So each tells the others after every step
    whether it was asked to, and hears their answers a step later, when they have long been there.
    All of that passes between the hosts: no device is waited for.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._asked: tuple[dist.Work, Tensor] | None = None

    def __enter__(self) -> "StopVote":
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error others may be gone, and would be waited for in vain.
        if self._group is not None and kind is None:
            if self._asked is not None:
                self._asked[0].wait()
            dist.destroy_process_group(self._group)
        self._group = self._asked = None

    def should_stop(self) -> bool:
        """Asked by every process after every step: whether all of them are to stop now, see ``stopping.received``."""
        if self._group is None:
            return stopping.received() is not None
        if self._asked is not None:
            work, answer = self._asked
            work.wait()
            if number := int(answer.item()):
                self._asked = None
                stopping.note(number)
                return True
        asked = torch.tensor(stopping.received() or 0, dtype=torch.int32)
        work = dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = work, asked
        return False
