"""A tokenizer's latents of a whole image source, computed once: diffusion training without images.

Kept per image: mean and, where the part is sampled, standard deviation of every part's posterior,
standardised, so that each step still draws anew; labels; and, where REPA is to see exactly what the
teacher saw, its tokens in eight bits. Mirrored images have rows of their own. A second folder holds the
held-out images' latents, so that a finished cache trains without any image at hand.

Where a run has kept by itself what the tokenizer's teacher saw in the training images, that is read. The latents then
differ by float16's rounding from those whose features are computed.
"""

import glob
import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from semtok.data.caches.feature_cache import features_found
from semtok.data.caches.remote_shards import RemoteShards
from semtok.data.caches.shards import INDEX, Compute, Shards, ensure_shards
from semtok.data.remote import protocol, read_remote_json, within
from semtok.data.source import DataConfig, ImageBatch, ImageSource, Key
from semtok.errors import UserError
from semtok.images import to_pixels
from semtok.privacy import without_secrets
from semtok.processes import process_index, together
from semtok.sampler.latents import Latents, Posterior
from semtok.settings import Config, parse
from semtok.storage import first_line, read_json, tensor_bytes, write_json
from semtok.teachers import StoredFeatures, Teacher, TeacherFeatures
from semtok.tokenizer import Tokenizer

DTypeName = Literal["fp16", "bf16"]
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_TRAIN, _VALIDATION, _ABOUT = "train", "validation", "latents.json"
_PLACE = "data.cache"
_NOT_OF_THE_IMAGES = {"cache", "num_workers", "streaming", "local_gigabytes", "crop"}
_NUM_VALIDATION = 2048  # at most; more than training looks at


class CachedImages(Config):
    """What a cache says of the images, for where they are not at hand."""

    model_config = ConfigDict(extra="ignore")

    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    name: str
    data: dict[str, Any]
    """The settings that decide which images there are."""
    labels_states: tuple[str, str] = ("", "")
    """Of the training and the held-out images, see ``ImageSource.labels_state``; of older caches it is not known."""


class _Kept(Config):
    """What the index of its shards says of their rows."""

    model_config = ConfigDict(extra="ignore")

    flip: bool
    parts: tuple[str, ...]
    targets: dict[str, Any] | None


class CachedLatents(ImageSource):
    """A source whose batches hold posteriors of latents, and REPA's targets where they were kept.

    Args:
        shards: see ``ensure_latent_cache``.
        images: of which they are.
        held_out: whether they are the held-out ones of these.

    Raises:
        UserError: the shards hold something else than their index says.
    """

    is_cheap = True  # measured: two workers read latents at a fifth of the speed

    def __init__(self, shards: Shards, images: CachedImages, *, held_out: bool = False) -> None:
        place = f"{_PLACE}: {shards.folder}"
        self.shards, self.kept = shards, parse(_Kept, shards.about, f"{place}: about")
        # Behind a URL a look at the columns would fetch a shard.
        columns = self.kept.parts if isinstance(shards, RemoteShards) else shards.columns
        missing = [n for n in self.kept.parts if not {n, f"{n}/mean"} & set(columns)]
        if missing or "texture" not in self.kept.parts:
            raise UserError(
                f"{place}: has no latents of {missing or 'the texture'}; compute it anew"
            )
        self.image_size, self.class_names = images.image_size, images.class_names
        self.attributes: dict[str, tuple[str, ...]] = {}
        self.flip, self.name = self.kept.flip, images.name
        self.block_size = shards.shard_size if isinstance(shards, RemoteShards) else None
        self._labels_state = images.labels_states[held_out]

    @property
    def labels_state(self) -> str:
        return self._labels_state

    def __len__(self) -> int:
        return self.shards.num_images

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return self.load_keys([Key(index) for index in indices])

    def load_keys(self, keys: Sequence[Key]) -> ImageBatch:
        rows = self.shards.rows(keys)
        features = None
        if "targets/patches" in rows:
            patches, pooled, scale = (rows[f"targets/{n}"] for n in ("patches", "pooled", "scale"))
            features = StoredFeatures((patches,), pooled, (scale,))
        mean = Latents({name: rows[f"{name}/mean"] for name in self.kept.parts})
        std = {n: rows.get(f"{n}/std", torch.zeros_like(part)) for n, part in mean.items()}
        return self.shards.batch(keys, features=features, latents=Posterior(mean, Latents(std)))

    @property
    def target_width(self) -> int | None:
        """D of the targets of REPA that are kept; None: there are none."""
        column = self.shards.columns.get("targets/patches")
        return column[1][0] if column is not None else None

    @property
    def target_teacher(self) -> str | None:
        """Name of the teacher whose features those are."""
        return self.kept.targets["teacher"] if self.kept.targets is not None else None

    @property
    def targets_asked(self) -> dict[str, Any]:
        """How that teacher was asked, see ``TeacherConfig.asked``."""
        own = {"teacher", "weights"}
        return {k: v for k, v in (self.kept.targets or {}).items() if k not in own}


