"""What ``sample`` does with a set: each process draws batches of it into one folder, and goes on where a run ended."""

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.drawn_sets import (
    LABELS_FILE,
    PROTOCOL_FILE,
    image_files,
    is_whole,
    protocol_text,
    read_protocol,
)
from semtok.images import Uint8Rule, to_uint8
from semtok.lock import is_of_the_killed
from semtok.pictures import write_png
from semtok.privacy import fit_to_show
from semtok.processes import gather, num_processes, process_index
from semtok.progress import progress
from semtok.sampler.sampling import SamplerConfig
from semtok.settings import flatten
from semtok.storage import write_json, write_text
from semtok.tokenizer import library_version
from semtok.unfinished import remove_unfinished

_NAMES = ("model.name", "weak.name")
_UNSAID = {"sampler.guidance.base": "null_label"}
"""How sets were drawn that do not say it, as they were begun before there was anything else."""
_MOST_SHOWN = 3


@dataclass(frozen=True)
class Drawing:
    """A set to be drawn.

    Attributes:
        weak: the generator of autoguidance.
        labels: of all images.
        batch_size: images drawn at once: those from a multiple of it on, whatever process draws them, as
            rounding, and ``sampler.error_over=batch``, depend on what is drawn together.
        image: that all start from; None: from noise alone.
        strength: the share of the time axis that is sampled from it on.
    """

    generator: Generator
    weak: Generator | None
    sampler: SamplerConfig
    labels: list[int]
    seed: int
    batch_size: int
    uint8: Uint8Rule
    image: Path | None = None
    strength: float | None = None

    def images_of_batch(self, number: int) -> range:
        """Which images of the set are drawn together."""
        first = number * self.batch_size
        return range(first, min(first + self.batch_size, len(self.labels)))

    @property
    def num_batches(self) -> int:
        return -(-len(self.labels) // self.batch_size)


def protocol_of(
    drawing: Drawing,
    args: argparse.Namespace,
    *,
    labels: str = "balanced",
    classes: list[int] | None = None,
) -> dict[str, Any]:
    """What a set says of itself: all that its images follow from, and nothing of this machine or person.

    Args:
        args: the options of a command that draws.
        labels: ``balanced`` or ``random``.
        classes: that labels are of, in their order; None: all.
    """
    generator, weak = drawing.generator, drawing.weak
    return {
        "library": "semtok",
        "library_version": library_version(),
        "model": {"name": fit_to_show(args.model), "digest": generator.digest()},
        "weak": {"name": fit_to_show(args.weak), "digest": weak.digest()} if weak else None,
        "sampler": drawing.sampler.model_dump(mode="json"),
        "num_images": len(drawing.labels),
        "image_size": list(generator.image_size),
        "num_classes": len(generator.class_names),
        "labels": labels,
        "classes": classes if classes is not None else "all",
        "seed": drawing.seed,
        "uint8": drawing.uint8,
        "precision": args.precision or "fp32",
        "compile": args.compile or "none",
        "batch_size": drawing.batch_size,
        **({} if drawing.image is None else _image_of(drawing)),
    }


def _image_of(drawing: Drawing) -> dict[str, Any]:
    """The image that a set starts from, by its bytes, as other files may have its name."""
    digest = hashlib.sha256(drawing.image.read_bytes()).hexdigest()[:12]
    return {"image": digest, "strength": drawing.strength}


def check_same(place: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, where a set was drawn otherwise than is wanted now.

    Models are compared by their digests: a folder may have moved.
    """
    ours, theirs = flatten(wanted), flatten(there)
    if "sampler.method" in theirs:
        theirs = _UNSAID | theirs
    differing = [
        f"{key} {theirs.get(key, 'not said')}, now {ours.get(key, 'not said')}"
        for key in dict.fromkeys((*ours, *theirs))
        if ours.get(key) != theirs.get(key) and key not in _NAMES
    ]
    if differing:
        more = f" and {len(differing) - _MOST_SHOWN} more" if len(differing) > _MOST_SHOWN else ""
        shown = "; ".join(differing[:_MOST_SHOWN]) + more
        raise UserError(
            f"--output {place}: holds a set drawn otherwise ({shown}); choose another, remove it, or go on as it began"
        )


def is_free(folder: Path) -> bool:
    """Whether a set may begin there: no folder yet, or one with nothing in it."""
    return not folder.exists() or all(is_of_the_killed(path.name) for path in folder.iterdir())


def image_name(number: int) -> str:
    """The file of an image of a set."""
    return f"{number:06d}.png"


def draw_set(drawing: Drawing, folder: Path, protocol: dict[str, Any]) -> None:
    """Draws what is missing of a set in a folder; all processes call it, within ``processes.together``.

    Files are there whole or not at all. Those that are there already stay if they are whole; of a batch of which
    one image is not, all are drawn. So the set does not depend on how often it was interrupted, nor on how many
    processes drew it, and no process holds more of it than a batch.

    Raises:
        UserError: the folder holds something else, or a set that was drawn otherwise.
    """
    if not process_index():
        _begin(drawing, folder, protocol)
    gather(None)
    own = _missing(drawing, folder)
    num = sum(gather(sum(len(drawing.images_of_batch(number)) for number in own)))
    if 0 < num < len(drawing.labels) and not process_index():
        print(f"{folder}: {len(drawing.labels) - num} of {len(drawing.labels)} images are there")
    rounds = max(gather(len(own)))
    with progress("sampling", num) as advance:
        for place in range(rounds):
            drawn = _draw_batch(drawing, folder, own[place]) if place < len(own) else 0
            advance(sum(gather(drawn)))


def _begin(drawing: Drawing, folder: Path, protocol: dict[str, Any]) -> None:
    there = read_protocol(folder) if folder.is_dir() else None
    if there is None and not is_free(folder):
        raise UserError(f"--output {folder}: exists already; choose another or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    # Without images nothing was drawn: a batch did not fit the memory, perhaps, and now it is smaller.
    images = image_files(folder)
    is_begun = there is not None and bool(images)
    if is_begun:
        check_same(folder, there, protocol)
    remove_unfinished(folder)
    foreign = next((name for name in images if not _is_of(drawing, name)), None)
    if foreign is not None:
        raise UserError(f"--output {folder}: {foreign} is no image of this set; remove it")
    if not is_begun:
        write_text(folder / PROTOCOL_FILE, protocol_text(protocol))
    write_json(folder / LABELS_FILE, drawing.labels)


def _is_of(drawing: Drawing, name: str) -> bool:
    stem = name.partition(".")[0]
    return stem.isdecimal() and int(stem) < len(drawing.labels) and name == image_name(int(stem))


def _missing(drawing: Drawing, folder: Path) -> list[int]:
    """Batches of this process's share of which an image is missing or damaged."""
    size = drawing.generator.image_size
    share = range(process_index(), drawing.num_batches, num_processes())
    missing = []
    with progress("looking for images", len(share), "batches") as advance:
        for number in share:
            files = (folder / image_name(i) for i in drawing.images_of_batch(number))
            if not all(is_whole(file, size) for file in files):
                missing.append(number)
            advance(1)
    return missing


def _draw_batch(drawing: Drawing, folder: Path, number: int) -> int:
    """Draws a batch and writes its images; their number."""
    images = drawing.images_of_batch(number)
    try:
        pixels = drawing.generator.sample(
            drawing.labels[images.start : images.stop],
            seed=drawing.seed,
            first=images.start,
            sampler=drawing.sampler,
            weak=drawing.weak,
            image=drawing.image,
            strength=drawing.strength,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    for i, image in zip(images, to_uint8(pixels, drawing.uint8).cpu(), strict=True):
        write_png(folder / image_name(i), image)
    return len(images)
