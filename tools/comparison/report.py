"""The report of a comparison: one HTML file that needs nothing else, one PNG, and the numbers as JSON."""

from pathlib import Path
from typing import Any

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
from semtok.data.images.kinds import open_sources
from semtok.storage import new_file, write_json, write_text


def write_report(
    comparison: Comparison, results: list[RowResult], *, command: str, about: list[str]
) -> list[Path]:
    """Writes ``report.html``, ``report.png`` and ``results.json`` into the comparison's folder.

    Args:
        command: that made it.
        about: sentences on the setting.
    """
    folder = comparison.folder
    names = open_sources(comparison.data())[0].class_names
    classes = [names[label] for label in shown_labels(len(names))] if len(names) > 1 else []
    picture = curves_and_samples(comparison, results, classes)
    with new_file(folder / "report.png") as temporary:
        temporary.write_bytes(picture)
    text = page(
        comparison,
        results,
        (generation_table(results), tokenizer_table(results)),
        figure=curves(results),
        classes=classes,
        command=command,
        about=about,
    )
    write_text(folder / "report.html", text)
    write_json(folder / "results.json", _as_json(comparison, results, command, about))
    return [folder / name for name in ("report.html", "report.png", "results.json")]


def generation_table(results: list[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the main scores at each step, the others at the last, and how soon each row is as
    good as the baseline at its end."""
    names = list(results[0].generation)
    followed = main_scores(names)
    steps, num_seeds = results[0].steps, len(results[0].seconds[0].values)
    header = [
        "row",
        *(f"{name} at {step}" for name in followed for step in steps),
        *(name for name in names if name not in followed),
        *(f"steps to the first row's {name}" for name in followed),
        "training, s",
    ]
    rows = [
        [
            r.row.name,
            *(str(spread) for name in followed for spread in r.generation[name]),
            *(str(r.generation[name][-1]) for name in names if name not in followed),
            *(_reached(r.steps_to_baseline[name], steps[0], num_seeds) for name in followed),
            str(r.seconds[-1]),
        ]
        for r in results
    ]
    return header, rows


def tokenizer_table(results: list[RowResult]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, one for each tokenizer."""
    by_tokenizer = {r.row.tokenizer: r.tokenizer for r in results}
    columns = [c for c in TOKENIZER_COLUMNS if any(c in t for t in by_tokenizer.values())]
    rows = [
        [name, *(str(scores[c]) if c in scores else "-" for c in columns)]
        for name, scores in by_tokenizer.items()
    ]
    return ["tokenizer", *(TOKENIZER_COLUMNS[c] for c in columns)], rows


def _reached(steps: tuple[float, ...], first: int, num_seeds: int) -> str:
    """Means over the seeds that get there; where one is there at the first checkpoint, nobody knows since when."""
    if not steps:
        return "never"
    missing = num_seeds - len(steps)
    at_most = "≤ " if first in steps else ""
    never = f" ({missing} of {num_seeds} seeds never)" if missing else ""
    return at_most + str(Spread(steps)) + never


def _as_json(
    comparison: Comparison, results: list[RowResult], command: str, about: list[str]
) -> dict[str, Any]:
    return {
        "command": command,
        "about": about,
        "settings": comparison.settings.model_dump(mode="json"),
        "num_seeds": comparison.num_seeds,
        "rows": [
            {
                **r.row.model_dump(mode="json"),
                "tokenizer_scores": {n: s.values for n, s in r.tokenizer.items()},
                "steps": r.steps,
                "generation": {n: [s.values for s in at] for n, at in r.generation.items()},
                "training_seconds": [s.values for s in r.seconds],
                "steps_to_baseline": r.steps_to_baseline,
            }
            for r in results
        ],
    }
