"""The picture of a comparison: scores against steps and seconds, and samples with their classes."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from PIL import Image

from comparison.plan import Comparison
from comparison.results import RowScores, direction, main_scores


def curves(results: list[RowScores]) -> bytes:
    """Each main score against steps, against seconds, and at the end, as a PNG."""
    followed = main_scores(results[0].generation)
    whole = plt.figure(figsize=(13, 3.6 * len(followed)), layout="constrained", facecolor="white")
    _draw_scores(whole.subplots(len(followed), 3, squeeze=False), followed, results)
    return _png(whole)


def curves_and_samples(
    comparison: Comparison, results: list[RowScores], classes: Sequence[str]
) -> bytes:
    """The curves, and below them samples, as a PNG.

    Args:
        classes: of the columns of samples; empty: there are none.
    """
    followed = main_scores(results[0].generation)
    longest = max((len(name) for name in classes), default=0)
    heights = [3.6 * len(followed), 0.62 * len(results) + 0.4 + 0.075 * longest]
    whole = plt.figure(figsize=(13, sum(heights)), layout="constrained", facecolor="white")
    above, grids = whole.subfigures(2, 1, height_ratios=heights)
    _draw_scores(above.subplots(len(followed), 3, squeeze=False), followed, results)
    axes = grids.subplots(len(results), 1, squeeze=False)[:, 0]
    for axis, result in zip(axes, results, strict=True):
        with Image.open(comparison.generator_scores(result.row, 0).with_suffix(".png")) as image:
            axis.imshow(np.asarray(image), interpolation="nearest")
        axis.set_ylabel(result.row.name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    if classes:
        width = axes[0].get_xlim()[1] / len(classes)
        axes[0].xaxis.tick_top()
        axes[0].set_xticks(
            [width * (i + 0.5) for i in range(len(classes))], classes, rotation=90, fontsize=7
        )
        axes[0].tick_params(length=0)
    grids.suptitle(
        "samples of seed 0, each column of one class and, where latents are of one shape, one noise",
        fontsize=9,
    )
    return _png(whole)


def _png(whole: Figure) -> bytes:
    buffer = io.BytesIO()
    whole.savefig(buffer, format="png", dpi=110)
    plt.close(whole)
    return buffer.getvalue()


def _draw_scores(axes: np.ndarray, names: Sequence[str], results: list[RowScores]) -> None:
    """A row of axes for each score."""
    for name, row in zip(names, axes, strict=True):
        _draw_score(row, name, results)
    handles, labels = axes[0][0].get_legend_handles_labels()
    above = {"loc": "outside upper center", "ncols": min(6, len(labels)), "fontsize": 8}
    axes[0][0].get_figure().legend(handles, labels, **above)


def _draw_score(axes: Sequence[Axes], name: str, results: list[RowScores]) -> None:
    by_step, by_second, bars = axes
    colours = plt.get_cmap("tab20" if len(results) > 10 else "tab10").colors
    for i, result in enumerate(results):
        colour = colours[i % len(colours)]
        style = {"color": colour, "marker": "o", "ms": 3, "lw": 1.4, "capsize": 2}
        scores = result.generation[name]
        mean, std = [s.mean for s in scores], [s.std for s in scores]
        by_step.errorbar(result.steps, mean, std, label=result.row.name, **style)
        by_second.errorbar([s.mean for s in result.seconds], mean, std, **style)
        bars.barh(i, mean[-1], xerr=std[-1], color=colour, capsize=2)
    label = f"{name} ({direction(name)})"
    for axis, below in ((by_step, "training steps"), (by_second, "seconds of training")):
        axis.set_xlabel(below)
        axis.set_ylabel(label)
        if direction(name) == "less is better":  # a distance
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ScalarFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
    by_step.set_xticks(results[0].steps)
    bars.set_yticks(range(len(results)), [r.row.name for r in results], fontsize=8)
    bars.invert_yaxis()
    bars.set_xlabel(f"{name} after {results[0].steps[-1]} steps ({direction(name)})")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
