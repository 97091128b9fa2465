"""How fast latents are written and read: images per second, and what of writing is not the models."""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.random_inputs import RandomSource
from benchmarks.reglue import random_reglue
from benchmarks.timing import Timing
from semtok.data.caches.latent_cache import CachedImages, CachedLatents, ensure_latent_cache
from semtok.data.caches.shards import ensure_shards
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageBatch, ImageSource

_BATCH = 256
_SIZE = 256  # pixels along a side


class _Blank(RandomSource):
    """Labels without images: only what is computed from them counts."""

    name = "blank"

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return ImageBatch(torch.zeros(len(indices), 3, 1, 1), self.labels(indices))


def _rows(targets: bool) -> dict[str, Tensor]:
    """REGLUE's parts of 256x256 images in bfloat16, as a cache keeps them, and DINOv2-B's tokens beside them."""
    rows = {
        "texture/mean": torch.randn(_BATCH, 4, 32, 32).bfloat16(),
        "texture/std": torch.randn(_BATCH, 4, 32, 32).bfloat16(),
        "semantic/mean": torch.randn(_BATCH, 16, 16, 16).bfloat16(),
        "global/mean": torch.randn(_BATCH, 768).bfloat16(),
    }
    if targets:
        patches = torch.randint(-127, 128, (_BATCH, 768, 16, 16), dtype=torch.int8)
        scale, pooled = torch.rand(_BATCH, 1, 16, 16), torch.randn(_BATCH, 768)
        rows |= {"targets/patches": patches, "targets/scale": scale, "targets/pooled": pooled}
    return rows


def cache_rates(num_images: int, folder: Path, *, targets: bool) -> tuple[Timing, Timing, float]:
    """Writing and reading REGLUE's parts. No model runs, so writing is all I/O. Also the bytes of an image.

    Args:
        targets: whether those of REPA lie beside them.
    """
    rows = _rows(targets)

    def compute(batch: ImageBatch) -> dict[str, Tensor]:
        return {name: column[: len(batch.labels)] for name, column in rows.items()}

    source = _Blank((_SIZE, _SIZE), num_images)
    kept = {"teacher": "random", "weights": ""} if targets else None
    about = {"parts": ["texture", "semantic", "global"], "targets": kept}
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
    seen = CachedImages(
        image_size=source.image_size, class_names=source.class_names, name="blank", data={}
    )
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


def encoding_rate(num_images: int, folder: Path, *, targets: bool) -> Timing:
    """Writing the same as it comes from SD's autoencoder, DINOv2-B and REGLUE's compressor, with random
    weights, on images of 256x256 pixels.
    """
    config = ShapesConfig(kind="shapes", size=_SIZE, num_images=num_images, num_validation_images=1)
    sources = Shapes(config, train=True), Shapes(config, train=False)
    folder.mkdir()
    tokenizer = random_reglue(folder)

    def write(images: tuple[ImageSource, ImageSource], cache: Path) -> float:
        start = time.perf_counter()
        device = Accelerator().device
        ensure_latent_cache(
            images,
            tokenizer.to(device),
            cache,
            data=config,
            targets=tokenizer.teacher if targets else None,
            dtype="bf16",
        )
        return time.perf_counter() - start

    write((sources[1], sources[1]), folder / "first")  # what is set up once is not counted
    return Timing("writing, with the networks", [write(sources, folder / "cache")], num_images + 1)
