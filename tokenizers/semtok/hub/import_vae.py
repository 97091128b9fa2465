"""Image autoencoders in the layout of CompVis' latent-diffusion code, as diffusers' AutoencoderKL:
VA-VAE and the plain f16d32 of LightningDiT and SFD, Stable Diffusion's, those that REPA-E trains.
"""

import re
from collections.abc import Mapping

from diffusers import AutoencoderKL
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import built, count_numbered, sizes
from semtok.methods.vae import Architecture, build_autoencoder
from semtok.storage import first_line

# What only training needed: discriminator, LPIPS and log variance; VA-VAE's teacher and its projection.
_TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
_NORM_GROUPS = 32  # fixed in that code
_RENAMED = (
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
    (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.block\.(\d+)\.", r".resnets.\1."),
    (r"\.attn\.(\d+)\.", r".attentions.\1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def import_autoencoder(state: Mapping[str, Tensor], *, place: str) -> AutoencoderKL:
    """The autoencoder that a state dict is of, in eval mode.

    What only training needs may stand beside it. It takes pixels in [-1, 1]; latents come as they are,
    without any scale.

    Args:
        state: with the official names.
        place: starts every message.

    Raises:
        UserError: not such weights; or tensors that are unknown, missing or of other shapes, by name.
    """
    state = {name: value for name, value in state.items() if not name.startswith(_TRAINING_ONLY)}
    try:
        architecture = _architecture(state)
    except ValueError as error:
        raise UserError(
            f"{place}: not an autoencoder in CompVis' layout ({first_line(error)})"
        ) from None
    levels = len(architecture.block_channels)
    ours = {our_name(name, levels): value.float() for name, value in state.items()}
    # Attention was written as 1x1 convolutions.
    ours = {
        name: value[..., 0, 0] if value.ndim == 4 and ".attentions." in name else value
        for name, value in ours.items()
    }
    return built(lambda: build_autoencoder(architecture), ours, place)


def what_became_of(name: str) -> str:
    """In a few words, what the import makes of a tensor with this official name."""
    return "left out, only training reads it" if name.startswith(_TRAINING_ONLY) else "network"


def _architecture(state: Mapping[str, Tensor]) -> Architecture:
    levels = count_numbered(state, "encoder.down.")
    layers = count_numbered(state, "encoder.down.0.block.")
    channels = tuple(
        sizes(state, f"encoder.down.{level}.block.{layers - 1}.conv2.weight", 4)[0]
        for level in range(levels)
    )
    z_channels = sizes(state, "encoder.conv_out.weight", 4)[0] // 2
    latent_channels = sizes(state, "post_quant_conv.weight", 4)[1]
    if z_channels != latent_channels:
        raise ValueError(
            f"{z_channels} channels inside, {latent_channels} of latents; AutoencoderKL has one number"
        )
    return Architecture(
        block_channels=channels,
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_groups=_NORM_GROUPS,
        attention=tuple(
            any(name.startswith(f"encoder.down.{level}.attn.") for name in state)
            for level in range(levels)
        ),
    )


def our_name(name: str, levels: int) -> str:
    """What a parameter with an official name is called in an AutoencoderKL of so many resolutions."""
    # There the decoder's levels count from the finest resolution, here from the coarsest.
    name = re.sub(
        r"^decoder\.up\.(\d+)\.",
        lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.",
        name,
    )
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
