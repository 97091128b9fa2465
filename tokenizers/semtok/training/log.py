"""What a run tells: metrics that never make the device wait, files, progress, curves."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm import tqdm

from semtok.errors import NonFiniteLoss
from semtok.progress import ProgressLines, duration
from semtok.storage import new_file, told_of_disk

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NEVER = 2**62
_MOST_ROWS = 2000


class MetricSums:
    """Running means of named values, kept on the device until they are read.

    A value is a scalar, or a pair (2,) of a sum and a count where a step may have seen no or many
    samples of what is measured. The values of a step are held until its end and then added in a few
    kernels, however many they are; nothing may change them in place meanwhile.
    """

    def __init__(self) -> None:
        self._step = 0
        self.clear()

    def add(self, values: dict[str, Tensor], *, step: int) -> None:
        """Adds values and notes the step where one is first not finite; no host synchronisation."""
        if step != self._step or values.keys() & self._held.keys():
            self._add_held()
        self._step = step
        self._held |= {name: value.detach().float() for name, value in values.items()}

    def _add_held(self) -> None:
        held, self._held = self._held, {}
        if not held:
            return
        device = next(iter(held.values())).device
        self._widen([name for name in held if name not in self._names], device)
        one, zero = torch.ones((), device=device), torch.zeros((), device=device)
        pairs = {name: value if value.ndim else (value, one) for name, value in held.items()}
        sums, counts = zip(*(pairs.get(name, (zero, zero)) for name in self._names), strict=True)
        added = torch.stack([*sums, *counts]).view(2, -1)
        self._table = self._table + added
        self._rows.append((self._step, added))
        seen = self._first_bad
        self._first_bad = torch.where(added[0].isfinite(), seen, seen.clamp_max(self._step))

    def _widen(self, names: list[str], device: torch.device) -> None:
        if names:
            self._names += names
            zeros = torch.zeros(2, len(names), device=device)
            self._table = torch.cat([self._table.to(device), zeros], dim=1)
            never = torch.full((len(names),), _NEVER, device=device)
            self._first_bad = torch.cat([self._first_bad.to(device), never])

    def read(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Means since the last ``clear``, without those that nothing was seen of. This waits for the device.

        Args:
            reduce: averages a tensor over processes.
        """
        self._add_held()
        sums, counts = self._reduced(reduce).tolist()
        rows = zip(self._names, sums, counts, strict=True)
        return {name: total / count for name, total, count in rows if count}

    def read_steps(
        self, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> dict[int, dict[str, float]]:
        """As ``read``, of each step since the last ``clear``: of the last ``_MOST_ROWS`` micro-batches, and of those
        that a checkpoint kept."""
        self._add_held()
        if not self._rows:
            return dict(self._before)
        steps, rows = zip(*self._rows, strict=True)
        missing = [len(self._names) - row.shape[1] for row in rows]  # names that came later
        table = torch.stack(
            [pad(r, (0, m)) if m else r for r, m in zip(rows, missing, strict=True)]
        )
        sums: dict[int, dict[str, tuple[float, float]]] = {}
        for step, (totals, counts) in zip(
            steps, (reduce(table) if reduce is not None else table).tolist(), strict=True
        ):
            own = sums.setdefault(step, {})
            for name, total, count in zip(self._names, totals, counts, strict=True):
                before = own.get(name, (0.0, 0.0))
                own[name] = before[0] + total, before[1] + count
        return self._before | {
            step: {name: total / count for name, (total, count) in own.items() if count}
            for step, own in sums.items()
        }

    def _reduced(self, reduce: Callable[[Tensor], Tensor] | None) -> Tensor:
        return reduce(self._table) if reduce is not None and self._names else self._table

    def first_bad_steps(self) -> dict[str, int]:
        """For each value that was not finite, the first step where it was not. Waits for the device."""
        self._add_held()
        steps = zip(self._names, self._first_bad.tolist(), strict=True)
        return {name: step for name, step in steps if step != _NEVER}

    def clear(self) -> None:
        self._names: list[str] = []
        self._held: dict[str, Tensor] = {}
        self._table = torch.zeros(2, 0)  # sums and counts, a column for each name
        self._first_bad = torch.zeros(0, dtype=torch.int64)
        # Of each micro-batch, as it was added; they stay on the device.
        self._rows: deque[tuple[int, Tensor]] = deque(maxlen=_MOST_ROWS)
        self._before: dict[int, dict[str, float]] = {}  # steps from before a run was resumed

    def state_dict(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
        """The sums so far; checkpoints are written only where all of them are finite.

        Args:
            reduce: averages a tensor over processes, so that each may go on with what one has written.
        """
        self._add_held()
        sums, counts = (
            dict(zip(self._names, row, strict=True)) for row in self._reduced(reduce).cpu()
        )
        return {"sums": sums, "counts": counts, "steps": self.read_steps(reduce)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.clear()
        self._widen(list(state["sums"]), device)
        for row, values in zip(self._table, (state["sums"], state["counts"]), strict=True):
            for column, value in enumerate(values.values()):
                row[column] = value
        self._before = dict(state.get("steps", {}))


def non_finite(first_bad: dict[str, int], *, last_good: Path | None) -> NonFiniteLoss:
    """The error that says which value went wrong first, when, and what to do.

    Args:
        first_bad: per value, the first step where it was not finite.
        last_good: the newest checkpoint; all that it holds was checked.
    """
    # At equal steps a loss is the cause, a gradient norm its consequence.
    name = min(first_bad, key=lambda name: (first_bad[name], not name.startswith("loss/")))
    kind = "loss term" if name.startswith("loss/") else "value"
    where = (
        f"the last good checkpoint is {last_good}" if last_good else "there is no checkpoint yet"
    )
    return NonFiniteLoss(
        f"{kind} '{name.removeprefix('loss/')}' is not finite at step {first_bad[name]}; {where}; "
        "lower train.optimiser.learning_rate, or use train.precision=fp32"
    )


def _step_of(line: str) -> float:
    """A log line's step; a line that a kill cut short belongs to no step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, LookupError, TypeError):
        return math.inf


class RunLog:
    """``metrics.jsonl`` and ``curves.png`` of a run, and its progress on the terminal."""

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        first_step: int,
        is_main: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.file = folder / "metrics.jsonl"
        self.curves = folder / "curves.png"
        self.is_main = is_main
        self.total_steps = total_steps
        self._bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=True,
            disable=not (is_main and sys.stderr.isatty()),
        )
        # Between the lines of the metrics where these are far apart, as at the first steps of a slow run.
        self._steps = ProgressLines(
            "training", total_steps, "steps", first=first_step, clock=clock, say=self.say
        )
        if is_main and self.file.exists():
            # An interrupted run may have logged steps that it will now take again.
            lines = self.file.read_text().splitlines()
            kept = [f"{line}\n" for line in lines if _step_of(line) <= first_step]
            with new_file(self.file) as temporary:
                temporary.write_text("".join(kept))

    def step_done(self) -> None:
        self._bar.update()
        if self._bar.disable:
            self._steps.advance(1)

    def say(self, text: str) -> None:
        """A line for people, from the main process."""
        if not self._bar.disable:
            self._bar.write(text)
        elif self.is_main:
            print(text, flush=True)

    def metrics(
        self,
        step: int,
        values: dict[str, float],
        *,
        seconds_left: float,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Appends to ``metrics.jsonl`` and shows the losses.

        Args:
            details: what the file has beside numbers.
        """
        if not self.is_main:
            return
        self._append({"step": step, **values, **(details or {})})
        shown = {
            name.removeprefix("loss/"): f"{v:.4g}"
            for name, v in values.items()
            if name.startswith("loss/")
        }
        rate = f"{values['images_per_second']:.1f} images/s"
        if not self._bar.disable:
            self._bar.set_postfix({**shown, "rate": rate}, refresh=False)
        else:
            losses = "  ".join(f"{name} {value}" for name, value in shown.items())
            left = duration(seconds_left)
            self.say(f"step {step}/{self.total_steps}  {losses}  {rate}  {left} left")
            self._steps.postpone()

    def _append(self, row: dict[str, Any]) -> None:
        with told_of_disk(self.file), self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def scores(self, step: int, values: dict[str, float]) -> None:
        """Appends scores to ``metrics.jsonl``, on a line of their own, and shows them."""
        if not self.is_main:
            return
        self._append({"step": step, **values})
        shown = (f"{n.removeprefix('score/')} {v:.4g}" for n, v in values.items() if "/" in n)
        self.say(f"step {step}/{self.total_steps}  scores: {'  '.join(shown)}")

    def close(self) -> None:
        self._bar.close()

    def draw_curves(self) -> None:
        """Draws every logged metric against the step."""
        if not self.is_main or not self.file.exists():
            return
        rows = [json.loads(line) for line in self.file.read_text().splitlines()]
        names = [
            n
            for n in dict.fromkeys(key for row in rows for key in row)
            if n.startswith(("loss/", "weight/", "metric/", "grad_norm/", "score/"))
        ]
        if not names:
            return
        points = {n: [(row["step"], row[n]) for row in rows if n in row] for n in names}
        with new_file(self.curves) as temporary:
            _figure_of_curves(points).savefig(temporary, dpi=110)


def _figure_of_curves(points: dict[str, list[tuple[int, float]]]) -> "Figure":
    """A panel for each name, its values against the step.

    Training waits for it, so what makes matplotlib slow is avoided: margins are fixed rather than fitted, which draws
    all text once more to measure it, and labels are plain numbers rather than typeset powers of ten.
    """
    from matplotlib.figure import Figure  # late: slow to import, and most processes draw nothing
    from matplotlib.ticker import LogLocator, NullLocator

    columns = min(4, len(points))
    lines = math.ceil(len(points) / columns)
    width, height = 3.6 * columns, 2.7 * lines  # inches
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(lines, columns, squeeze=False)
    figure.subplots_adjust(  # borders as shares of the figure, gaps as shares of a panel
        left=0.6 / width,
        right=1 - 0.15 / width,
        bottom=0.45 / height,
        top=1 - 0.3 / height,
        wspace=0.75 / 2.8,
        hspace=0.75 / 1.95,
    )
    for axis, (name, pairs) in zip(axes.flat, points.items(), strict=False):
        axis.plot(*zip(*pairs, strict=True), linewidth=1.2, marker="." if len(pairs) < 3 else None)
        axis.set_title(name, y=1, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
        axis.locator_params(nbins=4)
        values = [value for _, value in pairs]
        low, high = min(values), max(values)
        if low > 0 and high > 1.1 * low:
            few_decades = high < 100 * low
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few_decades else (1,)))
            axis.yaxis.set_major_formatter("{x:.5g}")
            axis.yaxis.set_minor_locator(NullLocator())
    for axis in axes.flat[len(points) :]:
        axis.set_visible(False)
    return figure
