"""Small images that tell their number, and what several tests check of every source that reads some."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageSource


def png(number: int, size: tuple[int, int] = (12, 9)) -> bytes:
    """An image of one colour, which is its number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number // 256, number % 256, 99)).save(file, "PNG")
    return file.getvalue()


def numbers(images: torch.Tensor) -> list[int]:
    """The numbers of images (B, 3, H, W), each of one colour."""
    assert (images == images[:, :, :1, :1]).all() and (images[:, 2] == 99).all()
    return (images[:, 0, 0, 0].int() * 256 + images[:, 1, 0, 0]).tolist()


def numbers_in(source: ImageSource) -> list[int]:
    """The numbers of all images of a source, in its order."""
    return numbers(source.load(range(len(source))).images)


def odd_images() -> dict[str, bytes]:
    """Files by name: transparency, palettes, grey, 16 bits, and a photograph taken with a turned camera."""
    random = np.random.default_rng(0)
    rgba = Image.fromarray(random.integers(0, 256, (20, 14, 4), dtype=np.uint8))
    grey16 = Image.fromarray(random.integers(0, 2**16, (9, 9), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, image, options in [
        ("rgba.png", rgba, {}),
        ("palette.png", rgba.convert("RGB").convert("P"), {"transparency": 3}),
        ("grey.jpg", rgba.convert("L"), {}),
        ("deep.png", grey16, {}),
        ("turned.jpg", rgba.convert("RGB"), {"exif": exif}),
        ("moving.webp", rgba, {}),
    ]:
        file = io.BytesIO()
        image.save(file, name.rpartition(".")[2].replace("jpg", "jpeg"), **options)
        files[name] = file.getvalue()
    return files


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    """Writes a tar file of (name, content)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def check_order(
    source: ImageSource, *, num_processes: int, accumulate: int = 1, num_workers: int = 0
) -> None:
    """Two epochs, shared out: all images, each once an epoch, in the one order; and so from any step on.

    The images of ``source`` have the numbers 0, 1, …
    """
    num_images, batch_size, seed = len(source), 2 * num_processes * accumulate, 3
    order = DataOrder(num_images, batch_size, seed, source.flip, source.block_size)
    num_steps = -(-2 * num_images // batch_size)

    def seen(first_step: int) -> list[int]:
        """Numbers in the order of the global batches, put together from what the processes load."""
        parts = [
            training_batches(
                source,
                order,
                BatchSlice(batch_size, accumulate, process, num_processes),
                first_step=first_step,
                last_step=num_steps,
                num_workers=num_workers,
                pin_memory=False,
            )
            for process in range(num_processes)
        ]
        micro_batches = [batch for step in zip(*parts, strict=True) for batch in step]
        return [number for batch in micro_batches for number in numbers(batch.images)]

    whole = seen(0)
    for epoch in range(2):
        own = whole[epoch * num_images : (epoch + 1) * num_images]
        assert sorted(own) == list(range(num_images)), "each image once in an epoch"
    assert whole == [index for step in range(num_steps) for index, _, _ in order.keys(step)]
    middle = num_steps // 2
    assert seen(middle) == whole[middle * batch_size :], "a resumed run sees what is left"
