"""Official checkpoints of feature coders: REGLUE's compressor with its statistics, SemVAE."""

from collections.abc import Mapping
from typing import Any

import yaml
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import built, count_numbered, sizes
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
        convolutions = [sizes(state, f"encoder.{i}.weight", 4) for i in range(0, layers, 2)]
    except ValueError as error:
        raise UserError(f"{place}: not a REGLUE compressor ({first_line(error)})") from None
    if not (statistics[1] > 0).all():
        raise UserError(f"{place}: a standard deviation in its statistics is not positive")
    state |= dict(zip(("feature_mean", "feature_std"), statistics, strict=True))
    *hidden, channels = (shape[0] for shape in convolutions)
    shape = CompressorShape(
        feature_channels=convolutions[0][1], hidden=tuple(hidden), channels=channels
    )
    return built(lambda: Compressor(shape), state, place)


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
        width, feature_channels = sizes(state, "encoder.0.weight", 2)
        blocks = sum(
            name.startswith("encoder.") and name.endswith("norm1.weight") for name in state
        )
        channels = sizes(state, f"encoder.{blocks + 2}.weight", 2)[0] // 2
        heads = heads or 6
        if channels < 1 or heads < 1 or width % heads:
            raise ValueError(f"width {width}, {heads} heads, {channels} channels")
    except ValueError as error:
        raise UserError(f"{place}: not a SemVAE checkpoint ({first_line(error)})") from None
    shape = SemVAEShape(
        feature_channels=feature_channels,
        channels=channels,
        width=width,
        heads=heads,
        blocks=blocks,
    )
    return built(lambda: SemVAE(shape), state, place)


def semvae_heads(content: Mapping[str, Any]) -> int | None:
    """The number of heads, from the YAML text that SemVAE's training script puts beside the weights."""
    text = content.get("config")
    try:
        told = yaml.safe_load(text) if isinstance(text, str) else None
        return int(told["model"]["params"]["transformer_heads"])
    except (LookupError, TypeError, ValueError, yaml.YAMLError):
        return None
