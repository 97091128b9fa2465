"""What a score was measured by: networks, images, references, and digests that tell them from others.

Every command of ``evaluate`` writes one ``Protocol`` with its scores. Two numbers may be compared where theirs
agree.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from semtok.data.images.encoded import StoredImages
from semtok.data.images.resized import ResizedImages
from semtok.data.source import ImageSource
from semtok.images import to_uint8
from semtok.privacy import fit_to_show
from semtok.storage import tensor_bytes
from semtok.teachers import Teacher
from semtok.tokenizer import library_version

_DIGITS = 12
AS_STORED = "as stored"


@dataclass(frozen=True)
class Network:
    """A network that images are seen by.

    Attributes:
        library: that computes it, with its version.
        model: the library's name for it.
        input: how images are brought to its input.
        weights: digest of its weights.
    """

    library: str
    model: str
    input: str
    weights: str


@dataclass(frozen=True)
class ImagesProtocol:
    """A set of images that a score is of, or is compared with. None where a thing does not apply or is not known.

    Attributes:
        name: where they come from, in a few words.
        kind: ``model`` (drawn for the score), ``folder``, ``archive``, ``statistics`` (a file), ``data`` (settings).
        num_images: how many.
        digest: of their pixels, see ``PixelDigest``; of a file of statistics, of the file.
        crop: ``adm``, ``lightningdit``, or ``as stored`` where nothing is cropped.
        uint8: how numbers became 8 bits: ``round``, ``truncate``, or ``as stored``.
        labels: of generated images: ``balanced``, ``random``, or ``as stored``.
        seed, sampler: of generated images.
        precision: that the generator computed in.
        written: how they were drawn, as ``sample`` writes it beside a set.
    """

    name: str
    kind: str
    num_images: int | None
    digest: str | None = None
    crop: str | None = None
    uint8: str | None = None
    labels: str | None = None
    seed: int | None = None
    sampler: dict[str, Any] | None = None
    precision: str | None = None
    written: dict[str, Any] | None = None


@dataclass(frozen=True)
class Protocol:
    """How a command of ``evaluate`` measured; of one shape for all of them.

    Attributes:
        task: the command's name.
        measures: what is computed, in words.
        networks: that saw the images, by name.
        models: digests of the weights of what is evaluated, by name.
        images: what is scored.
        references: what they are compared with, by the network that sees both; of reconstructions it is the images
            themselves.
        fitted_on: images that something was fitted on before.
        latents: which are looked at or decoded: ``mean`` of the posterior, or ``sample``; None: none.
        seed: of draws of the command's own.
        precision: that features and reconstructions are computed in.
    """

    task: str
    measures: str
    networks: dict[str, Network]
    models: dict[str, str]
    images: ImagesProtocol
    references: dict[str, ImagesProtocol] = field(default_factory=dict)
    fitted_on: ImagesProtocol | None = None
    latents: str | None = None
    seed: int | None = None
    precision: str = "fp32"
    library: str = field(default_factory=lambda: f"semtok {library_version()}")

    def to_json(self) -> dict[str, Any]:
        """As JSON has it, without places of this machine."""
        content = asdict(self)
        sets = [content["images"], content["fitted_on"], *content["references"].values()]
        for images in filter(None, sets):
            images |= {key: fit_to_show(images[key]) for key in ("name", "written")}
        content["models"] = {fit_to_show(name): told for name, told in self.models.items()}
        return content

    def lines(self) -> list[str]:
        """A few short lines for people."""
        shown = self.to_json()
        lines = [f"protocol: {shown['task']} by {shown['library']}"]
        if self.latents is not None:
            lines[0] += f"; posterior {self.latents}"
        lines += [
            f"network {name}: {n['model']}, {n['library']}, weights {n['weights']}; input {n['input']}"
            for name, n in shown["networks"].items()
        ]
        lines += [f"weights of {name}: {digest}" for name, digest in shown["models"].items()]
        lines.append(f"images: {_in_words(shown['images'])}")
        for name, images in shown["references"].items():
            lines.append(f"reference for {name}: {_in_words(images)}")
        if shown["fitted_on"] is not None:
            lines.append(f"fitted on: {_in_words(shown['fitted_on'])}")
        return lines


def _in_words(images: dict[str, Any]) -> str:
    words = [images["name"]]
    if images["num_images"] is not None:
        words.append(f"{images['num_images']} images")
    words += [f"{key} {images[key]}" for key in ("crop", "uint8") if images[key] is not None]
    if images["labels"] is not None:
        words.append(f"labels {images['labels']}")
    if isinstance(sampler := images["sampler"], dict):
        words += _sampler_in_words(sampler)
    words += [f"seed {images['seed']}"] if images["seed"] is not None else []
    words += [images["precision"]] if images["precision"] is not None else []
    words += [f"digest {images['digest']}"] if images["digest"] is not None else []
    return ", ".join(words)


def _sampler_in_words(sampler: Mapping[str, Any]) -> list[str]:
    """What decides the images, of a sampler's settings as a set has them."""
    if sampler.get("method") == "dopri5":
        words = ["dopri5", *(f"{key} {sampler.get(key)}" for key in ("rtol", "atol"))]
        words.append(f"error over {sampler.get('error_over')}")
    else:
        words = [f"{sampler.get('method')} {sampler.get('steps')} steps"]
    if sampler.get("method") == "sde":
        words.append(f"diffusion {sampler.get('diffusion')}")
    if sampler.get("euler_last_step") is not None:
        words.append(f"last step {sampler['euler_last_step']}")
    if sampler.get("end", 1) != 1:
        words.append(f"to {sampler['end']}")
    if sampler.get("state_refresh_rate", 1) != 1:
        words.append(f"state refreshed every {sampler['state_refresh_rate']} steps")
    guidance = sampler.get("guidance")
    if isinstance(guidance, Mapping) and guidance.get("scale") != 1:
        words.append(f"guidance {guidance.get('scale')} within {guidance.get('interval')}")
        if guidance.get("base", "null_label") != "null_label":
            words[-1] += f" away from {guidance['base']}"
        if guidance.get("num_channels") is not None:
            words[-1] += f" on {guidance['num_channels']} channels"
    return words


