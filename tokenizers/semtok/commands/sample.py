"""``sample MODEL``: images from a trained generator, to a grid, a folder or an ADM-style .npz."""

import argparse
import contextlib
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from torchvision.utils import make_grid

from semtok.commands.cli import Parser, add_plugin_option
from semtok.commands.sampler_options import add_sampler_options, sampler_from, sped_up
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.images import to_uint8
from semtok.pictures import write_png
from semtok.processes import gather, num_processes, process_index, progress, together
from semtok.registry import load_plugins
from semtok.sampler.sampling import SamplerConfig
from semtok.storage import new_file


def _parser() -> Parser:
    parser = Parser(prog="sample", description=__doc__)
    parser.add_argument("model", help="folder, run name or Hub id of a generator")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help="names or numbers, or 'none' for images of any class; default: all classes",
    )
    parser.add_argument("--num", type=int, help="images in all; default: 4 of each class")
    add_sampler_options(parser)
    parser.add_argument(
        "--weak", metavar="MODEL", help="autoguidance: guide away from this weaker model"
    )
    parser.add_argument(
        "--strip",
        type=int,
        metavar="COLUMNS",
        help="show sampling over time, one image a row, its semantic part below; to FILE.png",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same images")
    parser.add_argument("--batch-size", type=int, default=32, help="changes speed, not images")
    parser.add_argument(
        "--output", type=Path, required=True, help="FILE.png (a grid), FILE.npz, or a folder"
    )
    add_plugin_option(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    load_plugins(args.plugin)
    kind = _check_output(args.output)
    generator = sped_up(Generator.from_pretrained(args.model), args)
    weak = sped_up(Generator.from_pretrained(args.weak), args) if args.weak else None
    sampler = sampler_from(args, generator)
    classes = _classes(args.classes, generator)
    num = args.num if args.num is not None else 4 * len(classes)
    if min(num, args.batch_size) < 1:
        raise UserError("--num and --batch-size must be at least 1")
    if weak is not None and all(
        sampler.guidance.scale_of(p.name) == 1 for p in generator.network.spec.parts
    ):
        raise UserError("--weak needs a guidance scale other than 1; give --guidance W")
    # Classes take turns, so that any share of the set is balanced: Inception Score reads it in
    # consecutive parts.
    labels = [classes[i % len(classes)] for i in range(num)]

    if args.strip is not None:
        _strip(args, generator, sampler, labels if args.num is not None else classes[:4])
    else:
        _draw(args, generator, weak, sampler, labels, kind)
    return 0


def _draw(
    args: argparse.Namespace,
    generator: Generator,
    weak: Generator | None,
    sampler: SamplerConfig,
    labels: list[int],
    kind: str,
) -> None:
    """Draws the set, each process its share of the batches, and writes it as ``kind`` says."""
    state = PartialState(cpu=not torch.cuda.is_available())
    generator.to(state.device)
    weak = weak.to(state.device) if weak is not None else None
    num = len(labels)
    size = args.batch_size
    num_batches = math.ceil(math.ceil(num / size) / num_processes())  # of each process
    share = range(num)[process_index() * num_batches * size :][: num_batches * size]
    with (
        together(),
        _writer(args.output, kind, labels, generator.image_size) as write,
        progress("sampling", num) as advance,
    ):
        for first in range(0, num_batches * size, size):
            gather(None)
            batch = share[first : first + size]
            if batch:
                own = [labels[i] for i in batch]
                try:
                    pixels = generator.sample(
                        own, seed=args.seed, first=batch[0], sampler=sampler, weak=weak
                    )
                except ValueError as error:
                    raise UserError(str(error)) from None
                write(batch[0], to_uint8(pixels).cpu())
            advance(min(size * num_processes(), num - first * num_processes()))
    if state.is_main_process:
        names = [_name(generator, label) for label in dict.fromkeys(labels)]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        print(f"{num} images of {shown}: {args.output}")


@contextlib.contextmanager
def _writer(
    output: Path, kind: str, labels: list[int], image_size: tuple[int, int]
) -> Iterator[Callable[[int, Tensor], None]]:
    """Gives a function that takes uint8 images (B, 3, H, W) and the number of the first; at the end they are in
    ``output``. Each process writes its own, in order; none holds more than a batch."""
    if kind == "folder":

        def write(first: int, images: Tensor) -> None:
            for i, image in enumerate(images, start=first):
                write_png(output / f"{i:06d}.png", image)

        yield write
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    made = (
        None if process_index() else tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent)
    )
    try:
        parts = Path(gather(made)[0])
        with (parts / f"{process_index():06d}").open("wb") as part:
            yield lambda _, images: part.write(images.permute(0, 2, 3, 1).numpy().tobytes())
        gather(None)  # all are written
        if made is not None:
            _assemble(sorted(parts.iterdir()), labels, image_size, output, kind)
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _assemble(
    parts: list[Path], labels: list[int], image_size: tuple[int, int], output: Path, kind: str
) -> None:
    """Writes the output from the processes' parts, uint8 (N, H, W, 3), which follow one another."""
    shape = (len(labels), *image_size, 3)
    if kind == "npz":
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        with new_file(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for part in parts:
                    with part.open("rb") as content:
                        shutil.copyfileobj(content, file)
            with archive.open("arr_1.npy", "w") as file:
                np.lib.format.write_array(file, np.array(labels, dtype=np.int64))
        return
    # In a grid each class stands together, as many classes in a row as make it about square.
    order = sorted(range(len(labels)), key=lambda i: labels[i])
    per_class, rest = divmod(len(labels), len(set(labels)))
    columns = max(1, round(len(labels) ** 0.5 / per_class)) * per_class
    if rest or len(set(labels)) == 1:
        columns = math.ceil(len(labels) ** 0.5)
    content = np.concatenate([np.fromfile(part, np.uint8) for part in parts])  # as the grid does
    images = torch.from_numpy(content.reshape(shape)).permute(0, 3, 1, 2)
    write_png(output, make_grid(images[order], nrow=columns, padding=2, pad_value=255))


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
    """``grid``, ``npz`` or ``folder``; refuses to write over anything."""
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {output}: {parent} is no folder that can be written to")
    kind = {".png": "grid", ".npz": "npz"}.get(output.suffix.lower(), "folder")
    if kind == "folder" and output.suffix:
        raise UserError(f"--output {output}: expected FILE.png, FILE.npz or a folder")
    if output.is_dir() and any(output.iterdir()) or output.is_file():
        raise UserError(f"--output {output}: exists already; choose another or remove it")
    return kind


def _classes(words: list[str] | None, generator: Generator) -> list[int]:
    names = generator.class_names
    if words is None:
        return list(range(len(names))) or [0]
    numbers = {name: i for i, name in enumerate(names)} | {"none": len(names)}
    chosen = []
    for word in words:
        if word in numbers:
            chosen.append(numbers[word])
        elif word.isdecimal() and int(word) < len(names):
            chosen.append(int(word))
        else:
            known = ", ".join(names[:8]) + (" …" if len(names) > 8 else "")
            raise UserError(
                f"--classes: no class '{word}'; this model has 0 to {len(names) - 1} ({known}), and none"
            )
    return chosen


def _name(generator: Generator, label: int) -> str:
    return generator.class_names[label] if label < len(generator.class_names) else "any class"
