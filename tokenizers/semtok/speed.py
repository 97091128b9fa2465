"""How networks are computed: in which floating-point numbers, and by which compiler."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16", "bf16_matmul", "fp16"]
"""``fp32`` to the last bit; ``tf32``: matrix products and convolutions on a GPU's tensor cores, with 10 bits of
mantissa, what published code means by float32; ``bf16`` and ``fp16``: automatic mixed precision, and tf32 for what
that leaves in float32; ``bf16_matmul``: as ``bf16``, but convolutions in float32, as bf16 ones are slow on some CPUs.
A CPU computes tf32 as fp32."""
Compiler = Literal["none", "inductor", "aot_eager"]
"""Backends of torch.compile; ``aot_eager`` makes no kernels and is for finding out why ``inductor`` fails."""


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What automatic mixed precision computes in; None: there is none."""
    half = {"bf16": torch.bfloat16, "bf16_matmul": torch.bfloat16, "fp16": torch.float16}
    return half.get(precision)


def allow_tf32(precision: Precision) -> None:
    """Says for this process whether float32 may be computed as TF32."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextmanager
def computing(device: torch.device, precision: Precision | None) -> Iterator[None]:
    """Within this context networks compute in this precision; what comes after, as before. None: as it is.

    What ``bf16_matmul`` asks of convolutions is theirs to know, see ``set_convolutions``.
    """
    if precision is None:
        yield
        return
    matmul, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    dtype = autocast_dtype(precision)
    allow_tf32(precision)
    try:
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolutions


def compile_networks(networks: Iterable[nn.Module], compiler: Compiler) -> None:
    """Compiles each in place, so that its parameters' names stay as they are."""
    if compiler == "none":
        return
    for network in networks:
        # Training has one shape and sampling has few, so none is made symbolic.
        network.compile(backend=compiler, dynamic=False)


def use_channels_last(networks: Iterable[nn.Module]) -> bool:
    """Keeps the weights of all convolutions in the order NHWC, in place; what passes them follows.

    Returns:
        whether there was any convolution.
    """
    found = _convolutions(networks)
    for convolution in found:
        convolution.to(memory_format=torch.channels_last)
    return bool(found)


def set_convolutions(networks: Iterable[nn.Module], precision: Precision) -> None:
    """Lets convolutions compute in their weights' type under ``bf16_matmul``, and as autocast says under any other.

    In place; parameters and their names stay as they are.
    """
    for convolution in _convolutions(networks):
        convolution.__dict__.pop("forward", None)
        if precision == "bf16_matmul":
            # A bound method: a copy of the network, as its average is, gets its own.
            convolution.forward = MethodType(_without_autocast, convolution)


def _without_autocast(convolution: nn.Module, images: Tensor, *arguments: Any) -> Tensor:
    with torch.autocast(images.device.type, enabled=False):
        images = images.to(convolution.weight.dtype)
        return type(convolution).forward(convolution, images, *arguments)


def _convolutions(networks: Iterable[nn.Module]) -> list[nn.Module]:
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    return [m for network in networks for m in network.modules() if isinstance(m, kinds)]
