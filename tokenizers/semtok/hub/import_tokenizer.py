"""Published tokenizers: autoencoders of images, and coders of features alone or beside image latents."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from semtok.errors import UserError
from semtok.hub import import_vae as vaes
from semtok.hub.formats import Format
from semtok.hub.import_coder import (
    REDI_COMPONENTS,
    check_semvae,
    coder_width,
    import_components,
    import_compressor,
    import_semvae,
    read_semvae,
)
from semtok.hub.import_rae import import_diffusers_rae, import_rae
from semtok.hub.job import ImportJob, standardise
from semtok.methods.coders import FeatureCoder
from semtok.methods.composite import CompositeConfig
from semtok.methods.redi import PrincipalComponents
from semtok.methods.reglue import Compressor
from semtok.methods.vae import KLTokenizer
from semtok.objective import MethodContext
from semtok.registry import get_method
from semtok.settings import parse
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

_Made = TypeVar("_Made", bound=Tokenizer)
_RAES: Mapping[Format, Callable[[ImportJob], Tokenizer]] = {
    "rae": import_rae,
    "diffusers-rae": import_diffusers_rae,
}


def import_tokenizer(job: ImportJob) -> Tokenizer | FeatureCoder:
    """The autoencoder or the coder that a file is; a coder with image latents and teacher is a tokenizer.

    Raises:
        UserError: tensors that do not fit, options that do not belong to it, or settings of another network.
    """
    job.refuse("encoder_blocks")
    if job.format in _RAES:
        return finished(job, _RAES[job.format](job))
    is_images = job.format in ("compvis-vae", "diffusers-vae")
    return _autoencoder(job) if is_images else _coder(job)


# Tokenizers of images ----------------------------------------------------------------------------


def _autoencoder(job: ImportJob) -> KLTokenizer:
    job.refuse("tokenizer", "teacher", "heads", "image_size", "semantic_channels")
    if job.format == "diffusers-vae":
        folder = job.checkpoint.path
        folder = folder if (folder / "config.json").is_file() else folder / "vae"
        tokenizer = KLTokenizer.from_diffusers(folder)
        job.fates |= dict.fromkeys(tokenizer.autoencoder.state_dict(), "network")
        if job.options.statistics is None:
            return finished(job, tokenizer)
    else:
        tokenizer = compvis_tokenizer(job, job.checkpoint.state)
    statistics = job.statistics(tokenizer.spec["texture"].channels)
    if statistics is None:
        job.notes.append(
            "its latents are not standardised yet: give --statistics, a file of mean and std or a scaling "
            "factor such as 0.18215, or call measure_statistics; until then it only decodes raw latents"
        )
    else:
        standardise(tokenizer, "texture", statistics)
    return finished(job, tokenizer)


def compvis_tokenizer(job: ImportJob, state: Mapping[str, Tensor]) -> KLTokenizer:
    """A tokenizer, not standardised, of an autoencoder's weights in CompVis' layout."""
    job.fates |= {name: vaes.what_became_of(name) for name in state}
    if any(name.startswith(vaes.PROJECTION) for name in state):
        job.notes.append(
            "its projection to the teacher's tokens is for training alone, and stays in the file: "
            f"method.name=va_vae goes on with it by method.alignment.weights={job.place}"
        )
    return KLTokenizer(vaes.import_autoencoder(state, place=job.place), method="vae")


def finished(job: ImportJob, tokenizer: _Made) -> _Made:
    """The same, told where it comes from."""
    tokenizer.training_info = job.trained
    return tokenizer.eval()


# Tokenizers with coded features --------------------------------------------------------------


def _coder(job: ImportJob) -> Tokenizer | FeatureCoder:
    options = job.options
    job.fates |= dict.fromkeys(job.checkpoint.state, "network")
    if (options.tokenizer is None) != (options.teacher is None):
        raise UserError(f"{job.place}: give both --tokenizer and --teacher, or neither")
    if options.tokenizer is None:
        job.refuse("image_size", *(["statistics"] if job.format == "semvae" else []))
    coder = _CODERS[job.format](job)
    if options.tokenizer is None or options.teacher is None:
        job.notes.append(
            "a coder alone; with --tokenizer (of the image latents) and --teacher name=… it becomes a tokenizer"
        )
        return coder
    return _composite(job, coder, options.tokenizer, options.teacher)


def _compressor(job: ImportJob) -> FeatureCoder:
    job.refuse("heads", "semantic_channels")
    statistics = job.statistics(None)
    if statistics is None:
        raise UserError(
            f"{job.place}: its features' statistics are in another file, dino_mean_std_….pth; "
            "give it by --statistics"
        )
    return import_compressor(job.checkpoint.state, statistics, place=job.place)


def _semvae(job: ImportJob) -> FeatureCoder:
    job.refuse("semantic_channels")
    read = read_semvae(job.settings)
    if read is None and job.options.heads is None:
        job.notes.append("the file does not say how many heads there are: 6, as published")
    if read is not None and job.options.heads not in (None, read):
        raise UserError(f"{job.place}: says itself that it has {read} heads; leave --heads out")
    width = coder_width(job.checkpoint.state)
    if read is not None and width is not None and (read < 1 or width % read):
        name = "model.params.transformer_heads"
        raise job.settings.refusal(name, f"its width of {width} is no multiple of that")
    coder = import_semvae(job.checkpoint.state, place=job.place, heads=job.options.heads or read)
    check_semvae(job.settings, job.checkpoint.content, coder)
    return coder


def _components(job: ImportJob) -> FeatureCoder:
    job.refuse("heads", "statistics")
    channels = job.options.semantic_channels
    if channels is None:
        channels = REDI_COMPONENTS
        job.notes.append(f"the first {channels} components are kept, as published")
    coder = import_components(job.checkpoint.content, channels, place=job.place)
    job.fates |= dict.fromkeys(map(str, job.checkpoint.content), "network")
    return coder


_CODERS: Mapping[Format, Callable[[ImportJob], FeatureCoder]] = {
    "reglue-compressor": _compressor,
    "semvae": _semvae,
    "redi-pca": _components,
}


def _composite(
    job: ImportJob, coder: FeatureCoder, texture: Tokenizer, teacher: Teacher
) -> Tokenizer:
    if sum(teacher.widths) != coder.shape.feature_channels:
        raise UserError(
            f"{job.place}: codes {coder.shape.feature_channels} features, the teacher's layers give "
            f"{'+'.join(map(str, teacher.widths))}; other teacher.name or teacher.layers"
        )
    settings = coder.settings()
    side = job.options.image_size or 256
    if isinstance(coder, Compressor):
        shape = {"hidden": settings["hidden"], "channels": settings["channels"]}
        # As published, only the image latents are scaled.
        content = {"name": "reglue", "compressor": shape, "statistics": "none"}
    elif isinstance(coder, PrincipalComponents):
        content = {"name": "redi", "channels": settings["channels"], "statistics": "none"}
    else:
        shape = {key: settings[key] for key in ("channels", "width", "heads", "blocks")}
        content = {"name": "semvae", **shape}
    method = get_method(content["name"], place=job.place)
    config = parse(method.config, content, job.place)
    assert isinstance(config, CompositeConfig)
    try:
        objective = method.objective(config, MethodContext((side, side), teacher, 0, texture))
    except ValueError as error:
        raise UserError(f"{job.place}: {error}") from None
    objective.averaged_module().load_state_dict(coder.state_dict())
    tokenizer = objective.tokenizer(objective.averaged_module()).eval()
    if tokenizer.measured_parts:
        _standardise_semantic(job, tokenizer)
    tokenizer.training_info = job.trained
    return tokenizer


def _standardise_semantic(job: ImportJob, tokenizer: Tokenizer) -> None:
    statistics = job.statistics(tokenizer.spec["semantic"].channels)
    if statistics is None:
        raise UserError(
            f"{job.place}: the code's statistics are in another file, latents_sv_stats.pt; give it by "
            "--statistics"
        )
    standardise(tokenizer, "semantic", statistics)
