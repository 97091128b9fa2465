"""How many micro-batches a step takes: as many as the recipe says, or as the memory of a GPU asks for."""

import torch

from semtok.errors import UserError
from semtok.training.train_config import MemoryConfig, TrainConfig

_USABLE = 0.95  # of a GPU's memory; the rest is for its context and the allocator's gaps


def device_gb(device: torch.device) -> float | None:
    """A GPU's memory in GB (10^9 bytes); None: not a GPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory / 1e9


def micro_batches(config: TrainConfig, num_processes: int, gpu: float | None) -> tuple[int, str]:
    """The number of micro-batches of a step, and a line that tells what they need.

    With ``accumulate: auto`` it is the smallest that divides a process's share of the batch and fits into
    ``train.memory``.

    Args:
        gpu: memory in GB of the smallest GPU that takes part; None: as ``train.memory`` says.

    Returns:
        the number; the line, empty where the recipe says nothing of memory.

    Raises:
        UserError: sizes that don't divide, or not even one image fits.
    """
    share, rest = divmod(config.batch_size, num_processes)
    if config.accumulate == "auto":
        if rest:
            raise UserError(
                f"train.batch_size: {config.batch_size} is not divisible by {num_processes} processes"
            )
        assert config.memory is not None, "TrainConfig asks for it where accumulate is auto"
        number = _fewest(share, config.memory, gpu)
    else:
        number = config.accumulate
        if config.batch_size % (num_processes * number):
            raise UserError(
                f"train.batch_size: {config.batch_size} is not divisible by {num_processes} processes "
                f"times train.accumulate {number}"
            )
    if config.memory is None:
        return number, ""
    images, available = share // number, _available(config.memory, gpu)
    needed = config.memory.fixed + images * config.memory.per_image
    where = f"each of {num_processes} processes" if num_processes > 1 else "one process"
    line = (
        f"accumulate={number}: {images} images at once need {needed:.3g} of {available:.3g} GB "
        f"on {where}"
    )
    return number, line if needed <= _USABLE * available else f"warning: {line}"


def _fewest(share: int, memory: MemoryConfig, gpu: float | None) -> int:
    available = _available(memory, gpu)
    for number in range(1, share + 1):
        needed = memory.fixed + share // number * memory.per_image
        if share % number == 0 and needed <= _USABLE * available:
            return number
    raise UserError(
        f"train.accumulate: even one image at once needs {memory.fixed + memory.per_image:.3g} GB, and of "
        f"{available:.3g} GB {_USABLE:.0%} are used; take a larger GPU, or give a number"
    )


def _available(memory: MemoryConfig, gpu: float | None) -> float:
    return memory.gpu if gpu is None else min(memory.gpu, gpu)
