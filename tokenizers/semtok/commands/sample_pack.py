"""``sample pack FOLDER FILE.npz``: an archive as ADM's evaluation reads it, of a folder of images."""

import os
from collections.abc import Sequence
from pathlib import Path

from semtok.commands.cli import Parser
from semtok.errors import UserError
from semtok.evaluation.drawn_sets import image_files, write_archive
from semtok.progress import progress


def _parser() -> Parser:
    parser = Parser(prog="sample pack", description=__doc__)
    parser.add_argument(
        "folder", type=Path, help="images of one size, in the order of the numbers in their names"
    )
    parser.add_argument("output", type=Path, metavar="FILE.npz")
    parser.add_argument(
        "--shuffle",
        type=int,
        metavar="SEED",
        help="in a random order: for images sorted by class, as the Inception Score is of consecutive parts",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder")
    if args.output.suffix.lower() != ".npz" or args.output.exists():
        raise UserError(f"{args.output}: expected FILE.npz that is not there yet")
    if not os.access(args.output.absolute().parent, os.W_OK):
        raise UserError(f"{args.output}: no place that can be written to")
    if args.shuffle is not None and args.shuffle < 0:
        raise UserError(f"--shuffle: expected a seed of at least 0, got {args.shuffle}")
    with progress("packing", len(image_files(args.folder))) as advance:
        num = write_archive(args.output, args.folder, shuffle=args.shuffle, progress=advance)
    print(f"{num} images of {args.folder}: {args.output}")
    return 0
