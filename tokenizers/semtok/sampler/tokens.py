"""Noised latents as tokens: a convolution for the spatial parts, stacked as channels, and one token a vector part."""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.blocks import vector_norm


def patch_layer(config: DiTArchitecture, spatial: Mapping[str, int]) -> nn.Conv2d:
    """From spatial parts of so many channels, stacked, to patch tokens."""
    patch = config.patch_size
    return nn.Conv2d(sum(spatial.values()), config.width, patch, stride=patch)


def vector_layers(config: DiTArchitecture, vectors: Mapping[str, int]) -> nn.ModuleDict:
    """From each vector part of so many channels to its token."""
    width = config.width
    return nn.ModuleDict(
        {
            name: nn.Sequential(nn.Linear(size, width), vector_norm(config.vector_norm, width))
            for name, size in vectors.items()
        }
    )


def initialise_patches(patch_embed: nn.Conv2d) -> None:
    """As a linear layer is: Xavier-uniform with zero bias."""
    nn.init.xavier_uniform_(patch_embed.weight.flatten(1))
    nn.init.zeros_(patch_embed.bias)


def patch_tokens(
    x: Mapping[str, Tensor], spatial: Mapping[str, int], patch_embed: nn.Conv2d
) -> tuple[Tensor, tuple[int, int]]:
    """Tokens (B, patches, D) of the spatial parts (B, C, H, W), and the grid of the patches."""
    parts = [x[name].to(patch_embed.weight.dtype) for name in spatial]
    tokens = patch_embed(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
    grid = (tokens.shape[-2], tokens.shape[-1])
    return rearrange(tokens, "b d h w -> b (h w) d"), grid


def with_vectors(
    x: Mapping[str, Tensor],
    vectors: Mapping[str, int],
    vector_embed: nn.ModuleDict,
    patches: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The vector parts' tokens, then those of the patches: (B, vectors + patches, D)."""
    if not vectors:
        return patches
    embeds = zip(vectors, vector_embed.values(), strict=True)
    extra = [embed(x[name].to(dtype))[:, None] for name, embed in embeds]
    return torch.cat([*extra, patches], dim=1)
