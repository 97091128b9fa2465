"""When a cache pays, when a diffusion transformer is trained from cached latents, and where they lie."""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from semtok.data.caches.latent_cache import (
    CachedLatents,
    ensure_latent_cache,
    fingerprint,
    is_latent_cache,
    settings_of_images,
)
from semtok.data.images.folder import FolderConfig
from semtok.data.images.kinds import open_sources
from semtok.data.source import DataConfig, ImageSource
from semtok.diffusion.training import DiffusionObjective
from semtok.errors import UserError
from semtok.lock import InUse
from semtok.recipe import DiffusionRecipe, TokenizerRecipe
from semtok.references import RUNS

_TIMES, _SAVED = 2, 10_000
"""A cache pays where each image is seen so often, and so many encodings are saved."""


def stored_latents(data: DataConfig) -> str | None:
    """The finished cache that the settings name, which makes the images themselves unnecessary."""
    named = data.cache not in ("auto", "none")
    return data.cache if named and is_latent_cache(data.cache) else None


def warn_of_other_images(cached: CachedLatents, data: DataConfig) -> None:
    """Says so where a folder of images is not as it was when its latents were computed."""
    if not isinstance(data, FolderConfig) or not Path(data.path).is_dir():
        return
    try:
        identity = open_sources(data)[0].identity
    except UserError:  # the images are not needed
        return
    if identity != cached.shards.about.get("source"):
        print(
            f"warning: the images in {data.path} were changed, or copied, since {data.cache} was computed; "
            "training sees what the cache holds",
            flush=True,
        )


def check_targets(
    cached: CachedLatents, objective: DiffusionObjective, recipe: DiffusionRecipe[Any]
) -> None:
    """Raises UserError where REPA is to see a teacher's features and the cache has none, or another's."""
    repa = objective.config.repa
    if not repa or repa.targets == "decoded":
        return
    asked = recipe.teacher or objective.tokenizer.teacher_config
    kept = (cached.target_teacher, cached.targets_asked)
    if kept[0] is None or (asked is not None and (asked.name, asked.asked()) != kept):
        has = f"those of '{kept[0]}'" if kept[0] else "none"
        if asked is not None and asked.name == kept[0]:
            has += f" with {_written(kept[1])}, here {_written(asked.asked())}"
        raise UserError(
            f"data.cache: {recipe.data.cache} keeps REPA's targets of a teacher: {has}; pass "
            "diffusion.repa.targets=decoded, diffusion.repa=false, or another folder"
        )


def _written(asked: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in asked.items()) or "default settings"


def cached_latents(
    recipe: DiffusionRecipe[Any],
    images: tuple[ImageSource, ImageSource],
    objective: DiffusionObjective,
    accelerator: Accelerator,
) -> tuple[CachedLatents, CachedLatents] | None:
    """Latents in place of the images, computed now: where the settings name a folder, or by default where
    it pays. None: training encodes images in each step.

    Raises:
        UserError: the folder that the settings name can't be taken.
    """
    data, tokenizer = recipe.data, objective.tokenizer
    if data.cache == "none":
        return None
    if data.draws_crops:
        if accelerator.is_main_process:
            print(
                "note: latents are computed in each step (data.crop=random: a cache holds one crop of each image)",
                flush=True,
            )
        return None
    folder = Path(data.cache)
    if data.cache == "auto":
        if not pays(recipe, images[0]):
            return None
        folder = RUNS / "cache" / _digest(recipe, images[0], objective)
    try:
        return ensure_latent_cache(
            images,
            tokenizer.to(accelerator.device),
            folder,
            data=data,
            targets=objective.target_teacher,
        )
    except InUse:  # by the next run of the kind; another way to have latents would give others
        raise
    except UserError as error:
        if data.cache != "auto":
            raise
        if accelerator.is_main_process:
            print(f"note: latents are computed in each step ({error})", flush=True)
        return None


def pays(recipe: DiffusionRecipe[Any] | TokenizerRecipe[Any, Any], images: ImageSource) -> bool:
    """Whether training sees each image, and its mirror image, often enough."""
    seen = recipe.train.steps * recipe.train.batch_size
    computed = len(images) * (2 if images.flip else 1)
    return seen >= _TIMES * computed and seen - computed >= _SAVED


def _digest(
    recipe: DiffusionRecipe[Any], images: ImageSource, objective: DiffusionObjective
) -> str:
    """A name for the folder of what is computed, the same for every run that needs the same."""
    teacher = objective.target_teacher
    content = [
        fingerprint(objective.tokenizer),
        images.identity,
        settings_of_images(recipe.data),
        teacher.fingerprint() if teacher is not None else None,
    ]
    if teacher is not None and (asked := teacher.config.asked()):
        content.append(asked)
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
