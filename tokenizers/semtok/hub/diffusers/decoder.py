"""The decoder of a RAE, as a diffusers model."""

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from semtok.sampler.vit_decoder import DecoderShape, ViTDecoder


class SemtokDecoder(ModelMixin, ConfigMixin):
    """Turns a vision model's tokens into images. It has no encoder, which drawing images does not need.

    Its buffers ``latents_mean`` and ``latents_std`` are the statistics of the tokens that the transformer predicts.

    Args:
        shape: of the decoder, see ``DecoderShape``.
        channels: of the tokens.
        grid: (rows, columns) of the tokens that its position codes are for.
        statistics: of each channel at each position of the grid, (C, h, w), or of each channel, (C,).
    """

    @register_to_config
    def __init__(
        self,
        shape: dict[str, Any],
        channels: int,
        grid: Sequence[int],
        statistics: Literal["position", "channel"],
    ) -> None:
        super().__init__()
        rows, columns = grid
        sizes = DecoderShape.model_validate_json(json.dumps(shape))
        self.decoder = ViTDecoder(sizes, channels=channels, grid=(rows, columns))
        places = (channels, rows, columns) if statistics == "position" else (channels,)
        self.register_buffer("latents_mean", torch.zeros(places))
        self.register_buffer("latents_std", torch.ones(places))

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Raw tokens (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1], not clamped."""
        pixels = self.decoder(z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
