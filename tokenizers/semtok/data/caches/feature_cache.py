"""A teacher's features of a whole image source, computed once, read from disk in every step."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from semtok.data.caches.shards import Shards, ensure_shards
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.images import to_pixels
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

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return self.load_keys([Key(index) for index in indices])

    def load_keys(self, keys: Sequence[Key]) -> ImageBatch:
        rows = self.shards.rows(keys)
        pooled = rows.pop("pooled")
        patches = tuple(rows[f"layer_{i}"] for i in range(len(rows)))
        return self.shards.batch(keys, features=StoredFeatures(patches, pooled))


def ensure_feature_cache(
    source: ImageSource,
    teacher: Teacher,
    grid: tuple[int, int],
    folder: Path,
    *,
    batch_size: int,
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
        about={
            "source": source.identity,
            "image_size": list(source.image_size),
            "teacher": teacher.config.name,
            "teacher_fingerprint": teacher.fingerprint(),
            "layers": list(teacher.config.layers),
            "grid": list(grid),
        },
        what="the teacher's features",
        place=_PLACE,
        batch_size=batch_size,
    )
    return CachedFeatures(source, shards)
