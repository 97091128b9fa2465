"""What the pages show of results, as Markdown."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from comparison.report import interval_text, reached_text
from comparison.results import (
    CLASS_SHARE,
    TOKENIZER_COLUMNS,
    RowResult,
    Spread,
    compared,
    main_scores,
)
from comparison.stored import read_stored
from semtok.commands.evaluate_transfer import SCORE_LABELS, score_text
from semtok.storage import read_json

Table = tuple[list[str], list[list[str]]]
_TOKENIZER_SCORES = (
    "psnr",
    "ssim",
    "reconstruction_fd",
    "probe_accuracy",
    "cknna",
    "self_similarity",
    "high_frequency_share",
    "velocity_variance",
)
_SHARES = (CLASS_SHARE, "precision", "recall", "probe_accuracy")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _results(file: Path) -> list[RowResult]:
    stored = read_stored(file)
    return compared(stored.scores, stored.baseline)


def _text(name: str, spread: Spread) -> str:
    """A score with its spread; shares in percent."""
    if not name.startswith(_SHARES):
        return str(spread)
    percent = Spread(tuple(100 * value for value in spread.values))
    return (
        f"{percent.mean:.1f}" + (f" ± {percent.std:.1f}" if len(percent.values) > 1 else "") + " %"
    )


def scores(file: Path, *, by_seconds: bool = True) -> Table:
    """The last scores of each row, and its seconds of training.

    Args:
        by_seconds: False where seeds ran on unlike machines, whose seconds have no mean.
    """
    results = _results(file)
    names = list(results[0].scores.generation)
    rows = [
        [
            one.scores.row.name,
            *(_text(name, one.scores.generation[name][-1]) for name in names),
            *([str(one.scores.seconds[-1])] if by_seconds else []),
        ]
        for one in results
    ]
    return ["row", *names, *(["training, s"] if by_seconds else [])], rows


def differences(file: Path, *, by_seconds: bool = True) -> Table:
    """How far the main scores are from the baseline's, seed by seed, and how soon each row is as good.

    Args:
        by_seconds: as in ``scores``.
    """
    results = _results(file)
    followed, baseline = main_scores(results[0].scores.generation), results[0].baseline
    header = ["row"]
    for name in followed:
        header += [f"{name} less {baseline}'s", f"steps to {baseline}'s {name}"]
        header += [f"seconds to {baseline}'s {name}"] if by_seconds else []
    rows = []
    for one in results:
        if one.scores.row.name == baseline:
            continue
        cells = [one.scores.row.name]
        for name in followed:
            percent = 100 if name.startswith(_SHARES) else 1
            spread = Spread(tuple(percent * value for value in one.differences[name].values))
            first = Spread((one.scores.steps[0],) * len(one.scores.seconds[0].values))
            cells += [
                interval_text(spread) + (" points" if percent == 100 else ""),
                reached_text(one.steps_to_baseline[name], first),
            ]
            if by_seconds:
                seconds = one.seconds_to_baseline[name]
                cells.append(reached_text(seconds, one.scores.seconds[0]))
        rows.append(cells)
    return header, rows


def short(file: Path) -> Table:
    """The main scores alone."""
    results = _results(file)
    followed = main_scores(results[0].scores.generation)
    rows = [
        [r.scores.row.name, *(_text(n, r.scores.generation[n][-1]) for n in followed)]
        for r in results
    ]
    return ["", *followed], rows


def tokenizers(file: Path) -> Table:
    """What was measured of the tokenizers, one in a row; the first scores of each kind."""
    seen = {one.scores.row.tokenizer: one.scores.tokenizer for one in _results(file)}
    columns = [c for c in _TOKENIZER_SCORES if any(c in scores for scores in seen.values())]
    rows = [
        [name, *(_text(c, scores[c]) if c in scores else "–" for c in columns)]
        for name, scores in seen.items()
    ]
    return ["tokenizer", *(TOKENIZER_COLUMNS[c] for c in columns)], rows


def transfer(file: Path) -> Table:
    """Each tokenizer on each set of images, as ``evaluate transfer`` wrote it."""
    sets = read_json(file)["sets"]
    columns = [
        (name, score)
        for name, by_tokenizer in sets.items()
        for score in dict.fromkeys(score for own in by_tokenizer.values() for score in own)
    ]
    tokenizers = next(iter(sets.values()))
    rows = [
        [name, *(score_text(score, sets[images][name].get(score)) for images, score in columns)]
        for name in tokenizers
    ]
    return [
        "tokenizer",
        *(f"{images}: {SCORE_LABELS.get(score, score)}" for images, score in columns),
    ], rows


TABLES: dict[str, Callable[[Path], Table]] = {
    "scores": scores,
    "scores_alone": partial(scores, by_seconds=False),
    "differences": differences,
    "differences_by_steps": partial(differences, by_seconds=False),
    "short": short,
    "tokenizers": tokenizers,
    "transfer": transfer,
}
"""By the word that a page asks with."""
