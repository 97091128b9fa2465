"""Finished runs in ``runs/`` that stand in for what a comparison would train."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from comparison.plan import SETTINGS_FILE, Comparison, read_comparison
from comparison.recipes import base_of, is_composite, recipe_of
from semtok.commands.run_data import check_data
from semtok.commands.run_folder import RECIPE_FILE, differing
from semtok.data.images.kinds import open_sources
from semtok.errors import UserError
from semtok.evaluation.protocol import weights_digest
from semtok.recipe import load_recipe
from semtok.references import RUNS
from semtok.storage import new_folder
from semtok.tokenizer import Tokenizer

_SUMMARY = "summary.json"
_TEXTURE_OF_RUN, _TEXTURE_SETTING = "texture", "method.texture"


def with_whole_runs(comparison: Comparison) -> Comparison:
    """The comparison, or where every recipe of it has a finished run of all its steps, one of such runs.

    A quick comparison trains recipes for a part of their steps, which no finished run has done. Rows may not differ in
    how long they were trained, so it is all runs or none.
    """
    whole = replace(
        comparison, settings=comparison.settings.model_copy(update={"recipe_share": 1.0})
    )
    if (comparison.folder / SETTINGS_FILE).is_file():  # goes on as it began
        begun = read_comparison(comparison.folder, comparison.num_seeds)
        return whole if begun.settings == whole.settings else comparison
    recipes = [name for name in comparison.tokenizers if recipe_of(name) is not None]
    alike = all(why_not(whole, name, seed) is None for name in recipes for seed in whole.seeds)
    return whole if recipes and alike else comparison


def take_finished_runs(comparison: Comparison, say: Callable[[str], object]) -> None:
    """Copies into the comparison each finished run that is what the comparison would train, and says which.

    What the comparison has trained or begun itself stays. A copy is no longer touched by what becomes of the run.
    """
    for seed, name in _to_train(comparison):
        run, reason = RUNS / name, why_not(comparison, name, seed)
        if reason is None:
            with new_folder(comparison.tokenizer_folder(name, seed)) as folder:
                shutil.copytree(run / "export", folder / "export")
                for file in (RECIPE_FILE, _SUMMARY):
                    shutil.copyfile(run / file, folder / file)
            say(f"tokenizer {name}, seed {seed}: the finished run {run} is taken")
        elif _is_finished(run) and seed == 0:
            say(
                f"tokenizer {name}: trained anew, as {run} is another: {reason}; "
                f"to compare that run, name it in --tokenizers: {run}"
            )


def _to_train(comparison: Comparison) -> Iterator[tuple[int, str]]:
    """Those that others are built on first."""
    for seed in comparison.seeds:
        for name in comparison.tokenizers:
            if recipe_of(name) and not comparison.tokenizer_folder(name, seed).exists():
                yield seed, name


def _is_finished(run: Path) -> bool:
    files = ("export/config.json", RECIPE_FILE, _SUMMARY)
    return all((run / file).is_file() for file in files)


def why_not(comparison: Comparison, name: str, seed: int) -> str | None:
    """Why the run of a recipe is not what the comparison would train; None: it is."""
    run, recipe = RUNS / name, recipe_of(name)
    assert recipe is not None
    if not _is_finished(run):
        return "it is not finished"
    wanted = load_recipe(recipe, comparison.tokenizer_overrides(name, seed))
    changed = differing(run / RECIPE_FILE, wanted)
    for key, there, here in changed:
        if key != _TEXTURE_SETTING:
            return f"{key} is {there!r} there and {here!r} here"
    try:
        check_data(run, open_sources(wanted.data))
        same = not is_composite(name) or _digest(run / _TEXTURE_OF_RUN) == _digest(
            _texture(comparison, name, seed)
        )
    except UserError:
        return "its images, or what it is built on, are no longer there as they were"
    return (
        None if same else f"it is built on another image tokenizer than the '{base_of(name)}' here"
    )


def _texture(comparison: Comparison, name: str, seed: int) -> str:
    """What a composite is built on here, where it is known before it is trained."""
    base = base_of(name)
    assert base is not None
    if recipe_of(base) is None:
        return base
    own = comparison.tokenizer_folder(base, seed)
    is_own = own.exists() or why_not(comparison, base, seed) is not None
    return str(own if is_own else RUNS / base)


def _digest(reference: str | Path) -> str:
    return weights_digest(Tokenizer.from_pretrained(reference))
