"""Published checkpoint formats: how each is told from the names in a file, and how it is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import PCAStandIn, read_checkpoint, sizes
from semtok.hub.file_settings import FileSettings, read_settings
from semtok.hub.headed_dit import kind_of
from semtok.hub.import_dit import (
    PUBLISHED_SEMANTIC,
    has_repas_projectors,
    is_lightningdit,
    learns_sigma,
)
from semtok.hub.sr_dit import is_sr_dit
from semtok.methods.texture_classes import TEXTURE_CLASSES
from semtok.storage import first_line, read_json

Format = Literal[
    "sit",
    "redi",
    "repa",
    "reg",
    "reglue",
    "repa-e",
    "sr-dit",
    "lightningdit",
    "sfd",
    "ddt",
    "dit-dh",
    "compvis-vae",
    "reglue-compressor",
    "redi-pca",
    "semvae",
    "diffusers-vae",
    "rae",
    "diffusers-rae",
]
DITS: tuple[Format, ...] = ("sit", "redi", "repa", "reg", "reglue", "repa-e", "sr-dit")
DITS += ("lightningdit", "sfd", "ddt", "dit-dh")
_NESTS = ("ema", "model", "state_dict", "model_state_dict")
# What parallel training and compilers put into names; and larger models around the imported one.
_WRAPPERS = ("module.", "_orig_mod.")
_AROUND = ("first_stage_model.", "ema_model.", "vae.")
# DDT's training module holds both networks, and REPA's head beside them.
_DDTS = {"ema": "ema_denoiser.", "model": "denoiser."}
_DDTS_HEAD, _HEAD = "diffusion_trainer.proj.", "projectors."
_SIT_ARGUMENTS = ("loss_weight", "sample_eps", "train_eps")
_REPA_ARGUMENTS = ("proj_coeff", "weighting")
_REGLUE_ARGUMENTS = ("feat_channels", "encoder_channel_list", "compression_model_path")
_STATISTICS_NAMES = (("mean", "std"), ("latents_bias", "latents_scale"))


@dataclass(frozen=True)
class Checkpoint:
    """A published file, or a diffusers folder.

    Attributes:
        content: all that the file holds; of a folder, nothing.
        nest: under which entry the imported weights stand; None: they are the whole file.
        state: those weights, without what training puts before their names.
        others: names of tensors beside them that are of other networks.
        settings: what the file says of its training.
    """

    path: Path
    content: Mapping[str, Any]
    nest: str | None
    state: Mapping[str, Tensor]
    others: tuple[str, ...] = ()
    settings: FileSettings = field(default_factory=lambda: FileSettings(""))

    def beside(self) -> dict[str, str]:
        """What else is in the file, by entry; settings are told one by one."""
        entries = {} if self.nest is None else self.content
        beside = {
            str(name): "left out, other weights" if _is_state(value) else "left out, no weights"
            for name, value in entries.items()
            if name not in (self.nest, self.settings.entry)
        }
        return beside | dict.fromkeys(self.others, "left out, of other networks")


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
    return checkpoint_of(read_checkpoint(path), path, weights)


def checkpoint_of(content: Any, path: Path, weights: Literal["ema", "model"] = "ema") -> Checkpoint:
    """What a file holds, once it is read.

    Args:
        content: as it was read; tensors may be without contents, on torch's meta device.
        path: starts every message.

    Raises:
        UserError: it has no weights.
    """
    nests = (weights, *(nest for nest in _NESTS if nest != weights))
    for name in {weights, "ema"}:
        held = content.get(name) if isinstance(content, dict) else None
        if held is not None and not isinstance(held, Tensor) and not _is_state(held):
            raise UserError(f"{path}: '{name}' holds no state dict")
    nest = next((n for n in nests if isinstance(content, dict) and _is_state(content.get(n))), None)
    if nest is None and is_pca(content):
        return Checkpoint(path, content, None, {})
    state = content if nest is None else content[nest]
    if not _is_state(state):
        raise UserError(f"{path}: holds no state dict, neither bare nor under {', '.join(_NESTS)}")
    if weights == "ema" and nest == "model":
        raise UserError(f"{path}: holds no 'ema' beside 'model'; give --weights model")
    if weights == "model" and nest == "ema":
        raise UserError(f"{path}: holds no 'model' beside 'ema'; leave --weights out")
    names = {name: unwrapped(name) for name in state}
    if any(n.startswith(tuple(_DDTS.values())) for n in names.values()):
        around = _DDTS[weights]
        if not any(n.startswith(around) for n in names.values()):
            raise UserError(f"{path}: holds no '{around}'; give the other --weights")
        of_repa = {n: i.replace(_DDTS_HEAD, around + _HEAD, 1) for n, i in names.items()}
        return _inside(content, path, nest, state, around, of_repa)
    around = next((a for a in _AROUND if any(n.startswith(a) for n in names.values())), None)
    if weights == "model" and around == "ema_model.":
        raise UserError(f"{path}: holds averaged weights, 'ema_model.'; leave --weights out")
    return _inside(content, path, nest, state, around or "", names)


def _inside(
    content: Any,
    path: Path,
    nest: str | None,
    state: Mapping[str, Tensor],
    around: str,
    names: Mapping[str, str],
) -> Checkpoint:
    """Of a state dict the tensors within a larger model.

    Args:
        names: by those in the file.
    """
    others = tuple(name for name, inner in names.items() if not inner.startswith(around))
    own = {n: unwrapped(inner.removeprefix(around)) for n, inner in names.items()}
    own = {n: inner for n, inner in own.items() if n not in others}
    if len(set(own.values())) < len(own):
        raise UserError(f"{path}: holds names with and without 'module.' that mean the same tensor")
    inner_state = {own[n]: value for n, value in state.items() if n in own}
    settings = read_settings(content, str(path))
    return Checkpoint(path, content, nest, inner_state, others, settings)


def unwrapped(name: str) -> str:
    """A name without what parallel training and compilers put before it, or before a compiled block's."""
    before = None
    while name != before:
        before = name
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    return name.replace("._orig_mod.", ".")


