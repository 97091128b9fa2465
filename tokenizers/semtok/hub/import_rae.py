"""RAE's tokenizers: files of its stage 1, its decoder alone beside an encoder, and diffusers' AutoencoderRAE."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.checkpoints import built, count_numbered, read_checkpoint, sizes
from semtok.hub.formats import statistics_beside
from semtok.hub.job import ImportJob, check_statistics
from semtok.hub.rae_settings import (
    DecoderSettings,
    DiffusersRAEConfig,
    EncoderSettings,
    ImageSettings,
    check_agrees,
    check_heads,
    check_statistics_said,
    read_beside,
)
from semtok.methods.rae import RAETokenizer
from semtok.sampler.vit_decoder import DecoderShape, ViTDecoder
from semtok.settings import parse
from semtok.storage import first_line, read_tensors
from semtok.teachers import Teacher, TeacherConfig, TransformerShape

EPS = 1e-5
"""RAE divides by √(variance + eps), diffusers by (deviation + eps)."""
ENCODERS = {
    (384, 12): "vit_small_patch14_reg4_dinov2.lvd142m",
    (768, 12): "vit_base_patch14_reg4_dinov2.lvd142m",
    (1024, 24): "vit_large_patch14_reg4_dinov2.lvd142m",
}
"""What timm calls DINOv2 with registers, by width and depth."""
_HEAD_WIDTH = 64  # of DINOv2
_DECODER_HEADS = {1152: 16}  # of the published decoder
_DIFFUSERS_BUFFERS = ("encoder_mean", "encoder_std", "_latents_mean", "_latents_std")
_UNREAD = ("embeddings.mask_token", "layernorm.weight", "layernorm.bias")
_ENCODER_NAMES = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_DECODER_NAMES = (
    (r"^trainable_cls_token$", "cls_token"),
    (r"^decoder_pos_embed$", "positions"),
    (r"^decoder_(embed|norm)\.", r"\1."),
    (r"^decoder_pred\.", "head."),
    (r"^decoder_layers\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.(?:output\.dense|to_out\.0)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.)?(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.to_([qkv])\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_IN_TIMM = re.compile(
    r"patch_embed\.proj\.(weight|bias)|blocks\.\d+\."
    r"((norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma)"
)
_QKV = re.compile(r"(.*\.attn\.)(query|key|value|q|k|v)(\..*)")


def import_rae(job: ImportJob) -> RAETokenizer:
    """A tokenizer of RAE's own files.

    The statistics ``stat.pt`` are taken from beside the file, and so are ``encoder/``, transformers' folder of a
    Dinov2WithRegisters, and ``decoder_config/config.json``, which says the decoder's heads.

    Raises:
        UserError: no encoder, no statistics, or tensors of another network.
    """
    job.refuse("tokenizer", "image_size", "semantic_channels")
    state, folder = job.checkpoint.state, job.checkpoint.path.parent
    if any(".to_q." in name for name in state):
        raise UserError(
            f"{job.place}: weights of diffusers' AutoencoderRAE; give the folder that holds its config too"
        )
    encoder = _under(state, "encoder.encoder.")
    decoder = state if "decoder_embed.weight" in state else _under(state, "decoder.")
    if decoder is not state:
        _check_names(state, ("encoder.encoder.", "decoder."), (), job.place)
    job.fates |= {n: "network" for n in state}
    if job.options.teacher is not None:
        teacher = _given_encoder(job, encoder)
    else:
        teacher = _encoder(encoder or _encoder_beside(job), job, folder / "encoder")
    heads, said_by = _heads(job, decoder)
    network = import_decoder(decoder, heads, job.place, teacher, said_by=said_by)
    tokenizer = RAETokenizer(network, teacher)
    _take_statistics(tokenizer, job)
    return tokenizer


def import_diffusers_rae(job: ImportJob) -> RAETokenizer:
    """A tokenizer that encodes and decodes as a folder of diffusers' AutoencoderRAE does.

    Raises:
        UserError: an encoder other than DINOv2 with registers, or tensors of another network.
    """
    job.refuse("tokenizer", "teacher", "heads", "image_size", "semantic_channels", "statistics")
    folder = job.checkpoint.path
    config, place = (
        read_beside(DiffusersRAEConfig, folder / "config.json"),
        str(folder / "config.json"),
    )
    weights = folder / "diffusion_pytorch_model.safetensors"
    if not weights.is_file():
        raise UserError(
            f"{folder}: holds no {weights.name}; a RAE's variants and shards are not read here, so save it whole, by "
            "diffusers' save_pretrained"
        )
    if config.encoder_type != "dinov2":
        raise UserError(
            f"{place}: encoder_type '{config.encoder_type}' is not known here; dinov2 is"
        )
    if config.encoder_input_size % config.encoder_patch_size:
        raise UserError(
            f"{place}: encoder_input_size {config.encoder_input_size} is no multiple of encoder_patch_size "
            f"{config.encoder_patch_size}; correct the wrong one"
        )
    state = read_tensors(weights)
    _check_names(state, ("encoder.", "decoder."), _DIFFUSERS_BUFFERS, str(weights))
    job.fates |= dict.fromkeys(state, "network")
    teacher = _encoder(_under(state, "encoder."), job, None)
    _check_scale(state["encoder_mean"], state["encoder_std"], teacher, str(weights))
    for name, own in (("encoder_norm_mean", teacher.mean), ("encoder_norm_std", teacher.std)):
        said = getattr(config, name)
        if said is not None and not torch.allclose(torch.tensor(said), own.flatten(), atol=1e-5):
            raise UserError(
                f"{place}: {name} {list(said)}, this encoder's is {own.flatten().tolist()}"
            )
    decoder = _under(state, "decoder.")
    if "decoder_pos_embed" not in decoder:
        side = config.side
        decoder = decoder | {"decoder_pos_embed": diffusers_positions(state, side, job.place)}
        job.notes.append(
            f"its position table for {side}x{side} tokens is computed as diffusers does, which ignores a trained one: "
            "images are diffusers', not those of RAE's own file"
        )
    heads, said_by = config.decoder_num_attention_heads, f"{place}: decoder_num_attention_heads"
    network = import_decoder(decoder, heads, job.place, teacher, said_by=said_by)
    tokenizer = RAETokenizer(network, teacher)
    check_agrees(config, tokenizer, place)
    mean, std = state["_latents_mean"], state["_latents_std"]
    check_statistics_said(config, "latents_mean", mean, place)
    check_statistics_said(config, "latents_std", std, place)
    # diffusers adds eps to the deviation, and multiplies by its factor.
    _standardise(tokenizer, mean, (std.float() + EPS) / config.scaling_factor, job.place)
    return tokenizer


def diffusers_positions(state: Mapping[str, Tensor], side: int, place: str = "") -> Tensor:
    """The decoder's table (1, 1 + side², width) as diffusers makes it whenever it loads.

    Raises:
        UserError: the weights are of no decoder; ``place`` starts the message.
    """
    try:
        width = sizes(state, "decoder.decoder_embed.weight", 2)[0]
        if width % 4:
            raise ValueError(f"a width of {width} is no multiple of 4")
    except ValueError as error:
        raise UserError(f"{place}: not RAE's decoder ({first_line(error)})") from None
    table = get_2d_sincos_pos_embed(width, side, cls_token=True, extra_tokens=1, output_type="pt")
    return table[None].float()


def _check_names(
    state: Mapping[str, Tensor], prefixes: tuple[str, ...], needed: tuple[str, ...], place: str
) -> None:
    """Raises UserError, naming them, where tensors are of neither network nor needed, or a needed one is missing."""
    wrong = [f"{n} unknown" for n in state if not n.startswith(prefixes) and n not in needed]
    wrong += [f"{n} missing" for n in needed if n not in state]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{place}: tensors do not fit: {'; '.join(sorted(wrong)[:8])}{more}")


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


# Encoder -----------------------------------------------------------------------------------------


def encoder_in_timm(state: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Weights of transformers' Dinov2WithRegisters by timm's names, but for the final norm, which RAE leaves without
    scale and shift.

    Raises:
        UserError: they are of another network.
    """
    try:
        (_, registers, _), (_, _, width) = (
            sizes(state, f"embeddings.{name}", 3)
            for name in ("register_tokens", "position_embeddings")
        )
        blocks = count_numbered(state, "encoder.layer.")
        if registers != 4:
            raise ValueError(f"{registers} registers")
        names = [f"encoder.layer.{i}.mlp.fc1.weight" for i in range(blocks)]
        hidden = {sizes(state, name, 2)[0] for name in names}
        if hidden != {4 * width}:
            raise ValueError(f"MLPs of {sorted(hidden)} for a width of {width}")
    except ValueError as error:
        raise UserError(
            f"{place}: its encoder is no DINOv2 with four registers ({first_line(error)})"
        ) from None
    positions = state["embeddings.position_embeddings"]
    ours = {
        "cls_token": state["embeddings.cls_token"] + positions[:, :1],
        "reg_token": state["embeddings.register_tokens"],
        "pos_embed": positions[:, 1:],
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    made_of = ("cls_token", "register_tokens", "position_embeddings")
    left_out = {*_UNREAD, *(f"embeddings.{name}" for name in made_of)}
    rest = {n: v for n, v in state.items() if n not in left_out}
    theirs = _joined(_renamed(rest, _ENCODER_NAMES))
    unknown = sorted(name for name in theirs if not _IN_TIMM.fullmatch(name))
    if unknown:
        told = ", ".join(unknown[:8])
        raise UserError(f"{place}: tensors do not fit: its encoder's {told} unknown")
    return ours | theirs


def _encoder(state: Mapping[str, Tensor], job: ImportJob, folder: Path | None) -> Teacher:
    weights = encoder_in_timm(state, job.place)
    blocks, width = count_numbered(weights, "blocks."), weights["norm.weight"].numel()
    heads = max(1, width // _HEAD_WIDTH)
    named = ENCODERS.get((width, blocks))
    if folder is not None and (folder / "config.json").is_file():
        said = read_beside(EncoderSettings, folder / "config.json").num_attention_heads or heads
        place = f"{folder / 'config.json'}: num_attention_heads"
        check_heads(said, width, place)
        if named is not None and said != heads:
            raise UserError(f"{place} {said}, but {named} has {heads}; correct it")
        heads = said
    shape = TransformerShape(width=width, depth=blocks, heads=heads) if named is None else None
    config = TeacherConfig(
        name=named or ENCODERS[768, 12],
        checkpoint="teacher.safetensors",  # an export brings these weights along
        final_norm="plain",
        shape=shape,
    )
    teacher = Teacher(config, weights)
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        place = folder / "preprocessor_config.json"
        images = read_beside(ImageSettings, place)
        mean, std = torch.tensor(images.image_mean), torch.tensor(images.image_std)
        _check_scale(mean, std, teacher, str(place))
    for name in job.fates:
        if name.endswith(_UNREAD):
            job.fates[name] = "left out, RAE does not read it"
    return teacher


def _encoder_beside(job: ImportJob) -> dict[str, Tensor]:
    folder = job.checkpoint.path.parent / "encoder"
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"{job.place}: a decoder alone; put its encoder's folder of transformers beside it as encoder/, or give "
            f"--teacher name={ENCODERS[768, 12]} final_norm=plain"
        )
    job.notes.append(f"encoder taken from {folder}, which lies beside it")
    return read_tensors(folder / "model.safetensors")


def _given_encoder(job: ImportJob, own: Mapping[str, Tensor]) -> Teacher:
    teacher = job.options.teacher
    assert teacher is not None
    if own:
        raise UserError(f"{job.place}: holds its encoder; leave --teacher out")
    if teacher.config.final_norm != "plain":
        raise UserError(
            f"{job.place}: RAE's encoder has no scale after its last norm; give --teacher … final_norm=plain"
        )
    return teacher


def _check_scale(mean: Tensor, std: Tensor, teacher: Teacher, place: str) -> None:
    """Raises UserError where images are to be standardised otherwise than timm does for this encoder."""
    pairs = ((mean, teacher.mean), (std, teacher.std))
    if not all(
        own.numel() == known.numel()
        and torch.allclose(own.float().flatten(), known.flatten(), atol=1e-5)
        for own, known in pairs
    ):
        raise UserError(
            f"{place}: standardises images by {mean.flatten().tolist()} and {std.flatten().tolist()}, this encoder "
            f"by {teacher.mean.flatten().tolist()} and {teacher.std.flatten().tolist()}"
        )


# Decoder -----------------------------------------------------------------------------------------


def import_decoder(
    state: Mapping[str, Tensor], heads: int, place: str, teacher: Teacher, *, said_by: str
) -> ViTDecoder:
    """A decoder of RAE's or diffusers' names.

    Args:
        heads: of its attention, which no tensor tells.
        said_by: where the heads come from; starts the message if they do not fit.
        teacher: the encoder, in whose unit images come out.

    Raises:
        UserError: it is none, or of other tokens than the encoder's.
    """
    try:
        width, channels = sizes(state, "decoder_embed.weight", 2)
        _, tokens, _ = sizes(state, "decoder_pos_embed", 3)
        depth = count_numbered(state, "decoder_layers.")
        mlp_width, _ = sizes(state, "decoder_layers.0.intermediate.dense.weight", 2)
        numbers, _ = sizes(state, "decoder_pred.weight", 2)
        side, patch = round((tokens - 1) ** 0.5), round((numbers / 3) ** 0.5)
        if side**2 + 1 != tokens or 3 * patch**2 != numbers:
            raise ValueError(f"{tokens} tokens to {numbers} numbers each are no square images")
    except ValueError as error:
        raise UserError(f"{place}: not RAE's decoder ({first_line(error)})") from None
    check_heads(heads, width, said_by)
    told = {"width": width, "depth": depth, "mlp_width": mlp_width, "patch_size": patch}
    shape = parse(DecoderShape, {"heads": heads, **told}, f"{place}: not RAE's decoder")
    if channels != teacher.widths[-1]:
        raise UserError(
            f"{place}: decodes tokens of {channels} channels, the encoder's have {teacher.widths[-1]}"
        )
    ours = {name: value.float() for name, value in _joined(_renamed(state, _DECODER_NAMES)).items()}
    ours |= {f"image_{n}": getattr(teacher, n).view(3, 1, 1).cpu() for n in ("mean", "std")}
    return built(lambda: ViTDecoder(shape, channels=channels, grid=(side, side)), ours, place)


def _heads(job: ImportJob, decoder: Mapping[str, Tensor]) -> tuple[int, str]:
    """How many heads the decoder has, and where that comes from."""
    if job.options.heads is not None:
        return job.options.heads, f"{job.place}: --heads"
    file = job.checkpoint.path.parent / "decoder_config" / "config.json"
    if file.is_file():
        said = read_beside(DecoderSettings, file, "fetch the file again (or give --heads)")
        job.notes.append(f"the decoder's heads are taken from {file}, which lies beside it")
        heads = said.decoder_num_attention_heads
        return heads, f"{file}: decoder_num_attention_heads"
    width = next(iter(decoder.get("decoder_embed.weight", torch.empty(0)).shape), 0)
    if width not in _DECODER_HEADS:
        raise UserError(
            f"{job.place}: does not say how many heads its decoder of width {width} has; give --heads"
        )
    return _DECODER_HEADS[width], f"{job.place}: heads"


# Names and statistics ----------------------------------------------------------------------------


def _renamed(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    ours = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        ours[name] = value
    return ours


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one layer each."""
    parts: dict[str, dict[str, Tensor]] = {}
    ours = {}
    for name, value in state.items():
        if match := _QKV.fullmatch(name):
            parts.setdefault(f"{match[1]}qkv{match[3]}", {})[match[2][0]] = value
        else:
            ours[name] = value
    for name, three in parts.items():
        ours[name] = torch.cat([three[letter] for letter in "qkv" if letter in three])
    return ours


def _take_statistics(tokenizer: RAETokenizer, job: ImportJob) -> None:
    given, path = job.options.statistics, job.checkpoint.path
    if isinstance(given, float):
        raise UserError(f"--statistics {given}: expected a file here, RAE's stat.pt")
    file = given or statistics_beside(path, job.format)
    if file is None:
        job.notes.append(
            "its latents are not standardised yet: give --statistics, RAE's stat.pt, or call measure_statistics; "
            "until then it only decodes raw latents"
        )
        return
    if given is None:
        job.notes.append(f"statistics taken from {file}, which lies beside it")
    content: Any = read_checkpoint(file)
    held = content if isinstance(content, dict) else {}
    mean, var = held.get("mean"), held.get("var")
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        raise UserError(f"{file}: no statistics of RAE's; expected mean and var")
    _standardise(tokenizer, mean, (var.float() + EPS).sqrt(), str(file))


def _standardise(tokenizer: RAETokenizer, mean: Tensor, std: Tensor, place: str) -> None:
    for buffer, values in ((tokenizer.texture_mean, mean), (tokenizer.texture_std, std)):
        try:
            buffer.copy_(values.float().expand(buffer.shape))
        except RuntimeError:
            raise UserError(
                f"{place}: statistics of {tuple(values.shape)} for latents of {tuple(buffer.shape)}"
            ) from None
    check_statistics(tokenizer.texture_mean, tokenizer.texture_std, place)
    tokenizer.num_measured_images.fill_(1)  # by whoever published them
