"""The embedded data: procedural scenes, rendered with anti-aliasing from a seed. No files.

Each scene is one object on a patterned ground, described by eight labelled attributes. Image ``i``
of seed ``s`` is a pure function of (s, i): the same alone, in a batch, or on another machine.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor

from semtok.data.source import DataConfig, ImageBatch, ImageSource

_HUES = ("red", "yellow", "green", "cyan", "blue", "magenta")
_PATTERNS = ("plain", "stripes", "checker", "dots")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("ellipse", "square", "triangle", "star", "cross", "heart"),
    "hue": _HUES,
    "fill": _PATTERNS,
    "size": ("small", "medium", "large"),
    "position": tuple(
        f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "centre", "right")
    ),
    # Every shape is distinguishable within a turn of 72 degrees (the star's symmetry).
    "rotation": ("left", "upright", "right"),
    "ground_hue": _HUES,
    "ground": _PATTERNS,
}


_WITHOUT_EFFECT = {
    "flip": "drawn scenes are never mirrored, as their 'rotation' and 'position' would be others",
    "crop": "scenes are drawn in the size that is asked for, and never cropped",
}
"""Settings of stored images that have no meaning here, and why."""


class ShapesConfig(DataConfig):
    """Settings of the embedded data."""

    kind: Literal["shapes"] = "shapes"
    num_images: int = 50_000
    """Training images; the held-out images are others."""
    num_validation_images: int = 2_000
    """Held-out images."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Chooses the scenes, independently of the training seed."""
    classes: tuple[str, ...] = ("hue", "position")
    """Attributes whose combinations are the class labels. These two a small generator learns in
    minutes; shapes take longer."""

    flip: None = Field(None, exclude=True)
    crop: None = Field(None, exclude=True)
    """Refused, with the reason."""

    @field_validator("flip", "crop", mode="before")
    @classmethod
    def _without_effect(cls, value: object, info: ValidationInfo) -> None:
        why = _WITHOUT_EFFECT[str(info.field_name)]
        raise ValueError(f"{why}; leave it out, or choose another data.kind")

    @model_validator(mode="after")
    def _known_classes(self) -> "ShapesConfig":
        unknown = [name for name in self.classes if name not in ATTRIBUTES]
        if unknown or not self.classes:
            raise ValueError(
                f"data.classes: {unknown or 'empty'}; choose from {', '.join(ATTRIBUTES)}"
            )
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"data.classes: {list(self.classes)} names an attribute twice")
        if min(self.num_images, self.num_validation_images) < 1:
            raise ValueError("data.num_images and data.num_validation_images must be at least 1")
        return self


class Shapes(ImageSource):
    """The scenes of one split. Training and held-out scenes come from disjoint index ranges."""

    flip = False  # mirroring would change what 'rotation' and 'position' mean

    def __init__(self, config: ShapesConfig, *, train: bool) -> None:
        self.image_size = config.image_size
        self.attributes = ATTRIBUTES
        self.class_names = tuple(
            " ".join(names) for names in product(*(ATTRIBUTES[c] for c in config.classes))
        )
        self.name = f"shapes (seed {config.seed}, {'training' if train else 'held-out'})"
        self._classes = config.classes
        self._seed = config.seed
        self._first = 0 if train else config.num_images
        self._len = config.num_images if train else config.num_validation_images

    @classmethod
    def open(cls, config: ShapesConfig) -> tuple["Shapes", "Shapes"]:
        """The training and the held-out scenes."""
        return cls(config, train=True), cls(config, train=False)

    @property
    def identity(self) -> str:
        return f"{self.name} from {self._first}"

    def __len__(self) -> int:
        return self._len

    def load(self, indices: Sequence[int]) -> ImageBatch:
        index = torch.as_tensor(indices, dtype=torch.int64) + self._first
        images, attributes = render_scenes(index, seed=self._seed, image_size=self.image_size)
        labels = torch.zeros(len(index), dtype=torch.int64)
        for name in self._classes:
            labels = labels * len(ATTRIBUTES[name]) + attributes[name]
        return ImageBatch(images=images, labels=labels, attributes=attributes)


# Randomness: a counter-based hash, so that image i needs none of its neighbours ------------------


