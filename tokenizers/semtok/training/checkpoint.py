"""Checkpoints: everything that training needs to go on exactly, written whole or not at all."""

import contextlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.processes import gather, process_index, together
from semtok.storage import (
    DAMAGE,
    as_damage,
    first_line,
    new_folder,
    read_tensors,
    remove_folder,
    write_state,
)
from semtok.training.sharded_checkpoint import (
    SavingInParts,
    is_sharded,
    read_into,
    read_optimisers,
    tensors_of,
)
from semtok.training.sharded_checkpoint import read_networks as read_shared_networks
from semtok.training.sharding import shared_as
from semtok.training.train_config import TrainConfig
from semtok.unfinished import beside, remove_unfinished

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds them."""
_NAME = "step_{:08d}"
MODEL_FILE, _STATE_FILE = "model.safetensors", "state.pt"
_STATE_KEYS = {
    "step",
    "seconds",
    "skipped",
    "ema_updates",
    "optimisers",
    "schedules",
    "scaler",
    "metrics",
    "random",
}


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    modules: dict[str, torch.nn.Module],
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Writes ``folder/step_…``, then removes all but the newest ``keep_last``.

    Args:
        modules: networks, written as safetensors under their names.
        state: everything else, of tensors and plain Python values.

    Raises:
        OSError: the disk is full; the earlier checkpoints are as they were.
    """
    path = checkpoint_path(folder, step)
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(modules).items()}
    remove_unfinished(folder)  # nobody else writes there
    with new_folder(path) as temporary:
        safetensors.torch.save_file(tensors, temporary / MODEL_FILE)
        write_state(temporary / _STATE_FILE, state)
    keep_newest(folder, keep_last)
    return path


def keep_newest(folder: Path, num: int) -> None:
    """Removes all checkpoints but the newest ``num``, and what killed processes left of others."""
    remove_unfinished(folder)
    for old in list_checkpoints(folder)[:-num]:
        remove_folder(old)


class Keeper:
    """Keeps a run's checkpoints: whole ones, which the first process writes, or in parts.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path, config: TrainConfig) -> None:
        self.folder, self.keep_last = run / CHECKPOINTS, config.keep_last
        self._parts = SavingInParts() if config.sharding == "fsdp2" else None

    def kept(self) -> list[Path]:
        """Those that are there, oldest first."""
        return list_checkpoints(self.folder)

    def save(self, step: int, modules: dict[str, torch.nn.Module], state: dict[str, Any]) -> Path:
        """Writes the checkpoint after a step, or begins to; all processes have to ask. See ``wait``.

        Raises:
            OSError, UserError: it can't be written, or the one before.
        """
        path = checkpoint_path(self.folder, step)
        if self._parts is None:
            with together():
                if not process_index():
                    save_checkpoint(
                        self.folder,
                        step=step,
                        modules=modules,
                        state=state,
                        keep_last=self.keep_last,
                    )
            return path
        self._parts.wait()  # its folder is no unfinished one
        with together():
            if not process_index():
                remove_unfinished(self.folder)
        temporary = gather(beside(path))[0]
        self._parts.save(
            temporary,
            path,
            modules=modules,
            state=state,
            state_file=_STATE_FILE,
            prune=lambda: keep_newest(self.folder, self.keep_last),
        )
        return path

    def wait(self) -> None:
        """Until all checkpoints that were begun are there; all processes have to ask.

        Raises:
            OSError, UserError: one can't be written.
        """
        if self._parts is not None:
            self._parts.wait()

    def close(self) -> None:
        """Ends what is under way, after an error too."""
        if self._parts is not None:
            self._parts.close()


def load_checkpoint(
    path: Path,
    *,
    modules: dict[str, torch.nn.Module],
    parameters: Mapping[str, Sequence[Tensor]],
) -> dict[str, Any]:
    """Restores networks, strictly, and returns the rest of the state. No process asks another.

    Either kind of checkpoint is read, whatever this run shares out.

    Args:
        parameters: that train, by learner, see ``Optimisers``.

    Raises:
        UserError: the checkpoint is cut short, damaged, or of other networks.
    """
    way_out = f"delete {path} to go on from the one before it, or start a new run with --output"
    load_networks(path, modules=modules, way_out=way_out)
    try:
        with as_damage():
            state = torch.load(path / _STATE_FILE, map_location="cpu", weights_only=True)
    except DAMAGE as error:
        raise UserError(
            f"{path / _STATE_FILE}: cut short or damaged ({first_line(error)}); {way_out}"
        ) from None
    if not isinstance(state, dict) or not state.keys() >= _STATE_KEYS:
        raise UserError(f"{path / _STATE_FILE}: damaged, or of another version; {way_out}")
    if is_sharded(path):
        with _with_way_out(way_out):
            read_optimisers(path, state["optimisers"], parameters)
    else:
        _share_out(state["optimisers"], parameters)
    return state


def _share_out(optimisers: dict[str, Any], parameters: Mapping[str, Sequence[Tensor]]) -> None:
    """Leaves of the optimisers' whole tensors what this process has of the parameters."""
    for learner, optimiser in optimisers.items():
        for index, values in optimiser.get("state", {}).items():
            like = parameters[learner][index]
            for kind, value in values.items():
                if value.shape == like.shape:
                    values[kind] = shared_as(value, like)


def load_networks(path: Path, *, modules: dict[str, torch.nn.Module], way_out: str) -> None:
    """Restores networks, strictly.

    Args:
        way_out: of what can't be read, in a few words.

    Raises:
        UserError: the checkpoint is cut short, damaged, or of other networks.
    """
    if is_sharded(path):
        with _with_way_out(way_out):
            read_into(path, tensors_of(modules))
        return
    with _with_way_out(way_out):
        tensors = read_tensors(path / MODEL_FILE)
    for name, module in modules.items():
        prefix = f"{name}."
        own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        for key, like in module.state_dict().items():
            if key in own and own[key].shape == like.shape:
                own[key] = shared_as(own[key], like)
        try:
            module.load_state_dict(own, strict=True)
        except RuntimeError as error:
            raise UserError(
                f"{path}: does not fit this recipe's networks ({first_line(error)}); {way_out}"
            ) from None


def read_networks(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of a checkpoint's networks, whole, by their names in it.

    Raises:
        UserError: the checkpoint is cut short or damaged.
    """
    return read_shared_networks(path) if is_sharded(path) else read_tensors(path / MODEL_FILE)


@contextlib.contextmanager
def _with_way_out(way_out: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after a step is."""
    return folder / _NAME.format(step)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first, by the number in their names."""
    return sorted(p for p in folder.glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))


def step_of(checkpoint: Path) -> int:
    """After which step one of ``list_checkpoints`` was written."""
    return int(checkpoint.name.removeprefix("step_"))


def seed_random(seed: int) -> None:
    """Starts the global random generators of this process, of which a checkpoint notes the states."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def random_state() -> dict[str, Any]:
    """The states of this process's global random generators."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, keys.tolist(), position, has_gauss, cached],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undoes what has been drawn since ``random_state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