def ensure_latent_cache(
    sources: tuple[ImageSource, ImageSource],
    tokenizer: Tokenizer,
    folder: Path,
    *,
    data: DataConfig,
    targets: Teacher | None = None,
    dtype: DTypeName = "fp16",
    batch_size: int = 64,
    shard_size: int = 1024,
) -> tuple[CachedLatents, CachedLatents]:
    """Opens the caches of training and held-out images; where there are none, writes them first.

    Args:
        sources: training and held-out images.
        tokenizer: measured, in eval mode, on the device that is to compute.
        data: the settings of these images, by which the cache knows them where the images are not at hand.
        targets: the teacher whose tokens of its last layer are kept for REPA; None: none are.
        dtype: of the latents on disk.

    Raises:
        UserError: the folder holds something else, or the disk has too little room; in all processes, where it
            is raised in one.
    """
    (train, validation), device = sources, tokenizer.texture_mean.device
    if targets is not None:
        targets.to(device)
    about = {
        "tokenizer": fingerprint(tokenizer),
        "parts": list(tokenizer.spec.names),
        "targets": targets and _targets_about(targets),
        "dtype": dtype,
        "image_size": list(train.image_size),
    }
    compute = _latents_of(tokenizer, targets, _DTYPES[dtype], device)
    held_out = _Unmirrored(validation, validation.chosen(_NUM_VALIDATION))
    seen = CachedImages(
        image_size=train.image_size,
        class_names=train.class_names,
        name=train.name,
        data=settings_of_images(data),
        labels_states=(train.labels_state, validation.labels_state),
    )
    cached = []
    with together():
        _check_folder(folder)
        for name, source, images in ((_TRAIN, train, train), (_VALIDATION, held_out, validation)):
            shards = ensure_shards(
                source,
                folder / name,
                compute,
                about={**about, "source": images.identity},
                what=f"latents of the {'training' if name == _TRAIN else 'held-out'} images",
                place=_PLACE,
                features=_kept_features(train, tokenizer, folder) if source is train else None,
                batch_size=batch_size,
                shard_size=shard_size,
            )
            cached.append(CachedLatents(shards, seen, held_out=images is validation))
        if not process_index() and not (folder / _ABOUT).is_file():
            _write_about(folder, seen)
    return cached[0], cached[1]


def _write_about(folder: Path, seen: CachedImages) -> None:
    try:
        write_json(folder / _ABOUT, seen.model_dump(mode="json"))
    except OSError as error:
        raise UserError(f"{_PLACE}: {folder}: {first_line(error)}") from None


def _check_folder(folder: Path) -> None:
    """Raises UserError where there is something else than a cache of latents."""
    known = {_TRAIN, _VALIDATION, _ABOUT}
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    foreign = sorted(name for name in names if name not in known and not name.startswith("."))
    if foreign:
        raise UserError(
            f"{_PLACE}: {folder} holds other files ({foreign[0]}); choose another folder"
        )


def is_latent_cache(place: str) -> bool:
    """Whether a folder holds a finished cache; of a URL it is taken for granted."""
    files = (_ABOUT, f"{_TRAIN}/{INDEX}", f"{_VALIDATION}/{INDEX}")
    return bool(protocol(place)) or all((Path(place) / file).is_file() for file in files)


def open_latent_cache(
    place: str | Path, tokenizer: Tokenizer, *, data: DataConfig
) -> tuple[CachedLatents, CachedLatents]:
    """The caches of training and held-out images; no image is asked for.

    Args:
        place: a folder, or a URL that fsspec knows.
        data: the images that they are to be of.

    Raises:
        UserError: no finished cache, damaged, or of another tokenizer or other images.
    """
    if protocol(str(place)):
        url = str(place).rstrip("/")
        about = read_remote_json(within(url, _ABOUT), _PLACE)
        train, validation = (RemoteShards(within(url, n), _PLACE) for n in (_TRAIN, _VALIDATION))
    else:
        folder = Path(place)
        about = read_json(folder / _ABOUT)
        train, validation = (Shards(folder / name, _PLACE) for name in (_TRAIN, _VALIDATION))
    if train.about.get("tokenizer") != fingerprint(tokenizer):
        raise UserError(
            f"{_PLACE}: {place} holds latents of another tokenizer; choose another folder"
        )
    images = parse(CachedImages, about, f"{_PLACE}: {place}/{_ABOUT}")
    for key, value in settings_of_images(data).items():
        known = _without_secrets(images.data.get(key))  # earlier versions kept them
        # Where the images are not at hand, their path means nothing.
        if not _same_setting(known, value) and (key != "path" or _at_hand(value)):
            raise UserError(
                f"{_PLACE}: {place} holds latents of other images (data.{key}: {known}, here {value}); "
                "choose another folder"
            )
    return CachedLatents(train, images), CachedLatents(validation, images, held_out=True)


