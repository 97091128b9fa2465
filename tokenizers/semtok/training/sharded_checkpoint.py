"""Checkpoints in parts (torch.distributed.checkpoint): each process writes its own while training goes on.

They are read in any number of processes. The small rest of the state stands beside, as where networks are whole.
"""

import contextlib
import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from semtok import stopping
from semtok.errors import UserError
from semtok.processes import PATIENCE, process_index, together
from semtok.stopping import When
from semtok.storage import DAMAGE, as_damage, first_line, put_in_place, write_state

_METADATA = ".metadata"
_OPTIMISERS = "optimisers"
_NO_GROUP = "torch.distributed is disabled"  # torch warns where one process writes or reads alone


def is_sharded(checkpoint: Path) -> bool:
    """Whether a checkpoint is one in parts."""
    return (checkpoint / _METADATA).is_file()


# Writing -----------------------------------------------------------------------------------------


class SavingInParts:
    """Writes checkpoints of which each process has a part, while training goes on. One is under way at most.

    A step waits for the copy to the host, and for the checkpoint before, should it still be under way.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        self._pending: Future[Any] | None = None
        self._path: Path | None = None

    def save(
        self,
        temporary: Path,
        path: Path,
        *,
        modules: Mapping[str, nn.Module],
        state: dict[str, Any],
        state_file: str,
        prune: Callable[[], None],
    ) -> None:
        """Begins to write ``path``; all processes have to ask. It is there when all parts are.

        Args:
            temporary: a folder beside it, which no process has made.
            modules, state: see ``checkpoint.save_checkpoint``.
            state_file: takes the state but for the optimisers' tensors.
            prune: called in one process when the checkpoint is there.

        Raises:
            OSError, UserError: this checkpoint, or the one before, can't be written.
        """
        self.wait()
        tensors, rest = _split(state)
        tensors |= tensors_of(modules)
        with together():
            if not process_index():
                temporary.mkdir(parents=True)
                write_state(temporary / state_file, rest)
        if dist.is_initialized() and self._group is None:
            # Of its own, as training's exchanges are under way meanwhile; between hosts, as files are written there.
            self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
        writer, self._path = _Writer(temporary, path, prune), path
        warnings.filterwarnings("ignore", message=_NO_GROUP)
        self._pending = dcp.async_save(tensors, storage_writer=writer, process_group=self._group)

    def wait(self) -> None:
        """Until the checkpoint under way is there.

        Raises:
            OSError, UserError: it can't be written; in all processes.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            with stopping.obeyed(When.LATER):
                pending.result()
        except CheckpointException as error:
            failure = _first_failure(error)
            if isinstance(failure, OSError):
                raise failure from None
            # Of a full disk torch may tell that a position is unexpected.
            raise UserError(
                f"{self._path}: can't be written ({first_line(failure)}); see what others say, and whether the disk is "
                "full, and go on with --resume auto"
            ) from None

    def close(self) -> None:
        """Waits for what is under way, whatever becomes of it: the folder is another run's then."""
        if self._pending is not None:
            with contextlib.suppress(Exception):
                self.wait()
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = None


class _Writer(FileSystemWriter):
    """Puts the checkpoint in its place: in one process, after all have said that their parts are on the disk."""

    def __init__(self, temporary: Path, path: Path, prune: Callable[[], None]) -> None:
        super().__init__(temporary)
        self._temporary, self._path, self._prune = temporary, path, prune

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        put_in_place(self._temporary, self._path)
        self._prune()


def tensors_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Parameters and buffers of networks, under the names that they have in a checkpoint."""
    return {
        f"{name}.{key}": tensor.detach()
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
    }


def _split(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimisers' tensors, by learner, number of the parameter and kind; and the rest."""
    tensors, rest = {}, {}
    for learner, optimiser in state[_OPTIMISERS].items():
        for index, values in optimiser["state"].items():
            tensors |= {f"{_OPTIMISERS}.{learner}.{index}.{k}": v for k, v in values.items()}
        rest[learner] = optimiser | {"state": {}}
    return tensors, state | {_OPTIMISERS: rest}


def _first_failure(error: CheckpointException) -> Exception:
    """What went wrong in the first process that failed, as this process alone would have it."""
    _, (failure, _) = min(error.failures.items())
    return failure if isinstance(failure, Exception) else RuntimeError(first_line(failure))


# Reading -----------------------------------------------------------------------------------------


def read_networks(checkpoint: Path) -> dict[str, Tensor]:
    """Whole parameters and buffers, by their names in the checkpoint.

    Raises:
        UserError: it is damaged.
    """
    kept = _kept(checkpoint)
    networks = {n: about for n, about in kept.items() if not n.startswith(f"{_OPTIMISERS}.")}
    try:
        with as_damage():
            tensors = {name: _empty(about) for name, about in networks.items()}
    except DAMAGE as error:  # more than there is room for
        raise _damaged(checkpoint, error) from None
    _read(checkpoint, tensors)
    return tensors


