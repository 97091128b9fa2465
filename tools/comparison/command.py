"""``compare``: which tokenizer is better to generate in, and by how much.

Trains what is missing, scores every tokenizer, trains the same small diffusion transformer on each,
and reports. A finished run of a recipe in runs/ is taken where it is what would be trained. The same command goes on
where it stopped.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from comparison.asked import BUDGETS, SEEDS, ComparisonSettings, Row
from comparison.estimate import expected_seconds, measure_steps
from comparison.finished import take_finished_runs, with_whole_runs
from comparison.jobs import Job, Stopped, only_one_in, run_jobs
from comparison.judges import judges_told
from comparison.plan import SETTINGS_FILE, Comparison, read_comparison
from comparison.report import generation_table, shown_classes, tokenizer_table, write_report
from comparison.results import RowScores, collect, compared
from comparison.rows import read_rows
from comparison.scores import score
from comparison.stored import Told, read_results
from comparison.time_left import TimeLeft
from comparison.work import LOGS, MEASURING, jobs_of, measuring_job
from semtok.commands.cli import Parser
from semtok.commands.table import print_table
from semtok.data.images.shapes import ShapesConfig
from semtok.errors import UserError
from semtok.evaluation.judges import WORDS
from semtok.progress import duration
from semtok.references import RUNS
from semtok.settings import parse
from semtok.training.precision import chosen, found_here

_DEFAULT = "vae,send_vae,reglue,semvae,redi"


def _parser() -> Parser:
    parser = Parser(prog="compare", description=__doc__)
    _add_rows(parser)
    _add_settings(parser)
    parser.add_argument(
        "--jobs", type=int, help="processes at once; default: one for each GPU, or each CPU core"
    )
    parser.add_argument("--output", type=Path, default=RUNS / "compare")
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="draw the report of --output anew from its results.json, trains nothing; --baseline may be another",
    )
    parser.add_argument(
        "--score",
        nargs=3,
        metavar="WORD",
        help="tokenizer or generator, its NAME and SEED: only this, in a comparison that was begun; its processes are "
        "started with it; 'steps all 0': measure a few steps of each training",
    )
    return parser


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """What is compared."""
    parser.add_argument(
        "--tokenizers",
        nargs="+",
        metavar="REF",
        help="recipes of embedded tokenizers, also RECIPE@BASE, built on that tokenizer instead of the VAE; runs, "
        "folders, Hub ids; or NAME=REF of any; with spaces or commas between; "
        f"default: {_DEFAULT}, and none beside --variants",
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        action="append",
        default=[],
        metavar="WORD",
        help="one more row: NAME REF key=value …, the transformer's settings on that tokenizer",
    )
    parser.add_argument(
        "--variants",
        type=Path,
        metavar="FILE",
        help="YAML of such rows: NAME: {tokenizer: REF, settings: [key=value, …]}",
    )
    parser.add_argument(
        "--baseline",
        metavar="NAME",
        help="the row that others are compared with; default: the first",
    )


def _add_settings(parser: argparse.ArgumentParser) -> None:
    """What all rows share."""
    parser.add_argument(
        "--recipe",
        help="of the transformers, a YAML file or the name of one of the library's; default: dit",
    )
    parser.add_argument(
        "--seeds", type=int, help="default: 1 of a quick comparison, 3 of a full one"
    )
    parser.add_argument(
        "--budget",
        choices=BUDGETS,
        default="quick",
        help="quick (the default): one seed and a third of the recipes' steps; full: three seeds and all steps",
    )
    parser.add_argument("--steps", type=int, help="of the transformer; default: the budget's")
    parser.add_argument("--num-checkpoints", type=int, help="evenly spaced over the steps")
    parser.add_argument("--num-images", type=int, help="generated at each checkpoint")
    parser.add_argument("--data", nargs="+", default=[], metavar="key=value", help="other images")
    parser.add_argument(
        "--teacher", nargs="+", default=[], metavar="key=value", help="another teacher: name=…"
    )
    parser.add_argument(
        "--judge",
        nargs="+",
        action="append",
        metavar="WORD",
        help="who sees images for distances and classes, by default teacher; may be given several times, rows are "
        f"followed by the first: {WORDS}",
    )
    parser.add_argument(
        "--cache",
        choices=("auto", "none"),
        help="auto (the default for stored images): transformers learn from latents that are computed once, where that "
        "pays; none (the default for the embedded scenes): images are encoded in each step, and seconds hold that",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="key=value",
        help="settings of every transformer, as diffusion.network=…, which go before the budget's",
    )


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.score is not None:
        if args.score == MEASURING:
            measure_steps(read_comparison(args.output, 1))
        else:
            score(args.output, *args.score)
        return 0
    if args.redraw:
        return _redraw(args)
    comparison = _asked(args)
    comparison.check_folder()
    comparison = with_whole_runs(comparison)
    comparison.check()

    start = time.perf_counter()
    environments = _environments(args.jobs)
    try:
        with only_one_in(comparison.folder) as held:
            comparison.claim()
            rows, seeds = len(comparison.rows), comparison.num_seeds
            _say(f"{_counted(rows, 'row')}, {_counted(seeds, 'seed')}; output: {comparison.folder}")
            take_finished_runs(comparison, _say)
            _run(comparison, held, environments)
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    told = Told(
        "python tools/compare.py " + shlex.join(arguments),
        _about(comparison, len(environments)),
        shown_classes(comparison),
    )
    places = _report(comparison, collect(comparison), told, _baseline(args, comparison.rows))
    print(f"{duration(time.perf_counter() - start)}; report: {places}")
    return 0


def _asked(args: argparse.Namespace) -> Comparison:
    """The comparison that the options describe."""
    budget = BUDGETS[args.budget].model_dump()
    named = {word.partition("=")[0] for word in args.set}
    kept = [word for word in budget["settings"] if word.partition("=")[0] not in named]
    given = {
        "recipe": args.recipe,
        "data": args.data,
        "teacher": args.teacher,
        "judge": args.judge,
        "cache": args.cache,
        "settings": [*kept, *args.set],
        "steps": args.steps,
        "num_checkpoints": args.num_checkpoints,
        "num_images": args.num_images,
    }
    content = budget | {key: value for key, value in given.items() if value not in (None, [])}
    settings = parse(ComparisonSettings, content, "compare")
    default = _DEFAULT if args.variants is None else ""
    tokenizers = ",".join(args.tokenizers) if args.tokenizers is not None else default
    rows = read_rows(tokenizers, args.variant, args.variants)
    num_seeds = args.seeds if args.seeds is not None else SEEDS[args.budget]
    if not rows or num_seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise UserError("compare needs at least one tokenizer, one seed and one job")
    _baseline(args, rows)
    comparison = Comparison(args.output, settings, rows, num_seeds)
    return _with_precision(comparison if args.cache is not None else _with_cache(comparison))


def _with_cache(comparison: Comparison) -> Comparison:
    """With cached latents as the comparison began, or where images are stored: the embedded scenes cost next to
    nothing to draw and to encode."""
    if (comparison.folder / SETTINGS_FILE).is_file():
        cache = read_comparison(comparison.folder, 1).settings.cache
    else:
        cache = "none" if isinstance(comparison.data(), ShapesConfig) else "auto"
    settings = comparison.settings.model_copy(update={"cache": cache})
    return replace(comparison, settings=settings)


def _with_precision(comparison: Comparison) -> Comparison:
    """With the precision that the comparison began with, or that this machine is fast in."""
    if not comparison.is_automatic:
        return comparison
    if (comparison.folder / SETTINGS_FILE).is_file():
        precision = read_comparison(comparison.folder, 1).settings.precision
    else:
        precision, line = chosen([found_here()])
        _say(line)
    settings = comparison.settings.model_copy(update={"precision": precision})
    return replace(comparison, settings=settings)


def _baseline(args: argparse.Namespace, rows: Sequence[Row]) -> str:
    """The name of the row that others are compared with."""
    names = [row.name for row in rows]
    if args.baseline is not None and args.baseline not in names:
        raise UserError(f"--baseline: no row '{args.baseline}'; rows: {', '.join(names)}")
    return args.baseline or names[0]


def _redraw(args: argparse.Namespace) -> int:
    """The report anew, of the scores that are kept."""
    default = vars(_parser().parse_args(["--redraw"]))
    others = [
        name
        for name, value in vars(args).items()
        if value != default[name] and name not in ("baseline", "output")
    ]
    if others:
        raise UserError(
            f"--redraw: draws what {args.output} holds; --{others[0].replace('_', '-')} takes no effect, leave it out"
        )
    comparison, stored = read_results(args.output)
    rows = [one.row for one in stored.scores]
    baseline = _baseline(args, rows) if args.baseline is not None else stored.baseline
    print(f"report: {_report(comparison, stored.scores, stored.told, baseline)}")
    return 0


def _report(comparison: Comparison, scores: list[RowScores], told: Told, baseline: str) -> str:
    """Prints and writes it; where."""
    results = compared(scores, baseline)
    _print("tokenizers, on held-out images", *tokenizer_table(results))
    _print("generation", *generation_table(results))
    return "   ".join(map(str, write_report(comparison, results, told)))


def _run(comparison: Comparison, held: int, environments: list[dict[str, str]]) -> None:
    """Runs what is missing, and says before how long it will take."""
    jobs = jobs_of(comparison)
    waiting = [job for job in jobs if not job.is_done()]
    if not waiting:
        return
    told = {"held": held, "environments": environments, "say": _say}
    run_jobs([measuring_job(comparison)], **told)

    def expected(job: Job) -> float:
        return expected_seconds(comparison, job.kind, job.of)

    seconds = TimeLeft({job.name: expected(job) for job in waiting}, len(environments)).seconds()
    _say(
        f"{_counted(len(waiting), 'job')}, {len(environments)} at a time: about {duration(seconds)}, by a few steps of "
        f"each training on this machine; what each says: {comparison.folder / LOGS}"
    )
    run_jobs(jobs, **told, expected=expected)


def _say(line: str) -> None:
    print(line, flush=True)


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'s' if number != 1 else ''}"


def _print(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A report's table with its rows as columns, which a terminal is not too narrow for."""
    first, *others = (list(column) for column in zip(header, *rows, strict=True))
    print_table(title, others, first)


