"""The results of a comparison as ``results.json`` keeps them, from which its report can be drawn again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.asked import Row
from comparison.plan import Comparison, read_comparison
from comparison.results import RowResult, RowScores, Spread
from semtok.errors import UserError
from semtok.settings import parse
from semtok.storage import read_json, write_json

RESULTS_FILE = "results.json"


@dataclass(frozen=True)
class Told:
    """What a report says beside its scores.

    Attributes:
        command: that made the comparison.
        about: sentences on the setting.
        classes: of the columns of samples; empty: there are none.
    """

    command: str
    about: Sequence[str]
    classes: Sequence[str]


def write_results(comparison: Comparison, results: list[RowResult], told: Told) -> Path:
    """Writes all scores, of every seed, and what was made of them."""
    content = {
        "command": told.command,
        "about": list(told.about),
        "classes": list(told.classes),
        "settings": comparison.settings.model_dump(mode="json"),
        "num_seeds": comparison.num_seeds,
        "baseline": results[0].baseline,
        "rows": [_row(result) for result in results],
    }
    write_json(comparison.folder / RESULTS_FILE, content)
    return comparison.folder / RESULTS_FILE


def _row(result: RowResult) -> dict[str, Any]:
    scores = result.scores
    return {
        **scores.row.model_dump(mode="json"),
        "tokenizer_scores": {n: s.values for n, s in scores.tokenizer.items()},
        "steps": scores.steps,
        "generation": {n: [s.values for s in at] for n, at in scores.generation.items()},
        "training_seconds": [s.values for s in scores.seconds],
        "steps_to_baseline": result.steps_to_baseline,
        "seconds_to_baseline": result.seconds_to_baseline,
        "difference_to_baseline": {n: s.values for n, s in result.differences.items()},
    }


@dataclass(frozen=True)
class Stored:
    """What a file of results holds.

    Attributes:
        baseline: the name of the row that others are compared with.
        num_seeds: whose scores are there.
    """

    scores: list[RowScores]
    told: Told
    baseline: str
    num_seeds: int


def read_results(folder: Path) -> tuple[Comparison, Stored]:
    """What ``write_results`` wrote.

    Raises:
        UserError: nothing was reported there, or by an earlier version, which kept less.
    """
    file = folder / RESULTS_FILE
    if not file.is_file():
        raise UserError(
            f"{folder}: no {RESULTS_FILE}, nothing was reported there yet; compare first"
        )
    stored = read_stored(file)
    return read_comparison(folder, stored.num_seeds), stored


def read_stored(file: Path) -> Stored:
    """A file of results, wherever it lies now."""
    content = read_json(file)
    if not isinstance(content, dict) or not {"classes", "baseline"} <= content.keys():
        raise UserError(
            f"{file}: an earlier version wrote it; give the comparison's own command once more, which trains nothing"
        )
    rows = [_scores(row, str(file)) for row in content["rows"]]
    told = Told(content["command"], content["about"], content["classes"])
    return Stored(rows, told, content["baseline"], content["num_seeds"])


def _scores(content: dict[str, Any], place: str) -> RowScores:
    row = {name: content[name] for name in Row.model_fields}
    return RowScores(
        parse(Row, row, place),
        {name: Spread(tuple(values)) for name, values in content["tokenizer_scores"].items()},
        content["steps"],
        {n: [Spread(tuple(v)) for v in at] for n, at in content["generation"].items()},
        [Spread(tuple(values)) for values in content["training_seconds"]],
    )
