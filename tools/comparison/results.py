"""What the scores of a comparison come to: means and spreads over seeds, and who is how much faster."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from comparison.asked import Row
from comparison.plan import Comparison
from semtok.evaluation.classes import CLASS_SHARE
from semtok.evaluation.predictors import PREDICTORS
from semtok.storage import read_json

TOKENIZER_COLUMNS = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "reconstruction_fd": "FD of reconstructions",
    "probe_accuracy": "attribute probe, mean balanced accuracy",
    **{name: predictor.label for name, predictor in PREDICTORS.items()},
    "seconds": "training, s (with the VAE's)",
}


def direction(name: str) -> str:
    """``less is better`` or ``more is better`` of a score or a column's label; empty where neither is."""
    labels = {predictor.label: predictor.better for predictor in PREDICTORS.values()}
    if name in labels:
        return "more is better" if labels[name] == "higher" else "less is better"
    if name.startswith(("PSNR", "SSIM", "attribute probe", "precision", "recall", CLASS_SHARE)):
        return "more is better"
    return "less is better" if name.startswith(("FD", "KD", "steps to", "seconds to")) else ""


@dataclass(frozen=True)
class Spread:
    """One number of each seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Of the seeds, n - 1 in the denominator; 0 of a single one."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def interval(self, level: float = 0.95) -> tuple[float, float] | None:
        """Where the mean over all seeds lies, by Student's t; None: of one seed nobody can say."""
        num = len(self.values)
        if num < 2:
            return None
        half = float(stats.t.ppf((1 + level) / 2, num - 1)) * self.std / math.sqrt(num)
        return self.mean - half, self.mean + half

    def less(self, other: "Spread") -> "Spread":
        """Seed by seed."""
        return Spread(tuple(a - b for a, b in zip(self.values, other.values, strict=True)))

    def __str__(self) -> str:
        # Two digits, without an exponent where there are hundreds; what is left of equal numbers is none.
        std = float(f"{self.std if self.std > 1e-12 else 0:.2g}")
        spread = f" ± {std:g}" if len(self.values) > 1 else ""
        return f"{self.mean:.4g}{spread}"


@dataclass(frozen=True)
class RowScores:
    """All that was measured of a row.

    Attributes:
        tokenizer: by the keys of ``TOKENIZER_COLUMNS``, those that are known.
        generation: per score and step.
        seconds: of training up to each step.
    """

    row: Row
    tokenizer: dict[str, Spread]
    steps: list[int]
    generation: dict[str, list[Spread]]
    seconds: list[Spread]


@dataclass(frozen=True)
class RowResult:
    """A row's scores beside the baseline's, of which each seed's are compared with those of the same seed.

    Attributes:
        baseline: the name of the row that is one.
        steps_to_baseline: per main score, after how many steps it first is as good as the baseline's last, one
            number for each seed that gets there.
        seconds_to_baseline: the same in seconds of training.
        differences: per main score, the last one less the baseline's.
    """

    scores: RowScores
    baseline: str
    steps_to_baseline: dict[str, tuple[float, ...]]
    seconds_to_baseline: dict[str, tuple[float, ...]]
    differences: dict[str, Spread]


def collect(comparison: Comparison) -> list[RowScores]:
    """Reads every score file of a finished comparison."""
    results: list[RowScores] = []
    for row in comparison.rows:
        files = [comparison.tokenizer_scores(row.tokenizer, s) for s in comparison.seeds]
        tokenizer = [read_json(file) for file in dict.fromkeys(files)]
        curves = [read_json(comparison.generator_scores(row, s)) for s in comparison.seeds]
        names = [n for n in curves[0][0] if n not in ("step", "seconds")]
        results.append(
            RowScores(
                row,
                _tokenizer_spreads(tokenizer),
                [entry["step"] for entry in curves[0]],
                {
                    n: [Spread(tuple(e[n] for e in at)) for at in zip(*curves, strict=True)]
                    for n in names
                },
                [Spread(tuple(e["seconds"] for e in at)) for at in zip(*curves, strict=True)],
            )
        )
    return results


def compared(rows: Sequence[RowScores], baseline: str) -> list[RowResult]:
    """Each row beside the one of that name, which there is."""
    [reference] = [row for row in rows if row.row.name == baseline]
    return [_beside(row, reference) for row in rows]


def _beside(row: RowScores, reference: RowScores) -> RowResult:
    names = main_scores(row.generation)
    num_seeds = len(row.seconds[0].values)
    steps = [Spread((step,) * num_seeds) for step in row.steps]
    pairs = {n: (row.generation[n], reference.generation[n]) for n in names}
    return RowResult(
        row,
        reference.row.name,
        {n: _reached(steps, *pair, n) for n, pair in pairs.items()},
        {n: _reached(row.seconds, *pair, n) for n, pair in pairs.items()},
        {n: own[-1].less(other[-1]) for n, (own, other) in pairs.items()},
    )


def main_scores(names: Iterable[str]) -> list[str]:
    """The scores that rows are followed by over the steps: the Fréchet distance, and the share of images
    that show their class where there are classes."""
    distance, *others = names
    return [distance, *(n for n in others if n == CLASS_SHARE)]


def steps_to_reach(steps: Sequence[float], scores: Sequence[float], target: float) -> float:
    """After how many steps, or seconds, a falling score first is at most the target: interpolated linearly between
    checkpoints; infinity where it never is; the first checkpoint's where that is good enough."""
    for i, (step, score) in enumerate(zip(steps, scores, strict=True)):
        if score <= target:
            if i == 0:
                return float(step)
            share = (scores[i - 1] - target) / (scores[i - 1] - score)
            return steps[i - 1] + share * (step - steps[i - 1])
    return math.inf


def _reached(
    costs: list[Spread], scores: list[Spread], baseline: list[Spread], name: str
) -> tuple[float, ...]:
    """Args: costs: steps or seconds of each checkpoint, of each seed."""
    sign = -1 if name == CLASS_SHARE else 1  # of the share, more is better
    reached = [
        steps_to_reach(
            [at.values[seed] for at in costs],
            [sign * at.values[seed] for at in scores],
            sign * target,
        )
        for seed, target in enumerate(baseline[-1].values)
    ]
    return tuple(number for number in reached if math.isfinite(number))


def _tokenizer_spreads(scores: list[dict[str, float]]) -> dict[str, Spread]:
    renamed = [
        {("reconstruction_fd" if n.startswith("FD-") else n): v for n, v in s.items()}
        for s in scores
    ]
    return {n: Spread(tuple(s[n] for s in renamed)) for n in TOKENIZER_COLUMNS if n in renamed[0]}
