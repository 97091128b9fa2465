"""Official checkpoints of feature coders: REGLUE's compressor with its statistics, SemVAE, ReDi's components."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import PCAStandIn, built, count_numbered, sizes
from semtok.hub.file_settings import FileSettings
from semtok.methods.coders import CoderShape
from semtok.methods.redi import PrincipalComponents
from semtok.methods.reglue import Compressor, CompressorShape
from semtok.methods.semvae import SemVAE, SemVAEShape
from semtok.storage import first_line

REDI_COMPONENTS = 8
"""How many principal components its paper keeps."""


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
    device = state["encoder.0.weight"].device
    state |= {
        f"feature_{n}": v.to(device) for n, v in zip(("mean", "std"), statistics, strict=True)
    }
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


def read_semvae(settings: FileSettings) -> int | None:
    """The number of heads, from the YAML text that SemVAE's training script puts beside the weights; None: not said.

    Raises:
        UserError: settings of a network that this library has not.
    """
    settings.only("model.variational", True, instead="variational coders")
    settings.only("model.arch", "transformer", instead="transformers")
    return settings.take("model.params.transformer_heads", int, "decides the number of heads")


def coder_width(state: Mapping[str, Tensor]) -> int | None:
    """Width of SemVAE's tokens; None: there is no first layer."""
    first = state.get("encoder.0.weight")
    return len(first) if first is not None and first.ndim == 2 else None


def check_semvae(settings: FileSettings, content: Mapping[str, Any], coder: SemVAE) -> None:
    """Raises UserError where a file says of its network what its tensors are not."""
    shape = coder.shape
    settings.check("model.bottleneck_dim", shape.channels)
    settings.check("model.params.hidden_dim", shape.width)
    settings.check("model.params.transformer_blocks", shape.blocks)
    beside = FileSettings(settings.place, "file", content)
    beside.check("input_dim", shape.feature_channels)
    beside.check("bottleneck_dim", shape.channels)


def import_components(
    content: Mapping[str, Any], channels: int, *, place: str
) -> PrincipalComponents:
    """ReDi's principal components, in eval mode.

    There features are standardised, centred once more by the PCA's own mean, and projected; the two means are
    one here.

    Args:
        content: scikit-learn's PCA beside the mean and the standard deviation (D,) of the features; or arrays
            ``components`` (K, D), ``pca_mean``, ``mean`` and ``std`` (D,).
        channels: how many components are kept, the first ones.
        place: starts every message.

    Raises:
        UserError: something missing, sizes that do not go together, or a whitened PCA.
    """
    try:
        components, pca_mean, mean, std = _pca_arrays(content)
        if components.ndim != 2 or {len(v) for v in (pca_mean, mean, std)} != {components.shape[1]}:
            raise ValueError("its components, means and deviations are of different features")
        if not 1 <= channels <= len(components):
            raise ValueError(f"it has {len(components)} components, not {channels}")
        if not bool((std > 0).all()):
            raise ValueError("a standard deviation is not positive")
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: not ReDi's PCA ({first_line(error)})") from None
    shape = CoderShape(feature_channels=components.shape[1], channels=channels)
    state = {
        "components": components[:channels].float(),
        "feature_mean": (mean + std * pca_mean).float(),
        "feature_std": std.float(),
    }
    return built(lambda: PrincipalComponents(shape), state, place)


def _pca_arrays(content: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Components, the PCA's own mean, and the features' mean and standard deviation, in float64."""
    pca = next((value for value in content.values() if isinstance(value, PCAStandIn)), None)
    if pca is not None:
        fitted = vars(pca)
        if fitted.get("whiten"):
            raise ValueError("it whitens, which ReDi does not")
        arrays = [fitted.get("components_"), fitted.get("mean_")]
    else:
        arrays = [content.get("components"), content.get("pca_mean")]
    for word in ("mean", "std"):
        names = [n for n in content if word in str(n) and n != "pca_mean"]
        if len(names) != 1:
            raise ValueError(f"expected one entry for the features' {word}, found {len(names)}")
        arrays.append(content[names[0]])
    if any(array is None for array in arrays):
        raise ValueError("it was not fitted")
    components, *vectors = (torch.as_tensor(array, dtype=torch.float64) for array in arrays)
    return components, *(vector.flatten() for vector in vectors)
