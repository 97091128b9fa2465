"""Tokenizer: images to standardised latents and back, and the files it lives in."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from semtok.card import provenance, write_readme
from semtok.errors import UserError
from semtok.images import Images, ValueRange, check_range, to_pixels
from semtok.privacy import fit_to_show
from semtok.processes import gather, together
from semtok.publish import PushToHub
from semtok.references import locate_export
from semtok.registry import get_method, load_plugins, method_of_export, papers_of, plugin_of
from semtok.sampler.draws import SampleNoise
from semtok.sampler.latents import Latents, LatentSpec, Posterior
from semtok.settings import Config, parse
from semtok.statistics import StreamingMoments
from semtok.storage import (
    first_line,
    new_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from semtok.teachers import Teacher, TeacherConfig, TeacherFeatures

FORMAT_VERSION = 1
_CONFIG_FILE = "config.json"
_STATE_FILE = "tokenizer.safetensors"
_KEYS = {"method", "latents", "diffusion_defaults", "settings", "trained"}


class DiffusionDefaults(Config):
    """What a generator's recipe means, in its own words, where its ``diffusion:`` section is silent.

    Attributes:
        leads: per part, by how much of the time axis it runs ahead; parts not named have 0.
        loss_weights: per part, of the velocity's squared error; parts not named have 1.
        cosine_weight: of the cosine loss of the velocity.
        repa: settings of representation alignment, or None for none.
    """

    leads: dict[str, float] = {}
    loss_weights: dict[str, Annotated[float, Field(ge=0)]] = {}
    cosine_weight: float = Field(0.0, ge=0)
    repa: dict[str, Any] | None = None

    def check_parts(self, spec: LatentSpec) -> None:
        """Raises ValueError where a part is named that the latents do not have."""
        unknown = sorted((self.leads.keys() | self.loss_weights.keys()) - set(spec.names))
        if unknown:
            raise ValueError(f"diffusion_defaults name no part of the latents: {unknown}")


class Tokenizer(PushToHub, nn.Module, ABC):
    """Images to latents and back; three spaces, named everywhere:

    - *pixels*: float (B, 3, H, W) in [-1, 1];
    - *raw latents*: what the networks emit, of any scale;
    - *latents*: raw latents standardised per channel, or per channel and position, by statistics that were measured on
      training data and are buffers of this module. Nobody outside needs to know a scale.

    A method subclasses it with ``posterior_raw`` and ``decode_raw``, the two file hooks, and
    a ``LatentSpec``. It is an ordinary ``nn.Module``: move it, freeze it, put it in a training loop.

    Args:
        positions: (rows, columns) of the parts that have statistics of their own at each position, and so are of
            that grid alone; other parts have one mean and one deviation per channel.
    """

    method: str
    """Name under which the method is registered."""
    spec: LatentSpec
    diffusion_defaults: DiffusionDefaults
    teacher_config: TeacherConfig | None = None
    """Settings of the teacher by whose features it encodes; None: it needs none."""
    training_info: dict[str, Any]
    """What trained it (teacher, data, image size); for readers, no code depends on it."""

    def __init__(
        self,
        spec: LatentSpec,
        *,
        method: str,
        training_info: dict[str, Any] | None = None,
        positions: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.positions = dict(positions or {})
        self.spec = spec
        self.method = method
        self.training_info = training_info or {}
        self.diffusion_defaults = DiffusionDefaults()
        for part in spec.parts:
            shape = (part.channels, *self.positions.get(part.name, ()))
            self.register_buffer(f"{part.name}_mean", torch.zeros(shape))
            self.register_buffer(f"{part.name}_std", torch.ones(shape))
        self.register_buffer("num_measured_images", torch.zeros((), dtype=torch.int64))

    # What a method gives ------------------------------------------------------------------------

    @abstractmethod
    def posterior_raw(self, pixels: Tensor, features: TeacherFeatures | None = None) -> Posterior:
        """Pixels to the posterior of their raw latents.

        Args:
            features: what ``features`` gives for these pixels, where the caller has it already.
        """

    @abstractmethod
    def decode_raw(self, raw: Latents) -> Tensor:
        """Raw latents to pixels (not clamped)."""

    @abstractmethod
    def save_networks(self, folder: Path) -> dict[str, Any]:
        """Writes the networks into ``folder``; returns the JSON settings that rebuild them."""

    @classmethod
    @abstractmethod
    def load_networks(cls, folder: Path, config: Mapping[str, Any]) -> "Tokenizer":
        """Rebuilds the tokenizer from what ``save_networks`` wrote and the whole config.json."""

    @property
    def teacher(self) -> Teacher | None:
        """The teacher by whose features it encodes, or None."""
        return None

    @property
    def loaded_teacher(self) -> Teacher | None:
        """That teacher where it is in memory already; it may be loaded when it is first asked for."""
        return None

    def features(self, pixels: Tensor) -> TeacherFeatures | None:
        """What that teacher sees in pixels, or None."""
        return None

    def feature_grid(self, image_size: tuple[int, int]) -> tuple[int, int] | None:
        """(rows, columns) of the patch tokens that it asks that teacher for, of images of (height, width); None: no
        cache of features serves it."""
        return None

    def check_image_size(self, image_size: tuple[int, int]) -> None:
        """Raises ValueError where images of (height, width) are none that the stride divides, or not of the one size
        that statistics per position were measured on."""
        self.spec.check_image_size(image_size)
        height, width = image_size
        for name, (rows, columns) in self.positions.items():
            stride = self.spec[name].stride
            fit = (rows * stride, columns * stride)
            if (height, width) != fit:
                size = fit[0] if rows == columns else f"[{fit[0]},{fit[1]}]"
                raise ValueError(
                    f"image size {height}x{width} is not {fit[0]}x{fit[1]}, the only one of this tokenizer, whose "
                    f"statistics are of {rows}x{columns} positions; pass data.size={size}, or train a tokenizer with "
                    "method.statistics=channel"
                )

    @property
    def measured_parts(self) -> tuple[str, ...]:
        """The parts whose statistics ``measure_statistics`` measures."""
        return self.spec.names

    # The contract -------------------------------------------------------------------------------

    def encode(
        self,
        images: Images,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        value_range: ValueRange | None = None,
    ) -> Latents:
        """Images to latents.

        Args:
            images: files' paths, PIL images, NumPy arrays (B, H, W, 3) or tensors (B, 3, H, W), one or a list; uint8
                in [0, 255] or float in ``value_range``; H and W divisible by ``spec.stride``.
            sample: draw from the posterior, instead of taking its mean.
            generator: the source of that draw.
            value_range: (black, white) of float images. None: [-1, 1]. It is looked whether they can be, on
                a GPU at the first batch alone, as looking waits for it; (-1, 1) takes them as they are.

        Raises:
            ValueError: images of another shape, range or kind, a size that the stride does not divide, statistics
                not yet measured, or a generator without ``sample``.
        """
        if generator is not None and not sample:
            raise ValueError("generator: nothing is drawn; pass sample=True too")
        pixels = to_pixels(images, self.device, value_range=value_range)
        is_taken_as_it_is = value_range is not None and tuple(value_range) == (-1, 1)
        if not is_taken_as_it_is and self._range_is_looked_at(images, pixels):
            check_range(pixels, value_range)
        posterior = self.posterior(pixels)
        return posterior.sample(generator) if sample else posterior.mean

    def _range_is_looked_at(self, images: Images, pixels: Tensor) -> bool:
        if torch.compiler.is_compiling() or pixels.is_meta:
            return False
        if isinstance(images, Tensor) and images.dtype == torch.uint8:
            return False
        looked, self._looked = getattr(self, "_looked", False), True
        return not looked or pixels.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return self.texture_mean.device

    def posterior(self, images: Images, features: TeacherFeatures | None = None) -> Posterior:
        """Images to the posterior of their latents, standardised; errors as ``encode``.

        Args:
            images: as ``encode`` takes them.
            features: what ``features`` gives for these images, where the caller has it already.
        """
        pixels = to_pixels(images, self.device).to(self.texture_mean.dtype)
        self.check_image_size(tuple(pixels.shape[-2:]))
        return self.standardise_posterior(self.posterior_raw(pixels, features))

    def decode(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Latents to pixels (B, 3, H, W), clamped to [-1, 1], of this module's type of numbers. Parts beside the
        texture may be needed or not.

        Args:
            latents: of any float type and device.

        Raises:
            TypeError: something else than a mapping from part to tensor.
            ValueError: latents that do not fit the spec, or statistics not yet measured.
        """
        if not isinstance(latents, Mapping):
            raise TypeError(
                f"expected Latents, got {type(latents).__name__}; wrap it: Latents({{'texture': …}})"
            )
        self.spec.check(latents)
        own = Latents(latents).to(self.device, self.texture_mean.dtype)
        return self.decode_raw(self.destandardise(own)).clamp(-1, 1)

    def standardise(self, raw: Latents) -> Latents:
        """Raw latents to latents: (z - mean) / std."""
        return self._by_statistics(raw, lambda z, mean, std: (z - mean) / std)

    def standardise_posterior(self, raw: Posterior) -> Posterior:
        """A posterior of raw latents to that of latents."""
        std = self._by_statistics(raw.std, lambda std, _, scale: std / scale)
        return Posterior(self.standardise(raw.mean), std)

    def destandardise(self, latents: Latents) -> Latents:
        """Latents to raw latents, the inverse of ``standardise``."""
        return self._by_statistics(latents, lambda z, mean, std: z * std + mean)

    def _by_statistics(self, latents: Latents, function: Any) -> Latents:
        if not self.is_measured:
            raise ValueError(
                "this tokenizer's latent statistics were not measured yet; call measure_statistics first"
            )
        result = {}
        for name, part in latents.items():
            mean, std = getattr(self, f"{name}_mean"), getattr(self, f"{name}_std")
            grid = self.positions.get(name)
            if grid is not None and tuple(part.shape[-2:]) != grid:
                raise ValueError(
                    f"part '{name}': its statistics are of {grid[0]}x{grid[1]} positions, and these latents have "
                    f"{part.shape[-2]}x{part.shape[-1]}; take images of the size that they were measured on"
                )
            shape = (1, -1, *(grid or (1,) * (part.ndim - 2)))
            result[name] = function(part, mean.view(shape), std.view(shape))
        return Latents(result)

    @property
    def is_measured(self) -> bool:
        # A host-side copy, so that encoding never waits for the device.
        if not getattr(self, "_measured", False):
            self._measured = bool(self.num_measured_images > 0)
        return self._measured

    @torch.no_grad()
    def measure_statistics(
        self,
        batches: Iterable[
            Tensor
            | tuple[Sequence[int], Tensor]
            | tuple[Sequence[int], Tensor, TeacherFeatures | None]
        ],
        seed: int = 0,
    ) -> None:
        """Measures every part's mean and standard deviation, per channel or also per position, in one pass, in float64.

        Posterior draws are measured, since draws are what a generator learns; posterior means have
        a slightly smaller spread. Under a launcher all processes call it, each with its share of the images,
        and get the statistics of all.

        Args:
            batches: pixels (B, 3, H, W) of training images; or with the images' indices before them, to which
                the draws belong, whatever batch and process an image is in. Without, images are counted. Behind
                indices and pixels there may be what ``features`` gives for them, where the caller has it already.
            seed: of the draws.

        Raises:
            ValueError: no image, or a channel that does not vary or is not finite.
        """
        if not self.measured_parts:
            return
        num_images, device = 0, self.texture_mean.device
        moments = {name: StreamingMoments() for name in self.measured_parts}
        with together():
            for batch in batches:
                counted = range(num_images, num_images + len(batch))
                indices, pixels, *known = (counted, batch) if isinstance(batch, Tensor) else batch
                posterior = self.posterior_raw(pixels.to(device), *known)
                noise = SampleNoise(seed, indices, device)
                shapes = {name: tuple(part.shape[1:]) for name, part in posterior.mean.items()}
                raw = posterior.sample_with({name: noise(shape) for name, shape in shapes.items()})
                num_images += len(pixels)
                for name, seen in moments.items():
                    seen.add(raw[name].flatten(1) if name in self.positions else raw[name])
        num_images = sum(gather(num_images))
        if not num_images:
            raise ValueError("no images to measure latent statistics on")
        for name, part in moments.items():
            self._take_statistics(name, part.over_processes())
        self.num_measured_images.fill_(num_images)

    def _take_statistics(self, name: str, seen: StreamingMoments) -> None:
        mean, std = seen.mean, seen.std
        if not bool((std > 1e-6).all() & torch.isfinite(mean).all() & torch.isfinite(std).all()):
            dead = (~(std > 1e-6)).nonzero().flatten().tolist()
            if name in self.positions:
                dead = sorted({place // math.prod(self.positions[name]) for place in dead})
            raise ValueError(
                f"part '{name}': channels {dead} are constant or not finite on the training data"
            )
        for kind, values in (("mean", mean), ("std", std)):
            buffer = getattr(self, f"{name}_{kind}")
            buffer.copy_(values.view(buffer.shape))

    def means_the_same(self, other: "Tokenizer") -> bool:
        """Whether latents of this tokenizer are latents of the other, as far as can be told without images."""
        if self.spec != other.spec or self.positions != other.positions:
            return False
        ours, theirs = (dict(each.named_buffers(recurse=False)) for each in (self, other))
        names = [n for part in self.spec.names for n in (f"{part}_mean", f"{part}_std")]
        return all(torch.allclose(ours[n].cpu(), theirs[n].cpu(), atol=1e-4) for n in names)

    def has_latents_of(self, other: "Tokenizer") -> bool:
        """Whether this one's decoder can take the latents of the other: encoders and statistics are equal. False also
        where that can't be told."""
        return False

    def with_decoder_of(self, other: "Tokenizer") -> "Tokenizer":
        """The tokenizer of the same latents that decodes as the other does.

        Raises:
            UserError: the other's decoder was made for other latents.
        """
        if not other.has_latents_of(self):
            raise UserError(
                "this decoder was made for other latents: its tokenizer's encoder and statistics are not the same; "
                "train one with method.vae=… of this tokenizer and method.train=decoder"
            )
        other.diffusion_defaults = self.diffusion_defaults
        return other

    # Files --------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, *, pictures: Mapping[str, Path] | None = None
    ) -> None:
        """Writes config.json, the networks and the statistics, the recipe and a model card; an existing
        export is replaced whole.

        Args:
            pictures: for the card, files by the names that they get.

        Raises:
            UserError: the folder holds something else.
        """
        with new_folder(Path(folder), replaces=_CONFIG_FILE) as temporary:
            settings = self.save_networks(temporary)
            config = {
                "library": "semtok",
                "library_version": library_version(),
                "format_version": FORMAT_VERSION,
                "kind": "tokenizer",
                "method": self.method,
                **({"plugin": plugin} if (plugin := plugin_of(self.method)) else {}),
                "latents": self.spec.to_dict(),
                "diffusion_defaults": self.diffusion_defaults.model_dump(mode="json"),
                "settings": settings,
                "trained": fit_to_show(self.training_info),
            }
            state = dict(self.named_buffers(recurse=False))
            write_tensors(temporary / _STATE_FILE, state, provenance(config))
            write_json(temporary / _CONFIG_FILE, config)
            write_readme(temporary, config, pictures or {}, papers_of(self.method))

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        plugin: str | Path | None = None,
    ) -> "Tokenizer":
        """Loads a tokenizer, in eval mode.

        Args:
            reference: an exported folder, a run folder or the name of a finished run, or a Hub id.
                A diffusers autoencoder (AutoencoderKL, AutoencoderDC, AutoencoderTiny, …) is one too; its config's
                scaling is its statistics.
            revision: branch, tag or commit on the Hub.
            local_files_only: never ask the Hub, use its local cache.
            plugin: your file that registers the method; it is run. No code of the reference is.

        Raises:
            UserError: nothing found, a damaged file, a newer format, or an unknown method.
        """
        load_plugins([plugin] if plugin is not None else [])
        folder = locate_export(
            str(reference), "tokenizer", revision=revision, local_files_only=local_files_only
        )
        config = read_json(folder / _CONFIG_FILE)
        if isinstance(config, dict) and "_class_name" in config:
            return get_method("vae", place=str(folder)).tokenizer.from_diffusers(folder).eval()
        _check_config(config, folder)
        method = method_of_export(config, place=str(folder))
        tokenizer = method.tokenizer.load_networks(folder, config)
        state = read_tensors(folder / _STATE_FILE)
        expected = dict(tokenizer.named_buffers(recurse=False))
        if {n: b.shape for n, b in state.items()} != {n: b.shape for n, b in expected.items()}:
            raise UserError(
                f"{folder / _STATE_FILE}: holds {sorted(state)}, expected {sorted(expected)} of the spec's sizes"
            )
        for name, buffer in expected.items():
            buffer.copy_(state[name])
        tokenizer.training_info = config["trained"] or {}
        place = folder / _CONFIG_FILE
        key = "diffusion_defaults"
        defaults = parse(DiffusionDefaults, config[key], f"{place}: {key}")
        try:
            defaults.check_parts(tokenizer.spec)
            same = tokenizer.spec == LatentSpec.from_dict(config["latents"])
        except ValueError as error:
            raise UserError(f"{place}: {first_line(error)}") from None
        tokenizer.diffusion_defaults = defaults
        if not same:
            raise UserError(
                f"{folder / _CONFIG_FILE}: latents are {config['latents']}, but the networks' are "
                f"{tokenizer.spec.to_dict()}"
            )
        return tokenizer.eval()


