"""The recipe of a run: what a file and the command line say, and, where a run goes on, what its own folder says."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from semtok.commands.run_folder import RECIPE_FILE
from semtok.errors import UserError
from semtok.progress import is_first
from semtok.recipe import DiffusionRecipe, TokenizerRecipe, load_diffusion_recipe, load_recipe
from semtok.settings import apply_overrides, read_yaml
from semtok.storage import read_json, write_json

Resume = bool | Literal["auto"]
"""Whether a run goes on where it ended; ``auto``: if there is one, and a finished one is left alone."""
_OVERRIDES_FILE = "overrides.json"
_AT_STEPS = ("train.warmup_steps", "train.constant_steps", "train.export_at")

RecipeType = TypeVar("RecipeType", TokenizerRecipe[Any, Any], DiffusionRecipe[Any])
Load = Callable[[Path, list[str]], RecipeType]


@dataclass(frozen=True)
class Resolved:
    """What a command line asks for.

    Attributes:
        overrides: settings that the command line gave, now and when the run began.
    """

    recipe: Any
    place: str
    overrides: tuple[str, ...]


def resumes(folder: Path, resume: Resume) -> bool:
    """Whether a run in this folder goes on, as ``--resume`` says.

    Raises:
        ValueError: it says something else than ``Resume`` knows.
    """
    if resume != "auto" and not isinstance(resume, bool):
        raise ValueError(f'resume: expected True, False or "auto", got {resume!r}')
    return (folder / RECIPE_FILE).is_file() if resume == "auto" else resume


def split_recipe(recipe: str | None, overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """The first word may be a setting already, as a run that goes on needs no recipe."""
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        return None, [recipe, *overrides]
    return recipe, list(overrides)


def resolve(
    load: Load[RecipeType],
    path: Path | None,
    overrides: Sequence[str],
    *,
    folder: Path | None,
    resume: Resume,
) -> Resolved:
    """The recipe that a command line asks for.

    A run that goes on has that of its folder, on which the settings given now come. Where a recipe is named too, it
    is read with the settings of the run's beginning, so that they need not be repeated, and yet a recipe that has
    changed since is noticed (see ``check_run_folder``).

    Args:
        path: of the recipe; None: the folder's own.
        folder: of the run; None: nothing is there.

    Raises:
        UserError: see ``load``; neither is there; or the folder's run is of another command.
    """
    given = list(overrides)
    if folder is not None and resumes(folder, resume):
        own, earlier = folder / RECIPE_FILE, _recorded_overrides(folder)
        if not own.is_file():
            raise UserError(
                f"{folder}: no run to resume there (no {RECIPE_FILE}); leave --resume out to start one, or pass "
                "--resume auto"
            )
        _check_kind(folder, load)
        merged = _merged(earlier, given)
        if path is None:
            return Resolved(load(own, given), str(own), tuple(merged))
        return Resolved(load(path, merged), str(path), tuple(merged))
    if path is None:
        raise UserError("no recipe is named, and no run to go on with; give a recipe")
    given = _fitted(read_yaml(path), given)
    return Resolved(load(path, given), str(path), tuple(given))


def _check_kind(folder: Path, load: Load[RecipeType]) -> None:
    """Raises UserError where a run is a transformer's and not a tokenizer's, or the other way round."""
    content = read_yaml(folder / RECIPE_FILE)
    if load is load_recipe and "diffusion" in content and "method" not in content:
        what, command = "a transformer's", "train_dit"
    elif load is load_diffusion_recipe and "method" in content and "diffusion" not in content:
        what, command = "a tokenizer's", "train_tokenizer"
    else:
        return
    raise UserError(
        f"{folder}: is {what} run; semtok {command} --resume --output {folder} goes on with it, or choose another "
        "--output"
    )


def record_overrides(folder: Path, overrides: Sequence[str]) -> None:
    """Notes in a run what its command line said beside the recipe."""
    if overrides:
        write_json(folder / _OVERRIDES_FILE, list(overrides))


def _recorded_overrides(folder: Path) -> list[str]:
    file = folder / _OVERRIDES_FILE
    if not file.is_file():
        return []
    words = read_json(file)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{file}: expected a list of settings; remove it, and give them again")
    return words


def _merged(earlier: Sequence[str], later: Sequence[str]) -> list[str]:
    """Settings in their order, without those that are given anew."""
    keys = {word.partition("=")[0] for word in later}
    return [word for word in earlier if word.partition("=")[0] not in keys] + list(later)


def _fitted(content: dict[str, Any], overrides: list[str]) -> list[str]:
    """In a short run of a recipe, what the recipe says at steps of a longer one is cut, with a note.

    Warm-up and constant rate keep their share of the steps; exports on the way that are never reached are left
    out. What the command line itself says is left as it is.
    """
    keys = {word.partition("=")[0] for word in overrides}
    if "train.steps" not in keys or not isinstance(content.get("train"), dict):
        return overrides
    before, after = content["train"], apply_overrides(content, overrides)["train"]
    planned, steps = before.get("steps"), after.get("steps")
    if not isinstance(planned, int) or not isinstance(steps, int) or not 0 < steps < planned:
        return overrides
    names = [name for name in _AT_STEPS if name not in keys]
    cut: dict[str, int | list[int]] = {}
    lasting = [after.get(name.rpartition(".")[2], 0) for name in _AT_STEPS[:2]]
    if all(isinstance(n, int) for n in lasting) and sum(lasting) > steps:
        cut |= {n: m * steps // planned for n, m in zip(_AT_STEPS[:2], lasting, strict=True) if m}
    at = after.get("export_at")
    if isinstance(at, list) and any(isinstance(step, int) and step > steps for step in at):
        cut["train.export_at"] = [step for step in at if step <= steps]
    words = [f"{name}={json.dumps(value)}" for name, value in cut.items() if name in names]
    if words and is_first():
        told = f"note: train.steps {steps} of {planned}: {' '.join(words)}, cut to fit"
        print(told, file=sys.stderr, flush=True)
    return overrides + words
