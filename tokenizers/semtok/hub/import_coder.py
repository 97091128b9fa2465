"""Official checkpoints of feature coders: REGLUE's compressor with its statistics, SemVAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import read_checkpoint, read_state_dict
from semtok.methods.reglue import Compressor
from semtok.methods.semvae import SemVAE
from semtok.storage import DAMAGE, first_line


def import_compressor(path: str | Path, statistics: str | Path) -> Compressor:
    """REGLUE's compressor, in eval mode.

    Args:
        path: ``.pth`` as its training script writes it (names begin with ``module.``), or the same
            weights as safetensors.
        statistics: the norm-stats file beside it, ``dino_mean_std_….pth``: mean and std per channel.

    Raises:
        UserError: files that are not these, or not of one another.
    """
    state = {
        name.replace(".model.", ".", 1): value for name, value in read_state_dict(path).items()
    }
    try:
        # The layers of a stack alternate: convolution, residual block, …, convolution.
        last = max(int(name.split(".")[1]) for name in state if name.startswith("encoder."))
        convolutions = [state[f"encoder.{i}.weight"] for i in range(0, last + 1, 2)]
        feature_channels = convolutions[0].shape[1]
        *hidden, channels = (len(weight) for weight in convolutions)
        compressor = Compressor(feature_channels, hidden, channels)
        content = read_checkpoint(statistics)
        state |= {f"feature_{name}": _vector(content[name]) for name in ("mean", "std")}
        compressor.load_state_dict(state)
        if not (compressor.feature_std > 0).all():
            raise ValueError("a standard deviation is not positive")
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} with {statistics}: not a REGLUE compressor and its statistics ({first_line(error)})"
        ) from None
    return compressor.eval()


def _vector(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32).flatten()


def import_semvae(path: str | Path, *, heads: int | None = None) -> SemVAE:
    """SemVAE, in eval mode.

    Args:
        path: ``.pt`` as its training script writes it, or the bare weights as safetensors.
        heads: attention heads; None: from the settings in the checkpoint, where they are; else 6.

    Raises:
        UserError: a file that is none.
    """
    content = read_checkpoint(path)
    try:
        state = content.get("model_state_dict", content)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        width, feature_channels = state["encoder.0.weight"].shape
        blocks = sum(
            name.startswith("encoder.") and name.endswith("norm1.weight") for name in state
        )
        channels = len(state[f"encoder.{blocks + 2}.weight"]) // 2
        heads = heads or _heads(content) or 6
        coder = SemVAE(feature_channels, channels, width, heads, blocks)
        coder.load_state_dict(state)
    except (AttributeError, TypeError, ArithmeticError, *DAMAGE) as error:
        raise UserError(f"{path}: not a SemVAE checkpoint ({first_line(error)})") from None
    return coder.eval()


def _heads(content: Mapping[str, Any]) -> int | None:
    """The number of heads, which no weight tells, from the YAML text in the checkpoint."""
    try:
        return int(yaml.safe_load(content["config"])["model"]["params"]["transformer_heads"])
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return None