def _environments(jobs: int | None) -> list[dict[str, str]]:
    """Variables of each process that runs at once: a GPU of its own, or a share of the cores, unless the user has set
    how many threads each has."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    count = jobs or cores
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // count))
    return [{"OMP_NUM_THREADS": threads}] * count


def _about(comparison: Comparison, at_once: int) -> list[str]:
    settings = comparison.settings
    data = " ".join(settings.data) or "the embedded shapes at 32x32"
    words = comparison.teacher_words
    teacher = " ".join(words) if words != ("name=demo",) else "the embedded teacher"
    bases = " and ".join(f"'{name}'" for name in comparison.bases) or "of which there is none"
    seconds = f"Seconds are of {at_once} processes at a time on this machine; they depend on both."
    if settings.cache != "none":
        seconds += (
            " Latents that transformers learn from are computed once, before, and not in them."
        )
    return [
        f"Data: {data}. Teacher: {teacher}. Tokenizers are trained for {settings.recipe_share:.0%} of their recipes' "
        "steps. Those with several parts, or with weights to start from, are built on the tokenizer of the same seed "
        f"that each names, {bases}. One that was trained before is the same for every seed. On each the transformer of "
        f"the recipe {settings.recipe} is trained for {settings.steps} steps at a constant rate and sampled without "
        "guidance.",
        f"Generated images: {settings.num_images}, the classes in turn, by averaged weights, compared with "
        f"{settings.num_reference} training images in the features of {_counted(len(settings.judge), 'judge')}.",
        *judges_told(comparison),
        seconds,
    ]
