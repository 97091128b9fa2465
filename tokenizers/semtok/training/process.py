"""Devices, processes, and the signals that ask a run to stop."""

import importlib.util
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from semtok.errors import UserError
from semtok.speed import allow_tf32, autocast_dtype
from semtok.training.config import TrainConfig


def check_launch(config: TrainConfig) -> None:
    """Checks that this machine and the processes that a launcher has started can train so; joins no process.

    Raises:
        UserError: a precision or a tracker that this machine can't give, or sizes that don't divide.
    """
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU; use fp32 or bf16 here")
    if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
        raise UserError(
            f"train.tracker: {config.tracker} is not installed; pip install {config.tracker}"
        )
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % (num_processes * config.accumulate):
        raise UserError(
            f"train.batch_size: {config.batch_size} is not divisible by {num_processes} processes "
            f"times train.accumulate {config.accumulate}"
        )


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Devices and processes as the launcher set them up; one process on what there is otherwise.

    Raises:
        UserError: see ``check_launch``.
    """
    check_launch(config)
    allow_tf32(config.precision)
    # accelerate keeps one precision per process; a second run in this process may have another.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no" if autocast_dtype(config.precision) is None else config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=str(folder),
        kwargs_handlers=[
            # Running statistics agree over processes by themselves; nothing needs broadcasting.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(hours=2)),
        ],
    )


class StopSignals:
    """Within this context SIGTERM and SIGINT are remembered; a second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopSignals":
        self._old = {n: signal.signal(n, self._remember) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: Any) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
