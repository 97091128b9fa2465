"""``compare``: which tokenizer is better to generate in, and by how much.

Trains what is missing, scores every tokenizer, trains the same small diffusion transformer on each,
and reports. A finished run of a recipe in runs/ is taken where it is what would be trained. The same command goes on
where it stopped.
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from comparison.estimate import expected_seconds, is_measured, measure_steps, steps_file
from comparison.finished import take_finished_runs, with_whole_runs
from comparison.jobs import Job, Stopped, only_one_in, run_jobs
from comparison.plan import (
    BUDGETS,
    SEEDS,
    TEXTURE,
    Comparison,
    ComparisonSettings,
    Row,
    diffusion_recipe,
    read_comparison,
)
from comparison.report import generation_table, tokenizer_table, write_report
from comparison.results import collect
from comparison.scores import score
from comparison.time_left import TimeLeft
from semtok.commands.cli import Parser
from semtok.commands.table import print_table
from semtok.errors import UserError
from semtok.progress import duration
from semtok.references import RUNS, find_recipe
from semtok.settings import parse
from semtok.storage import read_json

_DEFAULT = "vae,send_vae,reglue,semvae,redi"
_TOOLS = Path(__file__).parents[1]
_LOGS = "logs"
_MEASURING = ["steps", "all", "0"]


def _parser() -> Parser:
    parser = Parser(prog="compare", description=__doc__)
    parser.add_argument(
        "--tokenizers",
        default=_DEFAULT,
        metavar="REF,REF",
        help="recipes of embedded tokenizers, runs, folders, Hub ids, or NAME=REF; the first is the baseline; "
        f"default: {_DEFAULT}",
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
        "--set",
        nargs="+",
        default=[],
        metavar="key=value",
        help="settings of every transformer, as diffusion.network=…, which go before the budget's",
    )
    parser.add_argument(
        "--jobs", type=int, help="processes at once; default: one for each GPU, or each CPU core"
    )
    parser.add_argument("--output", type=Path, default=RUNS / "compare")
    parser.add_argument(
        "--score",
        nargs=3,
        metavar="WORD",
        help="tokenizer or generator, its NAME and SEED: only this, in a comparison that was begun; its processes are "
        "started with it; 'steps all 0': measure a few steps of each training",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.score is not None:
        if args.score == _MEASURING:
            measure_steps(read_comparison(args.output, 1))
        else:
            score(args.output, *args.score)
        return 0
    budget = BUDGETS[args.budget].model_dump()
    named = {word.partition("=")[0] for word in args.set}
    kept = [word for word in budget["settings"] if word.partition("=")[0] not in named]
    given = {
        "data": args.data,
        "teacher": args.teacher,
        "settings": [*kept, *args.set],
        "steps": args.steps,
        "num_checkpoints": args.num_checkpoints,
        "num_images": args.num_images,
    }
    content = budget | {key: value for key, value in given.items() if value not in (None, [])}
    settings = parse(ComparisonSettings, content, "compare")
    names = [name for name in args.tokenizers.split(",") if name]
    rows = [_row(name) for name in names]
    named = {row.name: row.tokenizer for row in rows}
    rows += [_variant(words, named) for words in args.variant]
    num_seeds = args.seeds if args.seeds is not None else SEEDS[args.budget]
    if not rows or num_seeds < 1 or (args.jobs is not None and args.jobs < 1):
        raise UserError("compare needs at least one tokenizer, one seed and one job")
    comparison = Comparison(args.output, settings, tuple(rows), num_seeds)
    comparison.check_folder()
    comparison = with_whole_runs(comparison)
    comparison.check()

    start = time.perf_counter()
    environments = _environments(args.jobs)
    try:
        with only_one_in(comparison.folder) as held:
            comparison.claim()
            _say(
                f"{_counted(len(rows), 'row')}, {_counted(num_seeds, 'seed')}; output: {comparison.folder}"
            )
            take_finished_runs(comparison, _say)
            _run(comparison, held, environments)
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command goes on", file=sys.stderr)
        return 128 + stopped.number
    results = collect(comparison)
    _print("tokenizers, on held-out images", *tokenizer_table(results))
    _print("generation", *generation_table(results))
    places = write_report(
        comparison,
        results,
        command="python tools/compare.py " + shlex.join(arguments),
        about=_about(comparison, len(environments)),
    )
    print(f"{duration(time.perf_counter() - start)}; report: " + "   ".join(map(str, places)))
    return 0


def _run(comparison: Comparison, held: int, environments: list[dict[str, str]]) -> None:
    """Runs what is missing, and says before how long it will take."""
    jobs = _jobs(comparison)
    waiting = [job for job in jobs if not job.is_done()]
    if not waiting:
        return
    told = {"held": held, "environments": environments, "say": _say}
    run_jobs([_measuring_job(comparison)], **told)

    def expected(job: Job) -> float:
        return expected_seconds(comparison, job.kind, job.of)

    seconds = TimeLeft({job.name: expected(job) for job in waiting}, len(environments)).seconds()
    _say(
        f"{_counted(len(waiting), 'job')}, {len(environments)} at a time: about {duration(seconds)}, by a few steps of "
        f"each training on this machine; what each says: {comparison.folder / _LOGS}"
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


def _row(word: str) -> Row:
    """The row of REF, or of NAME=REF."""
    name, equals, reference = word.partition("=")
    if not equals:
        path = Path(word)
        name, reference = (path.parent if path.name == "export" else path).name, word
    content = {"name": name, "tokenizer": reference}
    return parse(Row, content, f"--tokenizers {word} (or NAME=REF)")


def _variant(words: list[str], named: dict[str, str]) -> Row:
    """One more row; its REF may be the name that a row of ``--tokenizers`` has."""
    if len(words) < 2 or any("=" not in word for word in words[2:]):
        raise UserError(f"--variant {' '.join(words)}: expected NAME REF key=value …")
    content = {"name": words[0], "tokenizer": named.get(words[1], words[1]), "settings": words[2:]}
    return parse(Row, content, "--variant")


def _environments(jobs: int | None) -> list[dict[str, str]]:
    """Variables of each process that runs at once: a GPU of its own, or a share of the cores."""
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    count = jobs or cores
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))}] * count


def _jobs(comparison: Comparison) -> list[Job]:
    """All the work, in an order that lets each begin as soon as what it needs is there."""
    jobs = []
    for seed in comparison.seeds:
        scores = []
        for reference in comparison.tokenizers:
            if find_recipe(reference) is not None:
                jobs.append(_tokenizer_job(comparison, reference, seed))
            after = (f"tokenizer {reference}, seed {seed}",)
            is_row = any(row.tokenizer == reference for row in comparison.rows)
            if is_row and (seed == 0 or find_recipe(reference) is not None):
                scores.append(_score_job(comparison, "tokenizer", reference, seed, after))
        for row in comparison.rows:
            name = f"transformer on {row.name}, seed {seed}"
            jobs.append(_generator_job(comparison, row, seed, name))
            jobs.append(_score_job(comparison, "generator", row.name, seed, (name,)))
        jobs += scores
    return jobs


def _measuring_job(comparison: Comparison) -> Job:
    words = ["--output", str(comparison.folder), "--score", *_MEASURING]
    return Job(
        "a few steps of each training",
        lambda: [*_launcher("compare"), *words],
        lambda: is_measured(comparison),
        comparison.folder / _LOGS / f"{steps_file(comparison).stem}.log",
    )


def _tokenizer_job(comparison: Comparison, reference: str, seed: int) -> Job:
    folder, recipe = comparison.tokenizer_folder(reference, seed), find_recipe(reference)
    overrides = comparison.tokenizer_overrides(reference, seed)
    built_on = any(word.startswith("method.texture=") for word in overrides)
    return Job(
        f"tokenizer {reference}, seed {seed}",
        lambda: _training("train_tokenizer", [str(recipe), *overrides], folder),
        (folder / "export" / "config.json").is_file,
        comparison.folder / _LOGS / f"tokenizer_{reference}-{seed}.log",
        (f"tokenizer {TEXTURE}, seed {seed}",) if built_on else (),
        kind="tokenizer",
        of=reference,
    )


def _generator_job(comparison: Comparison, row: Row, seed: int, name: str) -> Job:
    folder = comparison.generator_folder(row, seed)
    reference = comparison.tokenizer_reference(row.tokenizer, seed)
    words = ["--tokenizer", reference, "--recipe", str(diffusion_recipe())]
    words += comparison.generator_overrides(row, seed)
    return Job(
        name,
        lambda: _training("train_dit", words, folder),
        (folder / "export" / "config.json").is_file,
        comparison.folder / _LOGS / f"generator_{row.name}-{seed}.log",
        (f"tokenizer {row.tokenizer}, seed {seed}",),
        kind="generator",
        of=row.name,
    )


def _training(command: str, words: list[str], folder: Path) -> list[str]:
    resume = ["--resume"] if (folder / "recipe.yaml").is_file() else []
    return [*_launcher(command), *words, "--output", str(folder), *resume]


def _launcher(name: str) -> list[str]:
    """A program of tools/, by its path, which no module of the working directory can hide."""
    return [sys.executable, str(_TOOLS / f"{name}.py")]


def _score_job(
    comparison: Comparison, kind: str, name: str, seed: int, after: tuple[str, ...]
) -> Job:
    if kind == "tokenizer":
        file = comparison.tokenizer_scores(name, seed)
    else:
        row = next(row for row in comparison.rows if row.name == name)
        file = comparison.generator_scores(row, seed)
    words = ["--output", str(comparison.folder), "--score", kind, name, str(seed)]
    return Job(
        f"scores of {kind} {name}, seed {seed}",
        lambda: [*_launcher("compare"), *words],
        lambda: file.is_file() and file.with_suffix(".png").is_file() and bool(read_json(file)),
        comparison.folder / _LOGS / f"scores_{kind}_{file.stem}.log",
        after,
        kind=f"{kind} scores",
        of=name,
    )


def _about(comparison: Comparison, at_once: int) -> list[str]:
    settings = comparison.settings
    data = " ".join(settings.data) or "the embedded shapes at 32x32"
    teacher = " ".join(settings.teacher) or "the embedded teacher"
    return [
        f"Data: {data}. Teacher: {teacher}. Tokenizers are trained for {settings.recipe_share:.0%} of their recipes' "
        f"steps, and those with several parts are built on the '{TEXTURE}' of the same seed; one that was trained "
        "before is the same for every seed. On each the transformer of recipes/dit.yaml is trained for "
        f"{settings.steps} steps at a constant rate and sampled without guidance.",
        f"Generated images: {settings.num_images}, the classes in turn, by averaged weights, compared with "
        f"{settings.num_reference} training images in the features of the teacher. A teacher that tokenizers or "
        "transformers were aligned to is no impartial judge of them.",
        f"Seconds are of {at_once} processes at a time on this machine; they depend on both.",
    ]
