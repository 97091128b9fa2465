"""``train_tokenizer RECIPE [key=value …]``: from images to a usable tokenizer."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from semtok.commands.cli import Parser
from semtok.commands.run_folder import claim_run_folder, run_folder
from semtok.commands.stage import add_run_options, errors_at, start_trainer, summarise
from semtok.data.loading import DataOrder
from semtok.data.source import ImageSource
from semtok.data.sources import open_sources
from semtok.images import to_pixels
from semtok.objective import TokenizerObjective
from semtok.recipe import TokenizerRecipe, load_recipe, recipe_text
from semtok.registry import Stage, get_method
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer
from semtok.training.process import make_accelerator


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="train_tokenizer", description=__doc__)
    parser.add_argument(
        "recipe", type=Path, help="a YAML recipe, for example recipes/send_vae.yaml"
    )
    add_run_options(parser, "runs/<recipe's name>")
    args = parser.parse_intermixed_args(arguments)

    recipe = load_recipe(args.recipe, args.overrides)
    if args.print_recipe:
        print(recipe_text(recipe), end="")
        return 0
    folder = run_folder(args.recipe.stem, args.output)
    train_tokenizer(recipe, folder, resume=args.resume, place=str(args.recipe))
    return 0


def train_tokenizer(
    recipe: TokenizerRecipe[Any, Any], folder: Path, *, resume: bool = False, place: str = "recipe"
) -> Tokenizer:
    """Trains, evaluates and exports a tokenizer into a run folder.

    Raises:
        UserError: anything about the recipe, the data or the folder that can't work, before training.
        Interrupted, NonFiniteLoss: see ``Trainer.run``.
    """
    start = time.perf_counter()
    claim_run_folder(folder, recipe, resume=resume)
    sources = open_sources(recipe.data)
    accelerator = make_accelerator(recipe.train, folder)
    objective = build_objective(recipe, place=place)
    trainer = start_trainer(
        objective, recipe, accelerator, folder, sources, resume=resume, what=recipe.method.name
    )
    averaged = trainer.run()
    metrics = trainer.validate()
    tokenizer = objective.tokenizer(averaged)
    if accelerator.is_main_process:
        _export(tokenizer, recipe, sources[0], folder, metrics)
        summarise(trainer, metrics, folder, total_seconds=time.perf_counter() - start)
        print(
            f"tokenizer: {folder / 'export'}   pictures: {folder / 'samples'}   curves: {folder / 'curves.png'}"
        )
    accelerator.wait_for_everyone()  # other processes may read the export next
    return tokenizer


def build_objective(recipe: TokenizerRecipe[Any, Any], *, place: str) -> TokenizerObjective:
    """Builds the networks that a recipe describes, on the CPU, from its seed.

    Raises:
        UserError: a teacher or weights that can't be had, or settings that don't fit each other.
    """
    method = get_method(recipe.method.name, place=place)
    teacher = (
        Teacher(recipe.teacher)
        if recipe.teacher is not None and recipe.method.needs_teacher()
        else None
    )
    torch.manual_seed(recipe.train.seed)
    with errors_at(place):
        return method.objective(
            recipe.method, Stage(recipe.data.image_size, teacher, recipe.train.steps)
        )


def _export(
    tokenizer: Tokenizer,
    recipe: TokenizerRecipe[Any, Any],
    train: ImageSource,
    folder: Path,
    metrics: dict[str, float],
) -> None:
    """Measures the latents' statistics, writes ``export/`` and checks what a reader of it gets."""
    batch_size = min(64, recipe.train.batch_size)
    num_images = min(recipe.train.num_statistics_images, len(train))
    keys = DataOrder(len(train), num_images, recipe.train.seed, train.flip).keys(0)

    def batches() -> Any:
        for first in range(0, num_images, batch_size):
            chosen = keys[first : first + batch_size]
            pixels = to_pixels(train.load([index for index, _ in chosen]).images)
            mirrored = torch.tensor([mirror for _, mirror in chosen])[:, None, None, None]
            yield torch.where(mirrored, pixels.flip(-1), pixels)

    tokenizer.eval()
    generator = torch.Generator(tokenizer.texture_mean.device).manual_seed(recipe.train.seed)
    with errors_at(str(folder)):
        tokenizer.measure_statistics(batches(), generator)
    tokenizer.training_info = {
        "data": train.name,
        "image_size": list(recipe.data.image_size),
        "teacher": recipe.teacher.model_dump() if recipe.method.needs_teacher() else None,
        "metrics": metrics,
        "recipe": json.loads(recipe.model_dump_json()),
    }
    tokenizer.save_pretrained(folder / "export")

    pixels = to_pixels(train.load([0]).images, device=tokenizer.texture_mean.device)
    reloaded = Tokenizer.from_pretrained(folder / "export").to(pixels.device)
    with torch.no_grad():
        ours, theirs = tokenizer.encode(pixels), reloaded.encode(pixels)
    # On a GPU two calls of one network may differ by rounding.
    same = all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert same, f"{folder / 'export'} does not encode as the tokenizer that it was made from"
