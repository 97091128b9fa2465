"""Image autoencoders in the layout of CompVis' latent-diffusion code, as diffusers' AutoencoderKL:
VA-VAE and the plain f16d32 of LightningDiT and SFD, Stable Diffusion's, those that REPA-E trains.
"""

import re
from collections.abc import Mapping
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import built, count_numbered, sizes
from semtok.methods.autoencoder import check_channels
from semtok.storage import first_line

# What only training needed: discriminator, LPIPS and log variance; VA-VAE's teacher and its projection.
PROJECTION = "linear_proj."
_TRAINING_ONLY = ("loss.", "foundation_model.", PROJECTION, "model_ema.")
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
        settings = _settings(state)
        taken = sizes(state, "encoder.conv_in.weight", 4)[1]
        given = sizes(state, "decoder.conv_out.weight", 4)[0]
    except ValueError as error:
        raise UserError(
            f"{place}: not an autoencoder in CompVis' layout ({first_line(error)})"
        ) from None
    check_channels(taken, given, place)
    levels = len(settings["block_out_channels"])
    ours = {our_name(name, levels): value.float() for name, value in state.items()}
    # Attention was written as 1x1 convolutions.
    ours = {
        name: value.flatten(1) if value.shape[2:] == (1, 1) and ".attentions." in name else value
        for name, value in ours.items()
    }
    return built(lambda: AutoencoderKL(**settings), ours, place)


def what_became_of(name: str) -> str:
    """In a few words, what the import makes of a tensor with this official name."""
    if name.startswith(PROJECTION):
        return "left out, method.alignment.weights reads it"
    return "left out, only training reads it" if name.startswith(_TRAINING_ONLY) else "network"


def _settings(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of the AutoencoderKL that these tensors are of. Encoder and decoder may have attention at
    different resolutions, and the convolutions around the latents may be missing.

    Raises:
        ValueError: they are of none.
    """
    levels = count_numbered(state, "encoder.down.")
    layers = count_numbered(state, "encoder.down.0.block.")
    channels = tuple(
        sizes(state, f"encoder.down.{level}.block.{layers - 1}.conv2.weight", 4)[0]
        for level in range(levels)
    )
    first = sizes(state, "encoder.conv_in.weight", 4)[0]
    if first != channels[0]:
        raise ValueError(
            f"its first multiplier is {channels[0] / first:g}, from {first} channels to {channels[0]}; "
            "AutoencoderKL has one number for both, which is a multiplier of 1"
        )
    z_channels = sizes(state, "encoder.conv_out.weight", 4)[0] // 2
    latent_channels, convolutions = z_channels, {}
    for name in ("quant_conv", "post_quant_conv"):
        convolutions[f"use_{name}"] = f"{name}.weight" in state
    if "post_quant_conv.weight" in state:
        latent_channels = sizes(state, "post_quant_conv.weight", 4)[1]
    if z_channels != latent_channels:
        raise ValueError(
            f"{z_channels} channels inside, {latent_channels} of latents; AutoencoderKL has one number"
        )
    downs = ["Attn" if a else "" for a in _attention(state, "encoder.down", levels)]
    ups = ["Attn" if a else "" for a in reversed(_attention(state, "decoder.up", levels))]
    middle = {f"{side}.mid.attn_1.q.weight" in state for side in ("encoder", "decoder")}
    if len(middle) > 1:
        raise ValueError(
            "only one of encoder and decoder has attention in the middle; AutoencoderKL has both or none"
        )
    return {
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in downs),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in ups),
        "block_out_channels": channels,
        "layers_per_block": layers,
        "latent_channels": latent_channels,
        "norm_num_groups": _NORM_GROUPS,
        "mid_block_add_attention": middle == {True},
        **convolutions,
    }


def _attention(state: Mapping[str, Tensor], prefix: str, levels: int) -> list[bool]:
    """Which resolutions of one side have attention, finest first."""
    return [
        any(name.startswith(f"{prefix}.{level}.attn.") for name in state) for level in range(levels)
    ]


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
