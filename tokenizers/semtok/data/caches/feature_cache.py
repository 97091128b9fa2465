"""A teacher's features of a whole image source, computed once, read from disk wherever they are needed.

Training of coders, statistics of latents and caches of latents read them. A cache that is made by itself lies in a
folder that is named by what it holds, so that whoever needs these features of these images finds it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from semtok.data.caches.shards import INDEX, Shards, ensure_shards
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.errors import UserError
from semtok.images import to_pixels
from semtok.lock import InUse
from semtok.processes import gather
from semtok.progress import announce
from semtok.references import RUNS
from semtok.teachers import StoredFeatures, Teacher

_HALF = 65504.0  # the largest float16
_PLACE = "method.feature_cache"


class CachedFeatures(ImageSource):
    """A source whose batches hold cached features instead of images.

    Args:
        source: the images.
        shards: a cache of that source, see ``ensure_feature_cache``.
    """

    is_cheap = True

    def __init__(self, source: ImageSource, shards: Shards) -> None:
        self.source, self.shards = source, shards
        self.image_size, self.class_names = source.image_size, source.class_names
        self.attributes, self.flip, self.name = source.attributes, source.flip, source.name
        self.left_out = source.left_out
        # A run that is resumed when a cache has come, or has gone, keeps its order.
        self.block_size = source.block_size

    @property
    def identity(self) -> str:
        return self.source.identity

    @property
    def file_states(self) -> dict[str, str]:
        return self.source.file_states

    @property
    def labels_state(self) -> str:
        return self.source.labels_state

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return self.load_keys([Key(index) for index in indices])

    def load_keys(self, keys: Sequence[Key]) -> ImageBatch:
        return self.shards.batch(keys, features=self.features(keys))

    def features(self, keys: Sequence[Key]) -> StoredFeatures:
        """What the teacher saw in these images, mirrored where their keys say so."""
        rows = self.shards.rows(keys)
        pooled = rows.pop("pooled")
        patches = tuple(rows[f"layer_{i}"] for i in range(len(rows)))
        return StoredFeatures(patches, pooled)


def features_as_asked(
    source: ImageSource,
    teacher: Teacher,
    grid: tuple[int, int],
    cache: str | None,
    *,
    pays: bool,
    accelerator: Accelerator,
) -> CachedFeatures | None:
    """The features that a setting asks to keep; where they are not there, all processes compute them first, together.

    Args:
        grid: (rows, columns) of the patch tokens.
        cache: a folder; ``auto``: the one that everybody finds, where it is there or ``pays``; None: none.
        pays: whether each image is needed often enough.

    Raises:
        UserError: the folder that the setting names can't be taken, or another process writes there.
    """
    if cache is None:
        return None
    if cache != "auto":
        return ensure_feature_cache(source, teacher, grid, Path(cache), accelerator=accelerator)
    if source.crop == "random":
        announce(
            "note: the teacher's features are computed in each step (data.crop=random: a cache holds one crop of each "
            "image)"
        )
        return None
    teacher.to(accelerator.device)
    folder = automatic_folder(source, teacher, grid)
    if not pays and not gather((folder / INDEX).is_file())[0]:
        announce(
            "note: the teacher's features are computed each time (method.feature_cache=auto: training sees too few "
            "images too seldom for a cache)"
        )
        return None
    try:
        return ensure_feature_cache(source, teacher, grid, folder, accelerator=accelerator)
    except InUse:  # by the next run of the kind; features that are computed differ by rounding
        raise
    except UserError as error:
        announce(f"note: the teacher's features are computed in each step ({error})")
        return None


def features_found(
    source: ImageSource, teacher: Teacher, grid: tuple[int, int]
) -> CachedFeatures | None:
    """The features that an earlier run kept by itself; None: there are none.

    Raises:
        UserError: they are damaged.
    """
    folder = automatic_folder(source, teacher, grid)
    if not (folder / INDEX).is_file():
        return None
    announce(f"reading the teacher's features of {source.name} from {folder}")
    return CachedFeatures(source, Shards(folder, _PLACE))


def automatic_folder(source: ImageSource, teacher: Teacher, grid: tuple[int, int]) -> Path:
    """Where a cache that is made by itself lies: the same for whoever needs the same features."""
    content = {**_about(source, teacher, grid), "num_images": len(source), "flip": source.flip}
    digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()
    return RUNS / "cache" / f"features_{digest}"


def _about(source: ImageSource, teacher: Teacher, grid: tuple[int, int]) -> dict[str, Any]:
    """Which features of which images these are."""
    return {
        "source": source.identity,
        "image_size": list(source.image_size),
        "teacher": teacher.config.name,
        "teacher_fingerprint": teacher.fingerprint(),
        "layers": list(teacher.config.layers),
        "grid": list(grid),
    }


def ensure_feature_cache(
    source: ImageSource,
    teacher: Teacher,
    grid: tuple[int, int],
    folder: Path,
    *,
    batch_size: int = 64,
    accelerator: Accelerator,
) -> CachedFeatures:
    """Opens the cache in ``folder``; where there is none, all processes write it first, together.

    Features are kept in float16.

    Args:
        grid: (rows, columns) of the patch tokens.
        batch_size: images per forward of the teacher.

    Raises:
        UserError: the folder holds something else, or the disk has too little room.
    """
    teacher.to(accelerator.device)

    def compute(batch: ImageBatch) -> dict[str, Tensor]:
        features = teacher.features(to_pixels(batch.images.to(accelerator.device)), grid=grid)
        columns = {f"layer_{i}": patches for i, patches in enumerate(features.patches)}
        columns["pooled"] = features.pooled
        return {name: value.clamp(-_HALF, _HALF).half() for name, value in columns.items()}

    shards = ensure_shards(
        source,
        folder,
        compute,
        about=_about(source, teacher, grid),
        what="the teacher's features",
        place=_PLACE,
        batch_size=batch_size,
    )
    return CachedFeatures(source, shards)
