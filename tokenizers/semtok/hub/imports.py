"""Published checkpoints as this library's own: tokenizers, generators, or a part of one alone."""

import copy
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from semtok.diffusion.diffusion_config import DiffusionConfig, resolve_defaults
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.hub import import_dit as dits
from semtok.hub import import_vae as vaes
from semtok.hub.formats import (
    DITS,
    Checkpoint,
    Format,
    open_checkpoint,
    read_statistics,
    recognise,
    statistics_beside,
)
from semtok.hub.import_coder import import_compressor, import_semvae, semvae_heads
from semtok.hub.modules import save_module
from semtok.methods.composite import CompositeConfig, FeatureCoder
from semtok.methods.reglue import Compressor
from semtok.methods.vae import KLTokenizer
from semtok.objective import MethodContext
from semtok.references import recipe_folder
from semtok.registry import get_method
from semtok.sampler.dit import PRESETS, DiT, DiTArchitecture
from semtok.sampler.sampling import SamplerConfig
from semtok.sampler.transport import PathName
from semtok.settings import parse, read_yaml
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

_FAMILIES: dict[Format, dits.Family] = {"sit": "sit", "lightningdit": "lightningdit"}
_FAMILIES |= {"sfd": "lightningdit"}
"""Of all others: REPA's."""
# Recipes of the published networks, for how each is sampled.
_RECIPES: dict[Format, str] = {"sit": "sit_xl2", "repa": "sit_xl2_repa", "reg": "sit_xl2_reg"}
_RECIPES |= {"reglue": "sit_xl2_reglue", "repa-e": "sit_xl2_repa", "sfd": "lightningdit_xl1_sfd"}
_RECIPES |= {"lightningdit": "lightningdit_xl1"}
_PATHS: dict[str, PathName] = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
_LEAD = 0.3  # SFD's, which its weights were trained with


