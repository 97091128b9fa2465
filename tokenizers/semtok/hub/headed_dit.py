"""Transformers with a head, DDT (arXiv 2504.05741) and RAE's DiT^DH (arXiv 2510.11690): their published checkpoints,
read into this library's network and conventions.

DDT runs time from noise to data as we do. Its tokens are ordered by channel, and its rotary positions alternate between
column and row; rows of its weights are put into our order. DiT^DH runs time from data to noise, which our Fourier
embedding of time does too, and predicts the opposite velocity; the last layer's sign is turned.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import built, count_numbered, sizes
from semtok.hub.import_dit import ImportedDiT, check_fixed, swiglu_ratio
from semtok.hub.projectors import PROJECTORS, read_projectors
from semtok.sampler.architecture import DiTArchitecture, HeadArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.embeddings import rotary_table
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.sampler.transport import TimeConfig
from semtok.storage import first_line

Kind = Literal["ddt", "dit-dh"]
TIMES: Mapping[str, TimeConfig] = {
    "ddt": TimeConfig(law="logit_normal"),
    "dit-dh": TimeConfig(law="logit_normal", least=0.001, shift="dimension"),
}
"""Training times as published, of which the files say nothing."""
_SPLITS = {28: 22}
"""DDT's published encoder blocks, by the number of all."""
_CHANNELS = 4  # of DDT's latents, SD-VAE's
_SPAN, _PERIOD, _IMAGE = 16.0, 10.0, 256  # DDT's places, times, and pixels a side
_ROPE = ("enc_feat_rope", "dec_feat_rope")
_RENAMED = (
    (r"^s_embedder\.proj\.", "patch_embed."),
    (r"^x_embedder\.proj\.", "head.patch_embed."),
    (r"^s_projector\.", "head.project."),
    (r"^t_embedder\.W$", "time_embed.all.frequencies"),
    (r"^t_embedder\.", "time_embed.all."),
    (r"^y_embedder\.embedding_table\.", "label_embed."),
    (r"^pos_embed$", "positions"),
    (r"^final_layer\.norm_final\.", "final.norm."),
    (r"^final_layer\.linear\.", "final.linear."),
    (r"^final_layer\.", "final."),
    (r"\.?adaLN_modulation\.[01]\.", ".modulation."),
)


def kind_of(state: Mapping[str, Any]) -> Kind | None:
    """Whose network a state dict is of; None: of one without a head."""
    if "s_embedder.proj.weight" not in state:
        return None
    return "dit-dh" if "t_embedder.W" in state else "ddt"


def what_became_of(name: str) -> str:
    """In a few words, what the import makes of a tensor with this official name."""
    if name.startswith(_ROPE):
        return "computed anew, checked to be the same"
    if name.startswith(PROJECTORS):
        return "left out, only REPA's training reads it"
    return "network"


def our_name(name: str, encoder_blocks: int) -> str:
    """What a parameter with an official name is called in ``DiT``; of DDT's MLPs, w12 is made of w1 and w3."""

    def block(found: re.Match[str]) -> str:
        number = int(found[1])
        own = number < encoder_blocks
        return f"blocks.{number}." if own else f"head.blocks.{number - encoder_blocks}."

    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^blocks\.(\d+)\.", block, name)


def import_headed_dit(
    state: Mapping[str, Tensor],
    *,
    place: str,
    spec: LatentSpec | None = None,
    encoder_blocks: int | None = None,
    image_size: int | None = None,
) -> ImportedDiT:
    """Builds the network that a state dict is of, of any size.

    Args:
        state: with the official names.
        place: starts every message.
        spec: of the latents that it was trained on; None: SD-VAE's for DDT, cells of 16 pixels for DiT^DH.
        encoder_blocks: of DDT, whose tensors do not tell, and of DiT^DH where both widths are equal; None: as
            published, or as the tensors tell.
        image_size: pixels along a side, of DDT, which has no table of places; None: the published 256.

    Raises:
        UserError: names or shapes that are not of these networks.
    """
    kind = kind_of(state)
    try:
        projectors = read_projectors(state)
        if kind == "ddt":
            spec, config, ours = _ddt(state, spec, encoder_blocks)
            side = _side_of_images(image_size or _IMAGE, spec, config.patch_size)
        elif kind == "dit-dh":
            spec, config, ours = _ditdh(state, spec, encoder_blocks)
            side = _side(state)
        else:
            raise ValueError("s_embedder.proj.weight is missing")
        num_classes = sizes(state, "y_embedder.embedding_table.weight", 2)[0] - 1
    except ValueError as error:
        raise UserError(
            f"{place}: not a checkpoint of DDT or DiT^DH ({first_line(error)})"
        ) from None
    network = built(lambda: DiT(config, spec, num_classes=num_classes), ours, place)
    return ImportedDiT(
        network,
        projectors,
        (side, side),
        statistics=None,
        channels=sum(part.channels for part in spec.parts),
        learns_sigma=False,
        without_shifts=False,
        first_blocks=None,
    )