def hash_uniform(seed: int, index: Tensor, num: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on (seed, index) alone.

    The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied to a counter.

    Args:
        index: int64 (B,).
        num: numbers per index.

    Returns:
        float32 (B, num).
    """
    counter = index[:, None] * 1_000_003 + torch.arange(num)
    bits = _mix(_mix(torch.tensor(seed, dtype=torch.int64) + 0x1234567) ^ _mix(counter))
    return (_shift(bits, 40)).to(torch.float32) / 2**24


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15 modulo 2^64
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


# Rendering ---------------------------------------------------------------------------------------


def render_scenes(
    index: Tensor, *, seed: int, image_size: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Renders scenes.

    Args:
        index: int64 (B,), which scenes.
        image_size: (height, width) in pixels; any size, the scene fills the shorter side.

    Returns:
        uint8 images (B, 3, H, W), and per attribute of ``ATTRIBUTES`` its category int64 (B,).
    """
    height, width = image_size
    u = iter(hash_uniform(seed, index, 24).unbind(1))
    attributes = {name: (next(u) * len(names)).long() for name, names in ATTRIBUTES.items()}

    pixel = 2 / min(height, width)  # the shorter side spans [-1, 1]
    y = ((torch.arange(height) + 0.5) - height / 2) * pixel
    x = ((torch.arange(width) + 0.5) - width / 2) * pixel
    y, x = y[None, :, None], x[None, None, :]

    ground_angle, ground_phase = _column(next(u) * math.pi), _column(next(u))
    gx, gy = _rotate(x, y, ground_angle)
    mask = _pattern(
        gx + ground_phase, gy + ground_phase, attributes["ground"], period=0.5, pixel=pixel
    )
    bright = _hsv(
        attributes["ground_hue"],
        next(u),
        saturation=0.45 + 0.15 * next(u),
        value=0.42 + 0.16 * next(u),
    )
    image = torch.lerp(bright * 0.62, bright, mask[:, None])

    # The object's frame: moved, turned, scaled to radius 1.
    radius = _column(0.34 + 0.12 * attributes["size"] + 0.07 * next(u))
    row = attributes["position"].div(3, rounding_mode="floor")
    column = attributes["position"].remainder(3)
    centre_y = _column(((row - 1) * 0.3 + 0.12 * (next(u) - 0.5)) * height / min(height, width))
    centre_x = _column(((column - 1) * 0.3 + 0.12 * (next(u) - 0.5)) * width / min(height, width))
    turn = _column(((attributes["rotation"] - 1) * 24 + 18 * (next(u) - 0.5)) * math.pi / 180)
    ox, oy = _rotate(x - centre_x, y - centre_y, turn)
    ox, oy = ox / radius, oy / radius
    unit = pixel / radius

    distance = torch.empty_like(ox)
    for number, signed_distance in enumerate(_SHAPES):
        chosen = (attributes["shape"] == number).nonzero().squeeze(1)
        if len(chosen):
            distance[chosen] = signed_distance(ox[chosen], oy[chosen])
    coverage = (0.5 - distance / unit).clamp(0, 1)

    mask = _pattern(ox, oy, attributes["fill"], period=0.8, pixel=unit)
    bright = _hsv(
        attributes["hue"], next(u), saturation=0.8 + 0.2 * next(u), value=0.9 + 0.1 * next(u)
    )
    image = torch.lerp(image, torch.lerp(bright * 0.5, bright, mask[:, None]), coverage[:, None])
    return (image * 255).round().clamp(0, 255).to(torch.uint8), attributes


def _column(values: Tensor) -> Tensor:
    return values[:, None, None]  # (B,) -> (B, 1, 1)


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos(), angle.sin()
    return x * cos + y * sin, y * cos - x * sin


def _hsv(hue: Tensor, jitter: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB in [0, 1], (B, 3, 1, 1), of a hue category moved by at most 12 degrees."""
    h = hue + (jitter - 0.5) * 0.4  # in sixths of the circle
    k = (torch.tensor([5.0, 3.0, 1.0]) + h[:, None]) % 6
    rgb = value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return rgb[:, :, None, None]


def _pattern(x: Tensor, y: Tensor, kind: Tensor, *, period: float, pixel: float | Tensor) -> Tensor:
    """Anti-aliased two-tone patterns: 1 in the bright tone, 0 in the dark. (B, H, W)."""
    wave = 2 * math.pi / period
    sx, sy = torch.sin(x * wave), torch.sin(y * wave)
    level = torch.stack(
        [torch.ones_like(sx), sx.expand_as(sx + sy), sx * sy, 0.5 * (sx + sy) + 0.15], 1
    )
    level = level[torch.arange(len(kind)), kind]
    return (0.5 + level / (wave * pixel)).clamp(0, 1)


# Signed distances (negative inside) in the object's frame, y pointing down; radius about 1.


def _ellipse(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x / 0.62, y) - 1) * 0.62


def _square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.72


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    slant = (x.abs() * 1.75 + (y + 0.95) * -0.9) / math.hypot(1.75, 0.9)
    return torch.maximum(slant, y - 0.75)


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    distance = torch.hypot(x, y)
    px, py = distance * angle.sin(), distance * angle.cos()
    # The edge from the tip (0, 1) to the inner corner at half a sector, radius 0.45.
    ex, ey = 0.45 * math.sin(sector / 2), 0.45 * math.cos(sector / 2) - 1
    return (ex * (py - 1) - ey * px) / math.hypot(ex, ey)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    upright = torch.maximum(x - 0.28, y - 0.92)
    beam = torch.maximum(x - 0.92, y - 0.28)
    return torch.minimum(upright, beam)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    x = x.abs()
    lobe = torch.hypot(x - 0.42, y + 0.32) - 0.48
    tip = torch.maximum((x + y) / math.sqrt(2) - 0.55, -y - 0.32)
    tip = torch.maximum(
        tip, torch.maximum(x - 0.9, (x * 0.93 + y * 0.78 - 0.69) / math.hypot(0.93, 0.78))
    )
    return torch.minimum(lobe, tip)


_SHAPES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _ellipse,
    _square,
    _triangle,
    _star,
    _cross,
    _heart,
)
