"""The contract between tokenizers and generators: named parts, and their static description."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree


class Latents(Mapping[str, Tensor]):
    """An ordered mapping from part name to tensor.

    ``texture`` (B, C, H, W) is always there and decodes to the image; ``semantic`` (B, C', H', W')
    and ``global`` (B, D) where the method has them. What ``Tokenizer.encode`` returns is
    standardised (about zero mean and unit variance per channel); raw latents use the same class.
    """

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        if "texture" not in parts:
            raise ValueError(f"latents need a 'texture' part, got {list(parts)}")
        self._parts = dict(parts)

    def __getitem__(self, name: str) -> Tensor:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __repr__(self) -> str:
        return (
            f"Latents({', '.join(f'{name}: {tuple(part.shape)}' for name, part in self.items())})"
        )

    @property
    def texture(self) -> Tensor:
        return self._parts["texture"]

    def map(self, function: Callable[[Tensor], Tensor]) -> "Latents":
        """Applies a function to every part."""
        return Latents({name: function(part) for name, part in self.items()})

    def to(self, *args: Any, **kwargs: Any) -> "Latents":
        """``Tensor.to`` on every part."""
        return self.map(lambda part: part.to(*args, **kwargs))


def as_pytree(kind: type, flatten: Callable[[Any], tuple[list, Any]], build: Any) -> None:
    """Lets ``torch.export`` and ``torch.func`` see the tensors in a class of ours.

    Args:
        flatten: an object to its members, and what else rebuilds it.
        build: members and that, to an object.
    """
    name = f"{kind.__module__}.{kind.__qualname__}"
    pytree.register_pytree_node(kind, flatten, build, serialized_type_name=name)


as_pytree(
    Latents,
    lambda latents: (list(latents.values()), list(latents)),
    lambda parts, names: Latents(dict(zip(names, parts, strict=True))),
)


def on_texture_grid(latents: Latents) -> dict[str, Tensor]:
    """Spatial parts resampled bilinearly to the texture's grid, where theirs is another."""
    size = latents.texture.shape[-2:]
    return {
        name: F.interpolate(part, size=size, mode="bilinear")
        if part.ndim == 4 and part.shape[-2:] != size
        else part
        for name, part in latents.items()
    }


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents, per image.

    Attributes:
        mean, std: of the same parts and shapes; std is 0 where a part is deterministic.
    """

    mean: Latents
    std: Latents

    def map(self, function: Callable[[Tensor], Tensor]) -> "Posterior":
        """Applies a function to every tensor."""
        return Posterior(self.mean.map(function), self.std.map(function))

    def sample(self, generator: torch.Generator | None = None) -> Latents:
        """A draw."""
        noise = {
            name: torch.randn(part.shape, generator=generator, device=part.device, dtype=part.dtype)
            for name, part in self.mean.items()
        }
        return self.sample_with(noise)

    def sample_with(self, noise: Mapping[str, Tensor]) -> Latents:
        """The draw that standard normal numbers, per part, stand for."""
        return Latents(
            {name: mean + self.std[name] * noise[name] for name, mean in self.mean.items()}
        )


@dataclass(frozen=True)
class PartSpec:
    """One part of the latents.

    Attributes:
        name: ``texture``, ``semantic``, ``global``, or a name that a new method brings.
        channels: C of a spatial part, D of a vector part.
        stride: image pixels per latent cell along each side; None for a vector part.
    """

    name: str
    channels: int
    stride: int | None

    @property
    def is_spatial(self) -> bool:
        return self.stride is not None


@dataclass(frozen=True)
class LatentSpec:
    """The static description of latents: all that a generator needs to know of a tokenizer."""

    parts: tuple[PartSpec, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or self.names[:1] != ("texture",):
            raise ValueError(
                f"a latent spec lists distinct parts, 'texture' first; got {list(self.names)}"
            )

    def __getitem__(self, name: str) -> PartSpec:
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(f"no part '{name}'; the parts are {list(self.names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The parts' names, in order."""
        return tuple(part.name for part in self.parts)

    @property
    def stride(self) -> int:
        """Image sides must be divisible by this (the least common multiple of the parts' strides)."""
        return math.lcm(*(part.stride for part in self.parts if part.stride is not None))

    def shape(self, name: str, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Shape of a part, without the batch axis, for images of (height, width).

        Raises:
            ValueError: the image size is not divisible by the stride.
        """
        self.check_image_size(image_size)
        part = self[name]
        if part.stride is None:
            return (part.channels,)
        return (part.channels, image_size[0] // part.stride, image_size[1] // part.stride)

    def shapes_on(self, grid: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Of each part without the batch axis, all spatial ones on one grid (rows, columns)."""
        return {p.name: (p.channels, *grid) if p.is_spatial else (p.channels,) for p in self.parts}

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError where an image side is not a positive multiple of the stride."""
        height, width = image_size
        if min(height, width) < 1 or height % self.stride or width % self.stride:
            near = [max(1, round(side / self.stride)) * self.stride for side in image_size]
            raise ValueError(
                f"image size {height}x{width} is not divisible by the tokenizer's stride {self.stride}; "
                f"the nearest that is: {near[0]}x{near[1]}"
            )

    def check(self, latents: Mapping[str, Tensor]) -> None:
        """Raises ValueError where latents do not have this spec's parts, in order, with its channels."""
        if tuple(latents) != self.names:
            raise ValueError(f"expected parts {list(self.names)}, got {list(latents)}")
        for part in self.parts:
            tensor = latents[part.name]
            kind = f"(B, {part.channels}, H, W)" if part.is_spatial else f"(B, {part.channels})"
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"part '{part.name}': expected a tensor {kind}, got {type(tensor).__name__}"
                )
            if tensor.ndim != (4 if part.is_spatial else 2) or tensor.shape[1] != part.channels:
                raise ValueError(f"part '{part.name}': expected {kind}, got {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise ValueError(
                    f"part '{part.name}': expected floating-point numbers, got {tensor.dtype}"
                )
        counts = {name: len(part) for name, part in latents.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"parts of several numbers of images: {counts}")

    def to_dict(self) -> list[dict[str, Any]]:
        return [asdict(part) for part in self.parts]

    @classmethod
    def from_dict(cls, parts: list[dict[str, Any]]) -> "LatentSpec":
        """The inverse of ``to_dict``.

        Raises:
            ValueError: it did not come from there.
        """
        if not isinstance(parts, list) or not all(_is_part(part) for part in parts):
            raise ValueError(f"expected a list of name, channels and stride, got {parts!r}")
        return cls(tuple(PartSpec(**part) for part in parts))


def _is_part(content: Any) -> bool:
    if not isinstance(content, dict) or content.keys() != {"name", "channels", "stride"}:
        return False
    numbers = [content["channels"], *([content["stride"]] if content["stride"] is not None else [])]
    return isinstance(content["name"], str) and all(type(n) is int and n > 0 for n in numbers)
