"""Official checkpoints of diffusion transformers, read into this library's network and conventions:
SiT, ReDi, REPA, iREPA, REG, REGLUE, REPA-E, SR-DiT, LightningDiT, SFD.

SiT, ReDi, LightningDiT and SFD run time from noise to data as we do. REPA and its family run it from data to
noise and predict the opposite velocity; both are folded into the weights, exactly, so that an
imported network is one like any other: v(x, t) = -v'(x, 1 - t).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.hub.checkpoints import built, count_numbered, sizes
from semtok.hub.projectors import PROJECTORS, projector_name, read_projectors
from semtok.hub.sr_dit import SPLIT, Split, added_to_shape, is_sr_dit
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.embeddings import rotary_table, sincos_positions, time_frequencies
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.storage import first_line

Family = Literal["sit", "repa", "lightningdit"]

_RENAMED = (
    (r"t_embedder_sem\.", "time_embed.semantic."),
    (r"t_embedder_tex\.", "time_embed.texture."),
    (r"cls_projectors2\.", "vector_embed.global.0."),
    (r"wg_norm\.", "vector_embed.global.1."),
    (r"final_layer\.linear_cls\.", "final.vectors.global."),
    (r"mask_token$", "fusion.mask_token"),
    (r"fusion_proj\.", "fusion.linear."),
    (r"x_embedder\.proj\.", "patch_embed."),
    (r"t_embedder\.", "time_embed.all."),
    (r"y_embedder\.embedding_table\.", "label_embed."),
    (r"final_layer\.norm_final\.", "final.norm."),
    (r"final_layer\.linear\.", "final.linear."),
    (r"final_layer\.adaLN_modulation\.1\.", "final.modulation."),
    (r"(blocks\.\d+)\.adaLN_modulation\.1\.", r"\1.modulation."),
    (r"(blocks\.\d+\.attn)\.v1_lambda$", r"\1.first_share"),
)
_VECTOR, _LEADS = "cls_projectors2.weight", "t_embedder_sem.mlp.0.weight"
# What no SiT has, of LightningDiT: SwiGLU, RMSNorm, rotary tables.
_LIGHTNING = ("blocks.0.mlp.w12.weight", "blocks.0.norm1.weight", "feat_rope.freqs_cos")
_LIGHTNING += ("feat_rope.freqs_sin", "final_layer.norm_final.weight")
PUBLISHED_SEMANTIC: Mapping[str, Mapping[int, int]] = {
    "sfd": {48: 16},
    "reglue": {20: 16},
    "redi": {12: 8},
}
"""Of the published networks with a semantic part: by the number of all their channels, that of the semantic ones."""
_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}


_COMPUTED = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
# REPA-E standardises latents by a BatchNorm without weights.
_STATISTICS = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")


@dataclass(frozen=True)
class ImportedDiT:
    """What an official checkpoint holds.

    Attributes:
        network: in eval mode; predicts velocities of the latents that the checkpoint was trained on (their
            scaling is the tokenizer's affair).
        projectors: REPA's heads, one for each teacher, on the tokens (B, N, D) of a block, or on maps of them
            (B, D, h, w) where they convolve.
        grid: (rows, columns) of the texture that it was trained on.
        statistics: mean and standard deviation (C,) per channel of the raw latents, where the checkpoint
            has them (REPA-E).
        channels: of all spatial latents.
        learns_sigma: whether it had SiT's second half of outputs.
        without_shifts: whether its blocks had no shifts, for which rows of zeros stand now.
        first_blocks: of REPA's older files, after how many blocks numbers start anew; None of others.
    """

    network: DiT
    projectors: nn.ModuleList
    grid: tuple[int, int]
    statistics: tuple[Tensor, Tensor] | None
    channels: int
    learns_sigma: bool
    without_shifts: bool
    first_blocks: int | None


def what_became_of(name: str) -> str:
    """In a few words, what the import makes of a tensor with this official name."""
    if name in _COMPUTED:
        return "computed anew, checked to be the same"
    if name.startswith(PROJECTORS):
        return "left out, only REPA's training reads it"
    if name in _STATISTICS:
        return "latent statistics"
    return "network"


def is_lightningdit(state: Mapping[str, Tensor]) -> bool:
    """Whether there is a tensor that LightningDiT has and SiT has not."""
    return any(name in state for name in _LIGHTNING)


def has_repas_projectors(state: Mapping[str, Tensor]) -> bool:
    """Whether there are heads as REPA and those made from it call them."""
    return any(name.startswith("projectors.0.") for name in state)


def learns_sigma(state: Mapping[str, Tensor]) -> bool:
    """Whether the last layer has SiT's second, unused half of outputs.

    Raises:
        ValueError: there is no first or last layer.
    """
    _, channels, patch, _ = sizes(state, "x_embedder.proj.weight", 4)
    return sizes(state, "final_layer.linear.weight", 2)[0] == 2 * patch**2 * channels


_UNFIT = "can't be read as a transformer of SiT, REPA, REPA-E or LightningDiT"


def import_dit(
    state: Mapping[str, Tensor],
    *,
    place: str,
    family: Family | None = None,
    heads: int | None = None,
    spec: LatentSpec | None = None,
    null_label: bool = True,
    split: Split = SPLIT,
) -> ImportedDiT:
    """Builds the network that a state dict is of, of any size.

    Args:
        state: with the official names.
        place: starts every message.
        family: whose conventions hold; None: told from the names.
        heads: attention heads; None: from the rotary table, or the published size of that width.
        spec: of the latents that the checkpoint was trained on; None: see ``spec_of``.
        null_label: whether its last label means none; otherwise one is added, of zeros.
        split: blocks (first, last) that see all tokens, of SR-DiT, whose tensors do not tell.

    Raises:
        UserError: names or shapes that are not of these networks.
    """
    official = state
    try:
        state = _with_all_blocks(state)
        family = family or _family(state)
        if family not in get_args(Family) or (heads is not None and heads < 1):
            raise ValueError(f"family {family}, {heads} heads")
        projectors = read_projectors(state)
        config = _architecture(state, heads, split)
        spec = _checked(spec or spec_of(state), state)
        num_classes = sizes(state, "y_embedder.embedding_table.weight", 2)[0] - null_label
        side = _side(state)
        config = _with_positions(state, config, side)
        ours = {our_name(n): v for n, v in state.items() if what_became_of(n) == "network"}
        if config.learned_positions is not None:
            ours["positions"] = state["pos_embed"][0]
        statistics = _statistics(state)
        ours |= _velocity_rows(state) | _shift_rows(ours, config.width) | _flat_mask(ours)
        if not null_label:
            labels = ours["label_embed.weight"]
            ours["label_embed.weight"] = torch.cat([labels, torch.zeros_like(labels[:1])])
        if family == "repa":
            ours |= _reversed_time(ours)
    except ValueError as error:
        raise UserError(f"{place}: {_UNFIT} ({first_line(error)})") from None
    timed_parts = ("semantic", "texture") if _LEADS in state else ()
    network = built(
        lambda: DiT(config, spec, num_classes=num_classes, timed_parts=timed_parts), ours, place
    )
    legacy = any(name.startswith("decoder_blocks.") for name in official)
    return ImportedDiT(
        network,
        projectors,
        (side * config.patch_size, side * config.patch_size),
        statistics,
        channels=sizes(state, "x_embedder.proj.weight", 4)[1],
        learns_sigma=learns_sigma(state),
        without_shifts=_is_without_shifts(state, config.width),
        first_blocks=count_numbered(official, "blocks.") if legacy else None,
    )


def _with_all_blocks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """REPA's older files count the blocks after the aligned one anew, as ``decoder_blocks``."""
    if not any(name.startswith("decoder_blocks.") for name in state):
        return dict(state)
    first = count_numbered(state, "blocks.")

    def current(name: str) -> str:
        return re.sub(r"^decoder_blocks\.(\d+)", lambda m: f"blocks.{first + int(m[1])}", name)

    return {current(name): value for name, value in state.items()}


def _statistics(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    if not any(name in state for name in _STATISTICS):
        return None
    for name in _STATISTICS[:2]:
        sizes(state, name, 1)
    mean, var = state["bn.running_mean"].float(), state["bn.running_var"].float()
    if not bool((var > 0).all() & var.isfinite().all() & mean.isfinite().all()):
        raise ValueError("bn.running_var is not positive everywhere")
    return mean, var.sqrt()  # without the norm's epsilon, as its samplers undo it


def _family(state: Mapping[str, Tensor]) -> Family:
    if is_sr_dit(state):
        return "repa"
    if is_lightningdit(state):
        return "lightningdit"
    return "repa" if has_repas_projectors(state) or _VECTOR in state else "sit"


def spec_of(
    state: Mapping[str, Tensor],
    semantic: int | None = None,
    stride: int | None = None,
    *,
    published: Literal["sfd", "reglue", "redi"] | None = None,
) -> LatentSpec:
    """The latents that a checkpoint was trained on, as far as its tensors tell.

    Args:
        semantic: how many of its channels, the last ones, are the semantic part; None: as published.
        stride: image pixels per cell of the texture; None: the published 16 of LightningDiT and SR-DiT, 8 of
            others.
        published: whose split of the channels it is; None: told from the names.

    Raises:
        ValueError: a split that is not known, or leaves no texture.
    """
    channels = sizes(state, "x_embedder.proj.weight", 4)[1]
    lightning, vector = is_lightningdit(state) or _LEADS in state, _VECTOR in state
    if published is None and _LEADS in state:
        published = "sfd"
    is_reglue = vector and not is_sr_dit(state) and channels in PUBLISHED_SEMANTIC["reglue"]
    if published is None and is_reglue:
        published = "reglue"
    if semantic is None:
        split = PUBLISHED_SEMANTIC[published] if published is not None else {channels: 0}
        if channels not in split:
            raise ValueError(
                f"how many of its {channels} channels are semantic is not known; give --tokenizer or "
                "--semantic-channels"
            )
        semantic = split[channels]
    if not 0 <= semantic < channels:
        raise ValueError(f"{semantic} semantic of {channels} channels leave no texture")
    parts = [PartSpec("texture", channels - semantic, stride or (16 if lightning else 8))]
    parts += [PartSpec("semantic", semantic, 16)] if semantic else []
    parts += [PartSpec("global", sizes(state, _VECTOR, 2)[1], None)] if vector else []
    return LatentSpec(tuple(parts))


def _checked(spec: LatentSpec, state: Mapping[str, Tensor]) -> LatentSpec:
    channels = sizes(state, "x_embedder.proj.weight", 4)[1]
    vectors = [sizes(state, _VECTOR, 2)[1]] if _VECTOR in state else []
    ours = sum(part.channels for part in spec.parts if part.is_spatial)
    if _LEADS in state and "semantic" not in spec.names:
        raise ValueError(
            "its semantic part has a time of its own, the tokenizer's latents have no such part"
        )
    if ours != channels or [p.channels for p in spec.parts if not p.is_spatial] != vectors:
        raise ValueError(
            f"it generates {channels} channels and vectors of {vectors}, the tokenizer's latents are "
            + ", ".join(f"{part.name} {part.channels}" for part in spec.parts)
        )
    return spec


def _architecture(state: Mapping[str, Tensor], heads: int | None, split: Split) -> DiTArchitecture:
    width, _, patch, _ = sizes(state, "x_embedder.proj.weight", 4)
    depth = count_numbered(state, "blocks.")
    swiglu = "blocks.0.mlp.w12.weight" in state
    if heads is None and "feat_rope.freqs_cos" in state:
        heads = width // sizes(state, "feat_rope.freqs_cos", 2)[1]
    if heads is None and "blocks.0.attn.q_norm.weight" in state:
        heads = width // sizes(state, "blocks.0.attn.q_norm.weight", 1)[0]
    heads = heads or _PUBLISHED_HEADS.get(width)
    if heads is None:
        raise ValueError(f"width {width} is no published size; give --heads N")
    last = "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight"
    hidden = sizes(state, last, 2)[1]
    shape = {
        "depth": depth,
        "width": width,
        "heads": heads,
        "patch_size": patch,
        "mlp_ratio": swiglu_ratio(hidden, width) if swiglu else hidden / width,
        "swiglu": swiglu,
        "rope": bool({"feat_rope.freqs_cos", "feat_rope.freqs_sin"} & state.keys()),
        "rms_norm": "blocks.0.norm1.weight" in state,
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }
    return DiTArchitecture(**shape | (added_to_shape(state, split) if is_sr_dit(state) else {}))


def swiglu_ratio(hidden: int, width: int) -> float:
    """The MLP's ratio of whose hidden width two thirds, rounded down, are SwiGLU's: the roundest there is."""
    rounded = (round(hidden * 1.5 / width, digits) for digits in range(4))
    fits = (ratio for ratio in rounded if int(2 / 3 * int(width * ratio)) == hidden)
    return next(fits, math.ceil(hidden * 1.5) / width)


def _side(state: Mapping[str, Tensor]) -> int:
    """The number of tokens along a side of the grid that a checkpoint was trained on."""
    num_tokens = sizes(state, "pos_embed", 3)[1] - (_VECTOR in state)
    side = round(num_tokens**0.5)
    if side**2 != num_tokens or not side:
        raise ValueError(f"pos_embed of {num_tokens} tokens is not a square grid")
    return side


def _with_positions(
    state: Mapping[str, Tensor], config: DiTArchitecture, side: int
) -> DiTArchitecture:
    """The shape, with learned positions where the checkpoint's are: REPA-E trains them. Others' are fixed; those that
    are not the codes that we compute would mean something else."""
    positions = sincos_positions((side, side), config.width)
    if _VECTOR in state:  # the class token, first, has no place
        positions = torch.cat([torch.zeros(1, config.width), positions])
    expected = {"pos_embed": positions[None]}
    if config.rope:
        table = rotary_table((side, side), config.width // config.heads, 0, torch.device("cpu"))
        expected |= {"feat_rope.freqs_cos": table[0], "feat_rope.freqs_sin": table[1]}
    if (
        _STATISTICS[0] in state
        and _VECTOR not in state
        and _has_moved(state, expected["pos_embed"])
    ):
        del expected["pos_embed"]
        config = config.model_copy(update={"learned_positions": (side, side)})
    check_fixed(state, expected, side)
    return config


def _has_moved(state: Mapping[str, Tensor], code: Tensor) -> bool:
    own = state["pos_embed"].float()
    fits = own.shape == code.shape and not own.is_meta
    return fits and not torch.allclose(own, code, atol=1e-6)


def check_fixed(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], side: int) -> None:
    """Raises ValueError where a table that we compute is another one in a checkpoint."""
    for name, value in expected.items():
        own = state[name].float() if name in state else None
        fits = own is not None and own.shape == value.shape
        # Without contents, on the meta device, the shape is all that there is to compare.
        if not fits or not (own.is_meta or torch.allclose(own, value, atol=1e-4)):
            raise ValueError(f"{name} is not the fixed code of a {side}x{side} grid")


def our_name(name: str) -> str:
    """What a parameter with an official name is called in ``DiT``."""
    if name.startswith(PROJECTORS):
        return projector_name(name)
    for pattern, replacement in _RENAMED:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def _velocity_rows(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our last layer: without the second half of the outputs of each cell, SiT's unused ``learn_sigma``."""
    _, channels, patch, _ = sizes(state, "x_embedder.proj.weight", 4)
    rows = {}
    for kind, num_axes in (("weight", 2), ("bias", 1)):
        value, cells = state.get(f"final_layer.linear.{kind}"), patch * patch
        outputs, rest = divmod(sizes(state, f"final_layer.linear.{kind}", num_axes)[0], cells)
        if rest or outputs not in (channels, 2 * channels):
            raise ValueError(f"final_layer.linear has {outputs} outputs for {channels} channels")
        rows[f"final.linear.{kind}"] = value.unflatten(0, (cells, -1))[:, :channels].flatten(0, 1)
    return rows


def _is_without_shifts(state: Mapping[str, Tensor], width: int) -> bool:
    return sizes(state, "blocks.0.adaLN_modulation.1.weight", 2)[0] == 4 * width


def _shift_rows(ours: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The modulations of blocks that have no shifts (LightningDiT's ``wo_shift``), with rows of zeros for them:
    scale and gate of attention and MLP become shift, scale and gate of each."""
    rows = {}
    for name, value in ours.items():
        if re.match(r"blocks\.\d+\.modulation\.", name) and value.shape[:1] == (4 * width,):
            attention, mlp = value.chunk(2)
            zeros = torch.zeros_like(value[:width])
            rows[name] = torch.cat([zeros, attention, zeros, mlp])
    return rows


def _flat_mask(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SR-DiT's mask token without the axes of samples and tokens."""
    name = "fusion.mask_token"
    return {name: ours[name].flatten()} if name in ours else {}


def _reversed_time(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Folds t -> 1 - t and v -> -v into the weights: those of ours that change.

    cos(ω (1 - t)) = cos ω cos ωt + sin ω sin ωt and sin(ω (1 - t)) = sin ω cos ωt - cos ω sin ωt, so
    the first layer of the time embedding takes both up.
    """
    name, frequency = "time_embed.all.mlp.0.weight", time_frequencies(torch.device("cpu")).double()
    if name in state:
        frequency = frequency.to(state[name].device)
    if sizes(state, name, 2)[1] != 2 * len(frequency):
        raise ValueError(f"{name} is of another number of frequencies")
    cos, sin = state[name].double().chunk(2, dim=1)
    halves = (
        cos * frequency.cos() + sin * frequency.sin(),
        cos * frequency.sin() - sin * frequency.cos(),
    )
    last = {
        n: -v
        for n, v in state.items()
        if n.startswith(("final.linear.", "final.vectors.")) and v.is_floating_point()
    }
    return {name: torch.cat(halves, dim=1).to(state[name]), **last}
