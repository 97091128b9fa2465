"""Runs recipes once each, after what they are built on."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rehearsal.children import Outcome, command_line, run_command
from rehearsal.headers import Sampling
from rehearsal.inputs import lay_autoencoder
from rehearsal.plan import (
    Run,
    depth_settings,
    least_depth,
    maker,
    plan_run,
    same_output,
    small_settings,
    transformer_of,
)
from rehearsal.sizes import WEIGHTS, check_at_full_size
from semtok.errors import UserError

_LOGS = Path("logs")
# torch.hub looks for LPIPS' backbone there; and nothing is fetched: what is not at hand is an error.
_ENVIRONMENT = {"TORCH_HOME": str(WEIGHTS), "HF_HUB_OFFLINE": "1"}


@dataclass
class Result:
    """What a recipe's rehearsal came to.

    Attributes:
        name: the recipe's path below its library of recipes.
        ran: commands that succeeded.
        parameters: that get gradients, at full size; None: it did not come so far.
        parameters_here: those of the depth that was run.
        depth, depth_here: blocks of the transformer; 0: there is none.
        losses: terms of the one step, before their weights; empty: nothing is learned by steps.
        output: the run folder, by the recipe's own command.
        full_command: that command, before anything was made small.
        error: one line; None: all succeeded.
    """

    name: str
    ran: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    parameters: int | None = None
    parameters_here: int | None = None
    depth: int = 0
    depth_here: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    output: str | None = None
    full_command: str | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        outcomes = [vars(outcome) | {"last_lines": outcome.last_lines} for outcome in self.outcomes]
        return vars(self) | {"outcomes": outcomes}


class Rehearsal:
    """Runs recipes in the current folder, each once.

    Args:
        memory: bytes that a transformer's step may take, as estimated from its parameters.
        depth: most blocks of a transformer; None: as memory allows.

    Attributes:
        results: by recipe file, in the order of their runs.
    """

    def __init__(self, *, memory: float, depth: int | None = None) -> None:
        self.results: dict[Path, Result] = {}
        self._memory, self._depth = memory, depth
        self._runs: dict[Path, Run] = {}
        self._under_way: list[Path] = []

    def run(self, file: Path) -> Result:
        """Runs a recipe after those that it is built on; what fails is told in the result."""
        if file in self.results:
            return self.results[file]
        result = Result(f"{file.parent.name}/{file.stem}")
        self._under_way.append(file)
        try:
            run = self._runs[file] = plan_run(file)
            result.output = run.output
            for reference in run.references:
                self._provide(reference, run)
            weak = [self._guide(s.weak, run) for s in run.samplings]
            print(f"{result.name}", flush=True)
            self._train(run, result)
            for number, (sampling, guide) in enumerate(zip(run.samplings, weak, strict=True)):
                self._sample(run, sampling, guide, result, number)
        except UserError as error:
            result.error = str(error)
            print(f"  failed: {error}", flush=True)
        self._under_way.remove(file)
        self.results[file] = result  # so they are in the order of their runs
        return result

    def _provide(self, reference: str, run: Run) -> None:
        """Makes sure that what a run is built on is there: by the run that makes it, or random weights."""
        file = maker(reference, run.file)
        if file is None:
            lay_autoencoder(reference)
        else:
            self._need(file)

    def _guide(self, weak: str | None, run: Run) -> str | None:
        """The run folder of the model that guides."""
        if weak is None:
            return None
        file = maker(weak, run.file)
        if file is None:
            raise UserError(
                f"{run.file}: no recipe makes '{weak}', the --weak of its sample command"
            )
        self._need(file)
        return self._runs[file].output

    def _need(self, file: Path) -> None:
        if file in self._under_way:
            raise UserError(f"{file}: needs its own run")
        needed = self.run(file)
        if needed.error is not None:
            raise UserError(f"needs {needed.name}, which failed")

    def _train(self, run: Run, result: Result) -> None:
        note = ", ".join(map(str, same_output(run)))
        if note:
            print(
                f"  note: by its own command it writes to {run.output}, as does {note}", flush=True
            )
        command = "train_dit" if run.is_generator else "train_tokenizer"
        recipe = ["--recipe", str(run.file)] if run.is_generator else [str(run.file)]
        folder = [] if run.is_default_output else ["--output", run.output]
        full = [*recipe, *run.words, *folder]
        result.full_command = command_line(command, full, {})
        size, files = check_at_full_size(run)
        result.parameters = result.parameters_here = size.parameters
        settings = [*small_settings(run), *files]
        transformer = transformer_of(run.recipe)
        if transformer is not None:
            place, diffusion = transformer
            most = size.depth if self._depth is None else self._depth
            result.depth = size.depth
            within = min(most, size.depth_within(self._memory))
            result.depth_here = min(size.depth, max(within, least_depth(diffusion)))
            result.parameters_here = size.parameters_at(result.depth_here)
            settings += depth_settings(place, diffusion, result.depth_here)
        replaced = {setting.partition("=")[0] for setting in settings}
        kept = [word for word in full if word.partition("=")[0] not in replaced]
        self._command(command, [*kept, *settings], result)
        result.losses = _losses(Path(run.output) / "metrics.jsonl")
        shutil.rmtree(
            Path(run.output) / "checkpoints", ignore_errors=True
        )  # four times the weights

    def _sample(
        self, run: Run, sampling: Sampling, guide: str | None, result: Result, number: int
    ) -> None:
        words = [run.output, *sampling.options, *(("--weak", guide) if guide is not None else ())]
        output = Path(run.output) / f"samples_{number}.npz"
        small = ["--num", "2", "--batch-size", "2", "--output", str(output)]
        self._command("sample", [*words, *small], result)

    def _command(self, command: str, words: list[str], result: Result) -> None:
        """Runs a command, and prints it.

        Raises:
            UserError: it failed; what it printed last was printed.
        """
        print(f"  {command_line(command, words, _ENVIRONMENT)}", flush=True)
        name = f"{result.name.replace('/', '_')}_{len(result.outcomes)}_{command}"
        log = _LOGS / f"{name}.log"
        outcome = run_command(command, words, _ENVIRONMENT, log)
        result.outcomes.append(outcome)
        if outcome.code != 0:
            print("\n".join(f"    {line}" for line in outcome.last_lines), flush=True)
            last = outcome.last_lines[-1] if outcome.last_lines else "it printed nothing"
            raise UserError(f"{command} ended with {outcome.code}: {last}")
        result.ran.append(command)


def _losses(log: Path) -> dict[str, float]:
    """The terms of a run's last logged step; none where it has learned nothing by steps."""
    if not log.is_file():
        return {}
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    losses = [
        {k.removeprefix("loss/"): v for k, v in row.items() if k.startswith("loss/")}
        for row in rows
    ]
    return next(filter(None, reversed(losses)), {})  # scores have lines of their own
