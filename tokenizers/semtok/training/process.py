"""Devices, processes, and the signals that ask a run to stop."""

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


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """Devices and processes as the launcher set them up; one process on what there is otherwise.

    Raises:
        UserError: a precision or a tracker that this machine can't give, or sizes that don't divide.
    """
    gpu = torch.cuda.is_available()
    if config.precision == "fp16" and not gpu:
        raise UserError("train.precision: fp16 needs a GPU; use fp32 or bf16 here")
    allow_tf32(config.precision)
    # accelerate keeps one precision per process; a second run in this process may have another.
    AcceleratorState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=not gpu,
            mixed_precision="no" if autocast_dtype(config.precision) is None else config.precision,
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(folder),
            kwargs_handlers=[
                # Running statistics agree over processes by themselves; nothing needs broadcasting.
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=2)),
            ],
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"train: {error}") from None
    if config.tracker not in (
        "none",
        *(t.name for t in accelerator.trackers),
        *map(str, accelerator.log_with),
    ):
        raise UserError(
            f"train.tracker: {config.tracker} is not installed; pip install {config.tracker}"
        )
    parts = accelerator.num_processes * config.accumulate
    if config.batch_size % parts:
        raise UserError(
            f"train.batch_size: {config.batch_size} is not divisible by {accelerator.num_processes} processes "
            f"times train.accumulate {config.accumulate}"
        )
    return accelerator


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