def _checked(spec: LatentSpec, channels: int) -> LatentSpec:
    if sum(part.channels for part in spec.parts) != channels or not spec.parts[-1].is_spatial:
        said = ", ".join(f"{part.name} {part.channels}" for part in spec.parts)
        raise ValueError(f"it generates {channels} channels, the tokenizer's latents are {said}")
    return spec


def _blocks_shape(state: Mapping[str, Tensor], width: int, hidden: int) -> dict[str, Any]:
    """What both kinds tell alike."""
    swiglu = "blocks.0.mlp.fc1.weight" not in state
    return {
        "width": width,
        "mlp_ratio": swiglu_ratio(hidden, width) if swiglu else hidden / width,
        "swiglu": swiglu,
        "rope": True,
        "rms_norm": "blocks.0.norm1.weight" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }


# DDT ---------------------------------------------------------------------------------------------


def _ddt(
    state: Mapping[str, Tensor], spec: LatentSpec | None, encoder_blocks: int | None
) -> tuple[LatentSpec, DiTArchitecture, dict[str, Tensor]]:
    width, inputs = sizes(state, "s_embedder.proj.weight", 2)
    channels = sum(part.channels for part in spec.parts) if spec is not None else _CHANNELS
    patch = round((inputs / channels) ** 0.5)
    if channels * patch**2 != inputs:
        raise ValueError(
            f"its tokens hold {inputs} numbers, which are no squares of {channels} channels; "
            "is it of the latents of --tokenizer?"
        )
    spec = _checked(spec or LatentSpec((PartSpec("texture", channels, 8),)), channels)
    blocks = count_numbered(state, "blocks.")
    encoder_blocks = encoder_blocks or _SPLITS.get(blocks)
    if encoder_blocks is None or not 0 < encoder_blocks < blocks:
        raise ValueError(
            f"how many of its {blocks} blocks are the encoder is not known; give --encoder-blocks, fewer than all"
        )
    head_width = sizes(state, "blocks.0.attn.q_norm.weight", 1)[0]
    config = DiTArchitecture(
        **_blocks_shape(state, width, sizes(state, "blocks.0.mlp.w2.weight", 2)[1]),
        depth=encoder_blocks,
        heads=width // head_width,
        patch_size=patch,
        rope_span=_SPAN,
        position_codes=False,
        time_period=_PERIOD,
        biases=False,
        final_norm="layer",
        head=HeadArchitecture(depth=blocks - encoder_blocks),
    )
    return spec, config, _ddt_weights(state, config)


def _side_of_images(image_size: int, spec: LatentSpec, patch: int) -> int:
    """Cells of the texture along a side."""
    stride = spec["texture"].stride
    if image_size % (stride * patch):
        raise ValueError(f"--image-size {image_size}: expected a multiple of {stride * patch}")
    return image_size // stride


def _ddt_weights(state: Mapping[str, Tensor], config: DiTArchitecture) -> dict[str, Tensor]:
    ours, patch, heads = {}, config.patch_size, config.heads
    own = {name: value for name, value in state.items() if what_became_of(name) == "network"}
    for name, value in own.items():
        ours_is = our_name(name, config.depth)
        if name.startswith(("s_embedder.proj.weight", "x_embedder.proj.weight")):
            value = rearrange(value, "d (c p q) -> d c p q", p=patch, q=patch)
        elif name.startswith("final_layer.linear."):
            value = rearrange(value, "(c p q) ... -> (p q c) ...", p=patch, q=patch)
        elif name.endswith("attn.qkv.weight"):
            q, k, v = rearrange(value, "(three h d) i -> three h d i", three=3, h=heads)
            value = torch.stack([_row_first(q), _row_first(k), v]).flatten(0, 2)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            value = _row_first(value[None, :, None]).flatten()
        elif name.endswith("mlp.w1.weight"):
            ours_is = ours_is.replace("w1", "w12")
            other = name.replace("w1", "w3")
            sizes(state, other, 2)
            value = torch.cat([value, state[other]])
        elif name.endswith("mlp.w3.weight"):
            continue
        elif name.endswith("mlp.w2.weight"):
            ours_is = ours_is.replace("w2", "w3")
        ours[ours_is] = value
    return ours


