"""How fast latents are written and read: images per second, and what of writing is not the models."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.reglue import random_reglue
from benchmarks.timing import Timing
from semtok.data.caches.latent_cache import CachedLatents, ensure_latent_cache
from semtok.data.caches.shards import ensure_shards
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageBatch, ImageSource

_BATCH = 256
_SIZE = 256  # pixels along a side


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
        batch_size=_BATCH,
    )
    written = Timing("writing, models aside", [time.perf_counter() - start], num_images)
    seen = {"image_size": source.image_size, "class_names": source.class_names, "name": "blank"}
    size = min(_BATCH, num_images)
    cached, steps = CachedLatents(shards, seen), num_images // size
    seconds = []
    for epoch in range(3):
        batches = training_batches(
            cached,
            DataOrder(num_images, size, epoch, False),
            BatchSlice(size, 1, 0, 1),
            first_step=0,
            last_step=steps,
            num_workers=0,
            pin_memory=False,
        )
        start = time.perf_counter()
        for _ in batches:
            pass
        seconds.append(time.perf_counter() - start)
    read = Timing("reading, shuffled", seconds, steps * size)
    return written, read, shards.bytes_per_image


def encoding_rate(num_images: int, folder: Path) -> Timing:
    """Writing the same parts as they come from SD's autoencoder, DINOv2-B and REGLUE's compressor, with random
    weights, on images of 256x256 pixels.
    """
    config = ShapesConfig(kind="shapes", size=_SIZE, num_images=num_images, num_validation_images=1)
    sources = Shapes(config, train=True), Shapes(config, train=False)
    folder.mkdir()
    tokenizer = random_reglue(folder)

    def write(images: tuple[ImageSource, ImageSource], cache: Path) -> float:
        start = time.perf_counter()
        device = Accelerator().device
        ensure_latent_cache(images, tokenizer.to(device), cache, data=config, dtype="bf16")
        return time.perf_counter() - start

    write((sources[1], sources[1]), folder / "first")  # what is set up once is not counted
    return Timing("writing, with the networks", [write(sources, folder / "cache")], num_images + 1)
