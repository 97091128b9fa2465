"""``sample MODEL``: images from a trained generator, to a grid, a folder or an ADM-style .npz."""

import argparse
import contextlib
import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from torch import Tensor

from semtok import stopping
from semtok.commands import sample_pack
from semtok.commands.cli import Parser, add_plugin_option
from semtok.commands.sample_set import (
    Drawing,
    check_same,
    draw_set,
    image_name,
    is_free,
    protocol_of,
)
from semtok.commands.sampler_options import (
    add_sampler_options,
    add_weak_option,
    load_weak,
    sampler_from,
    sped_up,
)
from semtok.diffusion.generator import Generator
from semtok.errors import UserError, did_you_mean
from semtok.evaluation.drawn_sets import image_files, read_images, read_protocol, write_archive
from semtok.evaluation.image_sets import DRAWN_AT_ONCE, labels_for
from semtok.images import Uint8Rule
from semtok.lock import only_one_in
from semtok.pictures import grid_of_images, write_png
from semtok.processes import gather, process_index, together, watching
from semtok.progress import progress
from semtok.registry import load_plugins
from semtok.sampler.request import STRENGTH, class_numbers, composed
from semtok.sampler.sampling import SamplerConfig
from semtok.storage import disk_told_with
from semtok.unfinished import beside, remove_of_the_dead

_PACK = "'sample pack FOLDER FILE.npz' packs a folder of images as ADM's evaluation reads it."
_PARTS = ".parts"


