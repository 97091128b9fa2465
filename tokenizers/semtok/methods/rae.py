"""RAE (Zheng et al. 2025): a frozen encoder's tokens as latents, and a decoder that learns to turn them into images.

The texture part is a vision foundation model's patch tokens, of one layer or the mean of several (RAEv2), each with the
final norm. They are not compressed. The decoder is a ViT, trained with noise on the tokens, so that it also decodes
what a generator gets slightly wrong. In training tokens are of the encoder's own scale; the export standardises them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.decoder_noise import DecoderNoiseConfig, noise_for_decoder
from semtok.methods.image_losses import ImageLossConfig, ImageLossLearner, ImageLossObjective
from semtok.methods.teacher_tokenizer import (
    HeldTeacher,
    TeacherTokenizer,
    saved_teacher,
    token_grid,
)
from semtok.metrics import psnr, ssim
from semtok.objective import Batch, Carry, Inputs, MethodContext, StepOutput
from semtok.pictures import Row, principal_components, rows_of_images
from semtok.registry import register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.sampler.vit_decoder import DecoderShape, ViTDecoder
from semtok.settings import Config, parse
from semtok.storage import load_weights, write_tensors
from semtok.teachers import TeacherConfig, TeacherFeatures
from semtok.tokenizer import Tokenizer

_DECODER_FILE = "decoder.safetensors"


class RAEConfig(ImageLossConfig):
    """Settings of RAE. The encoder is the recipe's ``teacher``; published are ``teacher.final_norm: plain`` and
    distances of images in [0, 1], of which those in [-1, 1] are the double."""

    name: Literal["rae"] = "rae"
    decoder: DecoderShape
    """Sizes of the decoder."""
    spatial_mean: bool = False
    """Whether the mean token of the last of the encoder's layers is added to each token (RAEv2)."""
    statistics: Literal["position", "channel"] = "position"
    """Of what the latents' mean and deviation are: of each channel at each position, as published, which binds the
    latents to one size of images; or of each channel."""
    decoder_noise: DecoderNoiseConfig | None = None
    """Noise on the encoder's tokens in training, of their own scale; None: none."""
    gradient_checkpointing: bool = False
    """Recompute the decoder's activations in the backward pass, to save memory."""

    def needs_teacher(self) -> bool:
        return True


def encoder_tokens(features: TeacherFeatures, *, spatial_mean: bool) -> Tensor:
    """The mean over layers of patch tokens (B, C, h, w), in float32.

    Args:
        spatial_mean: add the mean over positions of the last layer's.
    """
    layers = [patches.float() for patches in features.patches]
    tokens = torch.stack(layers).mean(dim=0) if len(layers) > 1 else layers[0]
    return tokens + layers[-1].mean(dim=(2, 3), keepdim=True) if spatial_mean else tokens


# The tokenizer -----------------------------------------------------------------------------------


class RAETokenizer(TeacherTokenizer):
    """A frozen encoder and a ViT decoder.

    Args:
        teacher: the encoder.
        spatial_mean, statistics: as ``RAEConfig`` has them.
    """

    def __init__(
        self,
        decoder: ViTDecoder,
        teacher: HeldTeacher,
        *,
        spatial_mean: bool = False,
        statistics: Literal["position", "channel"] = "position",
        method: str = "rae",
    ) -> None:
        part = PartSpec("texture", decoder.channels, decoder.shape.patch_size)
        positions = {"texture": decoder.grid} if statistics == "position" else None
        super().__init__(LatentSpec((part,)), teacher, method=method, positions=positions)
        self.decoder, self.spatial_mean = decoder, spatial_mean

    def features(self, pixels: Tensor) -> TeacherFeatures:
        grid = token_grid(tuple(pixels.shape[-2:]), self.decoder.shape.patch_size)
        return self.teacher.features(pixels, grid=grid)

    def posterior_raw(self, pixels: Tensor, features: TeacherFeatures | None = None) -> Posterior:
        features = features if features is not None else self.features(pixels)
        tokens = encoder_tokens(features, spatial_mean=self.spatial_mean).to(pixels.dtype)
        return Posterior(
            Latents({"texture": tokens}), Latents({"texture": torch.zeros_like(tokens)})
        )

    def decode_raw(self, raw: Latents) -> Tensor:
        return self.decoder(raw.texture)

    def means_the_same(self, other: Tokenizer) -> bool:
        same = super().means_the_same(other) and isinstance(other, RAETokenizer)
        return same and self.spatial_mean == other.spatial_mean

    def has_latents_of(self, other: Tokenizer) -> bool:
        return self.means_the_same(other)

    def save_networks(self, folder: Path) -> dict[str, Any]:
        """Writes the decoder, and an encoder that only a local file has."""
        write_tensors(folder / _DECODER_FILE, self.decoder.state_dict())
        return {
            "decoder": self.decoder.shape.model_dump(mode="json"),
            "channels": self.decoder.channels,
            "grid": list(self.decoder.grid),
            "spatial_mean": self.spatial_mean,
            "statistics": "position" if self.positions else "channel",
            **self.save_teacher(folder),
        }

    @classmethod
    def load_networks(cls, folder: Path, config: Mapping[str, Any]) -> "RAETokenizer":
        settings = parse(_Saved, config["settings"], f"{folder / 'config.json'}: settings")
        decoder = ViTDecoder(settings.decoder, channels=settings.channels, grid=settings.grid)
        load_weights(decoder, folder / _DECODER_FILE)
        return cls(
            decoder,
            saved_teacher(settings.teacher, settings.teacher_fingerprint, folder),
            spatial_mean=settings.spatial_mean,
            statistics=settings.statistics,
            method=config["method"],
        )


