"""The diffusion transformer: SiT and LightningDiT as presets of one network, built from a LatentSpec.

SiT: Ma et al. 2024 (arXiv 2401.08740), on DiT (Peebles and Xie 2022). LightningDiT: Yao et al. 2025
(arXiv 2501.01423): patch 1, rotary positions, SwiGLU, RMSNorm. Spatial parts are stacked as channels
on the texture's grid; vector parts are further tokens (REG, Wu et al. 2025).
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial, wraps
from keyword import iskeyword
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field, model_validator
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from semtok.sampler.config import Config
from semtok.sampler.latents import Latents, LatentSpec, as_pytree
from semtok.sampler.roles import hidden_matrix

_EPS = 1e-6
_FREQUENCIES = 256  # sines and cosines of the time embedding


# Architectures -----------------------------------------------------------------------------------


class DiTArchitecture(Config):
    """Shape of a diffusion transformer."""

    depth: int = Field(ge=1)
    """Transformer blocks."""
    width: int = Field(ge=4)
    """Channels of each token."""
    heads: int = Field(ge=1)
    """Attention heads."""
    patch_size: int = Field(1, ge=1)
    """Texture cells per token and side."""
    mlp_ratio: float = Field(4.0, gt=0)
    """Hidden width of each MLP, in widths of the transformer."""
    swiglu: bool = False
    """SwiGLU of two thirds of the MLP's width, instead of tanh-GELU."""
    rope: bool = False
    """Rotary positions in attention, beside the sine-cosine codes that are always added."""
    rms_norm: bool = False
    """RMSNorm with a learned gain, instead of LayerNorm without one."""
    qk_norm: bool = False
    """Normalised queries and keys; the norm is of the kind that ``rms_norm`` says."""

    @model_validator(mode="after")
    def _consistent(self) -> "DiTArchitecture":
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of heads {self.heads}"
            )
        if self.rope and (self.width // self.heads) % 4:
            raise ValueError(
                f"rope needs a head width divisible by 4; width {self.width} / heads {self.heads} is "
                f"{self.width // self.heads}"
            )
        return self


# (depth, width, heads). SiT: table 1 of DiT; LightningDiT: its released configurations, and those
# of SFD (arXiv 2512.04926), which adds S and 1p6B. T is ours, for the embedded recipes.
_SIT_SIZES = {
    "T": (6, 192, 3),
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
_SIZES = {
    "SiT": _SIT_SIZES,
    "LightningDiT": _SIT_SIZES | {"1p0B": (24, 1536, 24), "1p6B": (28, 1792, 28)},
}
_PATCHES = {"SiT": (1, 2, 4, 8), "LightningDiT": (1, 2)}
PRESETS: dict[str, DiTArchitecture] = {
    f"{family}-{size}/{patch}": DiTArchitecture(
        depth=depth,
        width=width,
        heads=heads,
        patch_size=patch,
        **(dict(swiglu=True, rope=True, rms_norm=True) if family == "LightningDiT" else {}),
    )
    for family, sizes in _SIZES.items()
    for size, (depth, width, heads) in sizes.items()
    for patch in _PATCHES[family]
}


def architecture(network: str | DiTArchitecture) -> DiTArchitecture:
    """A preset by name, or the architecture that a recipe spells out.

    Raises:
        ValueError: no such preset; the message lists them.
    """
    if isinstance(network, DiTArchitecture):
        return network
    if network not in PRESETS:
        raise ValueError(f"no preset '{network}'; presets: {', '.join(PRESETS)}")
    return PRESETS[network]


# Embeddings --------------------------------------------------------------------------------------


_Build = TypeVar("_Build", bound=Callable[..., Any])


def _kept(build: _Build) -> _Build:
    """Keeps what is built, per arguments, so that no step builds it anew and copies it to the device.

    Kept are tensors that any later computation can use, whatever mode the first to ask is in.
    """
    keep = lru_cache(maxsize=16)(build)

    @wraps(build)
    def table(*args: Any, **kwargs: Any) -> Any:
        # Compiled code contains the building; tensors of FakeTensorMode and the like are of that mode.
        if torch.compiler.is_compiling() or type(torch.empty(0, device="cpu")) is not Tensor:
            return build(*args, **kwargs)
        with torch.inference_mode(False):
            return keep(*args, **kwargs)

    return table


def _place(device: torch.device | None) -> torch.device | None:
    """Where to build: on the host, for the same bits everywhere; in compiled code, where a copy in each
    step would make the host wait, on the device."""
    return device if torch.compiler.is_compiling() else torch.device("cpu")


@_kept
def sincos_positions(
    grid: tuple[int, int], width: int, *, device: torch.device | None = None
) -> Tensor:
    """Fixed two-dimensional sine-cosine position codes, computed for any grid.

    The first half of the width encodes the column, the second the row; each half is [sin | cos]
    with frequencies 10000^(-k / (width/4)) and integer coordinates from 0, as in MAE (He et al.
    2021) and DiT (Peebles and Xie 2022).

    Args:
        grid: (rows, columns).
        width: a multiple of 4.

    Returns:
        float32 (rows * columns, width), row-major.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    count = partial(torch.arange, dtype=torch.float64, device=_place(device))
    frequency = 10_000 ** (-count(width // 4) / (width / 4))
    row, column = torch.meshgrid(*(count(n) for n in grid), indexing="ij")
    angle = torch.stack([column.flatten(), row.flatten()], dim=1)[:, :, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=2).flatten(1).float().to(device)


class TimeEmbedding(nn.Module):
    """Sinusoids of the raw time in [0, 1], cosines first, through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for layer in (self.mlp[0], self.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, t: Tensor) -> Tensor:
        """Times (B,) to (B, width)."""
        angle = t.float()[:, None] * time_frequencies(t.device)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1).to(self.mlp[0].weight.dtype))


