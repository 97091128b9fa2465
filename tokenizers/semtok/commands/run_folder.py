"""The folder of a run: whose it is, and what may be written there."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from semtok.commands.run_data import knows_files
from semtok.errors import UserError
from semtok.lock import is_of_the_killed
from semtok.settings import Config, flatten, parse, read_yaml
from semtok.storage import read_json
from semtok.training.averages import AVERAGES
from semtok.training.checkpoint import CHECKPOINTS, list_checkpoints, step_of
from semtok.training.precision import AUTOMATIC
from semtok.unfinished import remove_unfinished

RECIPE_FILE = "recipe.yaml"
"""The resolved recipe, which makes the folder a run's."""
_PLANNED = "train.planned_before"
_PRECISION = "train.precision"
_PLACES = ("data.path", "data.validation")  # where images lie
_OWN_FILES = (RECIPE_FILE, "overrides.json", "data_files.json", "metrics.jsonl", "curves.png")
_OWN_FILES += ("summary.json", "validation_before.json", "texture_quality.json")
_OWN_FILES += ("texture", "tokenizer", "export", "export_generator")
_OWN_FOLDERS = (CHECKPOINTS, AVERAGES, "samples", "exports")
RecipeType = TypeVar("RecipeType", bound=Config)

# Settings that change what is written or how fast, but not what is learned.
_FREE_ON_RESUME = (
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.export_at",
    "train.accumulate",
    "train.planned_before",  # see _planned_anew
    "train.memory",
    "train.sample_every",
    "train.num_sample_images",
    "train.num_validation_images",
    "train.tracker",
    "train.compile",
    "train.sharding",
    "data.num_workers",
    "data.local_gigabytes",
    "method.min_texture_psnr",
)


def check_run_folder(folder: Path, recipe: RecipeType, *, resume: bool) -> RecipeType:
    """Checks that this run may write into the folder, and that a resumed one goes on with the same recipe.

    Returns:
        the recipe; of a run that goes on for more steps than its cosine was planned for, with
        ``train.planned_before``; and with what its machine chose for ``train.precision=auto``.

    Raises:
        UserError: another run's folder, a folder with other things in it, or a changed recipe.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: is a file; choose a folder")
    file = next((p for p in folder.parents if p.exists() and not p.is_dir()), None)
    if file is not None:
        raise UserError(f"--output {folder}: {file} is a file; choose a folder elsewhere")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    if not os.access(parent, os.W_OK):
        raise UserError(f"--output {folder}: {parent} can't be written to; choose another folder")
    recorded = folder / RECIPE_FILE
    if not resume:
        if recorded.exists():
            raise UserError(
                f"{folder}: holds a run already; go on with --resume, or choose another --output"
            )
        if folder.is_dir() and not all(is_of_the_killed(p.name) for p in folder.iterdir()):
            raise UserError(f"{folder}: is not empty and not a run; choose another --output")
        return recipe
    if not recorded.exists():
        raise UserError(
            f"{folder}: no run to resume there (no {RECIPE_FILE}); leave --resume out to start one, or pass "
            "--resume auto"
        )
    old = flatten(_recorded(recorded, recipe))
    recipe = _precision_kept(recipe, old.get(_PRECISION))
    new = flatten(recipe.model_dump(mode="json"))
    _check_unchanged(folder, old, new)
    return _planned_anew(folder, recipe, old, new)


def _precision_kept(recipe: RecipeType, precision: Any) -> RecipeType:
    """The recipe, with what its run computes in where that was for the machine to choose."""
    if recipe.train.precision != "auto" or precision not in AUTOMATIC:
        return recipe
    train = recipe.train.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"train": train})


def _check_unchanged(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    free, steps, was = _FREE_ON_RESUME, new.get("train.steps"), old.get("train.steps")
    # A constant rate ends anywhere; one that is to come down earlier would have been another run.
    is_longer = isinstance(steps, int) and isinstance(was, int) and steps >= was
    if is_longer or new.get("train.schedule") == "constant":
        free += ("train.steps",)
    if knows_files(folder):  # which are compared, wherever they lie
        free += _PLACES
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and not _is_of(key, free)
    ]
    if changed:
        key = "method.name" if "method.name" in changed else changed[0]  # the others follow from it
        raise UserError(
            f"{folder}: can't resume with another recipe: {key} was {old.get(key)!r} and is now {new.get(key)!r}"
            + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
            + "; start anew with --output"
        )
    done = _steps_done(folder)
    if isinstance(steps, int) and done > steps:
        raise UserError(
            f"{folder}: train.steps {steps}: the run has done {done} already; give as many or more"
        )


def _planned_anew(
    folder: Path, recipe: RecipeType, old: dict[str, Any], new: dict[str, Any]
) -> RecipeType:
    """The recipe, with what the learning rate followed up to here where the run has more steps now."""
    if new.get("train.schedule") not in ("cosine", "linear"):
        return recipe
    earlier = tuple(tuple(pair) for pair in old.get(_PLANNED) or ())
    given = tuple(tuple(pair) for pair in new.get(_PLANNED) or ())
    done, planned = _steps_done(folder), earlier
    if new["train.steps"] > old["train.steps"] and done > max((u for u, _ in earlier), default=0):
        planned += ((done, old["train.steps"]),)
    if given not in ((), earlier, planned):
        raise UserError(f"{folder}: {_PLANNED}: is not as the run was; leave it out")
    train = recipe.train.model_copy(update={"planned_before": planned})
    return recipe.model_copy(update={"train": train})


def _steps_done(folder: Path) -> int:
    """After which step the newest checkpoint is; 0: there is none."""
    return max(map(step_of, list_checkpoints(folder / CHECKPOINTS)), default=0)


def remove_what_was_begun(folder: Path) -> None:
    """Removes what a killed run was writing, on whatever machine; this one has the folder for itself.

    Beside the run's own files somebody may be writing others: samples, exports of checkpoints.
    """
    remove_unfinished(folder, *_OWN_FILES)
    for name in _OWN_FOLDERS:
        remove_unfinished(folder / name)


def is_finished(folder: Path, recipe: Any) -> bool:
    """Whether the run of this recipe has ended there: all steps are done, measured and exported."""
    summary = folder / "summary.json"
    if not summary.is_file() or not (folder / "export" / "config.json").is_file():
        return False
    content = read_json(summary)
    return isinstance(content, dict) and content.get("steps") == recipe.train.steps


def _recorded(file: Path, recipe: Config) -> dict[str, Any]:
    """What a run's recipe says; a setting that came into the library later has its default."""
    content = read_yaml(file)
    try:
        return parse(type(recipe), content, str(file)).model_dump(mode="json")
    except UserError:  # of another method, or of settings that are gone: compared as it stands
        return content


def _is_of(key: str, settings: Iterable[str]) -> bool:
    """Whether a dotted key is one of the settings, or of a section among them."""
    return any(key == name or key.startswith(f"{name}.") for name in settings)


def differing(file: Path, recipe: Config) -> list[tuple[str, Any, Any]]:
    """Of the settings that change what is learned, those in which a run's recipe is another.

    Args:
        file: the run's recorded recipe.

    Returns:
        for each its dotted key, what the run has, and what ``recipe`` has.
    """
    old = flatten(_recorded(file, recipe))
    new = flatten(_precision_kept(recipe, old.get(_PRECISION)).model_dump(mode="json"))
    free = (*_FREE_ON_RESUME, "data.licence")
    keys = [key for key in sorted(old.keys() | new.keys()) if not _is_of(key, free)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]