@dataclass(frozen=True)
class ImportOptions:
    """What a published file does not say of itself.

    Attributes:
        weights: the averaged or the trained ones, of a file that has both.
        tokenizer: whose latents a diffusion transformer generates, or whose image latents a coder's stand
            beside; None: it is imported as a part alone.
        teacher: whose features a coder codes.
        statistics: of raw latents: a file of mean and std, or a scaling factor; of REGLUE's compressor those
            of the features. None: the statistics file beside the checkpoint, where there is one.
        heads: attention heads of a network of unpublished width.
        image_size: pixels along a side, from which a coder's grid follows; None: the published 256.
    """

    weights: Literal["ema", "model"] = "ema"
    tokenizer: Tokenizer | None = None
    teacher: Teacher | None = None
    statistics: Path | float | None = None
    heads: int | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Imported:
    """An import, not yet written.

    Attributes:
        model: a whole tokenizer or generator, or a part alone.
        became: of every tensor, and of every other entry of the file, what became of it.
        notes: what the user should know, one line each.
    """

    format: Format
    model: Tokenizer | Generator | DiT | FeatureCoder
    trained: Mapping[str, Any]
    became: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes it as an export."""
        if isinstance(self.model, Tokenizer | Generator):
            self.model.save_pretrained(folder)
        else:
            save_module(self.model, folder, trained=self.trained)


def import_checkpoint(
    path: str | Path, format: Format | Literal["auto"], options: ImportOptions
) -> Imported:
    """Reads a published checkpoint; nothing in it is run.

    Args:
        path: a file, or a folder of diffusers.
        format: ``auto`` tells it from the names in the file.

    Raises:
        UserError: a file of another or of no known format, tensors that do not fit, by name, or options
            that do not belong to it.
    """
    checkpoint = open_checkpoint(path, options.weights)
    format = _choose(format, checkpoint)
    trained = {"imported_from": f"{checkpoint.path.name} ({format})"}
    job = _Import(checkpoint, format, options, trained)
    if checkpoint.nest is not None:
        job.notes.append(f"weights of '{checkpoint.nest}'")
    if format in DITS:
        model = job.generator()
    elif format in ("compvis-vae", "diffusers-vae"):
        model = job.autoencoder()
    else:
        model = job.coder()
    return Imported(format, model, trained, job.became, job.notes)


def _choose(wanted: Format | Literal["auto"], checkpoint: Checkpoint) -> Format:
    possible = recognise(checkpoint)
    if wanted == "auto":
        if len(possible) > 1:
            raise UserError(
                f"{checkpoint.path}: can be of {' or '.join(possible)}, which run time in opposite directions; "
                "name the format instead of auto"
            )
        return possible[0]
    if wanted not in get_args(Format):
        raise UserError(f"no format '{wanted}'; formats: auto, {', '.join(get_args(Format))}")
    # REG's and REGLUE's differ in what their channels mean, which only the user knows.
    alike = {"reg", "reglue"} if set(possible) & {"reg", "reglue"} else set(possible)
    if wanted not in alike:
        raise UserError(
            f"{checkpoint.path}: is of {' or '.join(possible)} by its names, not {wanted}"
        )
    return wanted


@dataclass
class _Import:
    """One import on its way; collects what became of everything."""

    checkpoint: Checkpoint
    format: Format
    options: ImportOptions
    trained: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place, self.became = str(self.checkpoint.path), self.checkpoint.beside()

    # Tokenizers of images ------------------------------------------------------------------------

    def autoencoder(self) -> KLTokenizer:
        self._refuse("tokenizer", "teacher", "heads", "image_size")
        if self.format == "diffusers-vae":
            folder = self.checkpoint.path
            folder = folder if (folder / "config.json").is_file() else folder / "vae"
            tokenizer = KLTokenizer.from_diffusers(folder)
            self.became |= dict.fromkeys(tokenizer.autoencoder.state_dict(), "network")
            if self.options.statistics is None:
                return self._finished(tokenizer)
        else:
            tokenizer = self._compvis(self.checkpoint.state)
        statistics = self._statistics(tokenizer.spec["texture"].channels)
        if statistics is None:
            self.notes.append(
                "its latents are not standardised yet: give --statistics, a file of mean and std or a scaling "
                "factor such as 0.18215, or call measure_statistics; until then it only decodes raw latents"
            )
        else:
            _standardise(tokenizer, "texture", statistics)
        return self._finished(tokenizer)

    def _compvis(self, state: Mapping[str, Tensor]) -> KLTokenizer:
        self.became |= {name: vaes.what_became_of(name) for name in state}
        return KLTokenizer(vaes.import_autoencoder(state, place=self.place), method="vae")

    def _finished(self, tokenizer: KLTokenizer) -> KLTokenizer:
        tokenizer.training_info = self.trained
        return tokenizer.eval()

    # Tokenizers with coded features --------------------------------------------------------------

    def coder(self) -> Tokenizer | FeatureCoder:
        options = self.options
        self.became |= dict.fromkeys(self.checkpoint.state, "network")
        if (options.tokenizer is None) != (options.teacher is None):
            raise UserError(f"{self.place}: give both --tokenizer and --teacher, or neither")
        if options.tokenizer is None:
            self._refuse("image_size", *(["statistics"] if self.format == "semvae" else []))
        if self.format == "reglue-compressor":
            self._refuse("heads")
            statistics = self._statistics(None)
            if statistics is None:
                raise UserError(
                    f"{self.place}: its features' statistics are in another file, dino_mean_std_….pth; "
                    "give it by --statistics"
                )
            coder: FeatureCoder = import_compressor(
                self.checkpoint.state, statistics, place=self.place
            )
        else:
            read = semvae_heads(self.checkpoint.content)
            if read is not None:
                self.became["config"] = "read for the number of heads"
            elif options.heads is None:
                self.notes.append("the file does not say how many heads there are: 6, as published")
            heads = options.heads or read
            coder = import_semvae(self.checkpoint.state, place=self.place, heads=heads)
        if options.tokenizer is None or options.teacher is None:
            self.notes.append(
                "a coder alone; with --tokenizer (of the image latents) and --teacher name=… it becomes a tokenizer"
            )
            return coder
        return self._composite(coder, options.tokenizer, options.teacher)

    def _composite(self, coder: FeatureCoder, texture: Tokenizer, teacher: Teacher) -> Tokenizer:
        if sum(teacher.widths) != coder.shape.feature_channels:
            raise UserError(
                f"{self.place}: codes {coder.shape.feature_channels} features, the teacher's layers give "
                f"{'+'.join(map(str, teacher.widths))}; other teacher.name or teacher.layers"
            )
        settings = coder.settings()
        side = self.options.image_size or 256
        if isinstance(coder, Compressor):
            shape = {"hidden": settings["hidden"], "channels": settings["channels"]}
            # As published, only the image latents are scaled.
            content = {"name": "reglue", "compressor": shape, "statistics": "none"}
        else:
            shape = {key: settings[key] for key in ("channels", "width", "heads", "blocks")}
            content = {"name": "semvae", **shape}
        method = get_method(content["name"], place=self.place)
        config = parse(method.config, content, self.place)
        assert isinstance(config, CompositeConfig)
        try:
            objective = method.objective(config, MethodContext((side, side), teacher, 0, texture))
        except ValueError as error:
            raise UserError(f"{self.place}: {error}") from None
        objective.averaged_module().load_state_dict(coder.state_dict())
        tokenizer = objective.tokenizer(objective.averaged_module()).eval()
        if tokenizer.measured_parts:
            self._standardise_semantic(tokenizer)
        tokenizer.training_info = self.trained
        return tokenizer

    def _standardise_semantic(self, tokenizer: Tokenizer) -> None:
        statistics = self._statistics(tokenizer.spec["semantic"].channels)
        if statistics is None:
            raise UserError(
                f"{self.place}: the code's statistics are in another file, latents_sv_stats.pt; give it by "
                "--statistics"
            )
        _standardise(tokenizer, "semantic", statistics)

    # Generators ----------------------------------------------------------------------------------

    def generator(self) -> Generator | DiT:
        self._refuse("teacher", "statistics", "image_size")
        content, tokenizer = self.checkpoint.content, self.options.tokenizer
        state = self.checkpoint.state
        self.became |= {name: dits.what_became_of(name) for name in state}
        if self.format == "repa-e" and isinstance(content.get("vae"), dict):
            self._refuse("tokenizer")
            del self.became["vae"]
            tokenizer = self._finished(self._compvis(content["vae"]))
        imported = dits.import_dit(
            state,
            place=self.place,
            family=_FAMILIES.get(self.format, "repa"),
            heads=self.options.heads,
            spec=tokenizer.spec if tokenizer is not None else None,
        )
        if self.options.heads is not None:
            self.notes.append(f"{self.options.heads} heads as given, which no weight can confirm")
        path, class_dropout = self._trained_with()
        if tokenizer is None:
            self.notes.append(
                "a network alone; with --tokenizer it becomes a generator that tools/sample.py takes"
            )
            return imported.network
        if imported.statistics is not None:
            if tokenizer is self.options.tokenizer:  # the caller's stays as it is
                tokenizer = copy.deepcopy(tokenizer)
                self.notes.append(
                    "the tokenizer is standardised by the checkpoint's own statistics"
                )
            _standardise(tokenizer, "texture", imported.statistics)
        if not tokenizer.is_measured:
            raise UserError(
                f"{self.place}: the tokenizer's latents are not standardised; import it with --statistics first"
            )
        network, stride = imported.network, tokenizer.spec["texture"].stride
        assert stride is not None
        leads = (
            {"semantic": _LEAD}
            if self.format == "sfd"
            else dict.fromkeys(tokenizer.spec.names, 0.0)
        )
        config = DiffusionConfig(
            network=_preset(network.config),
            path=path,
            leads=leads,
            class_dropout=class_dropout,
            repa=False,
        )
        return Generator(
            network,
            tokenizer,
            resolve_defaults(config, tokenizer),
            published_sampler(self.format),
            class_names=_class_names(network.num_classes),
            image_size=(imported.grid[0] * stride, imported.grid[1] * stride),
            training_info=self.trained,
        ).eval()

    def _trained_with(self) -> tuple[PathName, float]:
        """Path and class dropout, as the arguments beside the weights say; else the published ones.

        Raises:
            UserError: a path or a prediction that this library has not.
        """
        arguments = self.checkpoint.content.get("args")
        told = vars(arguments) if isinstance(arguments, Namespace) else {}
        path = str(told.get("path_type", "linear")).lower()
        prediction = str(told.get("prediction", "v")).lower()
        if path not in _PATHS or prediction not in ("v", "velocity"):
            raise UserError(
                f"{self.place}: was trained with path_type {path} and prediction {prediction}; only velocities "
                "on the linear and the cosine (GVP) path can be imported"
            )
        if not told and self.format in ("sit", "repa", "reg", "reglue", "repa-e"):
            self.notes.append("the file has no arguments: a linear path and velocities are assumed")
        dropout = told.get("cfg_prob", 0.1)
        return _PATHS[path], float(dropout) if isinstance(dropout, int | float) else 0.1

    # Shared --------------------------------------------------------------------------------------

    def _statistics(self, channels: int | None) -> tuple[Tensor, Tensor] | None:
        given, path = self.options.statistics, self.checkpoint.path
        if isinstance(given, float):
            if channels is None:
                raise UserError(f"--statistics {given}: expected a file here")
            if not 1e-12 < given < 1e12:
                raise UserError(f"--statistics {given}: expected a file or a positive number")
            return torch.zeros(channels), torch.full((channels,), 1 / given)
        file = given or (statistics_beside(path, self.format) if path.is_file() else None)
        if file is None:
            return None
        if given is None:
            self.notes.append(f"statistics taken from {file}, which lies beside it")
        mean, std = read_statistics(file)
        if len(mean) != len(std) or channels not in (None, len(mean)):
            raise UserError(f"{file}: statistics of {len(mean)} channels, not of {channels}")
        return mean, std

    def _refuse(self, *names: str) -> None:
        for name in names:
            if getattr(self.options, name) is not None:
                option = name.replace("_", "-")
                raise UserError(
                    f"{self.place}: --{option} says nothing to a checkpoint of {self.format}; leave it out"
                )


def published_sampler(format: Format) -> SamplerConfig:
    """How the network of that format is sampled in its paper, as its recipe says.

    ``sde`` has REPA's diffusion coefficient for REPA's family and SiT's for others; only on the linear path,
    which recipes take, are both the same.
    """
    folder = recipe_folder()
    sampler = SamplerConfig()
    if folder is not None:
        file = folder / "imagenet256" / f"{_RECIPES[format]}.yaml"
        sampler = parse(SamplerConfig, read_yaml(file).get("sampler", {}), f"{file}: sampler")
    is_repas = _FAMILIES.get(format, "repa") == "repa"
    return sampler.model_copy(update={"diffusion": "linear" if is_repas else "sigma"})


def _standardise(tokenizer: Tokenizer, part: str, statistics: tuple[Tensor, Tensor]) -> None:
    (mean, std), channels = statistics, tokenizer.spec[part].channels
    if len(mean) != channels:
        raise UserError(f"statistics of {len(mean)} channels for a {part} of {channels}")
    getattr(tokenizer, f"{part}_mean").copy_(mean)
    getattr(tokenizer, f"{part}_std").copy_(std)
    tokenizer.num_measured_images.fill_(1)  # by whoever published them


def _preset(shape: DiTArchitecture) -> str | DiTArchitecture:
    return next((name for name, preset in PRESETS.items() if preset == shape), shape)


def _class_names(num_classes: int) -> list[str]:
    """ImageNet's, as its folders are called; numbers of other data."""
    if num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_label_name(i) for i in range(num_classes)]
    return [str(number) for number in range(num_classes)]
