"""Published diffusion transformers: with the tokenizer of their latents a generator, alone a network."""

import copy

import torch
from timm.data import ImageNetInfo

from semtok.diffusion.diffusion_config import DiffusionConfig, resolve_defaults
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.hub import headed_dit as headed
from semtok.hub import import_dit as dits
from semtok.hub.dit_settings import (
    TrainedWith,
    check_latents,
    check_network,
    read_training,
    sampler_for,
)
from semtok.hub.formats import Format
from semtok.hub.import_tokenizer import compvis_tokenizer, finished
from semtok.hub.job import ImportJob, standardise
from semtok.hub.sr_dit import routing, shifted
from semtok.sampler.architecture import PRESETS, DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.latents import LatentSpec
from semtok.storage import first_line
from semtok.tokenizer import Tokenizer

_FAMILIES: dict[Format, dits.Family] = {"sit": "sit", "redi": "sit"}
_FAMILIES |= {"lightningdit": "lightningdit", "sfd": "lightningdit"}
"""Of all others: REPA's."""
_SPLIT: dict[Format, str] = {"sfd": "sfd", "reglue": "reglue", "redi": "redi"}


def import_generator(job: ImportJob) -> Generator | DiT:
    """The generator, or the network alone where no tokenizer is given.

    Raises:
        UserError: tensors that do not fit, settings or options that do not belong to it, by name.
    """
    job.refuse("teacher", "statistics", *(() if job.format == "ddt" else ("image_size",)))
    became = headed.what_became_of if job.format in headed.TIMES else dits.what_became_of
    job.fates |= {name: became(name) for name in job.checkpoint.state}
    trained = read_training(job.settings, job.format)
    if trained.shown:
        job.trained["settings"] = dict(trained.shown)
    tokenizer = _tokenizer(job)
    if tokenizer is not None:
        job.refuse("semantic_channels")
        check_latents(job.settings, trained, tokenizer.spec)
    imported = _network(job, trained, tokenizer.spec if tokenizer is not None else None)
    if imported.network.config.learned_positions is not None:
        job.fates["pos_embed"] = "network"
    stride = tokenizer.spec["texture"].stride if tokenizer is not None else trained.stride
    side = imported.grid[0] * stride if stride is not None else None
    check_network(job.settings, imported, side, trained.lead)
    _tell(job, trained, imported)
    if tokenizer is None:
        return _alone(job, trained, imported)
    return _with_tokenizer(job, trained, imported, _standardised(job, trained, imported, tokenizer))


def _network(job: ImportJob, trained: TrainedWith, spec: LatentSpec | None) -> dits.ImportedDiT:
    state, options = job.checkpoint.state, job.options
    if job.format in headed.TIMES:
        job.refuse("heads", "semantic_channels")
        return headed.import_headed_dit(
            state,
            place=job.place,
            spec=spec,
            encoder_blocks=options.encoder_blocks,
            image_size=options.image_size,
        )
    job.refuse("encoder_blocks")
    return dits.import_dit(
        state,
        place=job.place,
        family=_FAMILIES.get(job.format, "repa"),
        heads=options.heads,
        spec=spec or _spec(job, trained),
        null_label=_has_null_label(job, trained),
    )


def _tokenizer(job: ImportJob) -> Tokenizer | None:
    content = job.checkpoint.content
    if job.format == "repa-e" and isinstance(content.get("vae"), dict):
        job.refuse("tokenizer")
        del job.fates["vae"]
        return finished(job, compvis_tokenizer(job, content["vae"]))
    return job.options.tokenizer


def _spec(job: ImportJob, trained: TrainedWith) -> LatentSpec:
    """Of the latents, where no tokenizer says it: by option, by the file's settings, as published."""
    given, read = job.options.semantic_channels, trained.semantic_channels
    if given is not None and read not in (None, given):
        raise UserError(
            f"{job.place}: says itself that {read} channels are semantic; leave --semantic-channels out"
        )
    if given is not None and job.format not in _SPLIT:
        job.refuse("semantic_channels")
    try:
        return dits.spec_of(
            job.checkpoint.state,
            given if given is not None else read,
            trained.stride,
            published=_SPLIT.get(job.format),
        )
    except ValueError as error:
        raise UserError(f"{job.place}: {first_line(error)}") from None


def _has_null_label(job: ImportJob, trained: TrainedWith) -> bool:
    """A table of labels without a row for none is what training without class dropout makes."""
    table = job.checkpoint.state.get("y_embedder.embedding_table.weight")
    values = job.settings.values
    classes = values.get("data.num_classes", values.get("num_classes"))
    if trained.null_label or table is None or table.ndim != 2 or classes is None:
        return True
    return len(table) != classes


