"""Shapes of diffusion transformers: SiT and LightningDiT as presets of one network, and what is built upon them."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from semtok.sampler.config import Config


class HeadArchitecture(Config):
    """Shape of a head of transformer blocks, see ``sampler.head``; the rest is as in the network before it."""

    depth: int = Field(ge=1)
    """Transformer blocks, beside those of the network before it."""
    width: int | None = Field(None, ge=4)
    """Channels of each token; None: the network's. A wider one than the latents' channels is what DiT^DH is for."""
    heads: int | None = Field(None, ge=1)
    """Attention heads; None: the network's."""


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
    """Rotary positions in attention."""
    rope_span: float | None = Field(None, gt=0)
    """Places along each side of the grid run from 0 to this number, however many there are (DDT: 16); None: from cell
    to cell by 1."""
    position_codes: bool = True
    """Sine-cosine codes added to the patch tokens. Without them and without ``rope`` a token knows no place."""
    learned_positions: tuple[int, int] | None = None
    """The codes are learned, one for each token of this grid (rows, columns), from sine-cosine ones on (DiT^DH,
    REPA-E); on another grid they are resampled bilinearly. None: computed."""
    time_embedding: Literal["sinusoidal", "fourier"] = "sinusoidal"
    """``fourier``: of the noise's time 1 - t, by 256 learned frequencies that start normal (DiT^DH)."""
    time_period: float = Field(10_000.0, gt=1)
    """Longest period, over 2 pi, of the sinusoidal time embedding (DDT: 10)."""
    rms_norm: bool = False
    """RMSNorm instead of LayerNorm without a gain."""
    norm_gain: bool = True
    """RMSNorm's learned gain in blocks and in the last layer; SR-DiT has none."""
    qk_norm: bool | Literal["layer", "rms"] = False
    """Normalised queries and keys, with a learned gain: by LayerNorm or RMSNorm; true: by that of ``rms_norm``."""
    qk_norm_eps: float | None = Field(None, gt=0)
    """Added in that norm; None: 1e-6 in RMSNorm, 1e-5 in LayerNorm."""
    vector_norm: Literal["layer", "rms"] = "layer"
    """Of the tokens that vector parts become: LayerNorm, as in REG, or RMSNorm, as in SR-DiT."""
    biases: bool = True
    """Of queries, keys, values and the MLPs; DDT has none there."""
    final_norm: Literal["as_blocks", "layer"] = "as_blocks"
    """Of the last layer: that of the blocks, or LayerNorm without a gain, as DDT has beside RMSNorm."""
    condition_activations: Literal[1, 2] = 1
    """How often SiLU is applied to what modulates a block; twice in DiT^DH."""
    head: HeadArchitecture | None = None
    """Further blocks that read the latents again, each token under a condition of its own, which the blocks before
    have made: DDT (arXiv 2504.05741), and DiT^DH's wide head (RAE, arXiv 2510.11690). None: none."""
    value_residual: bool = False
    """Attention's values are mixed with those of the first block, by a learned share in each block (Zhou et al. 2024,
    arXiv 2410.17897; SR-DiT, arXiv 2512.12386). The blocks of a head do not take part."""
    split: tuple[int, int] | None = None
    """Blocks (first, last) that see all tokens in training too, of a network with token routing; ``diffusion.routing``
    sets it."""
    inner_head: int | None = Field(None, ge=1)
    """After this block a second head predicts too; ``diffusion.internal_guidance`` sets it."""
    predicts: Literal["velocity", "data"] = "velocity"
    """What the heads' outputs stand for; ``diffusion.prediction`` sets it."""

    @field_validator("learned_positions", mode="before")
    @classmethod
    def _pair(cls, grid: Any) -> Any:
        """YAML and JSON have lists alone, and a recipe's network is read as they give it."""
        return tuple(grid) if isinstance(grid, list) else grid

    @property
    def head_blocks(self) -> "DiTArchitecture":
        """The shape of the head's blocks, as of a network of its own."""
        assert self.head is not None, "a network without a head"
        width, heads = self.head.width or self.width, self.head.heads or self.heads
        changes = {"depth": self.head.depth, "width": width, "heads": heads, "head": None}
        changes |= {"value_residual": False, "split": None, "inner_head": None}
        return self.model_copy(update=changes)

    @property
    def last_width(self) -> int:
        """Channels of the tokens that the last layer reads."""
        return self.width if self.head is None else self.head_blocks.width

    @property
    def qk_norm_kind(self) -> Literal["layer", "rms"] | None:
        """Of queries and keys."""
        if self.qk_norm is True:
            return "rms" if self.rms_norm else "layer"
        return self.qk_norm or None

    @model_validator(mode="after")
    def _consistent(self) -> "DiTArchitecture":
        self._check_width()
        if self.head is not None:
            try:
                self.head_blocks._check_width()
            except ValueError as error:
                raise ValueError(f"head: {error}") from None
        self._check_positions()
        if self.time_period != 10_000 and self.time_embedding != "sinusoidal":
            raise ValueError("time_period takes effect with time_embedding: sinusoidal only")
        if self.final_norm == "layer" and not self.rms_norm:
            raise ValueError("final_norm: LayerNorm is that of the blocks too; pass rms_norm=true")
        if not self.norm_gain and not self.rms_norm:
            raise ValueError("norm_gain is RMSNorm's; pass rms_norm=true too")
        if self.qk_norm_eps is not None and not self.qk_norm:
            raise ValueError("qk_norm_eps takes effect with qk_norm only")
        if self.value_residual and self.depth == 1:
            raise ValueError("value_residual needs a second block; depth is 1")
        if self.split is not None and (min(self.split) < 1 or sum(self.split) >= self.depth):
            raise ValueError(
                f"split: {self.split[0]} first and {self.split[1]} last of {self.depth} blocks; expected at least one "
                "of each, and one between"
            )
        if self.inner_head is not None:
            self._check_inner_head(self.inner_head)
        return self

    def _check_width(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width {self.width} must be a multiple of 4 and of heads {self.heads}"
            )
        if self.rope and (self.width // self.heads) % 4:
            raise ValueError(
                f"rope needs a head width divisible by 4; width {self.width} / heads {self.heads} is "
                f"{self.width // self.heads}"
            )

    def _check_positions(self) -> None:
        if self.rope_span is not None and not self.rope:
            raise ValueError("rope_span takes effect with rope only")
        if self.learned_positions is None:
            return
        if not self.position_codes:
            raise ValueError("learned_positions takes effect with position_codes only")
        if min(self.learned_positions) < 1:
            raise ValueError(f"learned_positions: no grid of {list(self.learned_positions)}")

    def _check_inner_head(self, after: int) -> None:
        if after >= self.depth:
            raise ValueError(f"inner_head: after block {after} of {self.depth}; expected fewer")
        if self.is_routed(after):
            first, last = self.split or (0, 0)
            raise ValueError(
                f"inner_head: block {after} sees only some tokens in training; take one of the first {first} or of the "
                f"last {last}"
            )

    def is_routed(self, block: int) -> bool:
        """Whether a block, counted from 1, sees only the tokens that routing keeps."""
        return self.split is not None and self.split[0] < block <= self.depth - self.split[1]


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
