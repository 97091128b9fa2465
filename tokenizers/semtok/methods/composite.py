"""What SemVAE, REGLUE and ReDi share: latents made of an image VAE's and of a teacher's features.

A composite tokenizer has the texture part of any other tokenizer; a semantic part, which a *coder*
compresses from a frozen teacher's patch tokens; and a global part, the teacher's pooled token. Each
of the last two may be left out (REG has the global part alone). Only the texture part is decoded to
the image. The methods differ in their coder and in how it is learned.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from semtok.data.caches.feature_cache import features_as_asked
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.methods.coders import FeatureCoder, feature_cosine
from semtok.methods.teacher_tokenizer import (
    HeldTeacher,
    TeacherTokenizer,
    saved_teacher,
    token_grid,
)
from semtok.objective import Batch, Inputs, MethodContext, TokenizerObjective, Unregistered
from semtok.pictures import Row, principal_components, rows_of_images
from semtok.registry import MethodConfig, get_method
from semtok.sampler.latents import Latents, LatentSpec, PartSpec, Posterior
from semtok.settings import Config, parse
from semtok.statistics import StreamingMoments
from semtok.storage import first_line, load_weights, write_tensors
from semtok.teachers import Teacher, TeacherConfig, TeacherFeatures
from semtok.tokenizer import DiffusionDefaults, Tokenizer

_CODER_FILE = "coder.safetensors"


GLOBAL_WEIGHT = 0.03
"""Of the global part's velocity, REGLUE's and REG's; other papers have no such part."""

# Settings ----------------------------------------------------------------------------------------


class CompositeConfig(MethodConfig):
    """Settings that all composites share."""

    texture: str = "demo"
    """Whose texture part: a folder, a run's name, a Hub id, an autoencoder of diffusers (AutoencoderKL, AutoencoderDC,
    AutoencoderTiny, …), an embedded recipe's name (then it is trained first, on the same images), or ``demo``, the
    embedded VAE, which was made for the embedded images."""
    min_texture_psnr: float | None = Field(18.0, ge=0)
    """In dB: a texture that shows up to 64 of the training images worse than that is refused before training, as
    nothing generated in its latents can look better. 0 measures and refuses nothing, null does not measure. The
    embedded VAE has 28 dB on the embedded images, 15 on photographs and 8 on drawings; VAEs trained on the images at
    hand have 23 and more."""
    global_token: bool
    """Whether the teacher's pooled token (the CLS token of the last of its layers in use) is a part."""
    statistics: Literal["measured", "none"] = "measured"
    """``none`` leaves the semantic and global parts unscaled, as REGLUE, REG and ReDi publish; their
    variance then sets how much noise hides them."""
    feature_cache: str | None = None
    """Of the teacher's features of the training images, kept in float16 once they were computed. ``auto``: in a folder
    under ``runs/cache`` that every run with this teacher and these images reads, also for latents; it is made where
    training sees each image often. A folder: for this training alone. None or ``none``: they are computed each time."""

    @field_validator("feature_cache")
    @classmethod
    def _none_by_name(cls, cache: str | None) -> str | None:
        return None if cache == "none" else cache

    @model_validator(mode="after")
    def _cache_pays(self) -> "CompositeConfig":
        if self._names_cache and not self.has_steps():
            raise ValueError(
                "feature_cache: nothing is read twice here; leave it out, or pass auto, which reads what is there"
            )
        return self

    @property
    def _names_cache(self) -> bool:
        return self.feature_cache not in (None, "auto")

    def needs_teacher(self) -> bool:
        return True

    def needs_same_images(self) -> bool:
        return self._names_cache

    def texture_reference(self) -> str | None:
        return self.texture

    def least_texture_psnr(self) -> float | None:
        return self.min_texture_psnr


# The tokenizer -----------------------------------------------------------------------------------


