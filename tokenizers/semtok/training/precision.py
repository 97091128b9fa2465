"""``train.precision: auto``: in which numbers this machine trains fast, and that its processes agree on them."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semtok.processes import gather, process_index
from semtok.speed import Precision
from semtok.training.train_config import TrainConfig

AUTOMATIC = ("fp32", "bf16", "bf16_matmul")
"""What ``auto`` comes to."""
_ENOUGH = 1.15
"""How many times as fast bf16 has to be; less is not worth its rounding."""
_PAIRS = 5
_WIDTH, _HEADS, _TOKENS, _IMAGES = 192, 3, 64, 16  # of a T/2 transformer, of half a batch
_CONVOLUTIONS = ((32, 32), (64, 16))  # channels and side, of a small VAE
_FEW_IMAGES = 8


@dataclass(frozen=True)
class Gpu:
    """What is known of a GPU without measuring: whether its tensor cores multiply matrices of bf16."""

    name: str
    has_bf16: bool


@dataclass(frozen=True)
class Gains:
    """How many times as fast as float32 bf16 is on a CPU: a step of a layer, forward and backward."""

    matmul: float
    convolution: float


def settled(config: TrainConfig, *, resume: bool = False) -> TrainConfig:
    """The settings with a precision in the place of ``auto``, the same in all processes; all have to ask.

    The first process says what was chosen and why, and that a resumed run computes in bf16 where this is slow.
    """
    if config.precision != "auto":
        if resume and config.precision in ("bf16", "bf16_matmul"):
            _tell_of_slow(config.precision, gather(found_here()))
        return config
    precision, line = chosen(gather(found_here()))
    if not process_index():
        print(line, flush=True)
    return config.model_copy(update={"precision": precision})


def chosen(found: Sequence[Gpu | Gains]) -> tuple[Precision, str]:
    """What all processes train in, and a line that says why.

    A GPU without bf16 computes in float32: fp16 needs its losses scaled, and such a card has no TF32 either.

    Args:
        found: of each process; the slowest counts.
    """
    gpus = [one for one in found if isinstance(one, Gpu)]
    if slow := [gpu for gpu in gpus if not gpu.has_bf16]:
        return "fp32", f"precision: fp32 ({slow[0].name} has no fast bf16)"
    gains = _least(found)
    if gains is None:
        return "bf16", f"precision: bf16 ({gpus[0].name} has it in hardware)"
    matmul, convolution = gains.matmul, gains.convolution
    if matmul < _ENOUGH:
        return "fp32", f"precision: fp32 (bf16 matrix products {matmul:.1f}x as fast here)"
    products = f"precision: bf16 for matrix products ({matmul:.1f}x as fast here)"
    if convolution < _ENOUGH:
        return "bf16_matmul", f"{products}, fp32 for convolutions (bf16 {convolution:.1f}x)"
    return "bf16", f"{products} and convolutions ({convolution:.1f}x)"


def _least(found: Sequence[Gpu | Gains]) -> Gains | None:
    """Of all CPUs; None: there are GPUs alone."""
    gains = [one for one in found if isinstance(one, Gains)]
    if not gains:
        return None
    return Gains(min(one.matmul for one in gains), min(one.convolution for one in gains))


def _tell_of_slow(precision: Precision, found: Sequence[Gpu | Gains]) -> None:
    fast, _ = chosen(found)
    if process_index() or fast in ("bf16", precision):
        return
    gains = _least(found)
    why = ""
    if gains is not None:
        why = f": bf16 matrix products {gains.matmul:.1f}x as fast as fp32, convolutions {gains.convolution:.1f}x"
    print(
        f"precision: {precision}, as the run began, which is slow on this machine{why}", flush=True
    )


def found_here() -> Gpu | Gains:
    """Of this process's device."""
    if not torch.cuda.is_available():
        return measured()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Gpu(torch.cuda.get_device_name(device), has_bf16)


@functools.cache
def measured() -> Gains:
    """Of the layers and sizes of the small recipes, on this CPU, with as many threads as training has. That takes
    about half a second, once in a process.

    Random numbers that come after are as if nothing had been measured.
    """
    with torch.random.fork_rng(devices=[]):
        tokens = torch.randn(_IMAGES, _TOKENS, _WIDTH)
        matmul = _gain(_Block(), tokens)
        convolutions = [
            _gain(_convolutions(channels), torch.randn(_FEW_IMAGES, channels, side, side))
            for channels, side in _CONVOLUTIONS
        ]
    return Gains(matmul, statistics.geometric_mean(convolutions))


def _gain(network: nn.Module, inputs: Tensor) -> float:
    inputs.requires_grad_()

    def seconds(is_half: bool) -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            outputs = network(inputs)
        outputs.float().square().mean().backward()
        return time.perf_counter() - start

    return paired_gain(lambda: seconds(False), lambda: seconds(True))


def paired_gain(full: Callable[[], float], half: Callable[[], float]) -> float:
    """How many times as fast the second is: the median over pairs, which load on the machine slows alike.

    Args:
        full, half: do the work once and return its seconds. The first time sets things up and does not count;
            where the second is then plainly the slower one, nothing more is measured.
    """
    full(), half()
    gains = [full() / half()]
    while len(gains) < _PAIRS and gains[0] > 0.5:
        gains.append(full() / half())
    return statistics.median(gains)


class _Block(nn.Module):
    """A transformer's block: its matrix products, and what autocast casts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True)
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(2))
        self.mlp = nn.Sequential(
            nn.Linear(_WIDTH, 4 * _WIDTH), nn.GELU(), nn.Linear(4 * _WIDTH, _WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


def _convolutions(channels: int) -> nn.Module:
    def convolution() -> nn.Module:
        return nn.Conv2d(channels, channels, 3, padding=1)

    return nn.Sequential(convolution(), nn.GroupNorm(8, channels), nn.SiLU(), convolution())
