"""The report of a comparison: one HTML file that needs nothing else, one PNG, and the numbers as JSON."""

from collections.abc import Sequence
from pathlib import Path

from comparison.figure import curves, curves_and_samples
from comparison.page import page
from comparison.plan import Comparison
from comparison.results import (
    TOKENIZER_COLUMNS,
    RowResult,
    Spread,
    main_scores,
)
from comparison.scores import shown_labels
from comparison.stored import Told, write_results
from semtok.data.images.kinds import open_sources
from semtok.storage import new_file, write_text


def shown_classes(comparison: Comparison) -> list[str]:
    """Names of the classes whose samples are shown; empty: there is one class."""
    names = open_sources(comparison.data())[0].class_names
    return [names[label] for label in shown_labels(len(names))] if len(names) > 1 else []


def write_report(comparison: Comparison, results: list[RowResult], told: Told) -> list[Path]:
    """Writes ``report.html``, ``report.png`` and ``results.json`` into the comparison's folder."""
    folder = comparison.folder
    scores = [result.scores for result in results]
    picture = curves_and_samples(comparison, scores, told.classes)
    with new_file(folder / "report.png") as temporary:
        temporary.write_bytes(picture)
    tables = (generation_table(results), tokenizer_table(results))
    text = page(comparison, results, tables, figure=curves(scores), told=told)
    write_text(folder / "report.html", text)
    return [
        folder / "report.html",
        folder / "report.png",
        write_results(comparison, results, told),
    ]


def generation_table(results: list[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the main scores at each step, the others at the last, how far the main ones are from the
    baseline's at the end, and how soon each row is as good as the baseline then."""
    first = results[0].scores
    names, baseline = list(first.generation), results[0].baseline
    followed = main_scores(names)
    header = [
        "row",
        *(f"{name} at {step}" for name in followed for step in first.steps),
        *(name for name in names if name not in followed),
        *(f"{name} less {baseline}'s" for name in followed),
        *(f"{unit} to {baseline}'s {name}" for name in followed for unit in ("steps", "seconds")),
        "training, s",
    ]
    return header, [_generation_row(result, names, followed) for result in results]


def _generation_row(result: RowResult, names: list[str], followed: list[str]) -> list[str]:
    scores = result.scores
    steps = Spread((scores.steps[0],) * len(scores.seconds[0].values))
    return [
        scores.row.name,
        *(str(spread) for name in followed for spread in scores.generation[name]),
        *(str(scores.generation[name][-1]) for name in names if name not in followed),
        *(_signed(result, name) for name in followed),
        *(
            reached_text(reached[name], first)
            for name in followed
            for reached, first in (
                (result.steps_to_baseline, steps),
                (result.seconds_to_baseline, scores.seconds[0]),
            )
        ),
        str(scores.seconds[-1]),
    ]


def _signed(result: RowResult, name: str) -> str:
    if result.scores.row.name == result.baseline:
        return "-"
    return interval_text(result.differences[name])


def interval_text(differences: Spread) -> str:
    """The mean of differences by seed, and where there are several its 95 % interval."""
    bounds = differences.interval()
    within = f" [{bounds[0]:+.3g}, {bounds[1]:+.3g}]" if bounds is not None else ""
    mean = round(differences.mean, 9)  # scores that are equal may differ in their last bit
    return f"{mean:+.3g}{within}"


def tokenizer_table(results: list[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each tokenizer."""
    by_tokenizer = {r.scores.row.tokenizer: r.scores.tokenizer for r in results}
    columns = [c for c in TOKENIZER_COLUMNS if any(c in t for t in by_tokenizer.values())]
    rows = [
        [name, *(str(scores[c]) if c in scores else "-" for c in columns)]
        for name, scores in by_tokenizer.items()
    ]
    return ["tokenizer", *(TOKENIZER_COLUMNS[c] for c in columns)], rows


def reached_text(reached: Sequence[float], first: Spread) -> str:
    """Means over the seeds that get there; where one is there at the first checkpoint, nobody knows since when.

    Args:
        first: of the first checkpoint.
    """
    if not reached:
        return "never"
    num_seeds = len(first.values)
    missing = num_seeds - len(reached)
    at_most = "≤ " if set(first.values) & set(reached) else ""
    never = f" ({missing} of {num_seeds} seeds never)" if missing else ""
    return at_most + str(Spread(tuple(reached))) + never