class _Saved(Config):
    """What ``save_networks`` notes."""

    decoder: DecoderShape
    channels: int = Field(ge=1)
    grid: tuple[int, int]
    spatial_mean: bool
    statistics: Literal["position", "channel"]
    teacher: TeacherConfig
    teacher_fingerprint: str


# The objective -----------------------------------------------------------------------------------


class RAELearner(ImageLossLearner):
    """Trains the decoder."""

    def __init__(
        self, config: RAEConfig, context: MethodContext, discriminator: nn.Module | None
    ) -> None:
        super().__init__(config, context, discriminator)
        teacher, grid = context.teacher, token_grid(context.image_size, config.decoder.patch_size)
        assert teacher is not None
        self.decoder = ViTDecoder(config.decoder, channels=teacher.widths[-1], grid=grid)
        self.decoder.take_image_scale(teacher.mean, teacher.std)
        self.decoder.gradient_checkpointing = config.gradient_checkpointing

    @property
    def last_layer(self) -> Tensor:
        return self.decoder.head.weight

    def fresh_reconstruction(self, inputs: Inputs) -> Tensor:
        with torch.no_grad():  # there is nothing in the decoder that evaluation would change
            return self.decoder(inputs["tokens"])

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised: L = λ_r L_rec(x, x̂) + λ_p d(x, x̂) + λ_a w L_adv(x̂), with x̂ = decode(z + noise).

        Args:
            inputs: ``pixels`` (B, 3, H, W), the encoder's ``tokens`` (B, C, h, w) and all its ``features``.
            carry: unused, this learner is first.
        """
        z, noise = inputs["tokens"], self.config.decoder_noise
        x_hat = self.decoder(noise_for_decoder(z, noise, draws) if noise is not None else z)
        terms = self.image_terms(x_hat, inputs)
        terms |= self.adversarial_terms(x_hat, terms, step, draws)
        return StepOutput(terms, carry={"reconstruction": x_hat.detach()})


class RAEObjective(ImageLossObjective):
    """The decoder and, where the recipe has an adversarial loss, the discriminator.

    Raises:
        ValueError: images that the decoder's patches do not divide.
        UserError: an encoder that is no vision transformer, or whose tokens are of another grid alone.
    """

    def __init__(self, config: RAEConfig, context: MethodContext) -> None:
        teacher = context.teacher
        if teacher is None or not teacher.is_transformer:
            name = teacher.timm_name if teacher is not None else "none"
            raise UserError(
                f"teacher.name: RAE's encoder is a vision transformer, and '{name}' is not; choose one, as demo"
            )
        teacher.check_grid(token_grid(context.image_size, config.decoder.patch_size))
        super().__init__(config, context, "decoder", RAELearner)

    def averaged_module(self) -> nn.Module:
        return self.learner.decoder

    def compiled_modules(self) -> list[nn.Module]:
        return [*self.learner.decoder.blocks, *self.adversaries()]

    def prepare(self, batch: Batch) -> dict[str, Any]:
        stride = self.config.decoder.patch_size
        grid = token_grid(tuple(batch.pixels.shape[-2:]), stride)
        features = self.teacher.module.features(batch.pixels, grid=grid)
        tokens = encoder_tokens(features, spatial_mean=self.config.spatial_mean)
        return {"pixels": batch.pixels, "features": features, "tokens": tokens}

    def tokenizer(self, averaged: nn.Module) -> RAETokenizer:
        config = self.config
        law = {"spatial_mean": config.spatial_mean, "statistics": config.statistics}
        return RAETokenizer(averaged, self.teacher.module, **law, method=config.name)

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        x_hat = averaged(inputs["tokens"]).clamp(-1, 1)
        return {"psnr": psnr(x_hat, pixels), "ssim": ssim(x_hat, pixels)}

    def picture(self, averaged: nn.Module, pixels: Tensor, inputs: Inputs) -> Tensor:
        tokens = inputs["tokens"]
        return rows_of_images(
            [
                Row("image", pixels),
                Row("reconstruction", averaged(tokens).clamp(-1, 1)),
                Row("tokens\n(PCA)", principal_components(tokens)),
            ]
        )


register_method(
    "rae",
    config=RAEConfig,
    objective=RAEObjective,
    tokenizer=RAETokenizer,
    papers=("RAE, arXiv 2510.11690", "RAEv2, arXiv 2605.18324"),
)
