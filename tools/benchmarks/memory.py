"""How much memory a training step needs, estimated without computing it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.synthetic import PUBLISHED, transformer_inputs
from semtok.sampler.dit import DiT, architecture
from semtok.teachers import silu_mlp


@dataclass(frozen=True)
class MemoryEstimate:
    """GB, of 10^9 bytes.

    Attributes:
        weights: parameters in float32, and their bfloat16 copies that autocast keeps through a step.
        gradients, optimiser, average: float32; AdamW has two moments.
        activations: what the forward pass keeps for the backward pass.
    """

    weights: float
    gradients: float
    optimiser: float
    average: float
    activations: float

    @property
    def total(self) -> float:
        """All of it; the allocator needs some more."""
        return self.weights + self.gradients + self.optimiser + self.average + self.activations


def estimate_memory(
    kind: str, network: str, batch_size: int, *, precision: str, checkpointing: bool
) -> MemoryEstimate:
    """A step of a diffusion transformer on latents of 256x256 images, on tensors without contents.

    Args:
        kind: whose latents, one of ``PUBLISHED``.
    """
    published = PUBLISHED[kind]
    spec = published.spec
    with FakeTensorMode():
        leads = published.diffusion.get("leads")
        timed = ("semantic", "texture") if leads else ()
        model = DiT(architecture(network), spec, num_classes=1000, timed_parts=timed)
        model.checkpointing = checkpointing
        parameters = sum(p.numel() for p in model.parameters())
        width = published.target_width
        head = silu_mlp(model.config.width, 2048, width) if width is not None else None
        if head is not None:
            parameters += sum(p.numel() for p in head.parameters())
        x, times, labels = transformer_inputs(spec, batch_size)
        own = {id(p.untyped_storage()) for p in model.parameters()}
        kept: dict[int, tuple[int, object]] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if id(storage) not in own and tensor.numel() > 1:
                kept[storage._cdata] = (storage.nbytes(), tensor)
            return tensor

        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        with (
            torch.autocast("cpu", dtype, enabled=precision != "fp32"),
            saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output = model(x, times, labels, hidden_after=2)
            if head is not None:
                head(output.hidden)
        activations = sum(size for size, _ in kept.values())
    copies = 2 if precision != "fp32" else 0
    gb = 1e-9 * parameters
    # Autocast's copies of the weights are among what is kept.
    kept_copies = copies * gb if not checkpointing else 0.0
    return MemoryEstimate(
        weights=(4 + copies) * gb,
        gradients=4 * gb,
        optimiser=8 * gb,
        average=4 * gb,
        activations=max(0.0, activations * 1e-9 - kept_copies),
    )
