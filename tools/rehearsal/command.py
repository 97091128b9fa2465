"""``rehearse NAME …``: one real step of full-size recipes on this machine, before GPUs are rented.

Each recipe is run by the command at its head, from drawn JPEG files and with random weights, after the runs that it is
built on; a generator is then sampled. What makes it small is printed as the command line.
"""

import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from rehearsal.inputs import IMAGES, draw_images
from rehearsal.plan import all_recipes, find_recipes
from rehearsal.rehearsal import Rehearsal, Result
from semtok.commands.cli import Parser
from semtok.commands.table import print_table
from semtok.errors import UserError
from semtok.storage import write_json

_HEADER = ["recipe", "ran", "parameters", "of them here", "seconds", "peak GB", "losses"]


def _parser() -> Parser:
    parser = Parser(prog="rehearse", description=__doc__)
    parser.add_argument(
        "recipes", nargs="*", metavar="NAME", help="of recipes/imagenet256/NAME.yaml, or a path"
    )
    parser.add_argument("--all", action="store_true", help="every recipe of recipes/imagenet256/")
    parser.add_argument(
        "--output", type=Path, help="a new folder that is kept; default: a temporary one"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table, with all commands")
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="transformers have as many of their blocks as a step then has room for; default: half of what is free",
    )
    parser.add_argument("--depth", type=int, help="at most so many blocks of each transformer")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 where a recipe failed."""
    args = _parser().parse_args(arguments)
    if bool(args.recipes) == args.all:
        raise UserError("give recipes, or --all; see rehearse --help")
    files = all_recipes() if args.all else find_recipes(args.recipes)
    free = psutil.virtual_memory().available / 2
    memory = args.memory * 1e9 if args.memory is not None else free
    if memory <= 0 or (args.depth is not None and args.depth < 1):
        raise UserError("--memory and --depth must be more than 0")
    json_file = args.json.resolve() if args.json is not None else None
    with _ended_by_signals(), _folder(args.output) as folder, contextlib.chdir(folder):
        print(f"in {folder}, transformers within {memory / 1e9:.1f} GB", flush=True)
        draw_images(IMAGES)
        rehearsal = Rehearsal(memory=memory, depth=args.depth)
        for file in files:
            rehearsal.run(file)
            if json_file is not None:  # each time: the whole takes long
                write_json(json_file, [result.to_dict() for result in rehearsal.results.values()])
    results = list(rehearsal.results.values())
    print_table("one step each, with random weights", [_row(r) for r in results], _HEADER)
    failed = [result for result in results if result.error is not None]
    for result in failed:
        print(f"{result.name} failed: {result.error}", file=sys.stderr)
    return 1 if failed else 0


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM unwinds as Ctrl-C does, so that no command goes on running."""

    def end(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _folder(output: Path | None) -> Iterator[Path]:
    if output is None:
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            yield Path(folder)
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is there already; choose a new folder")
    output.mkdir(parents=True, exist_ok=True)
    yield output.resolve()


def _row(result: Result) -> list[str]:
    outcomes = result.outcomes
    here = _count(result.parameters_here)
    if result.depth_here != result.depth:
        here += f", {result.depth_here} of {result.depth} blocks"
    peak = max((o.peak_bytes for o in outcomes), default=0) / 1e9
    return [
        result.name,
        "failed" if result.error is not None else ", ".join(result.ran),
        _count(result.parameters),
        here,
        f"{sum(o.seconds for o in outcomes):.0f}",
        f"{peak:.1f}",
        ", ".join(f"{name} {value:.3g}" for name, value in result.losses.items()) or "-",
    ]


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number / 1e6:,.1f}M"
