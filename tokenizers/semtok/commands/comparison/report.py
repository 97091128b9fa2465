"""The report of a comparison: one HTML file that needs nothing else, one PNG, and the numbers as JSON."""

import base64
import html
import io
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from semtok.commands.comparison.plan import Comparison
from semtok.commands.comparison.results import (
    TOKENIZER_COLUMNS,
    RowResult,
    Spread,
    distance_name,
)
from semtok.evaluation.latents import PREDICTORS
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
    """Header and rows: the distance at each step, the other scores at the last, and how soon each row is as
    good as the baseline at its end."""
    distance = distance_name(results)
    others = [n for n in results[0].generation if n != distance]
    steps = results[0].steps
    header = [
        "row",
        *(f"{distance} at {step}" for step in steps),
        *others,
        f"steps to the baseline's {distance}",
        "training, s",
    ]
    rows = [
        [
            r.row.name,
            *map(str, r.generation[distance]),
            *(str(r.final(n)) for n in others),
            _reached(r, len(results[0].final(distance).values)),
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


def _reached(result: RowResult, num_seeds: int) -> str:
    if not result.steps_to_baseline:
        return "never"
    spread = str(Spread(result.steps_to_baseline))
    missing = num_seeds - len(result.steps_to_baseline)
    return spread + (f" ({missing} of {num_seeds} seeds never)" if missing else "")


# Figures ------------------------------------------------------------------------------------------


def _figure(comparison: Comparison, results: list[RowResult]) -> bytes:
    """Curves against steps and against seconds, bars of the final distance, and samples, as a PNG."""
    distance = distance_name(results)
    height = 4 + 0.62 * len(results)
    figure = plt.figure(figsize=(13, height), layout="constrained")
    curves, grids = figure.subfigures(2, 1, height_ratios=[4, height - 4])
    by_step, by_second, bars = curves.subplots(1, 3)
    colours = plt.get_cmap("tab10").colors
    for i, result in enumerate(results):
        style = {"color": colours[i % 10], "marker": "o", "ms": 3, "lw": 1.4, "capsize": 2}
        scores = result.generation[distance]
        mean, std = [s.mean for s in scores], [s.std for s in scores]
        by_step.errorbar(result.steps, mean, std, label=result.row.name, **style)
        by_second.errorbar([s.mean for s in result.seconds], mean, std, **style)
        bars.barh(i, mean[-1], xerr=std[-1], color=colours[i % 10], capsize=2)
    _label(by_step, "training steps", distance)
    _label(by_second, "seconds of training", distance)
    by_step.legend(fontsize=8)
    bars.set_yticks(range(len(results)), [r.row.name for r in results], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel(f"{distance} after {results[0].steps[-1]} steps (lower is better)")
    bars.spines[["top", "right"]].set_visible(False)
    axes = np.atleast_1d(grids.subplots(len(results), 1))
    for axis, result in zip(axes, results, strict=True):
        with Image.open(comparison.generator_scores(result.row, 0).with_suffix(".png")) as image:
            axis.imshow(np.asarray(image), interpolation="nearest")
        axis.set_ylabel(result.row.name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    grids.suptitle("samples of seed 0, each column of one class and one noise", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def _label(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(f"{y} (lower is better)")
    axis.set_yscale("log")
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
            f"<h2>Reconstructions of seed 0</h2><table>{pictures}</table>",
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