class CompositeTokenizer(TeacherTokenizer):
    """Texture of another tokenizer, coded features and pooled token of a teacher.

    Args:
        texture: a tokenizer whose only part is the texture.
        coder: of the semantic part; None: there is none.
        teacher: whose features.
        feature_stride: image pixels per patch token of the teacher along each side.
        global_width: width of the pooled token; None: no global part.
        scaled: whether the semantic and global parts are standardised; else they stay as they are.
    """

    coder_class: ClassVar[type[FeatureCoder] | None] = None

    def __init__(
        self,
        texture: Tokenizer,
        coder: FeatureCoder | None,
        teacher: HeldTeacher,
        *,
        feature_stride: int,
        global_width: int | None,
        scaled: bool = True,
        method: str,
    ) -> None:
        parts = [texture.spec["texture"]]
        if coder is not None:
            parts.append(PartSpec("semantic", coder.shape.channels, feature_stride))
        if global_width is not None:
            parts.append(PartSpec("global", global_width, None))
        spec = LatentSpec(tuple(parts))
        super().__init__(spec, teacher, method=method, positions=texture.positions)
        self.texture, self.coder = texture, coder
        self.feature_stride, self.scaled = feature_stride, scaled
        self.texture_mean.copy_(texture.texture_mean)
        self.texture_std.copy_(texture.texture_std)
        if not self.measured_parts:
            self.num_measured_images.copy_(texture.num_measured_images)

    @property
    def measured_parts(self) -> tuple[str, ...]:
        # The texture keeps the statistics that its own tokenizer measured.
        return self.spec.names[1:] if self.scaled else ()

    @property
    def feature_widths(self) -> tuple[int, ...] | None:
        """D of each of the teacher's layers that the semantic part codes; None: there is no such part.
        Layers of one grid are a transformer's, and of one width."""
        if self.coder is None:
            return None
        num_layers = len(self.teacher_config.layers)
        return (self.coder.shape.feature_channels // num_layers,) * num_layers

    def feature_grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        return token_grid(image_size, self.feature_stride)

    def features(self, pixels: Tensor) -> TeacherFeatures:
        return self.teacher.features(pixels, grid=self.feature_grid(tuple(pixels.shape[-2:])))

    def with_decoder_of(self, other: Tokenizer) -> Tokenizer:
        self.texture = self.texture.with_decoder_of(other)
        return self

    def means_the_same(self, other: Tokenizer) -> bool:
        if not super().means_the_same(other) or not isinstance(other, CompositeTokenizer):
            return False
        if self.coder is None or other.coder is None:
            return self.coder is other.coder
        ours, theirs = self.coder.state_dict(), other.coder.state_dict()
        return ours.keys() == theirs.keys() and all(
            torch.equal(value.cpu(), theirs[name].cpu()) for name, value in ours.items()
        )

    def posterior_raw(self, pixels: Tensor, features: TeacherFeatures | None = None) -> Posterior:
        texture = self.texture.posterior_raw(pixels)
        mean, std = dict(texture.mean), dict(texture.std)
        features = features if features is not None else self.features(pixels)
        if self.coder is not None:
            mean["semantic"], std["semantic"] = self.coder.encode(features.joined)
        if "global" in self.spec.names:
            mean["global"] = features.pooled
            std["global"] = torch.zeros_like(features.pooled)
        return Posterior(Latents(mean), Latents(std))

    def decode_raw(self, raw: Latents) -> Tensor:
        return self.texture.decode_raw(Latents({"texture": raw.texture}))

    def decode_features(self, latents: Latents) -> Tensor:
        """The teacher's features (B, D, h, w) that the semantic part stands for.

        Raises:
            ValueError: this tokenizer has no semantic part.
        """
        if self.coder is None:
            raise ValueError(f"a '{self.method}' tokenizer without a coder has no semantic part")
        return self.coder.decode(self.destandardise(latents)["semantic"])

    # Files ------------------------------------------------------------------------------------

    def save_networks(self, folder: Path) -> dict[str, Any]:
        """Writes ``texture/``, a whole tokenizer; the coder; and a teacher that only a local file has."""
        self.texture.save_pretrained(folder / "texture")
        if self.coder is not None:
            write_tensors(folder / _CODER_FILE, self.coder.state_dict())
        return {
            "coder": self.coder.settings() if self.coder is not None else None,
            **self.save_teacher(folder),
            "feature_stride": self.feature_stride,
            "global_width": self.spec["global"].channels if "global" in self.spec.names else None,
            "scaled": self.scaled,
        }

    @classmethod
    def load_networks(cls, folder: Path, config: Mapping[str, Any]) -> "CompositeTokenizer":
        place = f"{folder / 'config.json'}: settings"
        settings = parse(_Saved, config["settings"], place)
        coder = None
        if settings.coder is not None:
            if cls.coder_class is None:
                raise UserError(f"{place}.coder: a '{config['method']}' tokenizer has none")
            shape = parse(cls.coder_class.shape_class, settings.coder, f"{place}.coder")
            try:
                coder = cls.coder_class(shape)
            except ValueError as error:  # sizes that don't go together
                raise UserError(f"{place}.coder: {first_line(error)}") from None
            load_weights(coder, folder / _CODER_FILE)
        texture = Tokenizer.from_pretrained((folder / "texture").absolute())
        if texture.spec.names != ("texture",):
            raise UserError(f"{folder / 'texture'}: has parts beside the texture")
        return cls(
            texture,
            coder,
            saved_teacher(settings.teacher, settings.teacher_fingerprint, folder),
            feature_stride=settings.feature_stride,
            global_width=settings.global_width,
            scaled=settings.scaled,
            method=config["method"],
        )


class _Saved(Config):
    """What ``save_networks`` notes of a composite."""

    coder: dict[str, Any] | None
    teacher: TeacherConfig
    teacher_fingerprint: str
    feature_stride: int = Field(ge=1)
    global_width: int | None = Field(ge=1)
    scaled: bool


# The objective -----------------------------------------------------------------------------------


class CompositeObjective(TokenizerObjective):
    """Trains or fits a coder on a teacher's features; the texture's tokenizer stays as it is.

    Args:
        coder: the semantic part's; None: there is none, and nothing is trained.

    Raises:
        ValueError: a texture tokenizer with further parts, or a grid of patch tokens that does not
            divide the image.
    """

    def __init__(
        self, config: CompositeConfig, context: MethodContext, coder: FeatureCoder | None
    ) -> None:
        super().__init__()
        assert context.teacher is not None and context.texture is not None
        self.config, self.context, self.teacher = config, context, Unregistered(context.teacher)
        self.texture = Unregistered(context.texture)
        if context.texture.spec.names != ("texture",):
            raise ValueError(
                f"method.texture: '{config.texture}' has parts {', '.join(context.texture.spec.names)}; "
                "a composite takes a tokenizer of the texture alone"
            )
        self._check_teacher()
        self.feature_stride = feature_stride(context.teacher, context.image_size)
        self.learners = nn.ModuleDict()
        self._coder = Unregistered(coder)
        self.tokenizer(coder).check_image_size(context.image_size)

    @torch.no_grad()
    def _check_teacher(self) -> None:
        """Raises ValueError with all that keeps the teacher's features from being one grid that divides the image."""
        teacher, (height, width) = self.context.teacher, self.context.image_size
        wrong = []
        features = teacher.features(torch.zeros(1, 3, height, width))
        maps = [tuple(patches.shape[-2:]) for patches in features.patches]
        # The stages of a CNN have grids of their own; only the last has the one that is asked for.
        if any(shape != teacher.grid((height, width)) for shape in maps):
            layers = list(teacher.config.layers)
            wrong.append(
                f"teacher.layers: {layers} have maps of {maps}, not of one grid; pass teacher.layers=[-1]"
            )
        try:
            feature_stride(teacher, self.context.image_size)
        except ValueError as error:
            wrong.append(str(error))
        if wrong:
            suits = (
                ""
                if teacher.is_transformer
                else (
                    "; or take a vision transformer, whose layers have one grid, as dinov2_vits14 or demo"
                )
            )
            raise ValueError(", and ".join(wrong) + suits)

    def frozen_modules(self) -> list[nn.Module]:
        fitted = [] if self.learners or self.coder is None else [self.coder]
        return [self.teacher.module, self.texture.module, *fitted]

    @property
    def coder(self) -> FeatureCoder | None:
        """The semantic part's, where there is one."""
        return self._coder.module

    def averaged_module(self) -> FeatureCoder | None:
        return self.coder

    def compiled_modules(self) -> list[nn.Module]:
        return list(self.coder.children()) if self.learners else []  # encoder and decoder

    def feature_moments(
        self, batches: Iterable[Batch], *, covariance: bool = False
    ) -> StreamingMoments:
        """Moments of the features of all processes' batches."""
        moments = StreamingMoments(covariance=covariance)
        for batch in batches:
            moments.add(self.prepare(batch)["features"].joined)
        return moments.over_processes()

    def training_source(
        self, source: ImageSource, accelerator: Accelerator, *, pays: bool
    ) -> ImageSource:
        kept = features_as_asked(
            source,
            self.teacher.module,
            token_grid(self.context.image_size, self.feature_stride),
            self.config.feature_cache,
            pays=pays,
            accelerator=accelerator,
        )
        return kept if kept is not None else source

    def prepare(self, batch: Batch) -> dict[str, Any]:
        features = batch.features
        if features is None:
            grid = token_grid(tuple(batch.pixels.shape[-2:]), self.feature_stride)
            features = self.teacher.module.features(batch.pixels, grid=grid)
        return {"features": features}

    def tokenizer(self, averaged: FeatureCoder | None) -> CompositeTokenizer:
        config, teacher = self.config, self.teacher.module
        tokenizer = get_method(config.name, place="method").tokenizer(
            self.texture.module,
            averaged,
            teacher,
            feature_stride=self.feature_stride,
            global_width=teacher.pooled_width if config.global_token else None,
            scaled=config.statistics == "measured",
            method=config.name,
        )
        tokenizer.diffusion_defaults = self.diffusion_defaults(tokenizer.spec)
        return tokenizer

    @abstractmethod
    def diffusion_defaults(self, spec: LatentSpec) -> DiffusionDefaults:
        """How the paper diffuses these latents."""

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        if averaged is None:
            return {}
        features = inputs["features"].joined
        decoded = averaged.decode(averaged.encode(features)[0])
        return {"feature_cosine": feature_cosine(decoded, features)}

    def picture(self, averaged: nn.Module, pixels: Tensor, inputs: Inputs) -> Tensor | None:
        """The images; principal components of the features, of their reconstruction, in the same
        colours, and of the code."""
        if averaged is None:
            return None
        features = inputs["features"].joined
        code = averaged.encode(features)[0]
        decoded = averaged.decode(code)
        return rows_of_images(
            [
                Row("image", pixels),
                Row("teacher\n(PCA)", principal_components(features)),
                Row("reconstruction\n(PCA)", principal_components(decoded, of=features)),
                Row("code\n(PCA)", principal_components(code)),
            ]
        )


def feature_stride(teacher: Teacher, image_size: tuple[int, int]) -> int:
    """Image pixels per patch token.

    Raises:
        ValueError: the teacher's grid does not divide the image into squares.
    """
    rows, columns = teacher.grid(image_size)
    height, width = image_size
    if height % rows or width % columns or height // rows != width // columns:
        near = min(
            (s for s in range(1, min(image_size) + 1) if not (height % s or width % s)),
            key=lambda s: abs(min(image_size) / s - min(rows, columns)),
        )
        size = min(image_size) // near * teacher.patch_size
        raise ValueError(
            f"teacher.input_size: {teacher.input_size} gives {rows}x{columns} tokens, which do not divide "
            f"{height}x{width} pixels; pass teacher.input_size={size}"
        )
    return height // rows
