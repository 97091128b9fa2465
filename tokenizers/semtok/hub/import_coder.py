"""Official checkpoints of feature coders: REGLUE's compressor with its statistics, SemVAE."""

from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import MALFORMED, check_names_and_shapes, count_numbered
from semtok.methods.reglue import Compressor, CompressorShape
from semtok.methods.semvae import SemVAE, SemVAEShape
from semtok.storage import first_line


def import_compressor(
    state: Mapping[str, Tensor], statistics: tuple[Tensor, Tensor], *, place: str
) -> Compressor:
    """REGLUE's compressor, in eval mode.

    Args:
        state: with the names of its training script, ``encoder.model.0.weight`` and so on.
        statistics: mean and standard deviation (D,) of the features, which its script keeps in another
            file, ``dino_mean_std_….pth``.
        place: starts every message.

    Raises:
        UserError: weights that are not these, or statistics of other features.
    """
    state = {name.replace(".model.", ".", 1): value for name, value in state.items()}
    try:
        # The layers of a stack alternate: convolution, residual block, …, convolution.
        layers = count_numbered(state, "encoder.")
        convolutions = [state[f"encoder.{i}.weight"] for i in range(0, layers, 2)]
        feature_channels = convolutions[0].shape[1]
        *hidden, channels = (len(weight) for weight in convolutions)
        compressor = Compressor(
            CompressorShape(
                feature_channels=feature_channels, hidden=tuple(hidden), channels=channels
            )
        )
    except MALFORMED as error:
        raise UserError(f"{place}: not a REGLUE compressor ({first_line(error)})") from None
    if not (statistics[1] > 0).all():
        raise UserError(f"{place}: a standard deviation in its statistics is not positive")
    state |= dict(zip(("feature_mean", "feature_std"), statistics, strict=True))
    check_names_and_shapes(state, compressor.state_dict(), place)
    compressor.load_state_dict(state)
    return compressor.eval()


def import_semvae(state: Mapping[str, Tensor], *, place: str, heads: int | None = None) -> SemVAE:
    """SemVAE, in eval mode.

    Args:
        state: with the names of its training script.
        place: starts every message.
        heads: attention heads, which no weight tells; None: the published 6.

    Raises:
        UserError: weights that are not these.
    """
    try:
        width, feature_channels = state["encoder.0.weight"].shape
        blocks = sum(
            name.startswith("encoder.") and name.endswith("norm1.weight") for name in state
        )
        channels = len(state[f"encoder.{blocks + 2}.weight"]) // 2
        coder = SemVAE(
            SemVAEShape(
                feature_channels=feature_channels,
                channels=channels,
                width=width,
                heads=heads or 6,
                blocks=blocks,
            )
        )
    except MALFORMED as error:
        raise UserError(f"{place}: not a SemVAE checkpoint ({first_line(error)})") from None
    check_names_and_shapes(state, coder.state_dict(), place)
    coder.load_state_dict(state)
    return coder.eval()


def semvae_heads(content: Mapping[str, Any]) -> int | None:
    """The number of heads, from the YAML text that SemVAE's training script puts beside the weights."""
    try:
        return int(yaml.safe_load(content["config"])["model"]["params"]["transformer_heads"])
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError):
        return None
