"""Reading the pickled files that published training scripts write, without running what is in them."""

import argparse
import collections
import operator
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.storage import DAMAGE, as_damage, first_line, read_tensors

Network = TypeVar("Network", bound=nn.Module)


class StandIn:
    """Stands for an object of a class that is not loaded: its attributes and nothing else."""


class PCAStandIn(StandIn):
    """Stands for scikit-learn's PCA."""


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
# Of numpy's scalars and arrays: counters, losses and flags of every width.
_NUMBERS = ["?", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
_ARRAYS = ("multiarray._reconstruct", "multiarray.scalar", "numeric._frombuffer")
# Beside tensors and plain containers, published files hold arguments (a Namespace, or OmegaConf's
# objects), statistics as numpy arrays, and a PCA. Nothing else is admitted.
_ADMITTED: list[Any] = [
    argparse.Namespace,
    collections.defaultdict,
    dict,
    (StandIn, "typing.Any"),
    *((StandIn, name) for name in _SETTINGS_CLASSES),
    (PCAStandIn, "sklearn.decomposition._pca.PCA"),
    *(
        (operator.attrgetter(name)(np._core), f"numpy.{core}.{name}")
        for core in ("_core", "core")  # before numpy 2
        for name in _ARRAYS
    ),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in _NUMBERS),
]


def _bytes_of(text: str, encoding: str) -> bytes:
    """What old pickles call for the bytes of a numpy scalar; of no other encoding than they use."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"weights_only: text in {encoding!r} is not admitted")
    return text.encode("latin1")


class _ArrayUnpickler(pickle._Unpickler):
    """Of pickles that torch did not write: arrays, plain containers, and stand-ins by name.

    Python's own: the one in C takes any number in a file for the size of a table and fills the memory.
    """

    _classes: Mapping[tuple[str, str], Any] = {
        tuple(name.rsplit(".", 1)): value
        for value, name in (
            *(one for one in _ADMITTED if isinstance(one, tuple)),
            (np.ndarray, "numpy.ndarray"),
            (np.dtype, "numpy.dtype"),
            (_bytes_of, "_codecs.encode"),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._classes:
            raise pickle.UnpicklingError(f"weights_only: GLOBAL {module}.{name} is not admitted")
        return self._classes[module, name]


def read_checkpoint(path: str | Path) -> Any:
    """What a ``.pt``, ``.pth``, ``.ckpt``, ``.pkl`` or ``.safetensors`` file holds.

    No code in a pickle runs, and a class that is not admitted by name is refused by name.

    Raises:
        UserError: no such file, or one that can't be read so.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        if not zipfile.is_zipfile(path):  # a plain pickle, or one of torch before 1.6
            with path.open("rb") as file, as_damage():
                content = _ArrayUnpickler(file).load()
            if isinstance(content, dict):
                return content
        with as_damage(), torch.serialization.safe_globals(_ADMITTED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGE as error:
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
    """A network with these weights, in eval mode; nothing is allocated before they are known to fit. Weights
    without contents, on torch's meta device, make a network without contents.

    Raises:
        UserError: see ``check_names_and_shapes``.
    """
    with torch.device("meta"):
        expected = build().state_dict()
    check_names_and_shapes(state, expected, place)
    without_contents = any(value.is_meta for value in state.values())
    with torch.device("meta") if without_contents else nullcontext():
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
    if value.is_meta:  # has no contents to look at
        return None
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
