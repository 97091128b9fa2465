"""The page of a comparison: one HTML file that asks for nothing outside it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np
from PIL import Image

from comparison.asked import Row
from comparison.plan import Comparison
from comparison.results import RowResult, direction
from comparison.scores import part_pictures, strip_picture
from comparison.stored import Told
from semtok.evaluation.predictors import PREDICTORS

_WIDTH = 1100
"""Pixels that strips of images are enlarged to at most, by a whole number so that none is blurred."""
_STYLE = """
:root { color-scheme: light dark; --ink: #222; --quiet: #555; --paper: #fff; --line: #d5d5d5; --shade: #f3f4f6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --quiet: #aaa; --paper: #17181a; --line: #3c3f44; --shade: #24262a }
}
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1240px; margin: 2em auto; padding: 0 1em;
  color: var(--ink); background: var(--paper) }
.wide { overflow-x: auto; margin: 1em 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3em .8em; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { background: var(--shade); vertical-align: bottom; white-space: normal; min-width: 4.5em; font-weight: 600 }
thead th.group { text-align: center; border-left: 1px solid var(--line) }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper) }
thead th:first-child { background: var(--shade) }
tbody tr:hover td, tbody tr:hover th { background: var(--shade) }
small { display: block; font-weight: 400; color: var(--quiet) }
table.text td { text-align: left }
table.strips td, table.strips th { border: 0; padding: 2px .6em; vertical-align: middle; text-align: left }
table.strips thead th { background: none; vertical-align: bottom }
.columns { display: flex } .columns span { writing-mode: vertical-rl; transform: rotate(180deg);
  font: 11px/1 system-ui, sans-serif; display: flex; align-items: center; overflow: hidden; max-height: 14em }
