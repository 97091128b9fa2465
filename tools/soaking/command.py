"""``soak --kills N --output FOLDER``: training, caching, sampling and exporting are killed at random moments.

Each command runs once whole. Then it is killed with SIGKILL, started again by the same words, and so on until it ends.
What it leaves is compared with the uninterrupted run to the last bit. Whatever differs is a fault, and so is whatever
temporary stays. The exit code is then 1, and the folder of the round is kept.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from semtok.commands.cli import Parser
from semtok.commands.table import print_table
from semtok.errors import UserError, did_you_mean
from semtok.storage import write_json, write_text
from soaking.jobs import IMAGES, JOBS, Job, draw_images
from soaking.killing import Moment, environment
from soaking.soaking import Result, Soak
from soaking.warm import Warm

_HEADER = ("job", "kills", *(moment.value for moment in Moment), "restarts", "rounds", "seconds")
_HEADER += ("equal",)


def _parser() -> Parser:
    parser = Parser(prog="soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="over all jobs; default: 50")
    parser.add_argument("--seed", type=int, default=0, help="chooses the moments")
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="nothing is killed after them; default: 60"
    )
    parser.add_argument(
        "--jobs",
        nargs="+",
        metavar="JOB",
        help=f"default: all of {', '.join(job.name for job in JOBS)}",
    )
    parser.add_argument(
        "--warm",
        action="store_true",
        help="commands are forked from a process that has imported the library: no kill falls on imports, and each "
        "start takes seconds less",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="a new folder")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 1 where a command did not end as the uninterrupted one."""
    args = _parser().parse_args(arguments)
    jobs = [_job(name) for name in args.jobs] if args.jobs else list(JOBS)
    if args.kills < 1 or not args.minutes > 0:
        raise UserError("--kills and --minutes must be more than 0")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output {args.output}: is there already; choose a new folder")
    folder = args.output.resolve()
    draw_images(folder / IMAGES)
    results: Sequence[Result] = ()
    with _warm(args.warm) as warm:
        end = time.monotonic() + 60 * args.minutes
        for results in Soak(folder, seed=args.seed, deadline=end, warm=warm).run(jobs, args.kills):
            _write(folder, args, results)  # each time: the whole takes long
            done = sum(result.num_kills for result in results)
            print(f"{done} of {args.kills} kills, {_ended(results)}", flush=True)
    for result in results:
        for line in result.findings:
            print(f"{result.job.name}: {line}", file=sys.stderr)
    print_table(f"SIGKILL, seed {args.seed}", [_row(result) for result in results], _HEADER)
    return int(any(result.findings for result in results))


def _job(name: str) -> Job:
    found = next((job for job in JOBS if job.name == name), None)
    if found is None:
        names = [job.name for job in JOBS]
        hint = did_you_mean(name, names, f"choose from {', '.join(names)}")
        raise UserError(f"--jobs: no job '{name}'; {hint}")
    return found


@contextlib.contextmanager
def _warm(is_asked: bool) -> Iterator[Warm | None]:
    if not is_asked:
        yield None
        return
    with contextlib.closing(Warm(environment())) as warm:
        yield warm


def _ended(results: Sequence[Result]) -> str:
    told = f"{sum(result.rounds for result in results)} rounds ended"
    unequal = [result.job.name for result in results if result.findings]
    return f"{told}, not equal: {', '.join(unequal)}" if unequal else f"{told}, all equal"


def _row(result: Result) -> tuple[str, ...]:
    kills = [result.kills[moment] for moment in Moment]
    numbers = (result.num_kills, *kills, result.restarts, result.rounds, round(result.seconds))
    return (result.job.name, *map(str, numbers), "no" if result.findings else "yes")


def _write(folder: Path, args: argparse.Namespace, results: Sequence[Result]) -> None:
    """``soak.json``, and ``soak.md`` with the table."""
    content: dict[str, Any] = {"seed": args.seed, "warm": args.warm, "cores": os.cpu_count()}
    write_json(folder / "soak.json", content | {"jobs": [r.to_dict() for r in results]})
    rows = [_HEADER, ("---",) * len(_HEADER), *map(_row, results)]
    write_text(folder / "soak.md", "".join(f"| {' | '.join(row)} |\n" for row in rows))
