"""Generator: a trained diffusion transformer with its tokenizer, from class labels to images."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from semtok.card import provenance, write_readme
from semtok.diffusion.diffusion_config import DiffusionConfig, build_network, check_guidance
from semtok.errors import UserError
from semtok.images import Images, ValueRange, are_floats, check_unit_range, to_pil, to_pixels
from semtok.pictures import Row, principal_components, rows_of_images
from semtok.privacy import fit_to_show
from semtok.publish import PushToHub
from semtok.references import locate_export
from semtok.registry import load_plugins, papers_of
from semtok.sampler.dit import DiT
from semtok.sampler.guidance import Base
from semtok.sampler.latents import Latents, LatentSpec, on_texture_grid
from semtok.sampler.request import ClassLabels, Sampled, SampleRequest, check_guidance_fits, draw
from semtok.sampler.sampling import SamplerConfig, Watch
from semtok.settings import Config, parse
from semtok.speed import Compiler, Precision, compile_networks, computing, set_convolutions
from semtok.storage import (
    first_line,
    load_weights,
    new_folder,
    read_json,
    tensor_bytes,
    write_json,
    write_tensors,
)
from semtok.tokenizer import FORMAT_VERSION, Tokenizer, check_format_version, library_version

KIND = "generator"
OutputType = Literal["pixels", "pt", "np", "pil", "latent"]
_RENAMED = {
    "labels": "class_labels",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "cfg_scale": "guidance_scale",
    "callback": "callback_on_step_end",
}
_CONFIG_FILE = "config.json"
_NETWORK_FILE = "network.safetensors"


class _Saved(Config):
    """What an export's config.json says of a generator, beside its kind and versions."""

    model_config = ConfigDict(extra="ignore")

    format_version: Any
    latents: list[Any]
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    diffusion: DiffusionConfig
    sampler: SamplerConfig
    trained: dict[str, Any]


