"""The diffusion transformer: SiT and LightningDiT as presets of one network, built from a LatentSpec.

SiT: Ma et al. 2024 (arXiv 2401.08740), on DiT (Peebles and Xie 2022). LightningDiT: Yao et al. 2025
(arXiv 2501.01423): patch 1, rotary positions, SwiGLU, RMSNorm. Spatial parts are stacked as channels
on the texture's grid; vector parts are further tokens (REG, Wu et al. 2025). With a head it is DDT or DiT^DH.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import islice
from keyword import iskeyword
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.blocks import Block, FinalLayer, Rotary, init_xavier
from semtok.sampler.embeddings import (
    FourierTimeEmbedding,
    TimeEmbedding,
    positions_on,
    sincos_positions,
)
from semtok.sampler.head import Head, activated, rotary_of, run_block
from semtok.sampler.latents import Latents, LatentSpec, as_pytree
from semtok.sampler.routing import DENSE, Fusion, Route, taken, taken_rotary, taken_values
from semtok.sampler.tokens import (
    initialise_patches,
    patch_layer,
    patch_tokens,
    vector_layers,
    with_vectors,
)

_LEAST_NOISE = 0.05
"""What is divided by near data at least, where a network predicts data (RAEv2, arXiv 2605.18324)."""


@dataclass(frozen=True)
class DiTOutput:
    """What one forward pass gives.

    Attributes:
        velocity: per part, shaped as the input.
        hidden: tokens (B, vectors + patches, D) after the block that was asked for, or None. After a block
            that routing leaves only some tokens they are those, (B, K, D), in the order of ``Route.kept``.
        inner: the velocity that the second head predicts, where the network has one and it was asked for.
        state: what the blocks before a head have made of the latents, (B, vectors + patches, D), where there is one.
    """

    velocity: Latents
    hidden: Tensor | None
    inner: Latents | None = None
    state: Tensor | None = None


as_pytree(
    DiTOutput,
    lambda output: ([output.velocity, output.hidden, output.inner, output.state], None),
    lambda members, _: DiTOutput(*members),
)


class DiT(nn.Module):
    """Predicts the velocity of noised latents from their time and class.

    Args:
        config: its shape.
        spec: the latents' parts. Spatial parts are given on the texture's grid.
        num_classes: classes 0 ... n - 1; label n stands for none of them (guidance's null label).
            0: unconditional, every label is the null one.
        timed_parts: parts with an embedded time of their own, in the order in which their
            embeddings are joined; empty: all share the texture's time. SFD has (semantic, texture).
    """

    def __init__(
        self,
        config: DiTArchitecture,
        spec: LatentSpec,
        *,
        num_classes: int,
        timed_parts: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.config, self.spec, self.num_classes = config, spec, num_classes
        self.spatial = {part.name: part.channels for part in spec.parts if part.is_spatial}
        self.vectors = {part.name: part.channels for part in spec.parts if not part.is_spatial}
        self.timed_parts = timed_parts
        if timed_parts and config.width % len(timed_parts):
            raise ValueError(
                f"width {config.width} is not divisible among {len(timed_parts)} times"
            )
        width, channels = config.width, sum(self.spatial.values())
        self.patch_embed = patch_layer(config, self.spatial)
        self.vector_embed = vector_layers(config, self.vectors)
        self.positions: nn.Parameter | None = None
        if config.learned_positions is not None:
            rows, columns = config.learned_positions
            self.positions = nn.Parameter(torch.empty(rows * columns, width))
        each = width // max(1, len(timed_parts))
        self.time_embed = nn.ModuleDict(
            {name: _time_embedding(config, each) for name in timed_parts or ("all",)}
        )
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(
            Block(config, is_first=number == 0) for number in range(config.depth)
        )
        last = config if config.head is None else config.head_blocks
        self.final = FinalLayer(last, channels, self.vectors)
        self.fusion = Fusion(width) if config.split is not None else None
        self.inner = FinalLayer(config, channels, self.vectors) if config.inner_head else None
        self.head = Head(config, self.spatial, self.vectors) if config.head is not None else None
        self.checkpointing = False
        """Recompute each block's activations in the backward pass, to save memory."""
        self._initialise()

    @property
    def architecture(self) -> DiTArchitecture:
        """The network's shape; what is called config in a diffusers model is another."""
        return self.config

    @property
    def every_block(self) -> list[nn.Module]:
        """Those of the network and of its head."""
        return [*self.blocks, *(self.head.blocks if self.head is not None else ())]

    def _initialise(self) -> None:
        """Xavier everywhere, zero for modulations and outputs, so that each block starts as identity."""
        for module in (self.blocks, self.vector_embed, self.fusion):
            if module is not None:
                module.apply(init_xavier)
        initialise_patches(self.patch_embed)
        if self.head is not None:
            self.head.initialise()
        if self.positions is not None:
            grid = self.config.learned_positions
            self.positions.data.copy_(sincos_positions(grid, self.config.width))
        nn.init.normal_(self.label_embed.weight, std=0.02)
        modulations = [block.modulation for block in self.every_block]
        heads = [self.final] if self.inner is None else [self.final, self.inner]
        outputs = [(head.modulation, head.linear, *head.vectors.values()) for head in heads]
        for layer in (*modulations, *(layer for layers in outputs for layer in layers)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
        labels: Tensor,
        *,
        hidden_after: int | None = None,
        route: Route = DENSE,
        inner: bool = False,
        state: Tensor | None = None,
    ) -> DiTOutput:
        """One forward pass.

        Weights in half precision run as in training, under autocast: what autocast keeps in float32,
        such as norms and the stream of tokens, is in float32 then too.

        Args:
            x: noised latents of any float type; spatial parts (B, C, H, W) on one grid that the patch divides,
                vector parts (B, D).
            times: per part (B,) in [0, 1].
            labels: int64 (B,) in [0, num_classes].
            hidden_after: also give the tokens after this many blocks (1 is after the first).
            route: what a network with token routing drops; nothing of others.
            inner: also give what the second head predicts, of a network that has one.
            state: of another pass of a network with a head, which alone is then run; gives neither ``hidden`` nor
                ``inner``.
        """
        with self._computing():
            if state is not None:
                return DiTOutput(self._from_head(x, times, state), None, state=state)
            return self._forward(x, times, labels, hidden_after, route, inner)

    def _computing(self) -> AbstractContextManager[Any]:
        weight = self.patch_embed.weight
        half = weight.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(weight.device.type, weight.dtype) if half else nullcontext()

    def hidden(
        self, x: Mapping[str, Tensor], times: Mapping[str, Tensor], labels: Tensor, *, after: int
    ) -> Tensor:
        """The tokens (B, vectors + patches, D) after so many blocks, all of them, and nothing behind those blocks is
        computed; arguments as of ``forward``."""
        with self._computing():
            tokens, grid = self._embed(x)
            condition = self._condition(self._embed_times(times), labels)
            return self._run_blocks(tokens, condition, grid, DENSE, {after}, until=after)[0]

    def _condition(self, embedded: Tensor, labels: Tensor) -> Tensor:
        """What modulates the blocks, of embedded times and of labels."""
        return activated(F.silu(embedded + self.label_embed(labels)), self.config)

    def _forward(
        self,
        x: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
        labels: Tensor,
        hidden_after: int | None,
        route: Route,
        inner: bool,
    ) -> DiTOutput:
        tokens, grid = self._embed(x)
        embedded = self._embed_times(times)
        condition = self._condition(embedded, labels)
        wanted = {number for number in (hidden_after, self.config.inner_head) if number}
        tokens, seen = self._run_blocks(tokens, condition, grid, route, wanted)
        state = None
        if self.head is not None:
            state = F.silu(embedded[:, None] + tokens)
            velocity = self._from_head(x, times, state)
        else:
            velocity = self._velocity(self.final(tokens, condition), grid, x, times)
        second = None
        if inner:
            assert self.inner is not None, "a network without a second head"
            outputs = self.inner(seen[self.config.inner_head], condition)
            second = self._velocity(outputs, grid, x, times)
        hidden = seen[hidden_after] if hidden_after else None
        return DiTOutput(velocity, hidden, second, state)

    def _from_head(
        self, x: Mapping[str, Tensor], times: Mapping[str, Tensor], state: Tensor
    ) -> Latents:
        assert self.head is not None, "a network without a head"
        tokens, condition = self.head(x, state, checkpointing=self.checkpointing)
        side, patch = x["texture"].shape[-2:], self.config.patch_size
        grid = (side[0] // patch, side[1] // patch)
        return self._velocity(self.final(tokens, condition), grid, x, times)

    def _embed(self, x: Mapping[str, Tensor]) -> tuple[Tensor, tuple[int, int]]:
        """Tokens (B, vectors + patches, D), and the grid of the patches."""
        tokens, grid = patch_tokens(x, self.spatial, self.patch_embed)
        if self.positions is not None:
            tokens = tokens + positions_on(self.positions, self.config.learned_positions, grid)
        elif self.config.position_codes:
            tokens = tokens + sincos_positions(grid, self.config.width, device=tokens.device)
        dtype = self.patch_embed.weight.dtype
        return with_vectors(x, self.vectors, self.vector_embed, tokens, dtype), grid

    def _run_blocks(
        self,
        tokens: Tensor,
        condition: Tensor,
        grid: tuple[int, int],
        route: Route,
        wanted: set[int],
        until: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The tokens after the last block, or after so many, and after those that are wanted."""
        config, values, seen = self.config, None, {}
        rotary = rotary_of(config, grid, len(self.vectors), tokens.device)
        first, last = config.split or (config.depth, 0)
        middle = range(first + 1, config.depth - last + 1)
        whole = (tokens, condition, rotary, values)
        for number, block in enumerate(islice(self.blocks, until), start=1):
            if number == middle.start:
                whole = (tokens, condition, rotary, values)
                tokens, condition, rotary, values = _entering(*whole, route)
            if number == middle.stop and self.fusion is not None:
                dense, condition, rotary, values = whole
                tokens = self.fusion(dense, tokens, route)
            if number in middle and route.num_skipped == len(whole[0]):
                continue
            mixed = values if number > 1 else None
            tokens, own = run_block(block, self.checkpointing, tokens, condition, rotary, mixed)
            if number == 1 and config.value_residual:
                values = own
            if number in wanted:
                seen[number] = tokens
        return tokens, seen

    def _velocity(
        self,
        outputs: tuple[Tensor, list[Tensor]],
        grid: tuple[int, int],
        x: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
    ) -> Latents:
        """What a head's outputs stand for, per part."""
        patches, vectors = outputs
        stacked = rearrange(
            patches,
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=grid[0],
            p=self.config.patch_size,
            q=self.config.patch_size,
        )
        spatial = dict(
            zip(self.spatial, stacked.split(list(self.spatial.values()), dim=1), strict=True)
        )
        parts = spatial | dict(zip(self.vectors, vectors, strict=True))
        if self.config.predicts == "data":
            parts = {name: velocity_to(p, x[name], times[name]) for name, p in parts.items()}
        return Latents({part.name: parts[part.name] for part in self.spec.parts})

    def _embed_times(self, times: Mapping[str, Tensor]) -> Tensor:
        if not self.timed_parts:
            return self.time_embed["all"](times["texture"])
        embeds = zip(self.timed_parts, self.time_embed.values(), strict=True)
        return torch.cat([embed(times[name]) for name, embed in embeds], dim=1)

    def for_export(self) -> "DiT":
        """The same network for ``torch.export``, with the same weights under names that no Python keyword is
        part of: torch generates code that spells them, and a part is called ``global``."""
        other = copy(self)
        other._modules = dict(self._modules)
        other.vector_embed, other.time_embed = _spelt(self.vector_embed), _spelt(self.time_embed)
        for name in ("final", "inner"):
            if (layer := getattr(self, name)) is not None:
                setattr(other, name, _with(layer, "vectors"))
        if self.head is not None:
            other.head = _with(self.head, "vector_embed")
        return other


def _time_embedding(config: DiTArchitecture, width: int) -> nn.Module:
    if config.time_embedding == "fourier":
        return FourierTimeEmbedding(width)
    return TimeEmbedding(width, config.time_period)


def _with(module: nn.Module, name: str) -> nn.Module:
    """The same module, its parts' layers spelt as ``for_export`` says."""
    other = copy(module)
    other._modules = dict(module._modules)
    setattr(other, name, _spelt(getattr(module, name)))
    return other


def _spelt(modules: nn.ModuleDict) -> nn.ModuleDict:
    return nn.ModuleDict(
        {f"{name}_" if iskeyword(name) else name: m for name, m in modules.items()}
    )


def velocity_to(data: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The velocity on the linear path from x (B, ...) at times t (B,) to data: (x1 - x) / max(1 - t, 0.05)."""
    left = (1 - t).clamp_min(_LEAST_NOISE).view(-1, *(1,) * (x.ndim - 1))
    return (data.float() - x) / left


def _entering(
    tokens: Tensor,
    condition: Tensor,
    rotary: Rotary | None,
    values: Tensor | None,
    route: Route,
) -> tuple[Tensor, Tensor, Rotary | None, Tensor | None]:
    """What the blocks between are given."""
    if route.num_skipped:
        entering = len(tokens) - route.num_skipped
        tokens, condition = tokens[:entering], condition[:entering]
        values = values[:entering] if values is not None else None
    if route.kept is not None:
        tokens = taken(tokens, route.kept)
        rotary = taken_rotary(rotary, route.kept) if rotary is not None else None
        values = taken_values(values, route.kept) if values is not None else None
    return tokens, condition, rotary, values