def _parser() -> Parser:
    parser = Parser(prog="sample", description=__doc__, epilog=_PACK)
    parser.add_argument("model", help="folder, run name or Hub id of a generator")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names or numbers, or 'none' for images of any class; default: all classes",
    )
    parser.add_argument("--num", type=int, help="images in all; default: 4 of each class")
    add_sampler_options(parser)
    add_weak_option(parser)
    parser.add_argument(
        "--strip",
        type=int,
        metavar="COLUMNS",
        help="show sampling over time, one image a row, its semantic part below; to FILE.png",
    )
    parser.add_argument(
        "--image",
        type=Path,
        help="an image of the model's size that all start from, instead of noise alone",
    )
    parser.add_argument(
        "--strength",
        type=float,
        help=f"with --image: the share of the time axis that is sampled, in (0, 1]; default: {STRENGTH}",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument(
        "--labels",
        choices=("balanced", "random"),
        help="classes take turns (the default), or each image's is drawn; published scores differ by it",
    )
    parser.add_argument(
        "--uint8",
        choices=get_args(Uint8Rule),
        help="how images become uint8: rounded (the default), or truncated as REPA does",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        help=f"default: {DRAWN_AT_ONCE}; images differ by rounding, speed by much",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="FILE.png (a grid), FILE.npz, or a folder; the same command goes on with one that was interrupted",
    )
    add_plugin_option(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if arguments and arguments[0] == "pack":
        return sample_pack.main(arguments[1:])
    args = _parser().parse_args(arguments)
    load_plugins(args.plugin)
    kind = _check_output(args.output)
    _check_options(args)
    generator = Generator.from_pretrained(args.model)
    sampler = sampler_from(args, generator)
    weak = load_weak(args, generator, sampler)
    classes = _classes(args.classes, generator)
    num = args.num if args.num is not None else 4 * len(classes)
    size = args.batch_size if args.batch_size is not None else DRAWN_AT_ONCE
    if min(num, size) < 1:
        raise UserError("--num and --batch-size must be at least 1")
    try:
        generator.check_sampling(sampler, weak)
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_image(args, generator)
    balanced = args.labels != "random"
    places = labels_for(num, len(classes), balanced=balanced, seed=args.seed)
    labels = [classes[place] for place in places]

    if args.strip is not None:
        generator = sped_up(generator, args)
        _strip(args, generator, sampler, labels if args.num is not None else classes[:4])
        return 0
    drawing = Drawing(
        *(generator, weak, sampler, labels, args.seed, size),
        uint8=args.uint8 or "round",
        image=args.image,
        strength=args.strength,
    )
    chosen = classes if args.classes is not None else None
    protocol = protocol_of(drawing, args, labels=args.labels or "balanced", classes=chosen)
    way_on = f"the same command {'begins anew' if kind == 'grid' else 'goes on'}"
    disk = disk_told_with("give the same command again", place=args.output)
    with stopping.with_way_on(way_on), disk:
        _draw(args, drawing, protocol, kind)
    return 0


def _draw(args: argparse.Namespace, drawing: Drawing, protocol: dict[str, Any], kind: str) -> None:
    """Draws the set, each process its share of the batches, and makes of it what ``kind`` says."""
    output: Path = args.output
    parts = output.with_name(f"{output.name}{_PARTS}")
    if kind == "npz" and _is_packed(output, parts, protocol):
        return
    state = PartialState(cpu=not torch.cuda.is_available())
    for generator in (drawing.generator, drawing.weak):
        if generator is not None:
            sped_up(generator.to(state.device), args)
    if kind == "grid":
        with watching(), together(), _passing_folder(output) as folder:
            draw_set(drawing, folder, protocol)
            gather(None)  # all are written
            if state.is_main_process:
                write_png(output, _grid(folder, drawing.labels, drawing.generator))
    elif not _draw_to_keep(drawing, output if kind == "folder" else parts, output, protocol):
        return
    if not state.is_main_process:
        return
    names = [drawing.generator.class_name(n) or "any class" for n in dict.fromkeys(drawing.labels)]
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    print(f"{len(drawing.labels)} images of {shown}: {output}")


def _draw_to_keep(drawing: Drawing, folder: Path, output: Path, protocol: dict[str, Any]) -> bool:
    """Draws the set into a folder that this command has for itself, and packs it where it is not the output.

    Returns:
        whether it was drawn; another of this command may have packed it meanwhile.
    """
    is_main = not process_index()
    with stopping.with_way_on("the same command goes on"), contextlib.ExitStack() as stack:
        with watching(), together():
            if is_main:
                stack.enter_context(only_one_in(folder, "a command that draws a set"))
            if folder != output and gather(is_main and _is_packed(output, folder, protocol))[0]:
                return False
            draw_set(drawing, folder, protocol)
        if folder != output and is_main:  # the others need not wait
            _pack(folder, output, len(drawing.labels))
    return True


def _is_packed(output: Path, parts: Path, protocol: dict[str, Any]) -> bool:
    """Whether the archive is there; what is left of its making is then removed.

    Raises:
        UserError: there is one that was drawn otherwise.
    """
    if not output.exists():
        return False
    check_same(output, read_protocol(output) or {}, protocol)
    shutil.rmtree(parts, ignore_errors=True)
    print(f"{output}: is there already, whole")
    return True


def _pack(folder: Path, output: Path, num_images: int) -> None:
    """Makes an archive of a folder of the command's own, and removes it.

    Raises:
        UserError: the folder does not hold the whole set.
    """
    # Inside, where what a killed process leaves of it is removed when it goes on.
    with progress("packing", len(image_files(folder))) as advance:
        write_archive(folder / output.name, folder, num_images=num_images, progress=advance)
    (folder / output.name).replace(output)
    shutil.rmtree(folder)


@contextlib.contextmanager
def _passing_folder(output: Path) -> Iterator[Path]:
    """A folder for what is no longer wanted at the end, the same in all processes."""
    made = None
    if not process_index():
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_of_the_dead(output.parent)
        made = beside(output)
        made.mkdir()
    try:
        yield gather(made)[0]
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _grid(folder: Path, labels: list[int], generator: Generator) -> Tensor:
    """All images of a folder as one picture with the classes' names, uint8 (3, H, W). Each class stands together."""
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    names = [image_name(i) for i in order]
    images = np.stack(list(read_images(folder, names, generator.image_size)))
    return grid_of_images(
        rearrange(torch.from_numpy(images), "n h w c -> n c h w"),
        [generator.class_name(labels[i]) for i in order],
        _num_columns(len(labels), len(set(labels))),
    )


def _num_columns(num_images: int, num_classes: int) -> int:
    """Of a grid that is about square. No class is broken into two rows, and no row is cut short, where that is
    possible within a factor of 1.7."""
    square = num_images**0.5
    per_class, rest = divmod(num_images, num_classes)
    if not rest:
        whole = [n * per_class for n in range(1, num_classes + 1) if num_classes % n == 0]
        nearest = min(whole, key=lambda n: abs(math.log(n / square)))
        if num_classes > 1 and abs(math.log(nearest / square)) <= math.log(1.7):
            return nearest
    return math.ceil(square)


def _strip(
    args: argparse.Namespace, generator: Generator, sampler: SamplerConfig, labels: list[int]
) -> None:
    if args.output.suffix.lower() != ".png" or args.strip < 2 or args.weak:
        raise UserError(
            "--strip: expected at least 2 columns, --output FILE.png, and no --weak model"
        )
    generator.to("cuda" if torch.cuda.is_available() else "cpu")
    picture = generator.strip(labels, columns=args.strip, seed=args.seed, sampler=sampler)
    write_png(args.output, picture)
    print(f"sampling over time of {len(labels)} images: {args.output}")


def _check_output(output: Path) -> str:
    """``grid``, ``npz`` or ``folder``; refuses to write over anything but a set of its own, which may go on."""
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is no folder that can be written to")
    kind = {".png": "grid", ".npz": "npz"}.get(output.suffix.lower(), "folder")
    if kind == "folder" and not re.fullmatch(r"(\.\d+)?", output.suffix):  # cfg1.5 is a folder
        raise UserError(f"--output {output}: expected FILE.png, FILE.npz or a folder")
    begun = kind != "grid" and output.exists() and read_protocol(output) is not None
    is_new = is_free(output) if output.is_dir() and kind == "folder" else not output.exists()
    if not begun and not is_new:
        raise UserError(f"--output {output}: exists already; choose another or remove it")
    return kind


def _check_options(args: argparse.Namespace) -> None:
    """Refuses what would have no effect."""
    sets = {"--labels": args.labels, "--uint8": args.uint8, "--batch-size": args.batch_size}
    sets |= {"--image": args.image, "--strength": args.strength}
    without_effect = [option for option, value in sets.items() if value is not None]
    if args.strip is not None and without_effect:
        raise UserError(f"{without_effect[0]}: goes with a set of images, not with --strip")


def _check_image(args: argparse.Namespace, generator: Generator) -> None:
    """Raises UserError where the image or its strength can't be used; settles the strength."""
    if args.image is None:
        if args.strength is not None:
            raise UserError("--strength: says how much of an image is kept; give --image too")
        return
    args.strength = STRENGTH if args.strength is None else args.strength
    if not 0 < args.strength <= 1:
        raise UserError(f"--strength: expected more than 0 and at most 1, got {args.strength}")
    try:
        generator.encode(args.image)
    except ValueError as error:
        raise UserError(f"--image: {str(error).removeprefix('image: ')}") from None


def _classes(words: list[str] | None, generator: Generator) -> list[int]:
    names = generator.class_names
    if words is None:
        return list(range(len(names))) or [0]
    numbers = {"none": len(names)} | class_numbers(names)
    # Where names are numbers, another number could mean a class of that name, or a place among them.
    are_places = not any(name.isdecimal() for name in names)
    most = len(names) + ("none" in names)  # then any class has only its number
    chosen = []
    for word in map(composed, words):
        if word in numbers:
            chosen.append(numbers[word])
        elif word.isdecimal() and are_places and int(word) < most:
            chosen.append(int(word))
        else:
            known = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            numbered = f"0 to {len(names) - 1}, or by name " if are_places else ""
            hint = did_you_mean(word, names)
            raise UserError(
                f"--classes: no class '{word}'; {hint + ' ' if hint else ''}this model has {numbered}{known}; "
                f"{len(names) if 'none' in names else 'none'} is any class"
            )
    return chosen
