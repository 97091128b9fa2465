"""Official checkpoints of diffusion transformers, read into this library's network and conventions:
SiT, REPA, REG, REGLUE, LightningDiT, SFD.

SiT, LightningDiT and SFD run time from noise to data as we do. REPA and its family run it from data to
noise and predict the opposite velocity; both are folded into the weights, exactly, so that an
imported network is one like any other: v(x, t) = -v'(x, 1 - t).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from semtok.diffusion.dit import DiT, DiTArchitecture, rotary_table, time_frequencies
from semtok.errors import UserError
from semtok.hub.checkpoints import read_state_dict
from semtok.latents import LatentSpec, PartSpec
from semtok.nets.transformer import silu_mlp, sincos_positions
from semtok.storage import first_line

Family = Literal["sit", "repa", "lightningdit"]

_RENAMED = (
    (r"t_embedder_sem\.", "time_embed.semantic."),
    (r"t_embedder_tex\.", "time_embed.texture."),
    (r"cls_projectors2\.", "vector_embed.global.0."),
    (r"wg_norm\.", "vector_embed.global.1."),
    (r"final_layer\.linear_cls\.", "final.vectors.global."),
    (r"repa_projector\.", "projectors.0."),
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.", "time_embed.all."),
    (r"y_embedder\.embedding_table\.", "label_embed."),
    (r"final_layer\.norm_final\.", "final.norm."),
    (r"final_layer\.linear\.", "final.linear."),
    (r"final_layer\.adaLN_modulation\.1\.", "final.modulation."),
    (r"(blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.modulation."),
)
_VECTOR, _LEADS = "cls_projectors2.weight", "t_embedder_sem.mlp.0.weight"
_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


@dataclass(frozen=True)
class ImportedDiT:
    """What an official checkpoint holds.

    Attributes:
        network: in eval mode; predicts raw velocities of the latents that the checkpoint was
            trained on (their scaling is the tokenizer's affair).
        projectors: REPA's heads, one for each teacher, on the tokens (B, N, D) of a block.
    """

    network: DiT
    projectors: nn.ModuleList


def read_official_checkpoint(
    path: str | Path, weights: Literal["ema", "model"] = "ema"
) -> dict[str, Tensor]:
    """The state dict in a ``.pt`` or ``.safetensors`` file, nested as the training scripts write it or bare.

    Raises:
        UserError: no such file, or not a checkpoint that can be read without running code in it.
    """
    return read_state_dict(path, weights)


def import_dit(
    state: Mapping[str, Tensor],
    *,
    place: str,
    family: Family | None = None,
    heads: int | None = None,
    stride: int | None = None,
    semantic_channels: int | None = None,
    semantic_stride: int = 16,
) -> ImportedDiT:
    """Builds the network that a state dict is of, of any size.

    Args:
        state: with the official names.
        place: starts every message.
        family: whose conventions hold; None: told from the names.
        heads: attention heads; None: from the rotary table, or the published size of that width.
        stride: image pixels per texture cell, for the network's LatentSpec; None: 8, or SFD's 16.
        semantic_channels: how many of the last channels are the semantic part; None: those of SFD
            and REGLUE have 16, others none.
        semantic_stride: image pixels per cell of the semantic part before it was resized to the
            texture's grid; the published ones have 16x16 tokens of 256x256 pixels.

    Raises:
        UserError: names or shapes that are not of these networks.
    """
    try:
        family = family or _family(state)
        if family not in get_args(Family) or (heads is not None and heads < 1):
            raise ValueError(f"family {family}, {heads} heads")
        if min(stride or 1, semantic_stride) < 1:
            raise ValueError("strides are at least 1")
        projectors = _projectors(state)
        config = _architecture(state, heads)
        spec = _spec(state, stride, semantic_channels, semantic_stride)
        channels = state["x_embedder.proj.weight"].shape[1]
        num_classes = len(state["y_embedder.embedding_table.weight"]) - 1
        _check_positions(state, config)
        ours = {
            our_name(name): value
            for name, value in state.items()
            if not name.startswith(("pos_embed", "feat_rope.", "projectors.", "repa_projector."))
        }
        for name in ("final.linear.weight", "final.linear.bias"):
            ours[name] = _velocity_rows(ours[name], config.patch_size, channels)
        if family == "repa":
            _reverse_time(ours)
    except (LookupError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{place}: not a SiT, REPA or LightningDiT checkpoint ({reason})") from None
    timed_parts = ("semantic", "texture") if _LEADS in state else ()
    network = DiT(config, spec, num_classes=num_classes, timed_parts=timed_parts)
    try:
        network.load_state_dict(ours)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"{place}: does not fit the network that its names imply ({reason})"
        ) from None
    return ImportedDiT(network.eval(), projectors)


def _family(state: Mapping[str, Tensor]) -> Family:
    if "blocks.0.mlp.w12.weight" in state:
        return "lightningdit"
    return "repa" if {"projectors.0.0.weight", _VECTOR} & state.keys() else "sit"


def _spec(
    state: Mapping[str, Tensor],
    stride: int | None,
    semantic_channels: int | None,
    semantic_stride: int,
) -> LatentSpec:
    channels = state["x_embedder.proj.weight"].shape[1]
    if semantic_channels is None:
        with_features = _LEADS in state or (_VECTOR in state and channels > 16)
        semantic_channels = 16 if with_features else 0
    if not 0 <= semantic_channels < channels:
        raise ValueError(f"{semantic_channels} semantic of {channels} channels leave no texture")
    parts = [
        PartSpec("texture", channels - semantic_channels, stride or (16 if _LEADS in state else 8))
    ]
    if semantic_channels:
        parts.append(PartSpec("semantic", semantic_channels, semantic_stride))
    if _VECTOR in state:
        parts.append(PartSpec("global", state[_VECTOR].shape[1], None))
    return LatentSpec(tuple(parts))


def _architecture(state: Mapping[str, Tensor], heads: int | None) -> DiTArchitecture:
    width, _, patch, _ = state["x_embedder.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    swiglu = "blocks.0.mlp.w12.weight" in state
    if heads is None and "feat_rope.freqs_cos" in state:
        heads = width // state["feat_rope.freqs_cos"].shape[1]
    if heads is None and "blocks.0.attn.q_norm.weight" in state:
        heads = width // len(state["blocks.0.attn.q_norm.weight"])
    heads = heads or _PUBLISHED_HEADS.get(width)
    if heads is None:
        raise ValueError(f"width {width} is no published size; give the number of heads")
    hidden = state["blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"].shape[1]
    return DiTArchitecture(
        depth=depth,
        width=width,
        heads=heads,
        patch_size=patch,
        # SwiGLU's hidden width is two thirds, rounded down, of what the ratio says.
        mlp_ratio=round(hidden * 1.5 / width, 1) if swiglu else hidden / width,
        swiglu=swiglu,
        rope="feat_rope.freqs_cos" in state,
        rms_norm="blocks.0.norm1.weight" in state,
        qk_norm="blocks.0.attn.q_norm.weight" in state,
    )


def _check_positions(state: Mapping[str, Tensor], config: DiTArchitecture) -> None:
    """Our position codes are computed; a checkpoint with others would mean something else."""
    num_tokens = state["pos_embed"].shape[1] - (_VECTOR in state)
    side = round(num_tokens**0.5)
    if side**2 != num_tokens:
        raise ValueError(f"pos_embed of {num_tokens} tokens is not a square grid")
    positions = sincos_positions((side, side), config.width)
    if _VECTOR in state:  # the class token, first, has no place
        positions = torch.cat([torch.zeros(1, config.width), positions])
    expected = {"pos_embed": positions[None]}
    if config.rope:
        table = rotary_table((side, side), config.width // config.heads, 0, torch.device("cpu"))
        expected |= {"feat_rope.freqs_cos": table[0], "feat_rope.freqs_sin": table[1]}
    for name, value in expected.items():
        if not torch.allclose(state[name].float(), value, atol=1e-4):
            raise ValueError(f"{name} is not the fixed code of a {side}x{side} grid")


def our_name(name: str) -> str:
    """What a parameter with an official name is called in ``DiT``."""
    for pattern, replacement in _RENAMED:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def _velocity_rows(value: Tensor, patch: int, channels: int) -> Tensor:
    """Drops the second half of the outputs of each cell, SiT's unused ``learn_sigma``."""
    by_cell = value.unflatten(0, (patch * patch, -1))
    return by_cell[:, :channels].flatten(0, 1)


def _reverse_time(state: dict[str, Tensor]) -> None:
    """Folds t -> 1 - t and v -> -v into the weights.

    cos(ω (1 - t)) = cos ω cos ωt + sin ω sin ωt and sin(ω (1 - t)) = sin ω cos ωt - cos ω sin ωt, so
    the first layer of the time embedding takes both up.
    """
    name = "time_embed.all.mlp.0.weight"
    cos, sin = state[name].double().chunk(2, dim=1)
    frequency = time_frequencies(torch.device("cpu")).double()
    state[name] = torch.cat(
        [
            cos * frequency.cos() + sin * frequency.sin(),
            cos * frequency.sin() - sin * frequency.cos(),
        ],
        dim=1,
    ).to(state[name])
    for name in state:
        if name.startswith(("final.linear.", "final.vectors.")):
            state[name] = -state[name]


def _projectors(state: Mapping[str, Any]) -> nn.ModuleList:
    heads = nn.ModuleList()
    named = {our_name(name): value for name, value in state.items()}
    while f"projectors.{len(heads)}.0.weight" in named:
        prefix = f"projectors.{len(heads)}."
        own = {n.removeprefix(prefix): v for n, v in named.items() if n.startswith(prefix)}
        hidden, width = own["0.weight"].shape
        head = silu_mlp(width, hidden, len(own["4.weight"]))
        head.load_state_dict(own)
        heads.append(head)
    return heads
