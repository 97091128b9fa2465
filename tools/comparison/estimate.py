"""How long the jobs of a comparison will take, by a few measured steps of each training."""

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.timing import TrainerStep
from benchmarks.training import make_trainer
from comparison.asked import Row
from comparison.plan import Comparison
from comparison.recipes import is_composite, recipe_of
from semtok.commands.train_dit import build_diffusion_objective, needs_teacher
from semtok.commands.train_tokenizer import build_objective
from semtok.commands.when_to_cache import pays
from semtok.data.images.kinds import open_sources
from semtok.data.source import ImageSource
from semtok.images import to_pixels
from semtok.objective import Batch, Objective, TokenizerObjective
from semtok.recipe import DiffusionRecipe, TokenizerRecipe, load_diffusion_recipe, load_recipe
from semtok.references import DEMO
from semtok.storage import read_json, write_json
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

_KINDS = ("tokenizer", "generator", "encoding", "encoded once")
_STEPS = 2
_STATISTICS_IMAGES = 64
_START = 10.0
"""Seconds until a process has imported what it needs and read its networks."""
_TOKENIZER_SCORES = 40.0
"""Seconds of a tokenizer's scores, of which maps and probes take most; stated, not measured."""
_FORWARD = 1 / 3
"""Of a training step."""


def measure_steps(comparison: Comparison) -> None:
    """Writes seconds of a training step of each recipe and row into the comparison's folder, each as soon as it is
    known; what is known already is not measured again.

    A tokenizer that is not trained yet is taken as its recipe begins, and what it is built on or starts from is the
    embedded one: what a step takes hardly depends on it.
    """
    seconds = _measured(comparison)
    rows = [row for row in comparison.rows if row.name not in seconds["generator"]]
    untrained: dict[str, Tokenizer] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in comparison.tokenizers:
            is_known = name in seconds["tokenizer"]
            is_learned_on = any(row.tokenizer == name for row in rows)
            if recipe_of(name) is None or (is_known and not is_learned_on):
                continue
            objective, recipe, images = _tokenizer_training(comparison, name)
            if not is_known:
                taken = _seconds_a_step(objective, recipe, images, Path(place))
                seconds["tokenizer"][name] = taken
                write_json(steps_file(comparison), seconds)
            if is_learned_on:
                untrained[name] = _as_begun(objective, images)
        train, _ = open_sources(comparison.data())
        for row in rows:
            tokenizer = untrained.get(row.tokenizer)
            if tokenizer is None:
                tokenizer = Tokenizer.from_pretrained(row.tokenizer)
            _measure_row(comparison, row, tokenizer, train, Path(place), seconds)
            write_json(steps_file(comparison), seconds)


def _measured(comparison: Comparison) -> dict[str, dict[str, float]]:
    """What is known, by kind and name."""
    file = steps_file(comparison)
    known = read_json(file) if file.is_file() else {}
    return {kind: known.get(kind, {}) for kind in _KINDS}


def _tokenizer_training(
    comparison: Comparison, name: str
) -> tuple[TokenizerObjective, TokenizerRecipe[Any, Any], ImageSource]:
    path = recipe_of(name)
    assert path is not None
    recipe = load_recipe(path, comparison.tokenizer_overrides(name, 0, vae=DEMO))
    texture = Tokenizer.from_pretrained(DEMO) if is_composite(name) else None
    images = open_sources(recipe.data)[0]
    objective = build_objective(recipe, texture, place=str(path), class_names=images.class_names)
    return objective, recipe, images