def _tell(job: ImportJob, trained: TrainedWith, imported: dits.ImportedDiT) -> None:
    """Notes of what the user may not expect."""
    notes, settings = job.notes, job.settings
    if job.options.heads is not None:
        notes.append(f"{job.options.heads} heads as given, which no weight can confirm")
    if settings.entry is None:
        notes.append("the file has no settings: a linear path and velocities are assumed")
    if imported.without_shifts:
        notes.append("its blocks have no shifts: rows of zeros stand for them")
    if job.format == "redi":
        notes.append(
            "taken for image latents and principal components; of a texture alone it is 'sit'"
        )
    for name, value in trained.shown.items():
        notes.append(f"it was trained with {name} {value}")


def _alone(job: ImportJob, trained: TrainedWith, imported: dits.ImportedDiT) -> DiT:
    """The network, with what a generator would hold for readers of its card."""
    job.notes.append(
        "a network alone; with --tokenizer it becomes a generator that tools/sample.py takes"
    )
    for name in job.settings.values:
        if name.startswith("sample.") or name == "model.semfirst_infer_interval_mode":
            job.settings.fates[name] = "left out: a network alone is not sampled"
    config = _config(trained, imported, imported.network.spec)
    said = config.model_dump(mode="json", exclude_unset=True, exclude={"network", "repa"})
    latents = {"unscaled": list(trained.unscaled), "multiplier": trained.multiplier}
    if latents != {"unscaled": [], "multiplier": 1.0}:
        said["latents"] = latents
    job.trained["trained_with"] = said
    return imported.network


def _standardised(
    job: ImportJob, trained: TrainedWith, imported: dits.ImportedDiT, tokenizer: Tokenizer
) -> Tokenizer:
    """The tokenizer, whose latents are scaled as the network saw them; the caller's stays as it is."""
    unscaled = [part for part in trained.unscaled if part in tokenizer.spec.names]
    statistics, scale = imported.statistics, trained.latent_scale
    if scale is not None:
        channels = tokenizer.spec["texture"].channels
        statistics = (torch.zeros(channels), torch.full((channels,), 1 / scale))
    if statistics is None and not unscaled and trained.multiplier == 1:
        return tokenizer
    if tokenizer is job.options.tokenizer:
        tokenizer = copy.deepcopy(tokenizer)
        job.notes.append("the tokenizer is standardised as the checkpoint says")
    if statistics is not None:
        standardise(tokenizer, "texture", statistics)
    for part in unscaled:
        channels = tokenizer.spec[part].channels
        standardise(tokenizer, part, (torch.zeros(channels), torch.ones(channels)))
    for part in tokenizer.spec.parts:
        if part.is_spatial:
            getattr(tokenizer, f"{part.name}_std").div_(trained.multiplier)
    return tokenizer


def _with_tokenizer(
    job: ImportJob, trained: TrainedWith, imported: dits.ImportedDiT, tokenizer: Tokenizer
) -> Generator:
    if not tokenizer.is_measured:
        raise UserError(
            f"{job.place}: the tokenizer's latents are not standardised; import it with --statistics first"
        )
    network, stride = imported.network, tokenizer.spec["texture"].stride
    assert stride is not None
    try:
        config = resolve_defaults(_config(trained, imported, tokenizer.spec), tokenizer)
    except ValueError as error:
        raise UserError(f"{job.place}: {first_line(error)}") from None
    return Generator(
        network,
        tokenizer,
        config,
        sampler_for(job.format, network.config, job.settings),
        class_names=_class_names(network.num_classes),
        image_size=(imported.grid[0] * stride, imported.grid[1] * stride),
        training_info=job.trained,
    ).eval()


def _config(trained: TrainedWith, imported: dits.ImportedDiT, spec: LatentSpec) -> DiffusionConfig:
    """What the file says of training; the tokenizer's defaults say the rest."""
    network, time = imported.network.config, trained.time
    if trained.shift_base is not None and time is not None:
        rows, columns = imported.grid
        time = shifted(time, trained.shift_base, imported.channels * rows * columns)
    leads = dict.fromkeys(spec.names, 0.0)
    if trained.lead is not None:
        leads = {"semantic": trained.lead}
    told = {
        "time": time,
        "loss_weights": trained.loss_weights(spec),
        "cosine_weight": trained.cosine_weight,
    }
    told = {"repa": False, **told, **trained.more, "routing": routing(network)}
    return DiffusionConfig(
        network=_preset(network.model_copy(update={"split": None})),
        path=trained.path,
        leads=leads,
        class_dropout=trained.class_dropout,
        **{name: value for name, value in told.items() if value is not None},
    )


def _preset(shape: DiTArchitecture) -> str | DiTArchitecture:
    return next((name for name, preset in PRESETS.items() if preset == shape), shape)


def _class_names(num_classes: int) -> list[str]:
    """ImageNet's, as its folders are called; numbers of other data."""
    if num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_label_name(i) for i in range(num_classes)]
    return [str(number) for number in range(num_classes)]
