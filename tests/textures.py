"""A tiny autoencoder of every class of diffusers whose latents can be a texture, as somebody may have published it."""

from collections.abc import Callable

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderTiny,
)
from torch import nn

CHANNELS, STRIDE = (
    4,
    4,
)  # but for HunyuanImage's, whose norms have 32 groups and whose shortcuts fold


def kl() -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        latent_channels=CHANNELS,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )


def dc() -> nn.Module:
    blocks = {"block_types": ("ResBlock", "ResBlock", "EfficientViTBlock")}
    blocks |= {"block_out_channels": (4, 8, 16), "layers_per_block": (1, 1, 1)}
    blocks |= {"qkv_multiscales": ((), (), (5,))}
    sides = {f"{side}_{name}": v for side in ("encoder", "decoder") for name, v in blocks.items()}
    return AutoencoderDC(
        latent_channels=CHANNELS, attention_head_dim=8, scaling_factor=0.41407, **sides
    )


def small() -> nn.Module:
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=CHANNELS,
        scaling_factor=0.8,
        shift_factor=0.1,
    )


def asymmetric() -> nn.Module:
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        down_block_out_channels=(4, 4, 8),
        up_block_types=("UpDecoderBlock2D",) * 3,
        up_block_out_channels=(4, 8, 8),
        latent_channels=CHANNELS,
        norm_num_groups=4,
    )


def flux2() -> nn.Module:
    made = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
    )
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2)
    return made


def hunyuan() -> nn.Module:
    return AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        spatial_compression_ratio=4,
        sample_size=16,
        scaling_factor=0.75289,
    )


TEXTURES: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (kl, dc, small, asymmetric, flux2, hunyuan)
}


def texture(name: str) -> nn.Module:
    """One of them, in eval mode, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TEXTURES[name]().eval()
