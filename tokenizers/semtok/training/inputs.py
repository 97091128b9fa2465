"""What a source loaded, as networks on a device take it; and what of frozen teachers is compiled."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from semtok.data.source import ImageBatch
from semtok.images import to_pixels
from semtok.objective import Batch
from semtok.teachers import Teacher, TeacherFeatures


def on_device(batch: ImageBatch, device: torch.device) -> Batch:
    """What a source loaded, as objectives take it."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    return Batch(
        to_pixels(move(batch.images)) if batch.images is not None else None,
        move(batch.labels),
        {name: move(values) for name, values in batch.attributes.items()},
        # In float32 only on the device, so that little crosses.
        batch.features.map(move).restored() if batch.features is not None else None,
        batch.latents.map(lambda part: move(part).float()) if batch.latents is not None else None,
    )


def teacher_blocks(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of the frozen transformers among these networks."""
    teachers = [network.network for network in networks if isinstance(network, Teacher)]
    return [block for teacher in teachers for block in getattr(teacher, "blocks", ())]


def in_float32(value: Any) -> Any:
    """Features of teachers in float32; anything else as it is."""
    return value.map(Tensor.float) if isinstance(value, TeacherFeatures) else value
