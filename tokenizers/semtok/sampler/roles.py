"""Which weights of a network are hidden matrices, said where its layers are made.

A hidden matrix maps one hidden state of a transformer to another. Optimisers for matrices (Muon, Jordan et al. 2024)
treat these as matrices. Embeddings, output heads, convolutions, norms and biases are none.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

from torch import Tensor, nn

_TAG = "hidden_matrices"
_AXES = {"outputs": 0, "inputs": 1}  # of a linear layer's weight
_Layer = TypeVar("_Layer", bound=nn.Module)


@dataclass(frozen=True)
class HiddenMatrix:
    """A weight that is one hidden matrix, or several of equal shape stored as one.

    Attributes:
        parameter: (outputs, inputs).
        slices: of how many matrices it is made.
        axis: along which they follow each other: 0 the outputs, 1 the inputs.
    """

    parameter: nn.Parameter
    slices: int
    axis: int

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of each matrix's share of a tensor of the weight's shape."""
        return tensor.chunk(self.slices, dim=self.axis)


def hidden_matrix(
    layer: _Layer,
    *,
    weight: str = "weight",
    slices: int = 1,
    along: Literal["outputs", "inputs"] = "outputs",
) -> _Layer:
    """Says that a layer's weight is a hidden matrix; gives the layer back. Copies of the layer say so too.

    Args:
        weight: the parameter's name in the layer.
        slices: of how many matrices of equal shape it is made, such as 3 for queries, keys and values.
        along: how these follow each other.

    Raises:
        ValueError: the weight is no matrix, or can't be cut so.
    """
    axis, shape = _AXES[along], getattr(layer, weight).shape
    if len(shape) != 2 or slices < 1 or shape[axis] % slices:
        raise ValueError(f"a weight of shape {tuple(shape)} is not {slices} matrices along {along}")
    # On the module, not on the parameter, whose attributes a deep copy loses.
    setattr(layer, _TAG, getattr(layer, _TAG, {}) | {weight: (slices, axis)})
    return layer


def tagged_timm_block(block: _Layer) -> _Layer:
    """Says which weights of timm's transformer block are hidden matrices; gives the block back."""
    hidden_matrix(block.attn.qkv, slices=3)
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2):
        hidden_matrix(layer)
    return block


def find_hidden_matrices(network: nn.Module) -> Iterator[HiddenMatrix]:
    """Those of a network that train, in the order of its modules, each once."""
    seen = set()
    for module in network.modules():
        for weight, (slices, axis) in getattr(module, _TAG, {}).items():
            parameter = getattr(module, weight)
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield HiddenMatrix(parameter, slices, axis)
