"""Reading the pickled files that published training scripts write, without running what is in them."""

import argparse
import collections
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.storage import DAMAGE, first_line, read_tensors

Network = TypeVar("Network", bound=nn.Module)


class _Inert:
    """Stands for a class of a settings library whose contents nobody here reads."""


_SETTINGS_CLASSES = (
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
)
# Beside tensors and plain containers, published files hold arguments (a Namespace, or OmegaConf's
# objects) and statistics as numpy arrays. Nothing else is admitted.
_ADMITTED: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    dict,
    (_Inert, "typing.Any"),
    *((_Inert, name) for name in _SETTINGS_CLASSES),
    (np._core.multiarray._reconstruct, "numpy._core.multiarray._reconstruct"),
    (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float32, np.float64)),
]


def read_checkpoint(path: str | Path) -> Any:
    """What a ``.pt``, ``.pth`` or ``.safetensors`` file holds.

    Pickles are read with ``weights_only``: no code in them runs, and a class that is not admitted by
    name is refused by name.

    Raises:
        UserError: no such file, or one that can't be read so.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with torch.serialization.safe_globals(_ADMITTED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, *DAMAGE) as error:
        if "weights_only" in str(error):  # torch's own advice is to trust the file
            foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = f"'{foreign[1]}'" if foreign else "something"
            raise UserError(
                f"{path}: can't be read as a checkpoint: it would run or build {what} that is neither a "
                "tensor nor a known setting, and is refused"
            ) from None
        raise UserError(f"{path}: can't be read as a checkpoint ({first_line(error)})") from None


def sizes(state: Mapping[str, Tensor], name: str, num: int) -> tuple[int, ...]:
    """Of a tensor with so many axes.

    Raises:
        ValueError: it is missing, has another number of axes, or is empty.
    """
    if name not in state:
        raise ValueError(f"{name} is missing")
    shape = tuple(state[name].shape)
    if len(shape) != num or 0 in shape:
        fault = "is empty" if 0 in shape else f"has {len(shape)} axes instead of {num}"
        raise ValueError(f"{name} {fault}")
    return shape


def built(build: Callable[[], Network], state: Mapping[str, Tensor], place: str) -> Network:
    """A network with these weights, in eval mode; nothing is allocated before they are known to fit.

    Raises:
        UserError: see ``check_names_and_shapes``.
    """
    with torch.device("meta"):
        expected = build().state_dict()
    check_names_and_shapes(state, expected, place)
    network = build()
    network.load_state_dict(state)
    return network.eval()


def check_names_and_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], place: str
) -> None:
    """Raises UserError, listing them, where tensors are unknown, missing, of other shapes than expected, or no
    finite real numbers."""
    wrong = [
        *(f"{name} unknown" for name in state.keys() - expected.keys()),
        *(f"{name} missing" for name in expected.keys() - state.keys()),
        *(
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in state.keys() & expected.keys()
            if state[name].shape != expected[name].shape
        ),
        *(f"{name} {fault}" for name in state if (fault := _unsound(name, state[name]))),
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{place}: tensors do not fit: {'; '.join(sorted(wrong)[:8])}{more}")


def _unsound(name: str, value: Tensor) -> str | None:
    if name.endswith("num_batches_tracked"):
        return None
    if not value.is_floating_point():
        return f"of {str(value.dtype).removeprefix('torch.')}"
    return None if bool(value.isfinite().all()) else "not finite"


def count_numbered(names: Iterable[str], prefix: str) -> int:
    """How many parts are numbered from 0 behind a prefix, ``blocks.0.…``, ``blocks.1.…``.

    Raises:
        ValueError: none, or numbers with gaps.
    """
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = {int(match[1]) for name in names if (match := pattern.match(name))}
    if not numbers or max(numbers) + 1 != len(numbers):
        raise ValueError(f"{prefix}: expected numbers from 0 without gaps, found {len(numbers)}")
    return len(numbers)
