"""Teachers: frozen vision foundation models from timm, and how features are aligned with theirs."""

import contextlib
import difflib
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import try_to_load_from_cache
from pydantic import Field, field_validator, model_validator
from timm.layers import HybridEmbed
from timm.models import Eva, VisionTransformer
from timm.models.beit import Beit
from timm.models.vision_transformer_hybrid import ConvStem
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.progress import announce, waiting
from semtok.references import check_hub
from semtok.sampler.roles import hidden_matrix
from semtok.settings import Config
from semtok.storage import DAMAGE, as_damage, first_line, tensor_bytes

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
DEMO = "demo"
DEMO_FILE = "demo_teacher.safetensors"
DEMO_WIDTH = 128
_DEMO_SIZE = 32
_HEAD_WIDTH = 64  # of nearly every vision transformer

_TRANSFORMERS = VisionTransformer | Eva | Beit | VisionTransformerRelPos
# Their relative positions are a table for one grid, so these take images of input_size alone.
_FIXED_GRID = ("beit_", "beitv2_", "vit_relpos_")

# DINOv2's own short names; timm resamples the position table once, when the network is built.
_SHORT_NAMES = {
    f"dinov2_vit{letter}14{suffix}": f"vit_{size}_patch14_{timm_suffix}dinov2.lvd142m"
    for letter, size in (("s", "small"), ("b", "base"), ("l", "large"), ("g", "giant"))
    for suffix, timm_suffix in (("", ""), ("_reg", "reg4_"))
}


class TransformerShape(Config):
    """Sizes of a vision transformer that timm has under no name."""

    width: int = Field(ge=1)
    """Of its tokens."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Of its attention."""
    patch_size: int | None = Field(None, ge=1)
    """Pixels of a patch; None: as the network that ``name`` is."""

    def arguments(self) -> dict[str, int]:
        """What timm calls them."""
        sizes = {"embed_dim": self.width, "depth": self.depth, "num_heads": self.heads}
        return sizes | ({"patch_size": self.patch_size} if self.patch_size is not None else {})


class TeacherConfig(Config):
    """Which teacher, and what it is given."""

    name: str = DEMO
    """``demo``, any timm model name, or a DINOv2 short name such as ``dinov2_vitb14_reg``."""
    checkpoint: str | None = None
    """A local weights file in timm's naming; None takes timm's pretrained weights."""
    input_size: int | None = Field(None, gt=0)
    """Shorter side, in pixels, of what the teacher sees; None is the size it was trained at."""
    layers: tuple[int, ...] = (-1,)
    """Blocks (ViT) or stages (CNN) whose patch tokens are used; negative counts from the last."""
    normalise: bool = True
    """By the mean and the standard deviation that the network was trained with; false gives it pixels in [-1, 1], as
    VA-VAE does."""
    resize: Literal["bicubic", "bilinear"] = "bicubic"
    """How images get to ``input_size``, without antialiasing: bicubic in REPA's code, bilinear in VA-VAE's."""
    final_norm: Literal["affine", "plain", "none"] = "affine"
    """Of a transformer's tokens: its last norm as trained, without its learned scale and shift (RAE), or none."""
    shape: TransformerShape | None = None
    """Of a network that differs from ``name`` in its sizes alone, with ``checkpoint``; None: it is that network."""

    @model_validator(mode="after")
    def _weights_of_that_shape(self) -> "TeacherConfig":
        if self.shape is not None and (self.checkpoint is None or not self.name.startswith("vit_")):
            raise ValueError(
                "shape: of a vision transformer (vit_…) with weights of its own; give checkpoint, or leave shape out"
            )
        return self

    def asked(self) -> dict[str, Any]:
        """What decides, beside the weights, the features of the last of its layers: settings other than the default."""
        names = {"input_size", "normalise", "resize", "final_norm"}
        settings = self.model_dump(mode="json", include=names, exclude_defaults=True)
        if self.layers[-1] != -1:
            settings["layer"] = self.layers[-1]
        return settings

    @field_validator("layers")
    @classmethod
    def _some_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if not layers or len(set(layers)) != len(layers):
            raise ValueError(f"expected distinct layer numbers, at least one, got {layers}")
        return layers


@dataclass(frozen=True)
class TeacherFeatures:
    """What one forward pass of a teacher saw.

    Attributes:
        patches: per layer, in the order asked for, patch tokens (B, D, rows, columns); the final
            norm is applied to each, as DINOv2's ``get_intermediate_layers`` does. (A network whose
            norm comes after its pooling, timm's ``fc_norm``, has none for tokens.)
        pooled: (B, D), the CLS token of the last of these layers, or the mean of its patch tokens
            where the network has none.
    """

    patches: tuple[Tensor, ...]
    pooled: Tensor

    @property
    def joined(self) -> Tensor:
        """All layers' patch tokens on one channel axis, in their order: (B, sum of D, rows, columns)."""
        return self.patches[0] if len(self.patches) == 1 else torch.cat(self.patches, dim=1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "TeacherFeatures":
        """Applies a function to every tensor."""
        return TeacherFeatures(tuple(map(function, self.patches)), function(self.pooled))


@dataclass(frozen=True)
class StoredFeatures:
    """A teacher's features in few bytes, as they are kept on disk and go to the device.

    Attributes:
        patches, pooled: as ``TeacherFeatures`` has them, of any type.
        scales: per layer (B, 1, rows, columns), what patch tokens are to be multiplied by; empty: by nothing.
    """

    patches: tuple[Tensor, ...]
    pooled: Tensor
    scales: tuple[Tensor, ...] = ()

    def map(self, function: Callable[[Tensor], Tensor]) -> "StoredFeatures":
        """Applies a function to every tensor."""
        patches, scales = (tuple(map(function, each)) for each in (self.patches, self.scales))
        return StoredFeatures(patches, function(self.pooled), scales)

    def restored(self) -> TeacherFeatures:
        """The features, in float32."""
        patches = tuple(tokens.float() for tokens in self.patches)
        if self.scales:
            patches = tuple(p * scale for p, scale in zip(patches, self.scales, strict=True))
        return TeacherFeatures(patches, self.pooled.float())


class Teacher(nn.Module):
    """A frozen timm network with its own input size and normalisation.

    It stays in eval mode and without gradients of its own whatever is called on it. Gradients
    flow *through* it to its input where ``features(..., differentiable=True)`` asks for them.

    Args:
        config: which network.
        weights: in timm's naming, in the place of the file that ``config.checkpoint`` names; None: that file is read.

    Raises:
        UserError: an unknown name, a missing or unfitting checkpoint, a layer out of range, a ``final_norm`` of a
            network without one, or an ``input_size`` that a network of one size can't take.
    """

    widths: tuple[int, ...]
    """Channels D of the patch tokens, per layer."""
    is_transformer: bool
    """Whether it is a vision transformer; else its layers are the stages of a CNN, each with a grid of its own."""

    def __init__(self, config: TeacherConfig, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        self.timm_name = name_in_timm(config.name)
        self.network = _create(config, self.timm_name, weights)
        self.network.requires_grad_(False)
        data = timm.data.resolve_model_data_config(self.network)
        self.register_buffer("mean", torch.tensor(data["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(data["std"])[:, None, None], persistent=False)
        self.input_size = config.input_size or min(data["input_size"][1:])
        # Pixels of the network's input per token and side. A CNN takes any size, and whole multiples
        # of 32 keep its grid whole.
        embed = getattr(self.network, "patch_embed", None)
        self.patch_size = int(embed.feat_ratio()) if hasattr(embed, "feat_ratio") else 32
        self.is_transformer = isinstance(self.network, _TRANSFORMERS)
        self._take_final_norm()
        self.eval()
        self._check_layers()

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    @property
    def pooled_width(self) -> int:
        """Channels D of the pooled token."""
        return self.widths[-1]

    def grid(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(rows, columns) of the patch tokens of images of (height, width).

        The shorter side of what the network sees is ``input_size``, the longer keeps the aspect
        ratio, both rounded to whole patches.
        """
        short = min(image_size)
        rows, columns = (
            max(1, round(side * self.input_size / short / self.patch_size)) for side in image_size
        )
        return rows, columns

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises UserError where the network takes images of one size alone, whose patch tokens are another grid than
        (rows, columns)."""
        embed = getattr(self.network, "patch_embed", None)
        if not getattr(embed, "strict_img_size", False):
            return
        height, width = (n * self.patch_size for n in grid)
        if tuple(embed.img_size) == (height, width):
            return
        size = height if _takes_input_size(self.timm_name) else embed.img_size[0]
        helps = height == width and size != self.config.input_size
        raise UserError(
            f"teacher.input_size: '{self.timm_name}' takes images of {embed.img_size[0]}x{embed.img_size[1]} pixels "
            f"alone, and {grid[0]}x{grid[1]} tokens are of {height}x{width}; "
            + (f"pass teacher.input_size={size}, or " if helps else "")
            + "choose a network for any size, as dinov2_vits14"
        )

    def _take_final_norm(self) -> None:
        """Drops what ``final_norm`` leaves out."""
        kind, norm = self.config.final_norm, getattr(self.network, "norm", None)
        if kind == "affine":
            return
        if not self.is_transformer or not isinstance(norm, nn.LayerNorm):
            way_out = "pass teacher.final_norm=affine"
            if not self.is_transformer:  # which RAE refuses with any norm
                way_out = f"it is no vision transformer; choose one, or, where the method takes others, {way_out}"
            raise UserError(
                f"teacher.final_norm: '{self.timm_name}' has no layer norm after its blocks; {way_out}"
            )
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)

    def fingerprint(self) -> str:
        """A digest of the weights, and of the settings that change features at the same weights (how images are
        prepared, the last norm, heads) where they are not the default: tokenizers that encode by a teacher know
        theirs by it, and caches too."""
        digest = hashlib.blake2b(digest_size=16)
        prepared = self.config.model_dump(include={"normalise", "resize"}, exclude_defaults=True)
        if self.config.final_norm == "none":  # the weights tell plain from affine
            prepared["final_norm"] = "none"
        shape = self.config.shape
        if shape is not None and shape.heads * _HEAD_WIDTH != shape.width:
            prepared["heads"] = shape.heads
        digest.update(str(prepared or "").encode())
        for name, _, content in tensor_bytes(self.network):
            digest.update(name.encode())
            digest.update(content)
        return digest.hexdigest()

    def preprocess(self, pixels: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to the network's input: normalised, then resized, as the settings say.

        By default in the order and with the filter of the REPA family's code.

        Args:
            grid: of the patch tokens; None: what ``grid`` says.
        """
        if self.config.normalise:
            pixels = self.normalise(pixels)
        size = tuple(n * self.patch_size for n in grid or self.grid(tuple(pixels.shape[-2:])))
        if size == tuple(pixels.shape[-2:]):
            return pixels
        return F.interpolate(pixels, size=size, mode=self.config.resize, align_corners=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] by the mean and the deviation per channel that the network was trained with."""
        return ((pixels + 1) / 2 - self.mean) / self.std

    def features(
        self,
        pixels: Tensor,
        *,
        grid: tuple[int, int] | None = None,
        differentiable: bool = False,
    ) -> TeacherFeatures:
        """One forward pass for every consumer.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], any size.
            grid: (rows, columns) of the patch tokens; None: what ``grid`` says.
            differentiable: let gradients flow to ``pixels``; the teacher itself never has any.

        Raises:
            UserError: see ``check_grid``.
        """
        grid = grid or self.grid(tuple(pixels.shape[-2:]))
        self.check_grid(grid)
        with contextlib.nullcontext() if differentiable else torch.no_grad():
            return self.features_of_input(self.preprocess(pixels, grid))

    def features_of_input(self, network_input: Tensor) -> TeacherFeatures:
        """The same of what the network itself takes (B, 3, H, W), normalised and of its size."""
        options: dict[str, bool] = {}
        if self.is_transformer:
            # Prefix tokens asked for where there are none, timm's relative-position networks fail.
            has_prefix = self.network.num_prefix_tokens > 0
            has_norm = self.config.final_norm != "none"
            options = {"norm": has_norm, "return_prefix_tokens": has_prefix, "stop_early": True}
        layers = sorted(self._positive_layers)
        outputs = self.network.forward_intermediates(
            network_input, indices=layers, intermediates_only=True, **options
        )
        pairs = [output if isinstance(output, tuple) else (output, None) for output in outputs]
        by_layer = dict(zip(layers, pairs, strict=True))
        patches, prefixes = zip(*(by_layer[n] for n in self._positive_layers), strict=True)
        has_class = (
            prefixes[-1] is not None and getattr(self.network, "cls_token", None) is not None
        )
        pooled = prefixes[-1][:, 0] if has_class else patches[-1].mean(dim=(2, 3))
        return TeacherFeatures(patches, pooled)

    def _check_layers(self) -> None:
        if not hasattr(self.network, "forward_intermediates"):
            raise UserError(
                f"teacher.name: timm's '{self.timm_name}' gives no intermediate features; choose another"
            )
        depth = len(self.network.blocks) if self.is_transformer else len(self.network.feature_info)
        wrong = [layer for layer in self.config.layers if not -depth <= layer < depth]
        if wrong:
            stages = (
                ""
                if self.is_transformer
                else "; a CNN's stages have grids of their own, so [-1] is likely meant"
            )
            raise UserError(
                f"teacher.layers: {wrong} out of range; '{self.timm_name}' has {depth} layers{stages}"
            )
        self._positive_layers = [layer % depth for layer in self.config.layers]
        if len(set(self._positive_layers)) != len(self._positive_layers):
            raise UserError(
                f"teacher.layers: {list(self.config.layers)} names the same layer twice; "
                f"'{self.timm_name}' has {depth} layers"
            )
        side = max(1, self.input_size // self.patch_size) * self.patch_size
        probe = self.features(torch.zeros(1, 3, side, side))
        self.widths = tuple(patch.shape[1] for patch in probe.patches)


# Alignment ---------------------------------------------------------------------------------------


def silu_mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """The three-layer SiLU projector of REPA (Yu et al. 2024, appendix): width, hidden, hidden, out."""
    return nn.Sequential(
        hidden_matrix(nn.Linear(width, hidden)),
        nn.SiLU(),
        hidden_matrix(nn.Linear(hidden, hidden)),
        nn.SiLU(),
        hidden_matrix(nn.Linear(hidden, out)),
    )


def on_grid(target: Tensor, grid: tuple[int, int]) -> Tensor:
    """A teacher's tokens (B, D, h', w') on a grid, resampled bilinearly where theirs differs: float32 (B, D, h, w)."""
    target = target.float()
    if tuple(target.shape[-2:]) == grid:
        return target
    return F.interpolate(target, size=grid, mode="bilinear", antialias=True)


def alignment_loss(
    predicted: Tensor, target: Tensor, kind: Literal["cosine", "cosine_mse"] = "cosine"
) -> Tensor:
    """1 - cosine, averaged over positions: (B,), in float32.

    (REPA's published code logs the negative cosine, which is less by 1 and has the same gradient.)

    Args:
        predicted: (B, D, h, w).
        target: the teacher's tokens (B, D, h', w'), resampled bilinearly where the grids differ.
        kind: ``cosine_mse`` gives the mean of that and of the mean squared error.
    """
    predicted = predicted.float()
    target = on_grid(target, tuple(predicted.shape[-2:]))
    cosine = (1 - F.cosine_similarity(predicted, target, dim=1)).mean(dim=(1, 2))
    if kind == "cosine":
        return cosine
    return (cosine + (predicted - target).square().mean(dim=(1, 2, 3))) / 2


# Which network -----------------------------------------------------------------------------------


def demo_network() -> nn.Module:
    """The embedded teacher's network: timm's VisionTransformer on a stem of three convolutions.

    32x32 images become 8x8 patch tokens and a class token of width 128. The stem learns shapes in
    far fewer images than a plain patch embedding does (Xiao et al. 2021, "Early convolutions").
    """
    stem = ConvStem(channels=(32, 64, DEMO_WIDTH), stride=(2, 2, 1))
    network = VisionTransformer(
        img_size=_DEMO_SIZE,
        patch_size=1,
        embed_dim=DEMO_WIDTH,
        depth=4,
        num_heads=4,
        num_classes=0,
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False, strict_img_size=False),
        dynamic_img_size=True,
    )
    network.pretrained_cfg = dict(
        input_size=(3, _DEMO_SIZE, _DEMO_SIZE), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    return network


def teacher_names() -> list[str]:
    """All that a teacher may be called."""
    return [DEMO, *_SHORT_NAMES, *timm.list_models()]


def name_in_timm(name: str) -> str:
    """What timm calls the network of a teacher's name; ``demo`` stays.

    Raises:
        UserError: timm knows no such model.
    """
    name = _SHORT_NAMES.get(name, name)
    if name != DEMO and not timm.is_model(name):
        near = difflib.get_close_matches(name, teacher_names(), n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise UserError(f"teacher.name: timm knows no model '{name}'{hint}")
    return name


def _takes_input_size(name: str) -> bool:
    """Whether the network of this name in timm is built for the input size that is asked for."""
    return name.startswith(("vit_", "deit", "beit", "eva"))


def _create(config: TeacherConfig, name: str, weights: Mapping[str, Tensor] | None) -> nn.Module:
    options: dict[str, object] = {}
    missing = config.checkpoint is not None and not Path(config.checkpoint).is_file()
    if missing and weights is None:
        raise UserError(
            f"teacher.checkpoint: no such file '{config.checkpoint}'; pass teacher.checkpoint=…"
        )
    if _takes_input_size(name):
        if not name.startswith(_FIXED_GRID):
            options["dynamic_img_size"] = True
        if config.input_size is not None:
            options["img_size"] = config.input_size
    if config.shape is not None:
        options |= config.shape.arguments()
    demo = demo_network() if name == DEMO else None
    try:
        if weights is not None:
            options["pretrained_cfg_overlay"] = dict(state_dict=dict(weights))
        elif demo is not None:
            own = config.checkpoint or str(files("semtok") / "assets" / DEMO_FILE)
            with as_damage():
                timm.models.load_checkpoint(demo, own)
            return demo
        elif (file := config.checkpoint or _weights_of(name)) is not None:
            state = _local_weights(name, file, options)
            options["pretrained_cfg_overlay"] = dict(state_dict=state)
        with waiting(f"loading teacher '{name}'"), as_damage():
            # With its own classifier a network loads strictly: nothing stays random in silence.
            network = timm.create_model(name, pretrained=True, **options)
        network.reset_classifier(0)
        return network
    except DAMAGE as error:
        place = f"teacher '{name}'"
        way_out = "; without network, give a local file by teacher.checkpoint=…"
        if config.checkpoint:
            place, way_out = f"teacher.checkpoint '{config.checkpoint}'", ""
        if config.input_size is not None:
            place += f" at teacher.input_size {config.input_size}"
        raise UserError(f"{place}: can't be loaded ({first_line(error)}){way_out}") from None


def _weights_of(name: str) -> str | None:
    """The file of timm's weights in the local cache of the Hub; None: timm is to fetch them.

    Raises:
        UserError: they are not there, and the Hub can't be reached.
    """
    pretrained = timm.models.get_pretrained_cfg(name)
    repository = pretrained.hf_hub_id
    if repository is None or pretrained.hf_hub_filename is not None:  # timm knows under which names
        return None
    for file in _HUB_FILES:
        cached = try_to_load_from_cache(repository, file)
        if isinstance(cached, str):
            return cached
    check_hub(repository, _HUB_FILES[0])
    announce(f"fetching the weights of teacher '{name}', once")
    return None


def _local_weights(name: str, checkpoint: str, options: dict[str, object]) -> dict[str, Tensor]:
    """A file's weights; a classifier that it lacks, and that is dropped anyway, is filled in."""
    with as_damage():
        state = timm.models.load_state_dict(checkpoint)
    classifiers = timm.models.get_pretrained_cfg(name).classifier
    prefixes = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers or ())
    if prefixes and not any(key.startswith(prefixes) for key in state):
        fresh = timm.create_model(name, **options).state_dict()
        state |= {key: value for key, value in fresh.items() if key.startswith(prefixes)}
    return state