def _same_setting(ours: Any, theirs: Any) -> bool:
    """A path may be written in several ways."""
    both = isinstance(ours, str) and isinstance(theirs, str) and Path(theirs).exists()
    return ours == theirs or (both and Path(ours).resolve() == Path(theirs).resolve())


def _at_hand(path: Any) -> bool:
    """Whether images are where a setting says: a path, a URL, a pattern with ``*``, ``?`` or braces, or several."""
    if not isinstance(path, str):
        return any(map(_at_hand, path or ()))
    return bool(protocol(path) or glob.glob(re.sub(r"\{[^}]*\}", "*", path)))


def fingerprint(tokenizer: Tokenizer) -> str:
    """A digest of all that decides what a tokenizer's latents are."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value, content in tensor_bytes(tokenizer):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(content)
    teachers = [getattr(module, "teacher_fingerprint", None) for module in tokenizer.modules()]
    inner = [own for own in teachers[1:] if own is not None]  # of a texture that encodes by one too
    for own in (teachers[0], *inner):
        digest.update(str(own).encode())
    return digest.hexdigest()


# What is kept ------------------------------------------------------------------------------------


def _kept_features(
    train: ImageSource, tokenizer: Tokenizer, folder: Path
) -> Callable[[Sequence[Key]], StoredFeatures] | None:
    """What the tokenizer's teacher saw in training images, where a run has kept it and there is need of it."""
    grid = tokenizer.feature_grid(train.image_size)
    if grid is None or tokenizer.teacher is None or (folder / _TRAIN / INDEX).is_file():
        return None
    kept = features_found(train, tokenizer.teacher, grid)
    return kept.features if kept is not None else None


def _latents_of(
    tokenizer: Tokenizer, targets: Teacher | None, dtype: torch.dtype, device: torch.device
) -> Compute:
    own = tokenizer.teacher_config
    shared = targets is not None and own is not None and targets.config == own
    largest = torch.finfo(dtype).max

    @torch.no_grad()
    def compute(batch: ImageBatch) -> dict[str, Tensor]:
        assert batch.images is not None
        pixels = to_pixels(batch.images.to(device))
        if batch.features is not None:
            features = batch.features.map(lambda part: part.to(device)).restored()
        else:
            features = tokenizer.features(pixels)
        posterior = tokenizer.posterior(pixels, features)
        columns = {f"{name}/mean": part for name, part in posterior.mean.items()}
        columns |= {
            f"{name}/std": part for name, part in posterior.std.items() if bool((part > 0).any())
        }
        columns = {n: v.clamp(-largest, largest).to(dtype) for n, v in columns.items()}
        if targets is not None:
            columns |= _pack_features(features if shared else targets.features(pixels))
        return columns

    return compute


def _pack_features(features: TeacherFeatures | None) -> dict[str, Tensor]:
    """The last layer's tokens in int8 with a scale for each, the pooled token in float16."""
    assert features is not None
    patches = features.patches[-1].float()
    scale = patches.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
    return {
        "targets/patches": (patches / scale).round().to(torch.int8),
        "targets/scale": scale.float(),
        "targets/pooled": features.pooled.float(),
    }


def _targets_about(teacher: Teacher) -> dict[str, Any]:
    """Which features REPA's targets are."""
    names = {"teacher": teacher.config.name, "weights": teacher.fingerprint()}
    return names | teacher.config.asked()


def settings_of_images(data: DataConfig) -> dict[str, Any]:
    """The settings that decide which images there are; not ``crop``, as a cache holds the one at the centre, and not
    what of a URL is secret."""
    settings = data.model_dump(mode="json", exclude=_NOT_OF_THE_IMAGES)
    return {key: _without_secrets(value) for key, value in settings.items()}


def _without_secrets(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_secrets(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


class _Unmirrored(ImageSource):
    """A part of a source, unflipped, as a source."""

    def __init__(self, source: ImageSource, indices: Sequence[int]) -> None:
        self.source, self.indices = source, list(indices)
        self.image_size, self.class_names = source.image_size, source.class_names
        self.attributes, self.flip, self.name = source.attributes, False, source.name
        # Of a choice nobody knows the blocks, and each loader process would fetch them anew.
        self.num_workers = source.num_workers if source.block_size is None else 0

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return self.source.load([self.indices[i] for i in indices])