def read_into(checkpoint: Path, wanted: Mapping[str, Tensor]) -> None:
    """Reads parameters and buffers in place: of those that are shared out this process's part. No process asks another.

    Args:
        wanted: by their names in the checkpoint.

    Raises:
        UserError: it is damaged, or of other networks.
    """
    kept = _kept(checkpoint)
    prefixes = {name.split(".")[0] for name in wanted}
    names = {name for name in kept if name.split(".")[0] in prefixes}
    wrong = [f"{name} is unknown" for name in sorted(names - wanted.keys())]
    wrong += [f"{name} is missing" for name in sorted(wanted.keys() - names)]
    wrong += [
        f"{name} is {tuple(kept[name].size)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in kept and kept[name].size != tensor.shape
    ]
    if wrong:
        raise UserError(f"{checkpoint}: does not fit this recipe's networks ({wrong[0]})")
    _read(checkpoint, dict(wanted))


def read_optimisers(
    checkpoint: Path, optimisers: dict[str, Any], parameters: Mapping[str, Sequence[Tensor]]
) -> None:
    """Gives the optimisers' states the tensors that the checkpoint has of them, shared out as parameters are.

    Args:
        optimisers: by learner, as ``_split`` has left them.
        parameters: that train, by learner.

    Raises:
        UserError: it is damaged, or of other networks.
    """
    tensors: dict[str, Tensor] = {}
    for name, about in _kept(checkpoint).items():
        if not name.startswith(f"{_OPTIMISERS}."):
            continue
        learner, number, kind = _place_in_optimisers(name)
        if learner not in optimisers or number not in range(len(parameters.get(learner, ()))):
            raise UserError(f"{checkpoint}: does not fit this recipe's networks ({name})")
        like = parameters[learner][number].detach()
        empty = torch.zeros_like(like) if like.shape == about.size else _empty(about)
        tensors[name] = optimisers[learner]["state"].setdefault(number, {})[kind] = empty
    _read(checkpoint, tensors)


def _empty(about: TensorStorageMetadata) -> Tensor:
    return torch.zeros(about.size, dtype=about.properties.dtype)


def _kept(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    try:
        with as_damage():  # what is unpickled need be nothing of what it should be
            kept = _Reader(checkpoint).read_metadata().state_dict_metadata
            for name, about in kept.items():
                _check(name, about)
    except DAMAGE as error:
        raise _damaged(checkpoint, error) from None
    return kept


def _check(name: Any, about: Any) -> None:
    """Raises one of ``DAMAGE`` where the list of parts does not tell of a whole tensor.

    What no part holds torch would leave as it is, without a word.
    """
    if not isinstance(name, str) or not isinstance(about, TensorStorageMetadata):
        raise ValueError("holds other things than tensors")
    if name.startswith(f"{_OPTIMISERS}."):
        _place_in_optimisers(name)
    whole = torch.empty(about.size, dtype=about.properties.dtype, device="meta")
    if sum(math.prod(chunk.sizes) for chunk in about.chunks) != whole.numel():
        raise ValueError(f"parts of {name} are missing")


def _place_in_optimisers(name: str) -> tuple[str, int, str]:
    """Of a tensor's name in the checkpoint its learner, the number of its parameter, and its kind."""
    _, learner, number, kind = name.split(".")
    return learner, int(number), kind


def _read(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        return
    warnings.filterwarnings("ignore", message=_NO_GROUP)
    try:
        with as_damage():
            dcp.load(tensors, storage_reader=_Reader(checkpoint), no_dist=True)
    except CheckpointException as error:
        raise _damaged(checkpoint, _first_failure(error)) from None
    except DAMAGE as error:
        raise _damaged(checkpoint, error) from None


def _damaged(checkpoint: Path, error: Exception) -> UserError:
    # Torch's own advice is to trust the file.
    why = "a part holds no tensor" if "weights_only" in str(error) else first_line(error)
    return UserError(f"{checkpoint}: cut short or damaged ({why})")


class _Unpickler(pickle.Unpickler):
    """Of the list of parts: builds what it is made of, and refuses all else by name."""

    _OURS = {
        "torch.distributed.checkpoint.metadata": (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "pathlib":  # where it was written, which nobody asks
            return PurePath
        dtype = getattr(torch, name, None) if module == "torch" else None
        if name not in self._OURS.get(module, ()) and not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """Reads tensors and the list of them, and runs nothing that a file holds."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        with (Path(self.path) / _METADATA).open("rb") as file:
            return _Unpickler(file).load()
