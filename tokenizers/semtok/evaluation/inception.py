"""The Inception network of FID, by torch-fidelity; asked for, never assumed."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.evaluation.protocol import Network, file_digest, with_version
from semtok.extras import need
from semtok.progress import announce
from semtok.storage import DAMAGE, as_damage, first_line

_SIDE = 299
_SPATIAL_CHANNELS = 7
_RESIZES = {"tensorflow": "bilinear as TensorFlow 1", "pytorch": "bilinear as PyTorch"}
Resize = Literal["tensorflow", "pytorch"]


@dataclass(frozen=True)
class InceptionFeatures:
    """What the network sees in images.

    Attributes:
        pooled: (B, 2048), for FID, precision, recall and KID.
        spatial: (B, 2023), for sFID: the first 7 channels of 17x17 positions of block ``mixed_6``
            of the TensorFlow graph, flattened positions first, as ADM's evaluation does (Nash et al.
            2021; Dhariwal and Nichol 2021).
        logits: (B, 1008), without the bias, for the Inception Score.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Inception(nn.Module):
    """torch-fidelity's copy of the TensorFlow network that published FIDs use.

    Args:
        weights: digest of the weights' file.
        resize: how images come to 299x299: ``tensorflow`` is the graph's own bilinear resize, which torch-fidelity
            computes; ``pytorch`` is that of pytorch-fid, which samples at pixels' centres, and maps 0 to 255 on
            [-1, 1] instead of [-1, 1).
    """

    def __init__(
        self, network: nn.Module, *, weights: str = "unknown", resize: Resize = "tensorflow"
    ) -> None:
        super().__init__()
        self.network, self.resize = network, resize
        self.protocol = Network(
            with_version("torch-fidelity"),
            "inception-2015-12-05",
            f"{_SIDE}x{_SIDE}, {_RESIZES[resize]}",
            weights,
        )
        self._spatial = self._resized = torch.empty(0)
        network.Mixed_6d.register_forward_hook(self._keep_spatial)
        if resize == "pytorch":
            network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: (self._resized,))

    @torch.no_grad()
    def forward(self, images: Tensor) -> InceptionFeatures:
        """Features of uint8 images (B, 3, H, W), which it resizes."""
        if self.resize == "pytorch":
            size = (_SIDE, _SIDE)
            scaled = F.interpolate(images.float() / 255, size=size, mode="bilinear")
            self._resized = 2 * scaled - 1
        pooled, logits = self.network(images)
        return InceptionFeatures(pooled, self._spatial, logits)

    def _keep_spatial(self, block: nn.Module, inputs: object, output: Tensor) -> None:
        # The block joins its branches on the channel axis, the graph's mixed_6/conv first.
        self._spatial = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()


def check_torch_fidelity() -> None:
    """Raises UserError where torch-fidelity is not installed."""
    need("torch_fidelity", "torch-fidelity", extra="evaluation")


def load_inception(*, download: bool = False, resize: Resize = "tensorflow") -> Inception:
    """The network that published FIDs use.

    Args:
        download: fetch its weights (91 MB) where torch.hub's cache does not have them.
        resize: see ``Inception``.

    Raises:
        UserError: torch-fidelity is not installed, or the weights can't be had.
    """
    check_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not file.is_file() and not download:
        raise UserError(f"Inception's weights are not at {file}; put them there, or --download")
    try:
        if not file.is_file():
            announce(f"fetching Inception's weights (91 MB) to {file}")
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(file), progress=sys.stderr.isatty()
            )
        layers = ["2048", "logits_unbiased"]
        with as_damage():
            torch.load(file, map_location="cpu", weights_only=True)  # refuses all but tensors
            network = FeatureExtractorInceptionV3(
                "inception", layers, feature_extractor_weights_path=str(file)
            )
        return Inception(network, weights=file_digest(file), resize=resize)
    except DAMAGE as error:
        raise UserError(f"Inception's weights at {file}: {first_line(error)}") from None