def check_format_version(config: Mapping[str, Any], place: Path) -> None:
    """Raises UserError where an export (a tokenizer's or a generator's) is of a format not known here."""
    version = config.get("format_version")
    if version is None:
        raise UserError(f"{place}: 'format_version' is missing; export again")
    if not isinstance(version, int):
        raise UserError(f"{place}: format_version {version!r} is no number")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{place}: format version {version} is newer than this semtok reads ({FORMAT_VERSION}); "
            "upgrade semtok"
        )


def _check_config(config: Any, folder: Path) -> None:
    """Raises UserError where an export's config.json can't be read by this version."""
    place = folder / _CONFIG_FILE
    if not isinstance(config, dict) or config.get("library") != "semtok":
        raise UserError(f"{place}: not a semtok tokenizer")
    if config.get("kind", "tokenizer") != "tokenizer":
        raise UserError(
            f"{folder}: is a {config['kind']}, not a tokenizer; its tokenizer is {folder / 'tokenizer'}"
        )
    check_format_version(config, place)
    missing = sorted(_KEYS - config.keys())
    if missing:
        raise UserError(f"{place}: {', '.join(missing)} missing; export again")


def library_version() -> str:
    """The installed version of semtok."""
    try:
        return version("semtok")
    except PackageNotFoundError:  # imported from a checkout that was not installed
        return "unknown"