def is_pca(content: Any) -> bool:
    """Whether a file is a PCA with the statistics of what it was fitted to: scikit-learn's, or as arrays."""
    return isinstance(content, dict) and (
        any(isinstance(value, PCAStandIn) for value in content.values())
        or {"components", "pca_mean", "mean", "std"} <= content.keys()
    )


def recognise(checkpoint: Checkpoint) -> tuple[Format, ...]:
    """The formats that a file can be of, by its names: mostly one.

    Raises:
        UserError: none that is known.
    """
    state, path = checkpoint.state, checkpoint.path
    if path.is_dir():
        return _of_folder(path)
    if is_pca(checkpoint.content):
        return ("redi-pca",)
    if "x_embedder.proj.weight" in state:
        try:
            return _dits(state, checkpoint.settings)
        except ValueError as error:
            raise UserError(f"{path}: of no known format ({first_line(error)})") from None
    if "encoder.conv_in.weight" in state and any(n.startswith("encoder.down.") for n in state):
        return ("compvis-vae",)
    if "encoder.model.0.weight" in state:
        return ("reglue-compressor",)
    if "encoder.1.norm1.weight" in state and "encoder.0.weight" in state:
        return ("semvae",)
    if any(name.removeprefix("decoder.") == "decoder_embed.weight" for name in state):
        return ("rae",)
    if any(name.startswith("encoder.down_blocks.") for name in state):
        raise UserError(
            f"{path}: weights of a diffusers VAE; give the folder that holds its config too"
        )
    some = ", ".join(list(state)[:3])
    more = f" and {len(state) - 3} more" if len(state) > 3 else ""
    raise UserError(f"{path}: of no known format; it holds {some}{more}")


def _of_folder(path: Path) -> tuple[Format, ...]:
    found = []
    for folder in (path, path / "vae"):
        file = folder / "config.json"
        if file.is_file():
            config = read_json(file)
            if not isinstance(config, dict):
                raise UserError(
                    f"{file}: expected settings by name, got {config!r:.40}; fetch the file again"
                )
            name = config.get("_class_name")
            name = str(name) if name is not None else None  # a list could not be looked up
            if name in TEXTURE_CLASSES:
                return ("diffusers-vae",)
            if name == "AutoencoderRAE" and folder == path:
                return ("diffusers-rae",)
            found.append(f"{file} is of {name or 'no diffusers class'}")
    if found:
        raise UserError(
            f"{'; '.join(found)}; can be imported: {', '.join(TEXTURE_CLASSES)}, AutoencoderRAE"
        )
    raise UserError(f"{path}: a folder without a diffusers autoencoder; give a file")


def _dits(state: Mapping[str, Tensor], settings: FileSettings) -> tuple[Format, ...]:
    if (kind := kind_of(state)) is not None:
        return (kind,)
    _, channels, _, _ = sizes(state, "x_embedder.proj.weight", 4)
    if is_sr_dit(state):
        return ("sr-dit",)
    if "t_embedder_sem.mlp.0.weight" in state:
        return ("sfd",)
    if settings.has_network_config:  # of LightningDiT's or of SFD's script
        return ("sfd",) if settings.values.get("model.semantic_chans") else ("lightningdit",)
    if is_lightningdit(state):
        return ("lightningdit",)
    if any(name.startswith("bn.") for name in state):
        return ("repa-e",)
    if "cls_projectors2.weight" in state:
        return _with_a_class_token(channels, settings)
    if has_repas_projectors(state):
        return ("repa",)
    return _told_by_arguments(state, channels, settings)


def _with_a_class_token(channels: int, settings: FileSettings) -> tuple[Format, ...]:
    if any(name in settings for name in _REGLUE_ARGUMENTS):
        return ("reglue",)
    # The published latents: 4 channels alone, or 4 and the 16 of the compressor. REG's arguments have no others.
    if channels == 4 or ("cls" in settings and channels not in PUBLISHED_SEMANTIC["reglue"]):
        return ("reg",)
    return ("reglue",) if channels in PUBLISHED_SEMANTIC["reglue"] else ("reg", "reglue")


def _told_by_arguments(
    state: Mapping[str, Tensor], channels: int, settings: FileSettings
) -> tuple[Format, ...]:
    """SiT and ReDi run time from noise to data, REPA from data to noise; the tensors can be the same."""
    prediction = settings.values.get("prediction")
    sit = prediction == "velocity" or any(name in settings for name in _SIT_ARGUMENTS)
    sit = sit or learns_sigma(state) or "projector.0.weight" in state
    repa = prediction == "v" or any(name in settings for name in _REPA_ARGUMENTS)
    forward: tuple[Format, ...] = ("sit",)
    if channels in PUBLISHED_SEMANTIC["redi"]:
        forward = ("redi",) if sit else ("redi", "sit")
    if sit != repa:
        return forward if sit else ("repa",)
    return (*forward, "repa")


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
        "rae": "stat.pt",
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
