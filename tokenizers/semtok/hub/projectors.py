"""REPA's heads in published transformers: REPA's and REG's three layers, iREPA's convolution or one layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from semtok.hub.checkpoints import sizes
from semtok.teachers import silu_mlp

PROJECTORS = ("projectors.", "repa_projector.", "projector.")
"""Prefixes of their names."""
_ONE = ("repa_projector.", "projector.")  # of files with a single one
_LAYER = ".projection_layer."  # iREPA's class around the layers
_AS_ONE = "projectors."


def projector_name(name: str) -> str:
    """What a projector's parameter with an official name is called in ``read_projectors``'s list, after
    ``projectors.``."""
    for prefix in _ONE:
        if name.startswith(prefix):
            name = f"{_AS_ONE}0.{name.removeprefix(prefix)}"
    return name.replace(_LAYER, ".", 1)


def read_projectors(state: Mapping[str, Any]) -> nn.ModuleList:
    """Every head of a state dict, in eval mode: three layers or one on tokens (..., D), or an odd-sized convolution on
    maps of them (B, D, h, w), each as its tensors say.

    Raises:
        ValueError: names or shapes of another head.
    """
    own = {
        projector_name(name).removeprefix(_AS_ONE): value
        for name, value in state.items()
        if name.startswith(PROJECTORS)
    }
    heads = nn.ModuleList()
    while inner := _below(own, f"{len(heads)}."):
        heads.append(_head(inner, f"{_AS_ONE}{len(heads)}."))
    _none_unknown(own, heads.state_dict(), _AS_ONE)
    return heads.eval()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}


def _none_unknown(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], prefix: str) -> None:
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"unknown {', '.join(prefix + name for name in unknown[:3])}")


def _head(state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    first = next((state[name] for name in ("0.weight", "weight") if name in state), None)
    if first is None:
        raise ValueError(f"unknown {prefix}{sorted(state)[0]}")
    with first.device:
        head = _built(state, prefix)
    expected = head.state_dict()
    _none_unknown(state, expected, prefix)
    wrong = [n for n, v in expected.items() if n not in state or state[n].shape != v.shape]
    if wrong:
        raise ValueError(f"{prefix}{wrong[0]} is not of a projector")
    head.load_state_dict(state)
    return head


def _built(state: Mapping[str, Tensor], prefix: str) -> nn.Module:
    if "0.weight" in state:
        hidden, width = sizes(state, "0.weight", 2)
        if "4.weight" not in state:
            raise ValueError(f"{prefix}4.weight is missing, of a projector of three layers")
        return silu_mlp(width, hidden, sizes(state, "4.weight", 2)[0])
    if state["weight"].ndim != 4:
        out, width = sizes(state, "weight", 2)
        return nn.Linear(width, out)
    out, width, size, _ = sizes(state, "weight", 4)
    if not size % 2:
        raise ValueError(f"{prefix}weight convolves {size} cells; expected an odd number")
    return nn.Conv2d(width, out, size, padding=size // 2)