@_kept
def time_frequencies(device: torch.device) -> Tensor:
    """10000^(-k / 128) for k = 0 ... 127, float32."""
    half, place = _FREQUENCIES // 2, _place(device)
    exponent = torch.arange(half, dtype=torch.float32, device=place) / half
    return torch.exp(-torch.full((), 10_000.0, device=place).log() * exponent).to(device)


@_kept
def rotary_table(
    grid: tuple[int, int], head_width: int, num_prefix: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of two-dimensional rotary positions (LightningDiT's, after EVA-02).

    The first half of the head turns by the row, the second by the column; neighbours (2i, 2i + 1)
    form a pair. Prefix tokens do not turn.

    Returns:
        Two float32 tensors (num_prefix + rows * columns, head_width).
    """
    count = partial(torch.arange, dtype=torch.float32, device=_place(device))
    frequency = 10_000 ** (-count(0, head_width // 2, 2) / (head_width // 2))
    row, column = torch.meshgrid(*(count(n) for n in grid), indexing="ij")
    angles = [(p.flatten()[:, None] * frequency).repeat_interleave(2, 1) for p in (row, column)]
    angle = F.pad(torch.cat(angles, dim=1), (0, 0, num_prefix, 0))
    return angle.cos().to(device), angle.sin().to(device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns neighbouring pairs of the last axis: (x0, x1) by 90 degrees is (-x1, x0)."""
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos.to(x.dtype) + turned * sin.to(x.dtype)


# Blocks ------------------------------------------------------------------------------------------


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as ViT-family papers initialise them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class RMSNorm(nn.RMSNorm):
    """With the gain in its input's type, without which no fused kernel takes it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """Self-attention with optional normalised queries and keys, then optional rotary positions."""

    def __init__(self, config: DiTArchitecture) -> None:
        super().__init__()
        self.heads = config.heads
        head_width = config.width // config.heads
        norm = partial(RMSNorm, eps=_EPS) if config.rms_norm else nn.LayerNorm
        self.qkv = hidden_matrix(nn.Linear(config.width, 3 * config.width), slices=3)
        self.q_norm = norm(head_width) if config.qk_norm else nn.Identity()
        self.k_norm = norm(head_width) if config.qk_norm else nn.Identity()
        self.proj = hidden_matrix(nn.Linear(config.width, config.width))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """(B, N, D) to (B, N, D)."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), projected back; both first matrices in one, the gate's half first."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w12 = hidden_matrix(nn.Linear(width, 2 * hidden), slices=2)
        self.w3 = hidden_matrix(nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def _gelu_mlp(width: int, hidden: int) -> Mlp:
    mlp = Mlp(width, hidden, act_layer=partial(nn.GELU, approximate="tanh"))
    for layer in (mlp.fc1, mlp.fc2):
        hidden_matrix(layer)
    return mlp


def _norm(config: DiTArchitecture) -> nn.Module:
    if config.rms_norm:
        return RMSNorm(config.width, eps=_EPS)
    return nn.LayerNorm(config.width, eps=_EPS, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: tokens (B, N, D), both others (B, 1, D)."""
    return torch.addcmul(shift, x, 1 + scale)


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-zero, DiT section 3.2)."""

    def __init__(self, config: DiTArchitecture) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = Attention(config)
        self.mlp = (
            SwiGLU(config.width, int(2 / 3 * hidden))
            if config.swiglu
            else _gelu_mlp(config.width, hidden)
        )
        self.modulation = hidden_matrix(nn.Linear(config.width, 6 * config.width), slices=6)

    def forward(self, x: Tensor, condition: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Tokens (B, N, D), the activated condition (B, D), rotary tables or None."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(
            6, dim=2
        )
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1), rotary))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


class FinalLayer(nn.Module):
    """Modulated norm, then one projection for the patches and one for each vector part."""

    def __init__(self, config: DiTArchitecture, channels: int, vectors: Mapping[str, int]) -> None:
        super().__init__()
        self.norm = _norm(config)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.patch_size**2 * channels)
        self.vectors = nn.ModuleDict(
            {name: nn.Linear(config.width, width) for name, width in vectors.items()}
        )

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, N, D) to patch outputs (B, N - vectors, p * p * C) and vector outputs (B, D') in order."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=2)
        x = modulate(self.norm(x), shift, scale)
        vectors = [head(x[:, i]) for i, head in enumerate(self.vectors.values())]
        return self.linear(x[:, len(vectors) :]), vectors


# The network -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DiTOutput:
    """What one forward pass gives.

    Attributes:
        velocity: per part, shaped as the input.
        hidden: tokens (B, vectors + patches, D) after the block that was asked for, or None.
    """

    velocity: Latents
    hidden: Tensor | None


as_pytree(
    DiTOutput,
    lambda output: ([output.velocity, output.hidden], None),
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
        width, patch, channels = config.width, config.patch_size, sum(self.spatial.values())
        self.patch_embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.vector_embed = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width, eps=_EPS))
                for name, size in self.vectors.items()
            }
        )
        self.time_embed = nn.ModuleDict(
            {name: TimeEmbedding(width // len(timed_parts)) for name in timed_parts}
            if timed_parts
            else {"all": TimeEmbedding(width)}
        )
        self.label_embed = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final = FinalLayer(config, channels, self.vectors)
        self.checkpointing = False
        """Recompute each block's activations in the backward pass, to save memory."""
        self._initialise()

    def _initialise(self) -> None:
        """Xavier everywhere, zero for modulations and outputs, so that each block starts as identity."""
        for module in (self.blocks, self.vector_embed):
            module.apply(init_xavier)
        nn.init.xavier_uniform_(self.patch_embed.weight.flatten(1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.label_embed.weight, std=0.02)
        modulations = [block.modulation for block in self.blocks]
        outputs = [self.final.modulation, self.final.linear, *self.final.vectors.values()]
        for layer in (*modulations, *outputs):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
        labels: Tensor,
        *,
        hidden_after: int | None = None,
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
        """
        weight = self.patch_embed.weight
        if weight.dtype == torch.float32:
            return self._forward(x, times, labels, hidden_after)
        half = weight.dtype in (torch.float16, torch.bfloat16)
        with torch.autocast(weight.device.type, weight.dtype) if half else nullcontext():
            x = {name: part.to(weight.dtype) for name, part in x.items()}
            return self._forward(x, times, labels, hidden_after)

    def _forward(
        self,
        x: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
        labels: Tensor,
        hidden_after: int | None,
    ) -> DiTOutput:
        tokens = self.patch_embed(_stack([x[name] for name in self.spatial]))
        grid = (tokens.shape[-2], tokens.shape[-1])
        tokens = rearrange(tokens, "b d h w -> b (h w) d")
        tokens = tokens + sincos_positions(grid, self.config.width, device=tokens.device)
        if self.vectors:
            embeds = zip(self.vectors, self.vector_embed.values(), strict=True)
            extra = [embed(x[name])[:, None] for name, embed in embeds]
            tokens = torch.cat([*extra, tokens], dim=1)
        condition = F.silu(self._embed_times(times) + self.label_embed(labels))
        head_width = self.config.width // self.config.heads
        rotary = (
            rotary_table(grid, head_width, len(self.vectors), tokens.device)
            if self.config.rope
            else None
        )
        hidden = None
        for number, block in enumerate(self.blocks, start=1):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, rotary, use_reentrant=False)
            else:
                tokens = block(tokens, condition, rotary)
            if number == hidden_after:
                hidden = tokens
        patches, vectors = self.final(tokens, condition)
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
        return DiTOutput(Latents({part.name: parts[part.name] for part in self.spec.parts}), hidden)

    def _embed_times(self, times: Mapping[str, Tensor]) -> Tensor:
        if not self.timed_parts:
            return self.time_embed["all"](times["texture"])
        embeds = zip(self.timed_parts, self.time_embed.values(), strict=True)
        return torch.cat([embed(times[name]) for name, embed in embeds], dim=1)

    def for_export(self) -> "DiT":
        """The same network for ``torch.export``, with the same weights under names that no Python keyword is
        part of: torch generates code that spells them, and a part is called ``global``."""
        other = copy(self)
        other._modules, final = dict(self._modules), copy(self.final)
        final._modules = dict(self.final._modules)
        other.vector_embed, other.time_embed = _spelt(self.vector_embed), _spelt(self.time_embed)
        final.vectors, other.final = _spelt(self.final.vectors), final
        return other


def _spelt(modules: nn.ModuleDict) -> nn.ModuleDict:
    return nn.ModuleDict(
        {f"{name}_" if iskeyword(name) else name: m for name, m in modules.items()}
    )


def _stack(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
