"""Which image comes before which in the global batch, wherever in it that one is computed."""

from collections.abc import Callable

import torch
from torch import Tensor

from semtok.sampler.latents import Latents, Posterior


def previous_of(
    last: list[Posterior], process_index: int, gather: Callable[[Tensor], Tensor]
) -> list[Posterior]:
    """The posterior (1, ...) of the image before each micro-batch of this process.

    Before the first image of the batch comes the last one. See ``data.order.BatchSlice`` for who has which.

    Args:
        last: of each micro-batch of this process its last image, (1, ...).
        gather: tensors (1, ...) of all processes, in their order, in one.
    """
    own = torch.stack([_packed(posterior) for posterior in last])
    of_all = gather(own[None].contiguous()).transpose(0, 1)  # (micro-batches, processes, numbers)
    before = of_all.flatten(0, 1).roll(1, dims=0).view_as(of_all)[:, process_index]
    return [_unpacked(numbers, like) for numbers, like in zip(before, last, strict=True)]


def _packed(posterior: Posterior) -> Tensor:
    parts = [*posterior.mean.values(), *posterior.std.values()]
    return torch.cat([part.flatten() for part in parts])


def _unpacked(numbers: Tensor, like: Posterior) -> Posterior:
    shapes = [part.shape for part in (*like.mean.values(), *like.std.values())]
    parts = numbers.split([shape.numel() for shape in shapes])
    tensors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    mean, std = tensors[: len(like.mean)], tensors[len(like.mean) :]
    return Posterior(
        Latents(dict(zip(like.mean, mean, strict=True))),
        Latents(dict(zip(like.std, std, strict=True))),
    )
