"""Settings files of RAE's tokenizers: those of transformers beside its own checkpoints, and diffusers' config.json."""

from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from semtok.errors import UserError
from semtok.methods.rae import RAETokenizer
from semtok.settings import Config, ConfigType, parse
from semtok.storage import read_json

_OF_DIFFUSERS = ("_class_name", "_diffusers_version", "_name_or_path")


class _Beside(Config):
    """Of transformers' many settings those that no tensor tells; the tensors say the others."""

    model_config = ConfigDict(extra="ignore")


class EncoderSettings(_Beside):
    """``encoder/config.json``."""

    num_attention_heads: int | None = Field(None, ge=1)
    """None: one for each 64 channels, as every DINOv2 has."""


class ImageSettings(_Beside):
    """``encoder/preprocessor_config.json``: how images are standardised."""

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


class DecoderSettings(_Beside):
    """``decoder_config/config.json``."""

    decoder_num_attention_heads: int = Field(ge=1)


class DiffusersRAEConfig(Config):
    """What diffusers' AutoencoderRAE is made with, and its defaults."""

    encoder_type: str = "dinov2"
    encoder_hidden_size: int | None = None
    encoder_patch_size: int = Field(14, ge=1)
    encoder_num_hidden_layers: int | None = None
    encoder_input_size: int = Field(224, ge=1)
    encoder_norm_mean: tuple[float, float, float] | None = None
    encoder_norm_std: tuple[float, float, float] | None = None
    decoder_hidden_size: int | None = None
    decoder_num_hidden_layers: int | None = None
    decoder_num_attention_heads: int = Field(ge=1)
    decoder_intermediate_size: int | None = None
    patch_size: int | None = None
    image_size: int | None = None
    num_channels: Literal[3] = 3
    latents_mean: float | list[Any] | None = None
    latents_std: float | list[Any] | None = None
    noise_tau: float = 0.0
    """In training alone."""
    reshape_to_2d: Literal[True] = True
    use_encoder_loss: bool = False
    """In training alone."""
    scaling_factor: float = Field(1.0, gt=0)

    @property
    def side(self) -> int:
        """Of the grid of tokens."""
        return self.encoder_input_size // self.encoder_patch_size


def read_beside(
    model: type[ConfigType], path: Path, way_out: str = "fetch the file again"
) -> ConfigType:
    """The settings of a JSON file.

    Args:
        way_out: where a setting is missing.

    Raises:
        UserError: the file holds no settings by name, lacks one, or has one of another kind; by its key.
    """
    content = read_json(path)
    if isinstance(content, dict):
        content = {name: value for name, value in content.items() if name not in _OF_DIFFUSERS}
        for name, field in model.model_fields.items():
            if field.is_required() and name not in content:
                raise UserError(f"{path}: says no {name}; {way_out}")
    return parse(model, content, str(path))


def check_heads(heads: int, width: int, place: str) -> None:
    """Raises UserError where a width is no multiple of so many heads, which ``place`` says."""
    if heads < 1 or width % heads:
        raise UserError(f"{place} {heads} does not divide its width of {width}; correct it")


def check_agrees(config: DiffusersRAEConfig, tokenizer: RAETokenizer, place: str) -> None:
    """Raises UserError with the first setting of diffusers' that the tensors contradict, as diffusers would not load
    the folder, or would make another network of it."""
    decoder, teacher = tokenizer.decoder, tokenizer.teacher
    shape, (side, _) = decoder.shape, decoder.grid
    own = {
        "encoder_hidden_size": decoder.channels,
        "encoder_patch_size": teacher.patch_size,
        "encoder_num_hidden_layers": len(teacher.network.blocks),
        "encoder_input_size": side * teacher.patch_size,
        "decoder_hidden_size": shape.width,
        "decoder_num_hidden_layers": shape.depth,
        "decoder_intermediate_size": shape.mlp_width,
        "patch_size": shape.patch_size,
        "image_size": side * shape.patch_size,
    }
    for name, value in own.items():
        said = getattr(config, name)
        if said not in (None, value):
            raise UserError(
                f"{place}: {name} {said}, but its tensors say {value}; correct the wrong one"
            )


def check_statistics_said(config: DiffusersRAEConfig, name: str, own: Tensor, place: str) -> None:
    """Raises UserError where ``latents_mean`` or ``latents_std`` are others than the tensor of that name."""
    said = getattr(config, name)
    if said is None:
        return
    try:
        numbers = torch.tensor(said, dtype=torch.float32)
    except (TypeError, ValueError):
        raise UserError(f"{place}: {name} is no array of numbers; fetch the file again") from None
    if numbers.shape != own.shape or not torch.allclose(numbers, own.float(), rtol=1e-2, atol=1e-3):
        raise UserError(
            f"{place}: {name} differs from the tensor _{name} of the weights; correct the wrong one"
        )
