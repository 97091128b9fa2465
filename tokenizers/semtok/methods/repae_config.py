"""Settings of REPA-E, which hold those of a VAE's method and those of a diffusion transformer."""

from collections.abc import Mapping
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.errors import UserError, named_here
from semtok.methods.vae import VAEConfig
from semtok.optimiser import OptimiserConfig
from semtok.registry import MethodConfig, get_method
from semtok.sampler.sampling import SamplerConfig

VAEType = TypeVar("VAEType", bound=VAEConfig)

METHOD, OWN = r"\bmethod\.", "method.tokenizer."
"""What a VAE's settings are called alone, and here."""
_DECODER_ALONE = (
    "method.tokenizer.train: decoder keeps the latents, which joint training moves; pass all"
)


class REPAEConfig(MethodConfig, Generic[VAEType]):
    """Settings of REPA-E: those of a VAE, those of a diffusion transformer, and what joins them."""

    name: Literal["repae"] = "repae"
    tokenizer: VAEType
    """The VAE and its own losses: all settings of ``vae``, ``send_vae``, ``va_vae`` or another method of a VAE, its
    name too. The transformer and its alignment get the latents as the encoder gave them, whatever ``equivariance`` and
    ``decoder_noise`` make of them for the decoder."""
    diffusion: DiffusionConfig
    """The transformer. ``repa``: None is REPA's default."""
    alignment_weight: float = Field(1.5, gt=0)
    """Of REPA's loss through the frozen transformer, by which the VAE's encoder learns."""
    sampler: SamplerConfig = SamplerConfig()
    """How pictures are drawn in training, and by default afterwards."""
    average_vae: bool = True
    """``train.ema_decay`` follows the VAE too. False: the VAE is exported as it was trained last, as published."""
    diffusion_optimiser: OptimiserConfig | None = None
    """Of the transformer; None: the same as ``train.optimiser``."""

    @classmethod
    def of(cls, content: Mapping[str, Any], *, place: str) -> type[MethodConfig]:
        inner = content.get("tokenizer")
        if not isinstance(inner, Mapping) or "name" not in inner:
            raise UserError(
                f"{place}: 'method.tokenizer.name' is missing; give method.tokenizer.name=…"
            )
        name = inner["name"]
        config = get_method(name, place=f"{place}: method.tokenizer.name").config
        if not issubclass(config, VAEConfig):
            raise UserError(
                f"{place}: method.tokenizer.name: '{name}' trains no VAE; pass vae, send_vae or another that does"
            )
        if inner.get("train") == "decoder":  # before what the VAE itself asks for with it
            raise UserError(f"{place}: {_DECODER_ALONE}")
        return cls[config]

    @model_validator(mode="after")
    def _goes_together(self) -> "REPAEConfig[VAEType]":
        if self.tokenizer.train != "all":
            raise ValueError(_DECODER_ALONE)
        equivariance = self.tokenizer.equivariance
        if equivariance is not None and equivariance.low_resolution_probability:
            raise ValueError(
                "method.tokenizer.equivariance.low_resolution_probability: the transformer would learn latents of "
                "smaller images too; pass 0"
            )
        if self.diffusion.repa is False:
            raise ValueError(
                "method.diffusion.repa: false leaves the VAE nothing to learn from the transformer; leave it out"
            )
        if self.diffusion.is_contrastive:
            raise ValueError(
                "method.diffusion.contrastive_weight: the image before may be another process's, and its latents are "
                "made in the step; pass 0"
            )
        return self

    def needs_teacher(self) -> bool:
        return True

    def starts_from_weights(self) -> bool:
        return self.tokenizer.starts_from_weights()

    def warnings(self, learning_rate: float) -> list[str]:
        return self.tokenizer.warnings(learning_rate)

    def check_references(self) -> None:
        with named_here(METHOD, OWN):
            self.tokenizer.check_references()

    def check_use(self, image_size: tuple[int, int]) -> None:
        with named_here(METHOD, OWN):
            self.tokenizer.check_use(image_size)