# What things are ---------------------------------------------------------------------------------


def drawn_protocol(
    name: str,
    kind: str,
    num_images: int,
    written: dict[str, Any] | None,
    digest: str | None = None,
) -> ImagesProtocol:
    """Of a set that a model drew.

    Args:
        written: what ``sample`` writes of it, or would; None: nobody says how it was drawn.
    """
    said = written or {}
    return ImagesProtocol(
        name,
        kind,
        num_images,
        digest,
        crop=AS_STORED,
        uint8=said.get("uint8", AS_STORED),
        labels=said.get("labels", AS_STORED),
        seed=said.get("seed"),
        sampler=said.get("sampler"),
        precision=said.get("precision"),
        written=written,
    )


def data_protocol(
    source: ImageSource, num_images: int, digest: str | None, *, name: str | None = None
) -> ImagesProtocol:
    """Of images of a source, as its settings crop them."""
    crop = uint8 = AS_STORED
    if isinstance(source, StoredImages):
        crop, uint8 = "adm", "round"
    elif isinstance(source, ResizedImages):
        crop, uint8 = "lightningdit", "round, for scores of 8 bits alone"
    return ImagesProtocol(name or source.name, "data", num_images, digest, crop=crop, uint8=uint8)


def teacher_protocol(teacher: Teacher) -> Network:
    """Of a teacher, by the last of its layers."""
    config = teacher.config
    model = (
        config.name if config.name == teacher.timm_name else f"{config.name} ({teacher.timm_name})"
    )
    if config.layers[-1] != -1:
        model += f", layer {config.layers[-1]}"
    if config.final_norm != "affine":
        model += f", final norm {config.final_norm}"
    return Network(
        with_version("timm"),
        model,
        f"shorter side {teacher.input_size}, {config.resize}{'' if config.normalise else ', not normalised'}",
        weights_digest(teacher.network),
    )


def shown_names(references: Iterable[str]) -> dict[str, str]:
    """Of each reference a name that is fit to show, and no other's."""
    names: dict[str, str] = {}
    for reference in dict.fromkeys(references):
        name = base = str(fit_to_show(reference))
        number = 1
        while name in names.values():
            number += 1
            name = f"{base} ({number})"
        names[reference] = name
    return names


def with_version(library: str) -> str:
    """A library's name and installed version."""
    try:
        return f"{library} {version(library)}"
    except PackageNotFoundError:
        return library


# Digests -----------------------------------------------------------------------------------------


class PixelDigest:
    """The first 12 hexadecimal digits of a SHA-256 of images, the same in any order.

    It is of the SHA-256 of each image's bytes, uint8 (H, W, 3), sorted and joined. So it is of a folder, of an
    archive of the same images, and of the model that draws them.
    """

    def __init__(self) -> None:
        self._images: list[bytes] = []

    def add(self, images: Tensor) -> None:
        """Takes in a batch, uint8 or pixels (B, 3, H, W)."""
        if images.dtype != torch.uint8:
            images = to_uint8(images)
        rows = rearrange(images.cpu(), "b c h w -> b h w c").contiguous()
        self._images += [hashlib.sha256(row.numpy().data).digest() for row in rows]

    def watch(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same batches; each is taken in before it is given."""
        for images in batches:
            self.add(images)
            yield images

    def __str__(self) -> str:
        return hashlib.sha256(b"".join(sorted(self._images))).hexdigest()[:_DIGITS]


def file_digest(path: Path) -> str:
    """The first 12 hexadecimal digits of a file's SHA-256.

    Raises:
        OSError: it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:_DIGITS]


def weights_digest(module: nn.Module) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a module's tensors: names, types, shapes and bytes."""
    total = hashlib.sha256()
    for name, tensor, content in tensor_bytes(module):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(content)
    return total.hexdigest()[:_DIGITS]
