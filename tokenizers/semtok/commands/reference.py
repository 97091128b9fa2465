"""Tokenizer references on the command line, where a recipe's name means: train it first."""

from pathlib import Path

from semtok.commands.train_tokenizer import train_tokenizer
from semtok.errors import Interrupted
from semtok.recipe import load_recipe
from semtok.references import RUNS, find_recipe
from semtok.tokenizer import Tokenizer


def tokenizer_from_reference(reference: str) -> Tokenizer:
    """Loads a tokenizer; where the reference names an embedded recipe without a finished run, trains it.

    The order: a folder, the name of a finished run, a Hub id, the name of an embedded recipe.

    Raises:
        UserError: the reference names nothing.
    """
    recipe = find_recipe(reference)
    folder = RUNS / reference
    if recipe is None or Path(reference).is_dir() or (folder / "export" / "config.json").is_file():
        return Tokenizer.from_pretrained(reference)
    unfinished = (folder / "recipe.yaml").is_file()
    print(
        f"tokenizer '{reference}' is not trained yet: {'resuming' if unfinished else 'training'} {recipe} first",
        flush=True,
    )
    try:
        train_tokenizer(load_recipe(recipe, []), folder, resume=unfinished, place=str(recipe))
    except Interrupted as stopped:
        raise Interrupted(
            stopped.signal_number, stopped.checkpoint, way_on="the same command goes on"
        ) from None
    return Tokenizer.from_pretrained(folder)