def _row_first(rows: Tensor) -> Tensor:
    """Of heads (h, d, i) whose pairs turn by column, row, column …, those that turn by the row, then the others."""
    pairs = rearrange(rows, "h (n side two) i -> side h n two i", side=2, two=2)
    return torch.cat([pairs[1], pairs[0]], dim=1).flatten(1, 2)


# DiT^DH ------------------------------------------------------------------------------------------


def _ditdh(
    state: Mapping[str, Tensor], spec: LatentSpec | None, encoder_blocks: int | None
) -> tuple[LatentSpec, DiTArchitecture, dict[str, Tensor]]:
    width, channels, patch, _ = sizes(state, "s_embedder.proj.weight", 4)
    wide = sizes(state, "x_embedder.proj.weight", 4)[0]
    if patch != 1:
        raise ValueError(f"patches of {patch} cells, which its published code can't run")
    spec = _checked(spec or LatentSpec((PartSpec("texture", channels, 16),)), channels)
    swiglu = "blocks.0.mlp.w3.weight" in state
    last = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    blocks, side = count_numbered(state, "blocks."), _side(state)
    heads = [_heads(state, part, one, side) for part, one in zip(_ROPE, (width, wide), strict=True)]
    encoder_blocks = _encoder_blocks(state, blocks, encoder_blocks)
    has_table = "pos_embed" in state
    config = DiTArchitecture(
        **_blocks_shape(state, width, sizes(state, last, 2)[1]),
        depth=encoder_blocks,
        heads=heads[0],
        position_codes=has_table,
        learned_positions=(side, side) if has_table else None,
        time_embedding="fourier",
        condition_activations=2,
        head=HeadArchitecture(depth=blocks - encoder_blocks, width=wide, heads=heads[1]),
    )
    own = {
        our_name(n, encoder_blocks): v for n, v in state.items() if what_became_of(n) == "network"
    }
    own |= {name: -value for name, value in own.items() if name.startswith("final.linear.")}
    if has_table:
        own["positions"] = own["positions"].squeeze(0)
    return spec, config, own


def _encoder_blocks(state: Mapping[str, Tensor], blocks: int, given: int | None) -> int:
    """As many as have the first one's width, where the head's is another."""
    widths = [sizes(state, f"blocks.{i}.attn.proj.weight", 2)[0] for i in range(blocks)]
    told = widths.count(widths[0])
    if told == blocks and given is not None and 0 < given < blocks:
        return given
    if told == blocks:
        raise ValueError(
            f"how many of its {blocks} blocks, all of one width, are the encoder is not known; give --encoder-blocks, "
            "fewer than all"
        )
    if given not in (None, told):
        raise ValueError(
            f"its encoder has {told} blocks, by their width; leave --encoder-blocks out"
        )
    return told


def _side(state: Mapping[str, Tensor]) -> int:
    """Tokens along a side."""
    num_tokens = sizes(state, f"{_ROPE[0]}.freqs_cos", 2)[0]
    side = round(num_tokens**0.5)
    if side**2 != num_tokens:
        raise ValueError(f"{_ROPE[0]}.freqs_cos of {num_tokens} tokens is not a square grid")
    if "pos_embed" in state and sizes(state, "pos_embed", 3)[1] != num_tokens:
        raise ValueError(f"pos_embed is not of {num_tokens} tokens")
    return side


def _heads(state: Mapping[str, Tensor], part: str, width: int, side: int) -> int:
    """Attention heads of a part, whose rotary table must be ours."""
    head_width = sizes(state, f"{part}.freqs_cos", 2)[1]
    table = rotary_table((side, side), head_width, 0, torch.device("cpu"))
    names = (f"{part}.freqs_cos", f"{part}.freqs_sin")
    check_fixed(state, dict(zip(names, table, strict=True)), side)
    return width // head_width
