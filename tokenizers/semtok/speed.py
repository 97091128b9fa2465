"""How networks are computed: in which floating-point numbers, and by which compiler."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""``fp32`` to the last bit; ``tf32``: matrix products and convolutions on a GPU's tensor cores, with 10 bits of
mantissa, what published code means by float32; ``bf16`` and ``fp16``: automatic mixed precision, and tf32 for what
that leaves in float32. A CPU computes tf32 as fp32."""
Compiler = Literal["none", "inductor", "aot_eager"]
"""Backends of torch.compile; ``aot_eager`` makes no kernels and is for finding out why ``inductor`` fails."""


def autocast_dtype(precision: Precision) -> torch.dtype | None:
    """What automatic mixed precision computes in; None: there is none."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)


def allow_tf32(precision: Precision) -> None:
    """Says for this process whether float32 may be computed as TF32."""
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"


@contextmanager
def computing(device: torch.device, precision: Precision | None) -> Iterator[None]:
    """Within this context networks compute in this precision; what comes after, as before. None: as it is."""
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
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    found = [m for network in networks for m in network.modules() if isinstance(m, kinds)]
    for convolution in found:
        convolution.to(memory_format=torch.channels_last)
    return bool(found)
