"""``train_tokenizer RECIPE [key=value …]``: from images to a usable tokenizer."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from semtok.commands.around_training import (
    add_run_options,
    card_pictures,
    errors_at,
    print_places,
    start_trainer,
    summarise,
)
from semtok.commands.cli import Parser
from semtok.commands.run_folder import claim_run_folder, run_folder
from semtok.data.images.kinds import open_sources
from semtok.data.order import DataOrder
from semtok.data.passes import read_images
from semtok.data.source import ImageSource
from semtok.errors import Interrupted
from semtok.images import to_pixels
from semtok.objective import Batch, MethodContext, TokenizerObjective
from semtok.processes import process_index, together
from semtok.recipe import TokenizerRecipe, load_recipe, recipe_text
from semtok.references import DEMO, RUNS, find_recipe
from semtok.registry import get_method
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer
from semtok.training.loop import on_device
from semtok.training.process import make_accelerator

_TEXTURE = "texture"


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
    make_accelerator(recipe.train, folder)  # what it refuses should not wait for another tokenizer
    texture = _texture(recipe, folder, resume=resume, place=place)
    accelerator = make_accelerator(recipe.train, folder)
    objective = build_objective(recipe, texture, place=place)
    with errors_at(place):
        read = objective.training_source(sources[0], accelerator)
    trainer = start_trainer(
        objective,
        recipe,
        accelerator,
        folder,
        (read, sources[1]),
        resume=resume,
        what=recipe.method.name,
    )
    with together():
        if texture is not None and accelerator.is_main_process:
            keep_tokenizer(texture, folder / _TEXTURE)
    if not trainer.step:
        with together():
            batches = statistics_batches(read, recipe, accelerator.device)
            objective.measure(batch for _, batch in batches)
    averaged = trainer.run()
    metrics = trainer.validate()
    tokenizer = objective.tokenizer(averaged)
    with together():  # and other processes may read the export next
        _export(tokenizer, recipe, sources[0], folder, metrics)
        if accelerator.is_main_process:
            summarise(trainer, metrics, folder, total_seconds=time.perf_counter() - start)
            print_places(folder, "tokenizer")
    return tokenizer


def tokenizer_from_reference(reference: str) -> Tokenizer:
    """Loads a tokenizer; where the reference names an embedded recipe without a finished run, trains it.

    The order: a folder, the name of a finished run, ``demo``, a Hub id, the name of an embedded recipe.

    Raises:
        UserError: the reference names nothing.
    """
    recipe, folder = _untrained(reference), RUNS / reference
    if recipe is None:
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


def _untrained(reference: str) -> Path | None:
    """The embedded recipe that a reference names, where neither a folder nor a finished run does."""
    finished = (RUNS / reference / "export" / "config.json").is_file()
    return None if finished or Path(reference).is_dir() else find_recipe(reference)


def tokenizer_of_run(reference: str, copy: Path, *, resume: bool) -> Tokenizer:
    """The tokenizer that a run is built on: a resumed one reads the copy that it kept."""
    if resume and copy.is_dir():
        return Tokenizer.from_pretrained(copy)
    return tokenizer_from_reference(reference)


def keep_tokenizer(tokenizer: Tokenizer, copy: Path) -> None:
    """Copies into a run the tokenizer that it is built on: what a reference names may change meanwhile."""
    if not copy.is_dir():
        tokenizer.save_pretrained(copy)


def _texture(
    recipe: TokenizerRecipe[Any, Any], folder: Path, *, resume: bool, place: str
) -> Tokenizer | None:
    reference = recipe.method.texture_reference()
    if reference is None:
        return None
    copy = folder / _TEXTURE
    kept = resume and copy.is_dir()
    if not kept and _untrained(reference) is not None:
        # Whatever else is wrong should not wait for the other tokenizer's training.
        build_objective(recipe, Tokenizer.from_pretrained(DEMO), place=place)
    return tokenizer_of_run(reference, copy, resume=resume)


def build_objective(
    recipe: TokenizerRecipe[Any, Any], texture: Tokenizer | None = None, *, place: str
) -> TokenizerObjective:
    """Builds the networks that a recipe describes, on the CPU, from its seed.

    Args:
        texture: the tokenizer that the method is built on, where it is on one.

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
            recipe.method,
            MethodContext(recipe.data.image_size, teacher, recipe.train.steps, texture),
        )


def statistics_batches(
    source: ImageSource, recipe: TokenizerRecipe[Any, Any], device: torch.device
) -> Iterator[tuple[list[int], Batch]]:
    """This process's share of the first training images, in the order and with the mirroring of the first epoch.

    Yields:
        The images' numbers in that order, and the images.
    """
    train = recipe.train
    num_images = min(train.num_statistics_images, len(source))
    order = DataOrder(len(source), num_images, train.seed, source.flip, source.block_size)
    for places, batch in read_images(
        source,
        order.keys(0),
        batch_size=min(64, train.batch_size),
        what="images for statistics",
    ):
        yield places, on_device(batch, device)


def _export(
    tokenizer: Tokenizer,
    recipe: TokenizerRecipe[Any, Any],
    train: ImageSource,
    folder: Path,
    metrics: dict[str, float],
) -> None:
    """Measures the latents' statistics, in all processes; the first writes ``export/`` and checks what a reader
    of it gets."""
    tokenizer.eval()
    device = tokenizer.texture_mean.device
    with errors_at(str(folder)):
        batches = statistics_batches(train, recipe, device)
        pixels = ((places, batch.pixels) for places, batch in batches)
        tokenizer.measure_statistics(pixels, recipe.train.seed)
    tokenizer.training_info = {
        "data": train.name,
        "image_size": list(recipe.data.image_size),
        "teacher": recipe.teacher.model_dump() if recipe.method.needs_teacher() else None,
        "metrics": metrics,
        "recipe": json.loads(recipe.model_dump_json()),
    }
    if process_index():
        return
    tokenizer.save_pretrained(folder / "export", pictures=card_pictures(folder))

    pixels = to_pixels(train.load([0]).images, device=device)
    reloaded = Tokenizer.from_pretrained(folder / "export").to(device)
    with torch.no_grad():
        ours, theirs = tokenizer.encode(pixels), reloaded.encode(pixels)
    # On a GPU two calls of one network may differ by rounding.
    same = all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert same, f"{folder / 'export'} does not encode as the tokenizer that it was made from"
