"""``train_demo_vae``: trains the embedded image VAE again (about 12 minutes on one core)."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from demo_models import ASSETS
from semtok.commands.cli import Parser
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.errors import UserError
from semtok.recipe import TokenizerRecipe, load_recipe
from semtok.references import RUNS, find_recipe
from semtok.storage import new_folder

_SETTINGS = ("train.steps=6000", "train.precision=fp32", "data.seed=7")
"""Beside the recipe ``vae``'s own: longer, the same on every machine, on images of another seed than tokenizers see."""
_FOLDER = "demo_tokenizer"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="train_demo_vae", description=__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="other settings than it was trained with"
    )
    parser.add_argument("--output", type=Path, default=RUNS / "demo_vae", help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--to-assets", action="store_true", help="let it take the embedded one's place"
    )
    args = parser.parse_intermixed_args(arguments)

    train_tokenizer(demo_recipe(args.overrides), args.output, resume=args.resume)
    if args.to_assets:
        with new_folder(ASSETS / _FOLDER) as temporary:
            card = shutil.ignore_patterns("*.md", "*.png", "*.yaml")
            shutil.copytree(args.output / "export", temporary, dirs_exist_ok=True, ignore=card)
        print(f"embedded: {ASSETS / _FOLDER}")
    return 0


def demo_recipe(overrides: Sequence[str] = ()) -> TokenizerRecipe:
    """What the embedded VAE was trained with."""
    recipe = find_recipe("vae")
    if recipe is None:
        raise UserError("no recipes folder beside the library; run from a checkout")
    return load_recipe(recipe, [*_SETTINGS, *overrides])