def _measure_row(
    comparison: Comparison,
    row: Row,
    tokenizer: Tokenizer,
    train: ImageSource,
    place: Path,
    seconds: dict[str, dict[str, float]],
) -> None:
    """Adds what is measured to ``seconds``."""
    recipe = _recipe_of_row(comparison, row)
    objective = build_diffusion_objective(
        recipe,
        tokenizer,
        train,
        Teacher(recipe.teacher) if needs_teacher(recipe) else None,
        place=row.name,
    )
    seconds["generator"][row.name] = _seconds_a_step(objective, recipe, train, place)
    if recipe.data.cache != "auto" or not pays(recipe, train):
        return
    seconds["encoding"][row.name] = _seconds_to_encode(objective, recipe, train)
    others = [
        _recipe_of_row(comparison, other)
        for other in comparison.rows
        if other.tokenizer == row.tokenizer and other.name in seconds["encoded once"]
    ]
    # A later row finds what a row on the same tokenizer has encoded, with REPA's targets or without.
    is_found = any(bool(other.diffusion.repa) == bool(recipe.diffusion.repa) for other in others)
    num = 0 if is_found else len(train) * (2 if train.flip else 1)
    seconds["encoded once"][row.name] = num


def _recipe_of_row(comparison: Comparison, row: Row) -> DiffusionRecipe[Any]:
    words = comparison.generator_overrides(row, 0)
    return load_diffusion_recipe(comparison.recipe, words, tokenizer=row.tokenizer)


def _seconds_a_step(objective: Objective, recipe: Any, images: Any, folder: Path) -> float:
    """Of the second and the third: the first sets things up. Without learners, of the frozen networks."""
    config = recipe.train.model_copy(update={"steps": 1_000_000, "tracker": "none"})
    step = TrainerStep(make_trainer(objective, config, images, folder))
    step()
    start = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return (time.perf_counter() - start) / _STEPS


def _as_begun(objective: TokenizerObjective, images: ImageSource) -> Tokenizer:
    """The tokenizer of a training that has hardly begun, with statistics of a few images."""
    batch = images.load(images.chosen(_STATISTICS_IMAGES))
    pixels = to_pixels(batch.images)
    objective.measure([Batch(pixels, batch.labels)])
    tokenizer = objective.tokenizer(objective.averaged_module())
    tokenizer.measure_statistics([pixels])
    return tokenizer


def _seconds_to_encode(objective: Objective, recipe: Any, images: ImageSource) -> float:
    """Of the batch of a step, by the second: what cached latents save."""
    batch = images.load(images.chosen(recipe.train.batch_size))
    for _ in range(2):
        start = time.perf_counter()
        objective.prepare(Batch(to_pixels(batch.images), batch.labels))
        seconds = time.perf_counter() - start
    return seconds


def steps_file(comparison: Comparison) -> Path:
    """Where what was measured is kept."""
    return comparison.folder / "seconds_a_step.json"


def is_measured(comparison: Comparison) -> bool:
    """Whether every recipe and row was measured; rows may have been added."""
    known = _measured(comparison)
    recipes = {name for name in comparison.tokenizers if recipe_of(name) is not None}
    return recipes <= set(known["tokenizer"]) and {r.name for r in comparison.rows} <= set(
        known["generator"]
    )


def expected_seconds(comparison: Comparison, kind: str, name: str) -> float:
    """Of one job.

    Args:
        kind: ``tokenizer``, ``generator``, ``tokenizer scores`` or ``generator scores``.
        name: of the recipe or row.
    """
    known: Mapping[str, Mapping[str, float]] = read_json(steps_file(comparison))
    settings = comparison.settings
    if kind == "tokenizer scores":
        return _START + _TOKENIZER_SCORES
    if kind == "tokenizer":
        path = recipe_of(name)
        assert path is not None
        train = load_recipe(path, comparison.tokenizer_overrides(name, 0, vae=DEMO)).train
        passes = 2 * train.num_statistics_images / train.batch_size * _FORWARD
        return _START + known["tokenizer"][name] * (train.steps + passes)
    row = next(row for row in comparison.rows if row.name == name)
    recipe = _recipe_of_row(comparison, row)
    encoding = known.get("encoding", {}).get(name, 0.0)
    once = known.get("encoded once", {}).get(name, 0) * encoding / recipe.train.batch_size
    step = max(0.0, known["generator"][name] - encoding)
    if kind == "generator":
        return _START + once + step * recipe.train.steps
    forward = step / recipe.train.batch_size * _FORWARD
    drawn = settings.num_images * settings.num_checkpoints * recipe.sampler.steps
    return _START + forward * drawn
