"""The export of a run of ``train_tokenizer``: its statistics, its folder, and a look at what a reader of it gets."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands import around_training
from semtok.data.caches.feature_cache import CachedFeatures
from semtok.data.order import DataOrder
from semtok.data.passes import read_images
from semtok.data.source import ImageSource
from semtok.images import to_pixels
from semtok.objective import Batch, TokenizerObjective
from semtok.processes import process_index
from semtok.recipe import TokenizerRecipe
from semtok.references import generator_beside
from semtok.tokenizer import Tokenizer
from semtok.training.inputs import on_device


def statistics_batches(
    source: ImageSource,
    recipe: TokenizerRecipe[Any, Any],
    device: torch.device,
    *,
    what: str = "measuring the statistics of the latents",
    features: CachedFeatures | None = None,
) -> Iterator[tuple[list[int], Batch]]:
    """This process's share of the first training images in the order of the first epoch, unmirrored and cropped at the
    centre.

    Args:
        what: is done with them, for a line of progress.
        features: a teacher's of these images, which then come with them.

    Yields:
        The images' numbers in that order, and the images.
    """
    train = recipe.train
    num_images = min(train.num_statistics_images, len(source))
    order = DataOrder(len(source), num_images, train.seed, False, source.block_size)
    keys = order.keys(0)
    for places, batch in read_images(source, keys, batch_size=min(64, train.batch_size), what=what):
        if features is not None:
            batch = replace(batch, features=features.features([keys[i] for i in places]))
        yield places, on_device(batch, device)


def export_generator(
    objective: TokenizerObjective, averaged: nn.Module, tokenizer: Tokenizer, target: Path
) -> None:
    """Writes the generator that was trained with a tokenizer, where there is one, beside its export.

    Args:
        tokenizer: as it was exported.
        target: the tokenizer's export.
    """
    generator = objective.generator(averaged)
    if generator is None or process_index():
        return
    generator.tokenizer = tokenizer
    generator.training_info = tokenizer.training_info
    place = generator_beside(target)
    generator.save_pretrained(place)
    print(f"the generator of these latents: {place}", flush=True)


def export_tokenizer(
    tokenizer: Tokenizer,
    recipe: TokenizerRecipe[Any, Any],
    train: ImageSource,
    target: Path,
    *,
    step: int,
    metrics: dict[str, float],
    pictures: dict[str, Path],
    weights: str | None = None,
    features: CachedFeatures | None = None,
) -> None:
    """Measures the latents' statistics, in all processes; the first writes the export and checks what a reader
    of it gets.

    Args:
        train: images to measure on.
        target: the export's folder.
        step: after which the tokenizer is.
        metrics: held-out, as far as they were measured.
        pictures: for the card.
        weights: which it holds; None: those that the run exports.
        features: of its teacher, of these images, where they are kept.

    Raises:
        UserError: latents that do not vary.
    """
    tokenizer.eval()
    device = tokenizer.texture_mean.device
    with around_training.errors_at(str(target)):
        batches = statistics_batches(train, recipe, device, features=features)
        seen = ((places, batch.pixels, batch.features) for places, batch in batches)
        tokenizer.measure_statistics(seen, recipe.train.seed)
    tokenizer.training_info = {
        "data": train.name,
        "licence": recipe.data.licence,
        "image_size": list(recipe.data.image_size),
        "teacher": recipe.teacher.model_dump() if recipe.method.needs_teacher() else None,
        "metrics": metrics,
        "steps": step,
        "weights": weights or around_training.kept_weights(recipe.train),
        "recipe": json.loads(recipe.model_dump_json()),
    }
    if process_index():
        return
    tokenizer.save_pretrained(target, pictures=pictures)

    pixels = to_pixels(train.load([0]).images, device=device)
    reloaded = Tokenizer.from_pretrained(target).to(device)
    with torch.no_grad():
        ours, theirs = (t.encode(pixels, value_range=(-1, 1)) for t in (tokenizer, reloaded))
    # On a GPU two calls of one network may differ by rounding.
    same = all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in ours)
    assert same, f"{target} does not encode as the tokenizer that it was made from"
