"""How fast latents are written and read: images per second, and what of writing is not the models."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from semtok.commands.benchmarks.timing import Timing
from semtok.data.latent_cache import CachedLatents
from semtok.data.loading import BatchSlice, DataOrder, training_batches
from semtok.data.shards import ensure_shards
from semtok.data.source import ImageBatch, ImageSource

_BATCH = 256


class _Blank(ImageSource):
    """Labels without images: only what is computed from them counts."""

    image_size = (256, 256)
    class_names = tuple(map(str, range(1000)))
    flip = False
    name = "blank"

    def __init__(self, num_images: int) -> None:
        self.attributes, self.num_images = {}, num_images

    def __len__(self) -> int:
        return self.num_images

    def load(self, indices: list[int]) -> ImageBatch:
        return ImageBatch(torch.zeros(len(indices), 3, 1, 1), torch.tensor(indices) % 1000)


def cache_rates(num_images: int, folder: Path) -> tuple[Timing, Timing, float]:
    """Writing and reading REGLUE's parts of 256x256 images in bfloat16: 4x32x32 twice (mean and standard
    deviation), 16x16x16, 768. No model runs, so writing is all I/O. Also the bytes of an image.
    """
    pool = torch.randn(_BATCH, 2 * 4 * 32 * 32 + 16 * 16 * 16 + 768).bfloat16()

    def compute(batch: ImageBatch) -> dict[str, Tensor]:
        rows = pool[: len(batch.labels)]
        texture, semantic = rows[:, :8192].unflatten(1, (2, 4, 32, 32)), rows[:, 8192:12288]
        return {
            "texture/mean": texture[:, 0],
            "texture/std": texture[:, 1],
            "semantic/mean": semantic.unflatten(1, (16, 16, 16)),
            "global/mean": rows[:, 12288:],
        }

    source = _Blank(num_images)
    about = {"parts": ["texture", "semantic", "global"], "targets": None}
    start = time.perf_counter()
    shards = ensure_shards(
        source,
        folder,
        compute,
        about=about,
        what="rows",
        place="benchmark",
        accelerator=Accelerator(),
        batch_size=_BATCH,
    )
    written = Timing("writing, models aside", [time.perf_counter() - start], num_images)
    seen = {"image_size": source.image_size, "class_names": source.class_names, "name": "blank"}
    cached, steps = CachedLatents(shards, seen), num_images // _BATCH
    seconds = []
    for epoch in range(3):
        batches = training_batches(
            cached,
            DataOrder(num_images, _BATCH, epoch, False),
            BatchSlice(_BATCH, 1, 0, 1),
            first_step=0,
            last_step=steps,
            num_workers=0,
            pin_memory=False,
        )
        start = time.perf_counter()
        for _ in batches:
            pass
        seconds.append(time.perf_counter() - start)
    read = Timing("reading, shuffled", seconds, steps * _BATCH)
    return written, read, shards.bytes_per_image