.strips img { image-rendering: pixelated; display: block }
.figure img { max-width: 100%; background: #fff }
p.note, ul.note { color: var(--quiet) } code { background: var(--shade); padding: .1em .3em; overflow-wrap: anywhere }
"""

_INTERVALS = ". In brackets: the 95 % interval of the mean difference, by Student's t"
Table = tuple[list[str], list[list[str]]]


def page(
    comparison: Comparison,
    results: list[RowResult],
    tables: tuple[Table, Table],
    *,
    figure: bytes,
    told: Told,
) -> str:
    """The page.

    Args:
        tables: of generation and of tokenizers.
        figure: a PNG.
    """
    num = comparison.num_seeds
    spread = f"mean ± standard deviation of {num} seeds" if num > 1 else "one seed"
    generation, tokenizers = tables
    reference = results[0].baseline
    shown = [result.scores.row for result in results]
    samples = {
        row.name: _strip(comparison.generator_scores(row, 0).with_suffix(".png")) for row in shown
    }
    rows = [[row.name, row.tokenizer, " ".join(row.settings) or "-"] for row in shown]
    return "\n".join(
        [
            "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
            "<meta name='viewport' content='width=device-width, initial-scale=1'>",
            f"<title>Comparison of tokenizers</title><style>{_STYLE}</style></head><body>",
            "<h1>Comparison of tokenizers</h1>",
            *(f"<p>{html.escape(sentence)}</p>" for sentence in told.about),
            f"<p class='note'>Made by <code>{html.escape(told.command)}</code></p>",
            "<h2>Generation</h2>",
            f"<p class='note'>{spread}; {html.escape(reference)} is the baseline, with which each seed "
            f"is compared by the same seed{_INTERVALS if num > 1 else ''}.</p>",
            _table(*generation),
            f"<p class='figure'><img alt='scores against steps and seconds' src='{_data(figure)}'></p>",
            "<h2>Samples</h2>",
            "<p class='note'>Seed 0, after the last step. Each column is of one class and, where latents are of one "
            "shape, of one noise.</p>",
            _strips(samples, told.classes),
            *_over_time(comparison, shown),
            f"<h2>Tokenizers</h2><p class='note'>{spread}, on held-out images.</p>",
            _table(*_turned(*tokenizers)),
            f"<ul class='note'>{_meanings()}</ul>",
            "<h2>Reconstructions</h2>",
            "<p class='note'>Held-out images, what each tokenizer of seed 0 makes of them, and the first three "
            "principal components of each part of its latents, in colours that compare with those of the teacher's "
            "tokens.</p>",
            _strips(_reconstructions(comparison, results), ()),
            "<h2>Rows</h2>",
            _table(["row", "tokenizer", "settings of its transformer"], rows, kind="text"),
            "</body></html>",
        ]
    )


def _meanings() -> str:
    return "".join(
        f"<li><b>{html.escape(p.label)}</b> ({p.better} is better): {html.escape(p.meaning)}. "
        f"<i>{html.escape(p.source)}</i></li>"
        for p in PREDICTORS.values()
    )


def _reconstructions(comparison: Comparison, results: list[RowResult]) -> dict[str, Image.Image]:
    """Strips by label; the images once, as they are the same for every tokenizer. Below each reconstruction are the
    latents, which a comparison of an earlier version has not drawn."""
    strips: dict[str, Image.Image] = {}
    for name in dict.fromkeys(r.scores.row.tokenizer for r in results):
        file = comparison.tokenizer_scores(name, 0)
        both = _strip(file.with_suffix(".png"))
        half = both.height // 2
        strips.setdefault("held-out image", both.crop((0, 0, both.width, half)))
        strips[name] = both.crop((0, half, both.width, both.height))
        parts = part_pictures(file)
        strips |= {f"{name}: {part}": _strip(picture) for part, picture in parts.items()}
    return strips


def _over_time(comparison: Comparison, rows: Sequence[Row]) -> list[str]:
    """A section with the sampling of each row in which a part of the latents leads; nothing where there is none."""
    files = {row.name: strip_picture(comparison.generator_scores(row, 0)) for row in rows}
    figures = [
        f"<p class='figure'><img alt='sampling of {html.escape(name, quote=True)} over time' "
        f"src='{_data(file.read_bytes())}'></p><p class='note'>{html.escape(name)}</p>"
        for name, file in files.items()
        if file.is_file()
    ]
    told = (
        "<h2>Sampling over time</h2><p class='note'>Rows in which a part of the latents leads. From noise (left) to "
        "data (right): the decoded texture, and below it the semantic part's principal components.</p>"
    )
    return [told, *figures] if figures else []


def _strip(file: object) -> Image.Image:
    with Image.open(file) as image:
        return image.copy()


def _strips(strips: dict[str, Image.Image], columns: Sequence[str]) -> str:
    """Rows of images with their names beside them, and the columns' above."""
    first = next(iter(strips.values()))
    times = max(1, _WIDTH // first.width)
    head = ""
    if columns:
        side = times * first.width // len(columns)
        names = "".join(
            f"<span style='width:{side}px'>{html.escape(name)}</span>" for name in columns
        )
        head = f"<thead><tr><th></th><th><div class='columns'>{names}</div></th></tr></thead>"
    body = "".join(
        f"<tr><th>{html.escape(name)}</th><td><img alt='{html.escape(name, quote=True)}' "
        f"width='{times * image.width}' height='{times * image.height}' src='{_data(_png(image))}'></td></tr>"
        for name, image in strips.items()
    )
    return f"<div class='wide'><table class='strips'>{head}<tbody>{body}</tbody></table></div>"


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(buffer, "PNG")
    return buffer.getvalue()


def _table(header: list[str], rows: list[list[str]], *, kind: str = "numbers") -> str:
    """Columns called ``NAME at STEP`` stand together under one name."""
    upper, lower = "", ""
    height = 2 if any(" at " in cell for cell in header) else 1
    for name, group in groupby(header, key=lambda cell: cell.rpartition(" at ")[0] or cell):
        cells = list(group)
        told = f"{html.escape(name)}{_direction(name)}"
        steps = [cell.rpartition(" at ")[2] for cell in cells if cell != name]
        if steps:
            upper += f"<th class='group' colspan='{len(steps)}'>{told}</th>"
            lower += "".join(
                f"<th scope='col'>{html.escape(step)}&nbsp;steps</th>" for step in steps
            )
        else:
            upper += f"<th scope='col' rowspan='{height}'>{told}</th>"
    body = "".join(
        f"<tr><th scope='row'>{html.escape(first)}{_direction(first)}</th>{_cells(others)}</tr>"
        for first, *others in rows
    )
    second = f"<tr>{lower}</tr>" if lower else ""
    head = f"<thead><tr>{upper}</tr>{second}</thead>"
    return f"<div class='wide'><table class='{kind}'>{head}<tbody>{body}</tbody></table></div>"


def _turned(header: list[str], rows: list[list[str]]) -> Table:
    """A row for each column: a page is longer than wide, and scores outnumber tokenizers."""
    (_, *names), *others = (list(column) for column in zip(header, *rows, strict=True))
    return ["score", *names], others


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{html.escape(text)}</td>" for text in texts)


def _direction(name: str) -> str:
    told = direction(name)
    return f"<small>{told}</small>" if told else ""


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
