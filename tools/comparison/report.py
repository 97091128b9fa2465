"""The report of a comparison: one HTML file that needs nothing else, one PNG, and the numbers as JSON."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from comparison.plan import Comparison
from comparison.results import (
    CLASS_SHARE,
    TOKENIZER_COLUMNS,
    RowResult,
    Spread,
    main_scores,
)
from semtok.evaluation.predictors import PREDICTORS
from semtok.storage import new_file, write_json, write_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { vertical-align: bottom; white-space: normal } th:first-child, td:first-child { text-align: left }
img { max-width: 100%; image-rendering: pixelated } .figure img { image-rendering: auto }
p.note { color: #555 } code { background: #f4f4f4; padding: .1em .3em }
"""


def write_report(
    comparison: Comparison, results: list[RowResult], *, command: str, about: list[str]
) -> list[Path]:
    """Writes ``report.html``, ``report.png`` and ``results.json`` into the comparison's folder.

    Args:
        command: that made it.
        about: sentences on the setting.
    """
    folder = comparison.folder
    figure = _figure(comparison, results)
    with new_file(folder / "report.png") as temporary:
        temporary.write_bytes(figure)
    write_text(folder / "report.html", _html(comparison, results, figure, command, about))
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


# Figures ------------------------------------------------------------------------------------------


def _figure(comparison: Comparison, results: list[RowResult]) -> bytes:
    """Each main score against steps, against seconds, and at the end; and samples; as a PNG."""
    followed = main_scores(results[0].generation)
    heights = [3.6 * len(followed), 0.62 * len(results) + 0.3]
    figure = plt.figure(figsize=(13, sum(heights)), layout="constrained")
    curves, grids = figure.subfigures(2, 1, height_ratios=heights)
    axes = curves.subplots(len(followed), 3, squeeze=False)
    for name, row in zip(followed, axes, strict=True):
        _draw_score(row, name, results)
    axes[0][0].legend(fontsize=8)
    axes = grids.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        with Image.open(comparison.generator_scores(result.row, 0).with_suffix(".png")) as image:
            axis.imshow(np.asarray(image), interpolation="nearest")
        axis.set_ylabel(result.row.name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    grids.suptitle(
        "samples of seed 0, each column of one class and, where latents are of one shape, one noise",
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _draw_score(axes: Sequence[Axes], name: str, results: list[RowResult]) -> None:
    by_step, by_second, bars = axes
    colours = plt.get_cmap("tab20").colors
    for i, result in enumerate(results):
        colour = colours[i % len(colours)]
        style = {"color": colour, "marker": "o", "ms": 3, "lw": 1.4, "capsize": 2}
        scores = result.generation[name]
        mean, std = [s.mean for s in scores], [s.std for s in scores]
        by_step.errorbar(result.steps, mean, std, label=result.row.name, **style)
        by_second.errorbar([s.mean for s in result.seconds], mean, std, **style)
        bars.barh(i, mean[-1], xerr=std[-1], color=colour, capsize=2)
    better = "higher" if name == CLASS_SHARE else "lower"
    for axis, label in ((by_step, "training steps"), (by_second, "seconds of training")):
        axis.set_xlabel(label)
        axis.set_ylabel(f"{name} ({better} is better)")
        axis.set_yscale("linear" if name == CLASS_SHARE else "log")
    bars.set_yticks(range(len(results)), [r.row.name for r in results], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel(f"{name} after {results[0].steps[-1]} steps")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


# HTML ---------------------------------------------------------------------------------------------


def _html(
    comparison: Comparison,
    results: list[RowResult],
    figure: bytes,
    command: str,
    about: list[str],
) -> str:
    num = comparison.num_seeds
    spread = f"mean ± standard deviation of {num} seeds" if num > 1 else "one seed"
    meanings = "".join(
        f"<li><b>{html.escape(p.label)}</b> ({p.better} is better): {html.escape(p.meaning)}. "
        f"<i>{html.escape(p.source)}</i></li>"
        for p in PREDICTORS.values()
    )
    rows = "".join(
        f"<tr><td>{html.escape(r.row.name)}</td><td><code>{html.escape(r.row.tokenizer)}</code></td>"
        f"<td><code>{html.escape(' '.join(r.row.settings)) or '-'}</code></td></tr>"
        for r in results
    )
    pictures = "".join(
        f"<tr><td>{html.escape(name)}</td><td><img alt='reconstructions of {html.escape(name)}' "
        f"src='{_data(comparison.tokenizer_scores(name, 0).with_suffix('.png').read_bytes())}' "
        "width='1000'></td></tr>"
        for name in dict.fromkeys(r.row.tokenizer for r in results)
    )
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            f"<title>Comparison of tokenizers</title><style>{_STYLE}</style></head><body>",
            "<h1>Comparison of tokenizers</h1>",
            *(f"<p>{html.escape(sentence)}</p>" for sentence in about),
            f"<p class='note'><code>{html.escape(command)}</code></p>",
            f"<h2>Generation</h2><p class='note'>{spread}; the first row is the baseline.</p>",
            _table(*generation_table(results)),
            f"<p class='figure'><img alt='curves and samples' src='{_data(figure)}'></p>",
            f"<h2>Tokenizers</h2><p class='note'>{spread}, on held-out images.</p>",
            _table(*tokenizer_table(results)),
            f"<ul class='note'>{meanings}</ul>",
            f"<h2>Held-out images and their reconstructions, seed 0</h2><table>{pictures}</table>",
            f"<h2>Rows</h2><table><tr><th>row</th><th>tokenizer</th><th>settings</th></tr>{rows}</table>",
            "</body></html>",
        ]
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


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
