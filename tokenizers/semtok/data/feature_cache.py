"""A teacher's features of a whole image source, computed once, read from disk in every step."""

import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.errors import UserError
from semtok.images import to_pixels
from semtok.storage import DAMAGE, first_line, read_json, write_json
from semtok.teachers import Teacher, TeacherFeatures

_INDEX, _LABELS = "index.json", "labels.npy"
_HALF = 65504.0  # the largest float16


class CachedFeatures(ImageSource):
    """A source whose batches hold cached features instead of images.

    Features are float16 arrays on disk, one file per teacher layer and one for the pooled token,
    read by memory map. Mirrored images have rows of their own.

    Args:
        source: the images.
        folder: a finished cache of that source, see ``ensure_feature_cache``.
    """

    def __init__(self, source: ImageSource, folder: Path) -> None:
        self.source, self.folder = source, folder
        self.image_size, self.class_names = source.image_size, source.class_names
        self.attributes, self.flip, self.name = source.attributes, source.flip, source.name
        try:
            self.index = read_json(folder / _INDEX)
            self._skipped = {int(i): name for i, name in self.index["skipped"].items()}
            self._arrays = [np.load(folder / name, mmap_mode="r") for name in self.index["files"]]
            self._labels = np.load(folder / _LABELS)
        except (*DAMAGE, TypeError, AttributeError) as error:
            raise UserError(
                f"method.feature_cache: {folder} is damaged ({first_line(error)}); remove it, and it "
                "is computed again"
            ) from None

    def __len__(self) -> int:
        return len(self.source)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return self.load_keys([(index, False) for index in indices])

    def load_keys(self, keys: Sequence[Key]) -> ImageBatch:
        rows = [index + len(self) * mirror for index, mirror in keys]
        *patches, pooled = (torch.from_numpy(array[rows]).float() for array in self._arrays)
        labels = torch.from_numpy(self._labels[[index for index, _ in keys]])
        skipped = tuple(self._skipped[index] for index, _ in keys if index in self._skipped)
        return ImageBatch(
            None, labels, skipped=skipped, features=TeacherFeatures(tuple(patches), pooled)
        )


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

    Args:
        grid: (rows, columns) of the patch tokens.
        batch_size: images per forward of the teacher.

    Raises:
        UserError: the folder holds something else, or the disk has too little room.
    """
    wanted = _description(source, teacher, grid)
    teacher.to(accelerator.device)
    if not (folder / _INDEX).is_file():
        try:
            _write(
                source,
                teacher,
                grid,
                folder,
                wanted,
                batch_size=batch_size,
                accelerator=accelerator,
            )
        except OSError as error:
            raise UserError(f"method.feature_cache: {folder}: {first_line(error)}") from None
    cached = CachedFeatures(source, folder)
    wrong = [key for key, value in wanted.items() if cached.index.get(key) != value]
    if wrong:
        key = wrong[0]
        raise UserError(
            f"method.feature_cache: {folder} holds other features ({key}: {cached.index.get(key)}, "
            f"here {wanted[key]}); choose another folder"
        )
    return cached


def _description(source: ImageSource, teacher: Teacher, grid: tuple[int, int]) -> dict[str, Any]:
    """What has to agree for cached features to be those that would be computed."""
    return {
        "source": source.identity,
        "num_images": len(source),
        "flip": source.flip,
        "image_size": list(source.image_size),
        "teacher": teacher.config.name,
        "teacher_fingerprint": teacher.fingerprint(),
        "layers": list(teacher.config.layers),
        "grid": list(grid),
    }


def _write(
    source: ImageSource,
    teacher: Teacher,
    grid: tuple[int, int],
    folder: Path,
    description: dict[str, Any],
    *,
    batch_size: int,
    accelerator: Accelerator,
) -> None:
    mirrors = (False, True) if source.flip else (False,)
    num_rows = len(source) * len(mirrors)
    shapes = [(num_rows, width, *grid) for width in teacher.widths]
    shapes.append((num_rows, teacher.pooled_width))
    names = [f"layer_{i}.npy" for i in range(len(teacher.widths))] + ["pooled.npy"]
    place: list[Any] = [None]
    if accelerator.is_main_process:
        temporary = _claim(folder, sum(2 * math.prod(shape) for shape in shapes))
        place = [str(temporary)]
        for name, shape in zip(names, shapes, strict=True):
            np.lib.format.open_memmap(temporary / name, mode="w+", dtype=np.float16, shape=shape)
        labels = np.lib.format.open_memmap(
            temporary / _LABELS, mode="w+", dtype=np.int64, shape=(len(source),)
        )
        del labels
    temporary = Path(broadcast_object_list(place)[0])
    arrays = [np.load(temporary / name, mmap_mode="r+") for name in names]
    labels = np.load(temporary / _LABELS, mmap_mode="r+")
    keys = [(index, mirror) for mirror in mirrors for index in range(len(source))]
    firsts = range(0, num_rows, batch_size)
    own = firsts[accelerator.process_index :: accelerator.num_processes]
    skipped: dict[int, str] = {}
    for first in tqdm(
        own, desc="teacher's features", unit="batch", disable=not sys.stderr.isatty()
    ):
        rows = slice(first, min(first + batch_size, num_rows))
        batch = source.load_keys(keys[rows])
        features = teacher.features(to_pixels(batch.images.to(accelerator.device)), grid=grid)
        for array, values in zip(arrays, (*features.patches, features.pooled), strict=True):
            array[rows] = values.clamp(-_HALF, _HALF).half().cpu().numpy()
        indices = [index for index, _ in keys[rows]]
        labels[indices] = batch.labels.numpy()
        # Which of the batch they were, no batch tells; it counts that they are named.
        skipped |= dict(zip(indices, batch.skipped, strict=False))
    for array in (*arrays, labels):
        array.flush()
    everywhere = {k: v for part in gather_object([skipped]) for k, v in part.items()}
    if accelerator.is_main_process:
        write_json(temporary / _INDEX, {**description, "files": names, "skipped": everywhere})
        if (folder / _INDEX).is_file():  # another run was faster; its cache is as good
            shutil.rmtree(temporary)
        else:
            temporary.rename(folder)
    accelerator.wait_for_everyone()


def _claim(folder: Path, num_bytes: int) -> Path:
    """Makes a temporary folder of this run's own, after looking whether the result will have room."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"method.feature_cache: {folder} holds other files; choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if num_bytes > free:
        raise UserError(
            f"method.feature_cache: {folder} needs {num_bytes / 1e9:.1f} GB, the disk has "
            f"{free / 1e9:.1f} GB free; leave it out to compute features in each step"
        )
    print(
        f"computing the teacher's features once: {num_bytes / 1e9:.2f} GB in {folder}", flush=True
    )
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    temporary.chmod(0o755)  # mkdtemp's folders are closed to others
    return temporary
