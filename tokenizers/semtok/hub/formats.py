"""Published checkpoint formats: how each is told from the names in a file, and how it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import read_checkpoint, sizes
from semtok.hub.import_dit import learns_sigma
from semtok.storage import first_line, read_json

Format = Literal[
    "sit",
    "repa",
    "reg",
    "reglue",
    "repa-e",
    "lightningdit",
    "sfd",
    "compvis-vae",
    "reglue-compressor",
    "semvae",
    "diffusers-vae",
]
DITS: tuple[Format, ...] = ("sit", "repa", "reg", "reglue", "repa-e", "lightningdit", "sfd")
_NESTS = ("ema", "model", "state_dict", "model_state_dict")
_STATISTICS_NAMES = (("mean", "std"), ("latents_bias", "latents_scale"))


@dataclass(frozen=True)
class Checkpoint:
    """A published file, or a diffusers folder.

    Attributes:
        content: all that the file holds; of a folder, nothing.
        nest: under which entry the imported weights stand; None: they are the whole file.
        state: those weights, without the ``module.`` that parallel training puts before names.
    """

    path: Path
    content: Mapping[str, Any]
    nest: str | None
    state: Mapping[str, Tensor]

    def beside(self) -> dict[str, str]:
        """What else is in the file, by entry."""
        if self.nest is None:
            return {}
        return {
            str(name): "left out, other weights" if _is_state(value) else "left out, no weights"
            for name, value in self.content.items()
            if name != self.nest
        }


def open_checkpoint(path: str | Path, weights: Literal["ema", "model"] = "ema") -> Checkpoint:
    """Reads a file without running anything in it.

    Args:
        weights: the averaged or the trained ones, of a file that has both.

    Raises:
        UserError: no such file, one that can't be read so, or one without weights.
    """
    path = Path(path)
    if path.is_dir():
        return Checkpoint(path, {}, None, {})
    content = read_checkpoint(path)
    nests = (weights, *(nest for nest in _NESTS if nest != weights))
    for name in {weights, "ema"}:
        held = content.get(name) if isinstance(content, dict) else None
        if held is not None and not isinstance(held, Tensor) and not _is_state(held):
            raise UserError(f"{path}: '{name}' holds no state dict")
    nest = next((n for n in nests if isinstance(content, dict) and _is_state(content.get(n))), None)
    state = content if nest is None else content[nest]
    if not _is_state(state):
        raise UserError(f"{path}: holds no state dict, neither bare nor under {', '.join(_NESTS)}")
    if weights == "model" and nest == "ema":
        raise UserError(f"{path}: holds no 'model' beside 'ema'; leave --weights out")
    names = {name: name.removeprefix("module.") for name in state}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path}: holds names with and without 'module.' that mean the same tensor")
    return Checkpoint(path, content, nest, {names[n]: value for n, value in state.items()})


def recognise(checkpoint: Checkpoint) -> tuple[Format, ...]:
    """The formats that a file can be of, by its names: mostly one.

    Raises:
        UserError: none that is known.
    """
    state, path = checkpoint.state, checkpoint.path
    if path.is_dir():
        for folder in (path, path / "vae"):
            file = folder / "config.json"
            if file.is_file() and read_json(file).get("_class_name") == "AutoencoderKL":
                return ("diffusers-vae",)
        raise UserError(f"{path}: a folder without a diffusers AutoencoderKL; give a file")
    if "x_embedder.proj.weight" in state:
        try:
            return _dits(state)
        except ValueError as error:
            raise UserError(f"{path}: of no known format ({first_line(error)})") from None
    if "encoder.conv_in.weight" in state and any(n.startswith("encoder.down.") for n in state):
        return ("compvis-vae",)
    if "encoder.model.0.weight" in state:
        return ("reglue-compressor",)
    if "encoder.1.norm1.weight" in state and "encoder.0.weight" in state:
        return ("semvae",)
    if any(name.startswith("encoder.down_blocks.") for name in state):
        raise UserError(
            f"{path}: weights of a diffusers VAE; give the folder that holds its config too"
        )
    some = ", ".join(list(state)[:3])
    more = f" and {len(state) - 3} more" if len(state) > 3 else ""
    raise UserError(f"{path}: of no known format; it holds {some}{more}")


def _dits(state: Mapping[str, Tensor]) -> tuple[Format, ...]:
    if "t_embedder_sem.mlp.0.weight" in state:
        return ("sfd",)
    if "blocks.0.mlp.w12.weight" in state:
        return ("lightningdit",)
    if any(name.startswith("bn.") for name in state):
        return ("repa-e",)
    if "cls_projectors2.weight" in state:
        # The published latents: 4 channels alone, or 4 and the 16 of the compressor.
        return ("reglue",) if sizes(state, "x_embedder.proj.weight", 4)[1] > 16 else ("reg",)
    if "projectors.0.0.weight" in state:
        return ("repa",)
    return ("sit",) if learns_sigma(state) else ("sit", "repa")


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of a published file: of ``mean`` and ``std``, or as REPA-E's
    ``latents_bias`` and ``latents_scale``, which is one over the standard deviation.

    Raises:
        UserError: neither, or a standard deviation that is not positive.
    """
    content = read_checkpoint(path)
    for first, second in _STATISTICS_NAMES:
        if isinstance(content, dict) and {first, second} <= content.keys():
            try:
                mean, other = (_vector(content[name]) for name in (first, second))
            except (TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{path}: no statistics ({first_line(error)})") from None
            std = 1 / other if second == "latents_scale" else other
            if not bool((std > 0).all() & torch.isfinite(std).all() & torch.isfinite(mean).all()):
                raise UserError(f"{path}: a standard deviation is not a positive number")
            return mean, std
    raise UserError(f"{path}: no statistics; expected mean and std, or latents_bias and _scale")


def statistics_beside(path: Path, format: Format) -> Path | None:
    """The statistics file in the folder of a checkpoint, by the name that published ones have: REPA-E's are
    called as the checkpoint is; others must be the only one of their kind."""
    own = path.with_name(f"{path.stem}-latents-stats.pt")
    if format == "compvis-vae" and own.is_file():
        return own
    pattern = {
        "reglue-compressor": "dino_mean_std*.p*",
        "semvae": "latents_sv_stats.pt",
        "compvis-vae": "latents_stats.pt",
    }.get(format)
    found = list(path.parent.glob(pattern)) if pattern is not None else []
    return found[0] if len(found) == 1 else None


def _vector(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32).flatten()


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )
