"""Representation alignment: a block's tokens resemble the teacher's (REPA, Yu et al. 2024; iREPA's two changes)."""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from torch import Tensor, nn

from semtok.sampler.config import first_changed
from semtok.sampler.routing import taken
from semtok.settings import Config
from semtok.teachers import TeacherFeatures, alignment_loss, on_grid, silu_mlp

_EPS = 1e-6


class REPAConfig(Config):
    """Representation alignment (REPA, Yu et al. 2024): a block's tokens resemble the teacher's."""

    weight: float = Field(0.5, ge=0)
    """Weight of the alignment loss."""
    depth: int | None = Field(None, ge=1)
    """After which block; None: a third of them, at most 8, which is REPA's 4 for B and 8 for L and XL. Of blocks that
    token routing thins out, the kept tokens are aligned."""
    projector: Literal["mlp", "conv"] = "mlp"
    """Three layers on each token, or iREPA's one convolution over the map of tokens."""
    projector_width: int | None = Field(None, ge=1)
    """Of ``mlp``; None: REPA's 2048; in networks narrower than SiT-S twice their width, as the projector would cost
    more than the network."""
    kernel_size: int = Field(3, ge=1)
    """Of ``conv``, odd."""
    spatial_norm: float | None = Field(None, ge=0)
    """Targets are normalised over the positions of each image, per channel: (f - a mean) / std with a this number
    (iREPA; 0.6 as published). None: targets as they are."""
    loss: Literal["cosine", "cosine_mse"] = "cosine"
    """``cosine_mse`` is the mean of 1 - cosine and of the squared error (SFD, table 19)."""
    targets: Literal["teacher", "decoded"] = "teacher"
    """What the tokens are compared with: the teacher's features of the image; or those that the frozen
    coder decodes from the semantic latents, for which neither the image nor the teacher is needed (ours)."""
    with_global: bool = False
    """The token of the global part is aligned to the teacher's pooled token, as one more position."""

    @model_validator(mode="after")
    def _consistent(self) -> "REPAConfig":
        if not self.kernel_size % 2:
            raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")
        if self.projector == "mlp" and self.kernel_size != 3:
            raise ValueError("kernel_size takes effect with projector: conv only")
        if self.projector == "conv" and self.projector_width is not None:
            raise ValueError("projector_width takes effect with projector: mlp only")
        return self

    def check_use(self) -> None:
        """Raises ValueError where settings say how tokens are aligned, and the weight leaves nothing to align."""
        if self.weight:
            return
        name = first_changed(self, *(one for one in type(self).model_fields if one != "weight"))
        if name is not None:
            raise ValueError(
                f"diffusion.repa.{name} takes effect with some diffusion.repa.weight, and it is 0; pass more, or "
                "diffusion.repa=false"
            )

    def depth_in(self, num_blocks: int) -> int:
        """After which of a network's blocks."""
        return self.depth if self.depth is not None else min(8, max(1, num_blocks // 3))

    def projector_width_for(self, width: int) -> int:
        """Hidden width of the projector of a network of this width."""
        if self.projector_width is not None:
            return self.projector_width
        return 2048 if width >= 384 else 2 * width


def projector_for(config: REPAConfig, width: int, target_width: int) -> nn.Module:
    """From tokens of a network's width to the teacher's: of (B, N, D), or of maps (B, D, h, w) where it convolves."""
    if config.projector == "conv":
        size = config.kernel_size
        return nn.Conv2d(width, target_width, size, padding=size // 2)
    return silu_mlp(width, config.projector_width_for(width), target_width)


def spatially_normalised(features: Tensor, alpha: float) -> Tensor:
    """(f - alpha mean) / std over the positions of each image, per channel: (B, D, h, w), float32 (iREPA)."""
    features = features.float()
    mean = features.mean(dim=(2, 3), keepdim=True)
    std = features.flatten(2).std(dim=2)[:, :, None, None]
    return (features - alpha * mean) / (std + _EPS)


def repa_loss(
    config: REPAConfig,
    projector: nn.Module,
    hidden: Tensor,
    features: TeacherFeatures,
    *,
    grid: tuple[int, int],
    vectors: list[str],
    kept: Tensor | None,
) -> Tensor:
    """REPA's loss (B,): the mean over all aligned tokens.

    Args:
        hidden: tokens (B, vectors + patches, D), or the kept ones of them.
        grid: (rows, columns) of the patch tokens.
        vectors: the parts whose tokens stand before the patches.
        kept: places (B, K) of the tokens; None: all.
    """
    target = features.patches[-1]
    if config.spatial_norm is not None:
        target = spatially_normalised(target, config.spatial_norm)
    if kept is not None:
        return _of_kept(config, projector(hidden), target, features.pooled, grid, vectors, kept)
    convolves = config.projector == "conv"
    if convolves:
        patches = projector(rearrange(hidden[:, len(vectors) :], "b (h w) d -> b d h w", h=grid[0]))
    else:
        tokens = projector(hidden)
        patches = rearrange(tokens[:, len(vectors) :], "b (h w) d -> b d h w", h=grid[0])
    value = alignment_loss(patches, target, config.loss)
    if not config.with_global:
        return value
    place = vectors.index("global")
    # One token is a map of one cell.
    own = (
        projector(hidden[:, place, :, None, None]) if convolves else tokens[:, place, :, None, None]
    )
    own = alignment_loss(own, features.pooled[:, :, None, None], config.loss)
    num_patches = patches.shape[-2] * patches.shape[-1]
    return (num_patches * value + own) / (num_patches + 1)


def _of_kept(
    config: REPAConfig,
    tokens: Tensor,
    target: Tensor,
    pooled: Tensor,
    grid: tuple[int, int],
    vectors: list[str],
    kept: Tensor,
) -> Tensor:
    """The same for kept tokens (B, K, D), each against what it is compared with among all."""
    tokens, target = tokens.float(), on_grid(target, grid)
    is_aligned = [config.with_global and name == "global" for name in vectors]
    nothing = torch.zeros_like(target[:, :, 0, 0])
    others = [pooled.float() if aligned else nothing for aligned in is_aligned]
    targets = torch.stack([*others, *target.flatten(2).unbind(2)], dim=1)
    weights = torch.ones(targets.shape[1], device=tokens.device)
    for place, aligned in enumerate(is_aligned):
        weights[place] = float(aligned)  # which makes no host wait, as a copied tensor would
    targets, weights = taken(targets, kept), weights[kept]
    loss = 1 - F.cosine_similarity(tokens, targets, dim=2)
    if config.loss == "cosine_mse":
        loss = (loss + (tokens - targets).square().mean(dim=2)) / 2
    return (weights * loss).sum(dim=1) / weights.sum(dim=1).clamp_min(1)
