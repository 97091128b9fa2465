"""The blocks of a diffusion transformer, and its last layer."""

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.embeddings import rotate
from semtok.sampler.roles import hidden_matrix

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines that broadcast against (B, heads, N, D / heads)."""
NORM_EPS = 1e-6
_LAYER_NORM_EPS = 1e-5  # of queries and keys, torch's own
_FIRST_SHARE = 0.5  # of the first block's values, where training starts


def init_xavier(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, as ViT-family papers initialise them."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class RMSNorm(nn.RMSNorm):
    """With the gain in its input's type, without which no fused kernel takes it."""

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight.to(x.dtype) if self.weight is not None else None
        return F.rms_norm(x, self.normalized_shape, gain, self.eps)


class Attention(nn.Module):
    """Self-attention with optional normalised queries and keys, then optional rotary positions.

    Args:
        mixes_values: whether it is given the first block's values, of which it takes a learned share.
    """

    def __init__(self, config: DiTArchitecture, *, mixes_values: bool = False) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = hidden_matrix(nn.Linear(config.width, 3 * config.width, config.biases), slices=3)
        self.q_norm, self.k_norm = _qk_norm(config), _qk_norm(config)
        self.proj = hidden_matrix(nn.Linear(config.width, config.width))
        self.first_share = nn.Parameter(torch.tensor(_FIRST_SHARE)) if mixes_values else None

    def forward(
        self, x: Tensor, rotary: Rotary | None, first_values: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, N, D) to (B, N, D), and the values (B, heads, N, D / heads) before they were mixed."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k, values = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = values
        if self.first_share is not None:
            assert first_values is not None, "of the first block"
            mixed = torch.lerp(values, first_values, self.first_share.to(values.dtype))
        x = _attended(q, k, mixed)
        return self.proj(rearrange(x, "b h n d -> b n (h d)")), values


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What queries read of values, each (B, heads, N, D).

    A CPU computes it in float32 under autocast too: torch's backward pass takes nine times as long in bfloat16.
    """
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        read = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    return read.to(v.dtype)


def _qk_norm(config: DiTArchitecture) -> nn.Module:
    kind, eps, width = config.qk_norm_kind, config.qk_norm_eps, config.width // config.heads
    if kind is None:
        return nn.Identity()
    if kind == "rms":
        return RMSNorm(width, eps=eps or NORM_EPS)
    return nn.LayerNorm(width, eps=eps or _LAYER_NORM_EPS)


class SwiGLU(nn.Module):
    """silu(x W1) * (x W2), projected back; both first matrices in one, the gate's half first."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.w12 = hidden_matrix(nn.Linear(width, 2 * hidden, bias), slices=2)
        self.w3 = hidden_matrix(nn.Linear(hidden, width, bias))

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def _gelu_mlp(width: int, hidden: int, bias: bool) -> Mlp:
    mlp = Mlp(width, hidden, act_layer=partial(nn.GELU, approximate="tanh"), bias=bias)
    for layer in (mlp.fc1, mlp.fc2):
        hidden_matrix(layer)
    return mlp


def _norm(config: DiTArchitecture, *, is_final: bool = False) -> nn.Module:
    if config.rms_norm and not (is_final and config.final_norm == "layer"):
        return RMSNorm(config.width, eps=NORM_EPS, elementwise_affine=config.norm_gain)
    return nn.LayerNorm(config.width, eps=NORM_EPS, elementwise_affine=False)


def vector_norm(kind: Literal["layer", "rms"], width: int) -> nn.Module:
    """Of the token that a vector part becomes."""
    return (RMSNorm if kind == "rms" else nn.LayerNorm)(width, eps=NORM_EPS)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (1 + scale) + shift: tokens (B, N, D), both others (B, 1, D) or (B, N, D)."""
    return torch.addcmul(shift, x, 1 + scale)


def _per_token(modulation: Tensor) -> Tensor:
    """What modulates every token of an image, (B, M), or each its own, (B, N, M): (B, 1 or N, M)."""
    return modulation[:, None] if modulation.ndim == 2 else modulation


class Block(nn.Module):
    """Attention and MLP, each modulated and gated by the condition (adaLN-zero, DiT section 3.2).

    Args:
        is_first: of the network; with ``value_residual`` the others are given its values.
    """

    def __init__(self, config: DiTArchitecture, *, is_first: bool = False) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attn = Attention(config, mixes_values=config.value_residual and not is_first)
        self.mlp = (
            SwiGLU(config.width, int(2 / 3 * hidden), config.biases)
            if config.swiglu
            else _gelu_mlp(config.width, hidden, config.biases)
        )
        self.modulation = hidden_matrix(nn.Linear(config.width, 6 * config.width), slices=6)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        rotary: Rotary | None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The tokens after this block, and its attention's values.

        Args:
            x: tokens (B, N, D).
            condition: activated, (B, D), or (B, N, D) where each token has its own.
            rotary: tables, or None.
            first_values: of the first block, where this one mixes them.
        """
        modulation = _per_token(self.modulation(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)
        attended, values = self.attn(modulate(self.norm1(x), shift1, scale1), rotary, first_values)
        x = torch.addcmul(x, gate1, attended)
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2))), values


class FinalLayer(nn.Module):
    """Modulated norm, then one projection for the patches and one for each vector part."""

    def __init__(self, config: DiTArchitecture, channels: int, vectors: Mapping[str, int]) -> None:
        super().__init__()
        self.norm = _norm(config, is_final=True)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.linear = nn.Linear(config.width, config.patch_size**2 * channels)
        self.vectors = nn.ModuleDict(
            {name: nn.Linear(config.width, width) for name, width in vectors.items()}
        )

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens (B, N, D) to patch outputs (B, N - vectors, p * p * C) and vector outputs (B, D') in order; the
        condition is (B, D) or (B, N, D)."""
        shift, scale = _per_token(self.modulation(condition)).chunk(2, dim=2)
        x = modulate(self.norm(x), shift, scale)
        vectors = [head(x[:, i]) for i, head in enumerate(self.vectors.values())]
        return self.linear(x[:, len(vectors) :]), vectors
