"""A vision transformer that decodes tokens to pixels, as RAE's (Zheng et al. 2025) after MAE's (He et al. 2022)."""

from functools import partial

import torch
from einops import rearrange
from pydantic import Field, model_validator
from timm.models import vision_transformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semtok.sampler.config import Config
from semtok.sampler.embeddings import positions_on, sincos_positions
from semtok.sampler.roles import tagged_timm_block

_DECODER_EPS = 1e-12  # of its norms, as published


class DecoderShape(Config):
    """Sizes of a ViT decoder. RAE's: width 1152, depth 28, heads 16, mlp_width 4096, patch_size 16."""

    width: int = Field(ge=4, multiple_of=4)
    """Of its tokens."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Of its attention."""
    mlp_width: int = Field(ge=1)
    """Of each block's hidden layer."""
    patch_size: int = Field(ge=1)
    """Side, in pixels, of what one token is decoded to; the stride of the latents."""

    @model_validator(mode="after")
    def _whole_heads(self) -> "DecoderShape":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of heads {self.heads}")
        return self


def _decoder_block(shape: DecoderShape) -> nn.Module:
    norm = partial(nn.LayerNorm, eps=_DECODER_EPS)
    # timm cuts the product of width and ratio off; half a channel keeps rounding harmless.
    ratio = (shape.mlp_width + 0.5) / shape.width
    return tagged_timm_block(
        vision_transformer.Block(
            shape.width, shape.heads, mlp_ratio=ratio, qkv_bias=True, norm_layer=norm
        )
    )


class ViTDecoder(nn.Module):
    """Tokens to pixels. The position table starts as sines and cosines, and is trained.

    Args:
        channels: of the tokens.
        grid: (rows, columns) of the tokens that the table is for; on others it is resampled bilinearly.
    """

    def __init__(self, shape: DecoderShape, *, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.channels, self.grid = shape, channels, grid
        width = shape.width
        self.embed = nn.Linear(channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        patches = sincos_positions(grid, width)[None]
        self.positions = nn.Parameter(torch.cat([torch.zeros_like(patches[:, :1]), patches], dim=1))
        self.blocks = nn.ModuleList(_decoder_block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(width, eps=_DECODER_EPS)
        self.head = nn.Linear(width, shape.patch_size**2 * 3)
        self.register_buffer("image_mean", torch.zeros(3, 1, 1))
        self.register_buffer("image_std", torch.ones(3, 1, 1))
        self.gradient_checkpointing = False
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def take_image_scale(self, mean: Tensor, std: Tensor) -> None:
        """From now on what the head gives is images of this mean and deviation (3,) in [0, 1], the encoder's."""
        self.image_mean.copy_(mean.view(3, 1, 1))
        self.image_std.copy_(std.view(3, 1, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, C, h, w) to pixels (B, 3, h * patch, w * patch) in [-1, 1], not clamped."""
        grid, patch = tuple(tokens.shape[-2:]), self.shape.patch_size
        x = self.embed(rearrange(tokens, "b c h w -> b (h w) c"))
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.positions_on(grid)
        recomputes = self.gradient_checkpointing and self.training
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recomputes else block(x)
        x = self.head(self.norm(x))[:, 1:]
        images = rearrange(
            x, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch, q=patch, c=3
        )
        return (images * self.image_std + self.image_mean) * 2 - 1

    def positions_on(self, grid: tuple[int, int]) -> Tensor:
        """The table (1, 1 + h * w, width) for tokens of (h, w); the class token has its first row."""
        if grid == self.grid:
            return self.positions
        own, patches = self.positions[0, :1], self.positions[0, 1:]
        return torch.cat([own, positions_on(patches, self.grid, grid)])[None]
