"""A RAE tokenizer as a folder of diffusers' AutoencoderRAE."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.import_rae import ENCODERS, EPS, diffusers_positions
from semtok.methods.rae import RAETokenizer
from semtok.storage import new_folder, write_json, write_tensors
from semtok.teachers import Teacher

_POSITIONS = 37**2  # of DINOv2's table, for images of 518 pixels
_DECODER_NAMES = (
    (r"^cls_token$", "trainable_cls_token"),
    (r"^(embed|norm)\.", r"decoder_\1."),
    (r"^head\.", "decoder_pred."),
    (r"^blocks\.(\d+)\.", r"decoder_layers.\1."),
    (r"\.attn\.proj\.", ".attention.to_out.0."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
# transformers has renamed its attention in version 5, and diffusers reads what it has.
_ATTENTION = {
    True: ("attention.{}_proj", "attention.o_proj", "qkv"),
    False: ("attention.attention.{}", "attention.output.dense", ("query", "key", "value")),
}


def export_autoencoder(tokenizer: RAETokenizer, folder: Path) -> list[str]:
    """Writes config.json and the weights, which ``AutoencoderRAE.from_pretrained`` loads; latents are the same.

    Returns:
        what the user should know, one line each.

    Raises:
        UserError: a tokenizer that AutoencoderRAE can't be, or the folder holds something else.
    """
    _check(tokenizer)
    decoder, teacher = tokenizer.decoder, tokenizer.teacher
    side, shape, width = decoder.grid[0], decoder.shape, decoder.channels
    # diffusers adds eps to the deviation.
    mean, std = tokenizer.texture_mean.float(), tokenizer.texture_std.float() - EPS
    per_channel = (-1, 1, 1) if mean.ndim == 1 else mean.shape
    mean, std = mean.view(per_channel), std.view(per_channel)
    config: dict[str, Any] = {
        "_class_name": "AutoencoderRAE",
        "_diffusers_version": diffusers.__version__,
        "encoder_type": "dinov2",
        "encoder_hidden_size": width,
        "encoder_patch_size": teacher.patch_size,
        "encoder_num_hidden_layers": len(teacher.network.blocks),
        "decoder_hidden_size": shape.width,
        "decoder_num_hidden_layers": shape.depth,
        "decoder_num_attention_heads": shape.heads,
        "decoder_intermediate_size": shape.mlp_width,
        "patch_size": shape.patch_size,
        "encoder_input_size": side * teacher.patch_size,
        "image_size": side * shape.patch_size,
        "encoder_norm_mean": teacher.mean.flatten().tolist(),
        "encoder_norm_std": teacher.std.flatten().tolist(),
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
    }
    state = {f"encoder.{name}": value for name, value in _encoder(teacher).items()}
    state |= {f"decoder.{name}": value for name, value in _decoder(tokenizer).items()}
    for name, value in (("mean", teacher.mean), ("std", teacher.std)):
        state[f"encoder_{name}"] = value.view(1, 3, 1, 1)
    state |= {"_latents_mean": mean, "_latents_std": std}
    with new_folder(folder, replaces="config.json") as temporary:
        write_json(temporary / "config.json", config)
        write_tensors(temporary / "diffusion_pytorch_model.safetensors", state)
    return _notes(tokenizer, state, side)


def _check(tokenizer: RAETokenizer) -> None:
    """Raises UserError with what AutoencoderRAE has no place for."""
    teacher, (rows, columns) = tokenizer.teacher, tokenizer.decoder.grid
    network, config = teacher.network, teacher.config
    blocks = len(network.blocks)
    wrong = None
    if teacher.timm_name not in ENCODERS.values():
        wrong = f"encoder '{config.name}'; it has DINOv2 with registers"
    elif [layer % blocks for layer in config.layers] != [blocks - 1] or tokenizer.spatial_mean:
        wrong = "tokens of other layers than the last one"
    elif config.final_norm != "plain":
        wrong = f"teacher.final_norm {config.final_norm}; it has plain"
    elif not config.normalise:
        wrong = "teacher.normalise false; it has true"
    elif config.resize != "bicubic":
        wrong = f"teacher.resize {config.resize}; it has bicubic"
    elif network.blocks[0].attn.head_dim != 64 or network.pos_embed.shape[1] != _POSITIONS:
        wrong = (
            "an encoder whose heads are not 64 wide, or whose positions are not those of 518 pixels"
        )
    elif rows != columns:
        wrong = f"{rows}x{columns} tokens; its images are square"
    if wrong is not None:
        raise UserError(f"diffusers' AutoencoderRAE has no {wrong}")


def _notes(tokenizer: RAETokenizer, state: dict[str, Tensor], side: int) -> list[str]:
    own = diffusers_positions(state, side).to(tokenizer.decoder.positions)
    difference = float((tokenizer.decoder.positions.detach() - own).abs().max())
    if difference < 1e-5:
        return []
    return [
        f"diffusers computes the decoder's position table anew, which here differs by up to {difference:.2g} from the "
        "trained one: its images are not ours unless decoder.decoder_pos_embed of the file is copied into its buffer"
    ]


def _decoder(tokenizer: RAETokenizer) -> dict[str, Tensor]:
    theirs = {"decoder_pos_embed": tokenizer.decoder.positions.detach()}
    for name, value in tokenizer.decoder.state_dict().items():
        if name.startswith("image_") or name == "positions":
            continue
        for pattern, replacement in _DECODER_NAMES:
            name = re.sub(pattern, replacement, name)
        theirs |= _parts(name, value, "attention.to_{}", "qkv")
    return theirs


def _encoder(teacher: Teacher) -> dict[str, Tensor]:
    """By the names of transformers' Dinov2WithRegisters."""
    try:
        is_new = int(version("transformers").split(".")[0]) >= 5
    except PackageNotFoundError:
        is_new = True
    attention, output, letters = _ATTENTION[is_new]
    state = teacher.network.state_dict()
    width = state["norm.weight"].numel()
    theirs = {
        "embeddings.cls_token": state.pop("cls_token"),
        "embeddings.register_tokens": state.pop("reg_token"),
        "embeddings.mask_token": torch.zeros(1, width),
    }
    # timm has added the class token's position to the class token.
    patches = state.pop("pos_embed")
    theirs["embeddings.position_embeddings"] = torch.cat(
        [torch.zeros_like(patches[:, :1]), patches], dim=1
    )
    for name, value in state.items():
        if name.startswith("norm."):
            continue
        name = name.replace("patch_embed.proj.", "embeddings.patch_embeddings.projection.")
        name = re.sub(r"^blocks\.", "encoder.layer.", name)
        name = re.sub(r"\.ls(\d)\.gamma$", r".layer_scale\1.lambda1", name)
        name = name.replace(".attn.proj.", f".{output}.")
        theirs |= _parts(name, value, attention, letters)
    return theirs


def _parts(name: str, value: Tensor, attention: str, letters: Any) -> dict[str, Tensor]:
    """A tensor by its name, or queries, keys and values by theirs."""
    before, joined, after = name.partition("attn.qkv")
    if not joined:
        return {name: value}
    three = zip(letters, value.chunk(3), strict=True)
    return {f"{before}{attention.format(one)}{after}": part.clone() for one, part in three}
