"""SR-DiT (arXiv 2512.12386): what its checkpoints have beside the tensors and arguments of REG's, and what its code
fixes, so that no file says it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from semtok.diffusion.repa import REPAConfig
from semtok.diffusion.routing import RoutingConfig
from semtok.hub.checkpoints import count_numbered
from semtok.hub.file_settings import FileSettings
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.transport import TimeConfig

Split = tuple[int, int]

SPLIT: Split = (2, 2)
"""Blocks (first, last) that see all tokens."""
LATENT_SCALE = 0.3099
"""By which it multiplies its image latents, INVAE's."""
GLOBAL_WEIGHT = 0.03
_QK_NORM_EPS = torch.finfo(torch.float32).eps
_ROUTING = {"drop": 0.75, "law": "random", "vectors": "routed"}
_ROUTING |= {"path_drop": 0.05, "path_drop_per": "batch"}
_CONTRASTIVE, _ALIGNMENT, _SHIFT_BASE = 0.05, 0.5, 4096.0
_OWN = ("mask_token", "fusion_proj.weight")
_MIXES, _Q_NORM = "blocks.1.attn.v1_lambda", "blocks.0.attn.q_norm.weight"
_FATE = "decides a loss's weight"


def is_sr_dit(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a tensor that token routing alone has."""
    return any(name in state for name in _OWN)


def added_to_shape(state: Mapping[str, Tensor], split: Split) -> dict[str, Any]:
    """What its network has of ``DiTArchitecture`` that REPA's has not.

    Raises:
        ValueError: too few blocks.
    """
    depth = count_numbered(state, "blocks.")
    if min(split) < 1 or sum(split) >= depth:
        raise ValueError(
            f"{depth} blocks, of which the first {split[0]} and the last {split[1]} see all tokens"
        )
    has_qk_norm = _Q_NORM in state
    return {
        "rms_norm": True,
        "norm_gain": False,
        "qk_norm": "rms" if has_qk_norm else False,
        "qk_norm_eps": _QK_NORM_EPS if has_qk_norm else None,
        "vector_norm": "rms" if "wg_norm.bias" not in state else "layer",
        "value_residual": _MIXES in state,
        "split": split,
    }


def learnt(settings: FileSettings) -> dict[str, Any]:
    """How its network was trained, as ``DiffusionConfig`` has it; routing and the shift of time are of its shapes.

    Raises:
        UserError: by name, a setting that this library has not.
    """
    settings.only("cfm_weighting", "uniform", instead="a contrast that weighs all times alike")
    contrastive = settings.number("cfm_coeff", _FATE, default=_CONTRASTIVE)
    if contrastive >= 1:
        reason = "as much as the squared error itself has no least value; expected less than 1"
        raise settings.refusal("cfm_coeff", reason)
    alignment = settings.number("proj_coeff", _FATE, default=_ALIGNMENT)
    repa = REPAConfig(weight=alignment, depth=SPLIT[0], with_global=True)
    return {"contrastive_weight": {"texture": contrastive}, "repa": repa}


def shift_base(settings: FileSettings) -> float | None:
    """The number of latent dimensions at which times are not shifted; None: they never are.

    Raises:
        UserError: settings that say nothing of this kind.
    """
    fate = "decides the law of training times"
    shifts = settings.take("time_shifting", bool, fate, True)
    base = settings.number("shift_base", fate, default=_SHIFT_BASE, least=1, most=1e9)
    return base if shifts else None


def shifted(time: TimeConfig, base: float, dimensions: int) -> TimeConfig:
    """That law of time with the shift of so many spatial latent dimensions."""
    if base == _SHIFT_BASE:
        return time.model_copy(update={"shift": "spatial_dimension"})
    return time.model_copy(update={"shift": math.sqrt(dimensions / base)})


def routing(network: DiTArchitecture) -> RoutingConfig | None:
    """Of an imported network; None where it has none."""
    if network.split is None:
        return None
    return RoutingConfig(first=network.split[0], last=network.split[1], **_ROUTING)
