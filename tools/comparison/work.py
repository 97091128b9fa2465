"""The jobs of a comparison: what is trained and what is scored, and in which order."""

import sys
from pathlib import Path

from comparison.asked import Row
from comparison.estimate import is_measured, steps_file
from comparison.jobs import Job
from comparison.plan import Comparison
from comparison.recipes import base_of, file_name, recipe_of
from semtok.storage import read_json

_TOOLS = Path(__file__).parents[1]
LOGS = "logs"
"""Folder of what the jobs say."""
MEASURING = ["steps", "all", "0"]
"""Words of ``--score`` that measure a few steps of each training."""


def jobs_of(comparison: Comparison) -> list[Job]:
    """All the work, in an order that lets each begin as soon as what it needs is there."""
    jobs = []
    for seed in comparison.seeds:
        scores = []
        for reference in comparison.tokenizers:
            if recipe_of(reference) is not None:
                jobs.append(_tokenizer_job(comparison, reference, seed))
            after = (f"tokenizer {reference}, seed {seed}",)
            is_row = any(row.tokenizer == reference for row in comparison.rows)
            if is_row and (seed == 0 or recipe_of(reference) is not None):
                scores.append(_score_job(comparison, "tokenizer", reference, seed, after))
        for row in comparison.rows:
            name = f"transformer on {row.name}, seed {seed}"
            jobs.append(_generator_job(comparison, row, seed, name))
            jobs.append(_score_job(comparison, "generator", row.name, seed, (name,)))
        jobs += scores
    return jobs


def measuring_job(comparison: Comparison) -> Job:
    words = ["--output", str(comparison.folder), "--score", *MEASURING]
    return Job(
        "a few steps of each training",
        lambda: [*_launcher("compare"), *words],
        lambda: is_measured(comparison),
        comparison.folder / LOGS / f"{steps_file(comparison).stem}.log",
        saves=False,  # what was measured is kept, and a signal would wait for the end of a step
    )


def _tokenizer_job(comparison: Comparison, reference: str, seed: int) -> Job:
    folder, recipe = comparison.tokenizer_folder(reference, seed), recipe_of(reference)
    base = base_of(reference)
    overrides = comparison.tokenizer_overrides(reference, seed)
    return Job(
        f"tokenizer {reference}, seed {seed}",
        lambda: _training("train_tokenizer", [str(recipe), *overrides], folder),
        (folder / "export" / "config.json").is_file,
        comparison.folder / LOGS / f"tokenizer_{file_name(reference)}-{seed}.log",
        (f"tokenizer {base}, seed {seed}",) if base is not None and recipe_of(base) else (),
        kind="tokenizer",
        of=reference,
    )


def _generator_job(comparison: Comparison, row: Row, seed: int, name: str) -> Job:
    folder = comparison.generator_folder(row, seed)
    reference = comparison.tokenizer_reference(row.tokenizer, seed)
    words = ["--tokenizer", reference, "--recipe", str(comparison.recipe)]
    words += comparison.generator_overrides(row, seed)
    return Job(
        name,
        lambda: _training("train_dit", words, folder),
        (folder / "export" / "config.json").is_file,
        comparison.folder / LOGS / f"generator_{row.name}-{seed}.log",
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
        comparison.folder / LOGS / f"scores_{kind}_{file.stem}.log",
        after,
        kind=f"{kind} scores",
        of=name,
    )
