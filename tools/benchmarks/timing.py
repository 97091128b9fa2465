"""How things are timed: in turns, so that a noisy machine hits them alike, beside a matrix product."""

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from semtok.speed import Precision, allow_tf32, autocast_dtype, computing
from semtok.training.loop import Trainer

Step = Callable[[], None]


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing in each round.

    Attributes:
        images: handled in a round.
        flops: floating-point operations in a round; None: not counted.
        precision: in which matrices are multiplied.
        waits: seconds of each round that were spent waiting for data; None: there are no data.
    """

    name: str
    seconds: list[float]
    images: int
    flops: float | None = None
    waits: list[float] | None = None
    precision: Precision = "fp32"

    @property
    def median(self) -> float:
        """Seconds of a round."""
        return statistics.median(self.seconds)

    def row(self, matmul_rates: Mapping[Precision, float]) -> dict[str, Any]:
        """What is reported.

        Args:
            matmul_rates: FLOP/s of a large matrix product in the same run; empty: not measured.
        """
        rate = matmul_rates.get(self.precision)
        return {
            "what": self.name,
            "ms": self.median * 1e3,
            "images/s": self.images / self.median,
            "GFLOP/s": self.flops / self.median / 1e9 if self.flops else None,
            "of matmul": self.flops / self.median / rate if self.flops and rate else None,
            "waiting for data": statistics.median(self.waits) / self.median if self.waits else None,
        }


def time_in_turns(
    steps: Mapping[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after one round that is not counted."""
    for step in steps.values():
        step()
        if isinstance(step, TrainerStep):
            step.waits.clear()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            seconds[name].append(clock() - start)
    return seconds


def ratio(slow: Timing, fast: Timing) -> str:
    """How many times as fast the second is, round by round."""
    own = slow.images / fast.images
    ratios = [a / b / own for a, b in zip(slow.seconds, fast.seconds, strict=True)]
    return (
        f"{fast.name} is {statistics.median(ratios):.2f} times as fast as {slow.name} "
        f"(rounds: {min(ratios):.2f} to {max(ratios):.2f})"
    )


def matmul_rate(device: torch.device, precision: Precision) -> float:
    """FLOP/s of a square matrix product in this precision, the most that this machine gives."""
    dtype = autocast_dtype(precision) or torch.float32
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds: list[float] = []
    # The first product sets things up; a CPU without bfloat16 may take many seconds for it.
    with computing(device, precision):
        while len(seconds) < 2 or len(seconds) < 20 and sum(seconds) < 1:
            start = time.perf_counter()
            torch.mm(a, b)
            wait_for(device)
            seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def forward_flops(module: nn.Module, *inputs: Any, **options: Any) -> float:
    """Floating-point operations of one forward pass: matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **options)
    return float(counter.get_total_flops())


def counted_flops(step: Step) -> float:
    """Floating-point operations of one step, which is taken for it, forward and backward."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


class TrainerStep:
    """One optimiser step of a trainer, as the loop does it; knows how long it waited for data.

    Args:
        trainer: just built. What that set for the whole process, each step sets again: the steps of another trainer
            may come between.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.waits = trainer, []
        trainer.objective.learners.train()
        self._batches = self._watched(trainer._batches())

    @property
    def precision(self) -> Precision:
        """Of its matrix products."""
        return self.trainer.config.precision

    def __call__(self) -> None:
        self.take()
        wait_for(self.trainer.device)

    def take(self) -> None:
        """A step, for which the device is not waited."""
        self.waits.append(0.0)
        allow_tf32(self.precision)
        torch.backends.cudnn.benchmark = self.trainer.config.cudnn_benchmark
        self.trainer.train_step(self._batches)

    def _watched(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waits[-1] += time.perf_counter() - start
            if batch is None:
                return
            yield batch