class Generator(PushToHub, nn.Module):
    """Draws images of given classes.

    Args:
        network: the transformer; its classes are ``class_names``.
        tokenizer: whose latents it generates, and which decodes them.
        config: with leads and loss weights resolved.
        sampler: how samples are drawn unless a call says otherwise.
        image_size: (height, width) that it was trained at.
        training_info: what trained it; for readers.
    """

    def __init__(
        self,
        network: DiT,
        tokenizer: Tokenizer,
        config: DiffusionConfig,
        sampler: SamplerConfig,
        *,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        training_info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.config, self.sampler = config, sampler
        self.class_names, self.image_size = tuple(class_names), image_size
        self.training_info = training_info or {}
        self.schedule = config.schedule
        self._precision: Precision | None = None  # as the surroundings have it

    def speed_up(self, *, precision: Precision = "fp32", compile: Compiler = "none") -> "Generator":
        """Makes sampling faster from here on; images then differ by rounding.

        Args:
            precision: of the transformer; the state between steps and the decoder stay in float32.
            compile: torch.compile's backend for the transformer's blocks, or ``none``. The first images of
                each batch size wait for it.
        """
        self._precision = precision
        set_convolutions([self.network], precision)
        compile_networks(self.network.every_block, compile)
        return self

    @property
    def device(self) -> torch.device:
        return self.tokenizer.device

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the texture, on which all spatial parts are generated."""
        rows, columns = self.tokenizer.spec.shape("texture", self.image_size)[1:]
        return rows, columns

    @property
    def shift(self) -> float:
        """Of the training times, and of samplers that have none of their own."""
        return self.config.time.shift_for(self.network.spec.shapes_on(self.grid))

    @property
    def can_be_guided(self) -> dict[Base, bool]:
        """For each base whether training has prepared for guidance from it."""
        config = self.config
        knows_null = config.class_dropout > 0 and not config.unconditional
        drops = config.routing is not None and config.routing.path_drop > 0
        return {
            "null_label": knows_null,
            "dropped_path": drops and (knows_null or config.unconditional),
            "inner_head": config.internal_guidance is not None,
        }

    @torch.no_grad()
    def sample(
        self,
        class_labels: ClassLabels = None,
        *,
        image: Images | None = None,
        value_range: ValueRange | None = None,
        output_type: OutputType = "pixels",
        sampler: SamplerConfig | None = None,
        weak: "Generator | None" = None,
        **words: Any,
    ) -> Any:
        """Images of the given classes, in the words of the diffusers pipeline that it exports to.

        Image i of a seed is the same in a batch of any size, but with ``dopri5`` and ``error_over: batch``, where
        the images of one call share their steps.

        Args:
            class_labels: classes, by name or number; None, also in a list, is any class, as is the number of
                classes.
            image: to start from, one for all or one for each, as ``Tokenizer.encode`` takes them; ``strength``
                says how much of it is sampled anew. Semantics are encoded too, by the tokenizer's teacher.
            value_range: (black, white) of an image of floats; None: (0, 1), as ``np`` and ``pt`` give them.
            output_type: ``pixels`` (B, 3, H, W) in [-1, 1], ``pt`` the same in [0, 1], ``np`` (B, H, W, 3) in
                [0, 1], ``pil`` or ``latent``.
            sampler: instead of the one it was saved with.
            weak: a weaker generator of the same latents, for autoguidance.
            words: those of ``SampleRequest``: num_images_per_class, num_inference_steps, guidance_scale,
                guidance_base, seed (none and no generator: new noise in each call), generator, first, latents,
                strength, callback_on_step_end.

        Returns:
            what ``output_type`` says.

        Raises:
            ValueError: a class, scale, shape or setting that does not fit this model, guidance of what these
                latents have not, or a weak generator that does not fit.
            TypeError: a word that is none.
        """
        if output_type not in get_args(OutputType):
            raise ValueError(
                f"output_type {output_type!r}: expected {', '.join(get_args(OutputType))}"
            )
        latents = self.sample_latents(
            class_labels,
            image=image,
            value_range=value_range,
            sampler=sampler,
            weak=weak,
            **words,
        )
        if output_type == "latent":
            return latents
        # The decoder stays in float32, whatever the transformer is computed in.
        with computing(self.device, "fp32" if self._precision is not None else None):
            pixels = self.tokenizer.decode(latents).float()
        if output_type == "pil":
            return to_pil(pixels)
        if output_type == "pixels":
            return pixels
        unit = (pixels + 1) / 2
        return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()

    def forward(self, class_labels: ClassLabels = None, **words: Any) -> Any:
        """``sample``."""
        return self.sample(class_labels, **words)

    @torch.no_grad()
    def sample_latents(
        self,
        class_labels: ClassLabels = None,
        *,
        image: Images | None = None,
        value_range: ValueRange | None = None,
        sampler: SamplerConfig | None = None,
        weak: "Generator | None" = None,
        watch: Watch | None = None,
        **words: Any,
    ) -> Latents:
        """Latents of the given classes, spatial parts on the texture's grid, float32; see ``sample``.

        Args:
            watch: told the clock and the state at the start and on the way, see ``sampling.integrate``.
        """
        renamed = sorted(words.keys() & _RENAMED.keys())
        if renamed:
            raise TypeError(f"{renamed[0]}: is called {_RENAMED[renamed[0]]}")
        request = SampleRequest(class_labels, **words)
        settings = request.settings(sampler or self.sampler)
        if weak is not None and request.guidance_base is not None:
            raise ValueError("guidance_base: the weak model takes its place; give one of them")
        if request.guidance_scale is not None or request.guidance_base is not None:
            guided = weak is not None or self.can_be_guided[settings.guidance.base]
            check_guidance_fits(settings, self.network, can_be_guided=guided)
        self.check_sampling(settings, weak)
        model = self._sampled()
        known = None if image is None else self.encode(image, value_range=value_range)
        start = request.start(model, known)
        with computing(self.device, self._precision):
            return draw(
                model,
                request,
                settings,
                start=start,
                device=self.device,
                weak=weak.network if weak is not None else None,
                watch=request.watch(self, also=watch),
            )

    def _sampled(self) -> Sampled:
        trained = (self.schedule, self.config.path, self.shift)
        return Sampled(self.network, self.class_names, self.grid, *trained)

    def _numbers(self, class_labels: ClassLabels) -> list[int]:
        """Classes by number; raises ValueError as ``sample`` does."""
        return SampleRequest(class_labels).numbers(self._sampled())

    @torch.no_grad()
    def encode(self, image: Images, *, value_range: ValueRange | None = None) -> Latents:
        """Images as latents to start from, on the texture's grid, float32: the mean of their posterior.

        Args:
            value_range: see ``sample``.

        Raises:
            ValueError: images that ``Tokenizer.encode`` does not take, or of another size than it draws.
        """
        with computing(self.device, "fp32" if self._precision is not None else None):
            if are_floats(image):
                image, value_range = to_pixels(image, value_range=value_range or (0, 1)), (-1, 1)
                check_unit_range(image)
            latents = self.tokenizer.encode(image, value_range=value_range).to(torch.float32)
        size = tuple(
            side * self.tokenizer.spec["texture"].stride for side in latents.texture.shape[2:]
        )
        if size != tuple(self.image_size):
            height, width = self.image_size
            raise ValueError(
                f"image: this model draws {height}x{width} (height x width), got {size[0]}x{size[1]}; resize it "
                "first"
            )
        return Latents(on_texture_grid(latents))

    @torch.no_grad()
    def strip(
        self,
        labels: Sequence[int | str],
        *,
        columns: int = 9,
        seed: int | None = None,
        sampler: SamplerConfig | None = None,
    ) -> Tensor:
        """A picture of sampling: for each label the texture, decoded, and below it the semantic part
        where there is one, from noise (left) to data: uint8 (3, H, W).

        Rows are labelled by class, columns by the share of the sampling time that is over.

        Args:
            columns: states shown, evenly spaced on the clock as far as the sampler's steps allow.
        """
        seed = int(torch.randint(2**63 - 1, ())) if seed is None else seed
        rows = []
        for place, label in enumerate(labels):
            seen: list[tuple[float, dict[str, Tensor]]] = []
            self.sample_latents(
                [label],
                seed=seed,
                first=place,
                sampler=sampler,
                watch=lambda clock, state, seen=seen: seen.append((clock, state)),
            )
            clocks, chosen = [], []
            for column in range(columns):
                wanted = self.schedule.length * column / max(1, columns - 1)
                clock, state = min(seen, key=lambda entry: abs(entry[0] - wanted))
                clocks.append(f"{clock / self.schedule.length:.0%}")
                chosen.append(state)
            states = {name: torch.cat([state[name] for state in chosen]) for name in chosen[0]}
            images = self.tokenizer.decode(Latents(states))
            name = self.class_name(self._numbers([label])[0])
            rows.append(Row(name or "image", images, clocks if not rows else ()))
            if "semantic" in states:
                semantic = states["semantic"]
                maps = principal_components(semantic, of=semantic[-1:])
                rows.append(Row("semantic\n(PCA)", maps))
        return rows_of_images(rows)

    def class_name(self, number: int) -> str:
        """The name of a class; of no class, where there are classes, ``any class``; empty where there are none."""
        if number < len(self.class_names):
            return self.class_names[number]
        return "any class" if self.class_names else ""

    def check_sampling(self, sampler: SamplerConfig, weak: "Generator | None" = None) -> None:
        """Raises ValueError where this model can't be guided so, or a weak generator does not fit."""
        sampler.guidance.check_fits(self.network.spec)
        if weak is not None:
            self._check_weak(weak)
        else:
            check_guidance(self.config, sampler, self.network.spec)

    def _check_weak(self, weak: "Generator") -> None:
        """Autoguidance compares velocities, so both must mean the same by latents, classes and time."""
        ours, theirs = self.network.spec, weak.network.spec
        if theirs != ours:
            raise ValueError(
                f"the weak model's latents are {describe(theirs)}, this model's {describe(ours)}"
            )
        for what, own, other in (
            ("classes", self.class_names, weak.class_names),
            ("path", self.config.path, weak.config.path),
            ("leads", self.schedule, weak.schedule),
        ):
            if own != other:
                raise ValueError(f"the weak model has other {what} than this one")
        if not self.tokenizer.means_the_same(weak.tokenizer):
            raise ValueError("the weak model was trained on another tokenizer's latents")

    def use_decoder(self, tokenizer: Tokenizer) -> None:
        """From now on decodes by another tokenizer of the same latents, as ``method.train: decoder`` makes one of the
        tokenizer that this model was trained on (of a composite: of its texture). Its export then holds that one.

        Raises:
            UserError: the decoder was made for other latents.
        """
        tokenizer.requires_grad_(False).eval().to(self.device)
        self.tokenizer = self.tokenizer.with_decoder_of(tokenizer)

    def digest(self) -> str:
        """Twelve hex digits (of SHA-256) of what images follow from beside sampler, seed and labels: weights,
        statistics, path and times. They are those of every copy."""
        meaning = [self.network.spec.to_dict(), self.image_size, self.config.path, self.shift]
        hashed = hashlib.sha256(json.dumps([*meaning, dict(self.schedule.starts)]).encode())
        for name, tensor, content in tensor_bytes(self):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            hashed.update(content)
        return hashed.hexdigest()[:12]

    # Files --------------------------------------------------------------------------------------

    def save_pretrained(
        self, folder: str | Path, *, pictures: Mapping[str, Path] | None = None
    ) -> None:
        """Writes config.json, the network, ``tokenizer/``, the recipe and a model card; an existing export is
        replaced whole.

        Args:
            pictures: for the card, files by the names that they get.

        Raises:
            UserError: the folder holds something else.
        """
        with new_folder(Path(folder), replaces=_CONFIG_FILE) as temporary:
            self.tokenizer.save_pretrained(temporary / "tokenizer")
            config = self.to_dict()
            write_tensors(temporary / _NETWORK_FILE, self.network.state_dict(), provenance(config))
            write_json(temporary / _CONFIG_FILE, config)
            write_readme(temporary, config, pictures or {}, self.papers())

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of it: all but the weights and the tokenizer."""
        return {
            "library": "semtok",
            "library_version": library_version(),
            "format_version": FORMAT_VERSION,
            "kind": KIND,
            "latents": self.network.spec.to_dict(),
            "image_size": list(self.image_size),
            "class_names": list(self.class_names),
            "diffusion": self.config.model_dump(mode="json"),
            "sampler": self.sampler.model_dump(mode="json"),
            "trained": fit_to_show(self.training_info),
        }

    def papers(self) -> tuple[str, ...]:
        """To cite for the network, its training and its tokenizer, one line each."""
        config, shape = self.config, self.network.config
        used = {
            "SiT, arXiv 2401.08740": True,
            "LightningDiT, arXiv 2501.01423": shape.swiglu and shape.rope and shape.rms_norm,
            "REPA, arXiv 2410.06940": bool(config.repa),
            "iREPA, arXiv 2512.10794": bool(config.repa)
            and (config.repa.projector == "conv" or config.repa.spatial_norm is not None),
            "DDT, arXiv 2504.05741": shape.head is not None,
            "RAE, arXiv 2510.11690": shape.head is not None and shape.last_width != shape.width,
            "SPRINT, arXiv 2510.21986": config.routing is not None,
            "value residual learning, arXiv 2410.17897": shape.value_residual,
            "contrastive flow matching, arXiv 2506.05350": config.is_contrastive,
            "RAEv2, arXiv 2605.18324": config.internal_guidance is not None
            or config.prediction == "data",
        }
        own = [paper for paper, is_used in used.items() if is_used]
        return tuple(dict.fromkeys([*own, *papers_of(self.tokenizer.method)]))

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        plugin: str | Path | None = None,
    ) -> "Generator":
        """Loads a generator, in eval mode.

        Args:
            reference: an exported folder, a run folder or the name of a finished run, or a Hub id.
            revision: branch, tag or commit on the Hub.
            local_files_only: never ask the Hub, use its local cache.
            plugin: your file that registers the tokenizer's method; it is run. No code of the reference is.

        Raises:
            UserError: nothing found, a damaged file, a newer format, or a tokenizer of other latents.
        """
        load_plugins([plugin] if plugin is not None else [])
        folder = locate_export(
            str(reference), "model", revision=revision, local_files_only=local_files_only
        )
        place = folder / _CONFIG_FILE
        content = read_json(place)
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise UserError(f"{place}: not a semtok generator (made by tools/train_dit.py)")
        missing = sorted(_Saved.model_fields.keys() - content.keys())
        if missing:
            raise UserError(f"{place}: {', '.join(missing)} missing; export again")
        check_format_version(content, place)
        saved = parse(_Saved, content, str(place))
        tokenizer = Tokenizer.from_pretrained((folder / "tokenizer").absolute())
        try:
            spec = LatentSpec.from_dict(saved.latents)
            tokenizer.check_image_size(saved.image_size)
        except ValueError as error:
            raise UserError(f"{place}: {first_line(error)}") from None
        if spec != tokenizer.spec:
            raise UserError(
                f"{folder}: the model generates {describe(spec)}, its tokenizer has {describe(tokenizer.spec)}"
            )
        generator = cls(
            build_network(saved.diffusion, spec, num_classes=len(saved.class_names)),
            tokenizer,
            saved.diffusion,
            saved.sampler,
            class_names=saved.class_names,
            image_size=saved.image_size,
            training_info=saved.trained,
        )
        load_weights(generator.network, folder / _NETWORK_FILE)
        return generator.eval()


def describe(spec: LatentSpec) -> str:
    """A spec in a few words, for messages: ``texture 8 channels, stride 4``."""
    return "; ".join(
        f"{part.name} {part.channels} channels"
        + (f", stride {part.stride}" if part.is_spatial else "")
        for part in spec.parts
    )
