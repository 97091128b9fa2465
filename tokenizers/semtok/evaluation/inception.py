"""The Inception network of FID, by torch-fidelity; asked for, never assumed."""

from pathlib import Path

import torch
from torch import nn

from semtok.errors import UserError
from semtok.storage import DAMAGE, first_line


def load_inception(*, download: bool = False) -> nn.Module:
    """The network that published FIDs use: uint8 images (B, 3, H, W) to a tuple of features (B, 2048).

    Args:
        download: fetch its weights (91 MB) where torch.hub's cache does not have them.

    Raises:
        UserError: torch-fidelity is not installed, or the weights can't be had.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import (
            URL_INCEPTION_V3,
            FeatureExtractorInceptionV3,
        )
    except ImportError:
        raise UserError("needs torch-fidelity; pip install 'semtok[evaluation]'") from None
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    try:
        if not file.is_file():
            if not download:
                raise UserError(
                    f"Inception's weights are not at {file}; put them there, or --download"
                )
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file))
        torch.load(file, map_location="cpu", weights_only=True)  # refuses all but tensors
        return FeatureExtractorInceptionV3(
            "inception", ["2048"], feature_extractor_weights_path=str(file)
        )
    except DAMAGE as error:
        raise UserError(f"Inception's weights at {file}: {first_line(error)}") from None
