"""A head of blocks behind an encoder: DDT (arXiv 2504.05741), and DiT^DH's wide one (RAE, arXiv 2510.11690).

    s = silu(t + encoder(x, t, y)),  v = head(x, W s)

The blocks before the head are the encoder. The head reads the noised latents again, in its own width and without codes
of their places, and each of its tokens is modulated by the encoder's token at its place. What a sampler's step has
made of s can serve the next steps too, which then run the head alone.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.blocks import Block, Rotary, init_xavier
from semtok.sampler.embeddings import rotary_table
from semtok.sampler.roles import hidden_matrix
from semtok.sampler.tokens import (
    initialise_patches,
    patch_layer,
    patch_tokens,
    vector_layers,
    with_vectors,
)


class Head(nn.Module):
    """The blocks after an encoder, with a layer of their own for the latents.

    Args:
        config: of the network, with a head.
        spatial, vectors: channels of the latents' parts.
    """

    def __init__(
        self, config: DiTArchitecture, spatial: Mapping[str, int], vectors: Mapping[str, int]
    ) -> None:
        super().__init__()
        own = config.head_blocks
        self.config, self.spatial, self.vectors = own, spatial, vectors
        self.patch_embed = patch_layer(own, spatial)
        self.vector_embed = vector_layers(own, vectors)
        self.project = (
            nn.Identity()
            if own.width == config.width
            else hidden_matrix(nn.Linear(config.width, own.width))
        )
        self.blocks = nn.ModuleList(Block(own, is_first=True) for _ in range(own.depth))

    def initialise(self) -> None:
        """As the network before it."""
        for module in (self.blocks, self.vector_embed, self.project):
            module.apply(init_xavier)
        initialise_patches(self.patch_embed)

    def forward(
        self, x: Mapping[str, Tensor], state: Tensor, *, checkpointing: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The tokens after the last block (B, N, D), and the condition (B, N, D) of each.

        Args:
            x: noised latents.
            state: of the encoder, activated, (B, N, its D).
        """
        patches, grid = patch_tokens(x, self.spatial, self.patch_embed)
        dtype = self.patch_embed.weight.dtype
        tokens = with_vectors(x, self.vectors, self.vector_embed, patches, dtype)
        condition = activated(self.project(state), self.config)
        rotary = rotary_of(self.config, grid, len(self.vectors), tokens.device)
        for block in self.blocks:
            tokens, _ = run_block(block, checkpointing, tokens, condition, rotary, None)
        return tokens, condition


def activated(condition: Tensor, config: DiTArchitecture) -> Tensor:
    """What modulates blocks, of a condition that is activated once."""
    return condition if config.condition_activations == 1 else nn.functional.silu(condition)


def rotary_of(
    config: DiTArchitecture, grid: tuple[int, int], num_prefix: int, device: torch.device
) -> Rotary | None:
    """The rotary tables of a shape, where it has such positions."""
    if not config.rope:
        return None
    return rotary_table(grid, config.width // config.heads, num_prefix, device, config.rope_span)


def run_block(
    block: nn.Module,
    checkpointing: bool,
    tokens: Tensor,
    condition: Tensor,
    rotary: Rotary | None,
    first_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A block's output; where asked, its activations are computed again in the backward pass."""
    inputs = (tokens, condition, rotary, first_values)
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
