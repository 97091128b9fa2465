"""``train_tokenizer RECIPE [key=value …]``: from images to a usable tokenizer."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands import around_training
from semtok.commands.cli import Parser
from semtok.commands.run_data import check_data, note_licence
from semtok.commands.run_folder import check_run_folder
from semtok.commands.run_recipe import Resume, resolve, resumes, split_recipe
from semtok.commands.texture_quality import TextureQuality, record, texture_quality
from semtok.commands.tokenizer_export import (
    export_generator,
    export_tokenizer,
    statistics_batches,
)
from semtok.commands.when_to_cache import pays
from semtok.data.caches.feature_cache import CachedFeatures
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import ShapesConfig
from semtok.data.source import DataConfig, ImageSource
from semtok.errors import Interrupted, UserError
from semtok.objective import MethodContext, TokenizerObjective
from semtok.processes import together
from semtok.recipe import (
    TokenizerRecipe,
    default_run,
    load_recipe,
    locate_recipe,
    parse_recipe,
    recipe_text,
)
from semtok.references import RUNS, find_recipe
from semtok.registry import get_method
from semtok.settings import read_yaml
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer
from semtok.training.checkpoint import CHECKPOINTS, list_checkpoints, seed_random
from semtok.training.optimisers import check_optimisers
from semtok.training.process import check_launch, make_accelerator
from semtok.training.sharding import check_sharding

_TEXTURE = "texture"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="train_tokenizer", description=__doc__)
    parser.add_argument(
        "recipe",
        nargs="?",
        help="a YAML recipe, or the name of one of the library's, as imagenet256/send_vae; a run that is resumed "
        "needs none beside --output",
    )
    around_training.add_run_options(parser, "runs/<recipe's name>")
    args = around_training.read_run_options(parser, arguments)

    name, overrides = split_recipe(args.recipe, args.overrides)
    path = locate_recipe(name) if name is not None else None
    if args.output is None and path is None:
        parser.error("a recipe is missing, or the --output of a run to go on with")
    folder = Path(args.output or default_run(path))
    with around_training.planning():
        found = resolve(load_recipe, path, overrides, folder=folder, resume=args.resume)
    if args.print_recipe:
        print(recipe_text(found.recipe), end="")
        return 0
    note_licence(found.recipe.data, overrides)
    train_tokenizer(
        found.recipe, folder, resume=args.resume, place=found.place, overrides=found.overrides
    )
    return 0


# The plan, and its execution ---------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerPlan:
    """A run of which everything was checked and nothing begun: no file written, no process joined.

    Attributes:
        sources: training and held-out images.
        texture: the tokenizer that the method is built on, or the run that makes it first; None: it is on none.
        objective: built on that tokenizer; where it is still to be made, on what it is before its training.
        overrides: settings that a command line gave beside the recipe, which the run notes.
    """

    recipe: TokenizerRecipe[Any, Any]
    folder: Path
    place: str
    resume: bool
    sources: tuple[ImageSource, ImageSource]
    texture: "Tokenizer | TokenizerPlan | None"
    objective: TokenizerObjective
    overrides: tuple[str, ...] = ()

    @property
    def stand_in(self) -> Tokenizer:
        """The tokenizer before its training: of the same parts, not measured. For checks of what is built on it, which
        may freeze it; so it is a copy."""
        return copy.deepcopy(self.objective.tokenizer(self.objective.averaged_module()))


def train_tokenizer(
    recipe: TokenizerRecipe[Any, Any] | str | Path,
    folder: str | Path,
    *,
    resume: Resume = False,
    place: str = "recipe",
    overrides: Sequence[str] = (),
) -> Tokenizer:
    """Trains, evaluates and exports a tokenizer into a run folder.

    In a thread other than the main one, as of a notebook server or a web worker, it trains as well; signals are
    then not heard. One training at a time has a process.

    Args:
        recipe: or a file's path, or the name of one of the library's.
        resume: go on with the run that is there; ``"auto"``: if there is one, and a finished one is only loaded.
        place: starts messages about the recipe.
        overrides: settings of a command line that the recipe holds already, which the run notes.

    Raises:
        UserError: see ``check_tokenizer``.
        Interrupted, NonFiniteLoss: see ``Trainer.run``.
    """
    if not isinstance(recipe, TokenizerRecipe):
        place, recipe = str(recipe), load_recipe(locate_recipe(recipe), [])
    folder = Path(folder)
    if around_training.is_finished_already(folder, recipe, resume):
        return Tokenizer.from_pretrained(folder)
    with around_training.one_training():
        with around_training.planning():
            plan = check_tokenizer(recipe, folder, resume=resume, place=place, overrides=overrides)
        return run_tokenizer(plan)


def check_tokenizer(
    recipe: TokenizerRecipe[Any, Any],
    folder: Path,
    *,
    resume: Resume = False,
    place: str = "recipe",
    overrides: Sequence[str] = (),
) -> TokenizerPlan:
    """Checks a run and the runs that come before it.

    Raises:
        UserError: anything about the recipe, the images, the machine or the folder that can't work.
    """
    goes_on = resumes(folder, resume)
    recipe = check_run_folder(folder, recipe, resume=goes_on)
    check_launch(recipe.train)
    plan = plan_tokenizer(recipe, folder, resume=goes_on, place=place)
    return replace(plan, overrides=tuple(overrides))


def plan_tokenizer(
    recipe: TokenizerRecipe[Any, Any], folder: Path, *, resume: bool, place: str
) -> TokenizerPlan:
    """``check_tokenizer`` without checking that this folder and this machine can take the run.

    Raises:
        UserError: see there.
    """
    if not resume:
        with around_training.errors_at(place):
            recipe.method.check_use(recipe.data.image_size)
    sources = open_sources(recipe.data)
    texture, reference = None, recipe.method.texture_reference()
    if reference is not None:
        texture = check_tokenizer_of_run(
            reference, folder, _TEXTURE, data=recipe.data, resume=resume
        )
    built_on = texture.stand_in if isinstance(texture, TokenizerPlan) else texture
    resumes = resume and _has_checkpoints(folder)
    names = sources[0].class_names
    objective = build_objective(recipe, built_on, place=place, resumes=resumes, class_names=names)
    with around_training.errors_at(place):
        check_optimisers(objective, recipe.train)
        check_sharding(objective, recipe.train)
    return TokenizerPlan(recipe, folder, place, resume, sources, texture, objective)


def _has_checkpoints(folder: Path) -> bool:
    return bool(list_checkpoints(folder / CHECKPOINTS))


def run_tokenizer(plan: TokenizerPlan) -> Tokenizer:
    """Executes a plan: see ``train_tokenizer``."""
    with around_training.at_work(plan.folder, plan.recipe, resume=plan.resume):
        return _run(plan)


def _run(plan: TokenizerPlan) -> Tokenizer:
    start = time.perf_counter()
    folder, objective, texture = plan.folder, plan.objective, plan.texture
    if isinstance(texture, TokenizerPlan):
        texture = run_first(texture)
        objective = _objective_on(texture, plan)
    recipe = around_training.with_precision(plan.recipe, resume=plan.resume)
    accelerator = make_accelerator(recipe.train, folder)
    if accelerator.is_main_process and recipe.train.optimiser is not None:
        for line in recipe.method.warnings(recipe.train.optimiser.learning_rate):
            print(f"warning: {line}", flush=True)
        for line in objective.notes():
            print(f"note: {line}", flush=True)
    with around_training.errors_at(plan.place):
        quality = _texture_quality(plan, texture, accelerator.device)
        worth = pays(recipe, plan.sources[0])
        read = objective.training_source(plan.sources[0], accelerator, pays=worth)
    trainer = around_training.start_trainer(
        objective,
        recipe,
        accelerator,
        folder,
        (read, plan.sources[1]),
        resume=plan.resume,
        what=recipe.method.name,
        overrides=plan.overrides,
    )
    with together():
        if texture is not None and accelerator.is_main_process:
            keep_tokenizer(texture, folder / _TEXTURE)
            record(quality, folder)
    if not trainer.step:
        with together():
            what = f"measuring {objective.measures}"
            batches = statistics_batches(read, recipe, accelerator.device, what=what)
            objective.measure(batch for _, batch in batches)
        if recipe.method.starts_from_weights():
            around_training.measure_start(trainer)
    kept = read if isinstance(read, CachedFeatures) else None
    averaged = trainer.run(
        lambda module, step: _export_on_the_way(plan, objective, module, step, kept)
    )
    metrics = trainer.validate()
    # Its statistics are new, and not yet where its networks are.
    tokenizer = objective.tokenizer(averaged).to(accelerator.device)
    with together():  # and other processes may read the export next
        export_tokenizer(
            tokenizer,
            recipe,
            plan.sources[0],
            folder / "export",
            step=trainer.step,
            metrics=metrics,
            pictures=around_training.card_pictures(folder),
            features=kept,
        )
        export_generator(objective, averaged, tokenizer, folder / "export")
        if accelerator.is_main_process:
            seconds = time.perf_counter() - start
            around_training.summarise(
                trainer, metrics, folder, "tokenizer", total_seconds=seconds, texture=quality
            )
    return tokenizer


def _objective_on(texture: Tokenizer, plan: TokenizerPlan) -> TokenizerObjective:
    return build_objective(
        plan.recipe,
        texture,
        place=plan.place,
        resumes=plan.resume and _has_checkpoints(plan.folder),
        class_names=plan.sources[0].class_names,
    )


def _texture_quality(
    plan: TokenizerPlan, texture: Tokenizer | None, device: torch.device
) -> TextureQuality | None:
    """Of the tokenizer that the method is built on, where there is one."""
    if texture is None:
        return None
    resumes = plan.resume and _has_checkpoints(plan.folder)
    return texture_quality(
        plan.recipe, texture, plan.sources[0], plan.folder, device, resumes=resumes
    )


# Tokenizers that others are built on -------------------------------------------------------------


def tokenizer_from_reference(reference: str, *, drawn: bool = True) -> Tokenizer:
    """Loads a tokenizer; where the reference names an embedded recipe without a finished run, trains it.

    The order: a folder, the name of a finished run, ``demo``, a Hub id, the name of an embedded recipe.

    Args:
        drawn: whether it is for the drawn scenes, which embedded recipes train on.

    Raises:
        UserError: the reference names nothing, or a recipe that would train on other images than it is for.
    """
    found = check_reference(reference)
    if not isinstance(found, TokenizerPlan):
        return found
    if not drawn:
        raise UserError(
            f"tokenizer '{reference}' is not trained yet, and not on these images; train it first: python "
            f"tools/train_tokenizer.py recipes/{reference}.yaml data.kind=… data.path=… --output {RUNS}/NAME"
        )
    return run_first(found)


def check_reference(
    reference: str, data: DataConfig | None = None, *, run: Path | None = None
) -> Tokenizer | TokenizerPlan:
    """The tokenizer that a reference names, or the plan of the run that makes it: of an embedded recipe without a
    finished run.

    Args:
        data: images that it is for. Where these are neither drawn scenes nor the recipe's own images, the recipe is
            trained on them instead of its own.
        run: the folder of the run that needs it; beside it stands what is trained on such images.

    Raises:
        UserError: the reference names nothing.
    """
    folder = RUNS / reference
    finished = (folder / "export" / "config.json").is_file()
    recipe = None if finished or Path(reference).is_dir() else find_recipe(reference)
    if recipe is None:
        return Tokenizer.from_pretrained(reference)
    if run is not None and data is not None and not _is_of(recipe, data):
        folder = run.with_name(f"{run.name}_{reference.replace('/', '_')}")
        own = read_yaml(recipe) | {"data": _images(data)}
        content, place, overrides = parse_recipe(own, str(recipe)), str(recipe), ()
    else:
        found = resolve(load_recipe, recipe, [], folder=folder, resume="auto")
        content, place, overrides = found.recipe, found.place, found.overrides
    plan = check_tokenizer(content, folder, resume="auto", place=place, overrides=overrides)
    # Also a finished run has to be of the same recipe and images, which is checked above.
    if not (folder / "export" / "config.json").is_file():
        return plan
    check_data(folder, plan.sources)
    return Tokenizer.from_pretrained(folder)


def _is_of(recipe: Path, data: DataConfig) -> bool:
    """Whether a recipe, as it stands, is for images as these; any drawn scenes are as good as a recipe's own."""
    return isinstance(data, ShapesConfig) or _images(load_recipe(recipe, []).data) == _images(data)


def _images(data: DataConfig) -> dict[str, Any]:
    return data.model_dump(mode="json", exclude={"cache"})  # a cache is of latents


def check_tokenizer_of_run(
    reference: str, folder: Path, kept: str, *, data: DataConfig, resume: bool
) -> Tokenizer | TokenizerPlan:
    """The tokenizer that a run is built on: a resumed one reads the copy that it kept.

    Args:
        folder: the run's.
        kept: the copy's name there.
        data: the run's images.
    """
    if resume and (folder / kept).is_dir():
        return Tokenizer.from_pretrained(folder / kept)
    return check_reference(reference, data, run=folder)


def run_first(plan: TokenizerPlan) -> Tokenizer:
    """Executes the plan of a tokenizer that something else waits for; as it is loaded from its export."""
    doing = "resuming" if plan.resume else "training"
    print(
        f"tokenizer '{plan.folder.name}' is not trained yet: {doing} {plan.place} first", flush=True
    )
    try:
        run_tokenizer(plan)
    except Interrupted as stopped:
        raise Interrupted(
            stopped.signal_number,
            checkpoint=stopped.checkpoint,
            way_on="the same command goes on",
        ) from None
    return Tokenizer.from_pretrained(plan.folder)


def keep_tokenizer(tokenizer: Tokenizer, kept: Path) -> None:
    """Copies into a run the tokenizer that it is built on: what a reference names may change meanwhile."""
    if not kept.is_dir():
        tokenizer.save_pretrained(kept)


def build_objective(
    recipe: TokenizerRecipe[Any, Any],
    texture: Tokenizer | None = None,
    *,
    place: str,
    resumes: bool = False,
    class_names: Sequence[str] = (),
) -> TokenizerObjective:
    """Builds the networks that a recipe describes, on the CPU, from its seed.

    Args:
        texture: the tokenizer that the method is built on, where it is on one.
        resumes, class_names: see ``MethodContext``.

    Raises:
        UserError: a teacher or weights that can't be had, or settings that don't fit each other.
    """
    method = get_method(recipe.method.name, place=place)
    with around_training.errors_at(place):
        recipe.method.check_references()
    teacher = (
        Teacher(recipe.teacher)
        if recipe.teacher is not None and recipe.method.needs_teacher()
        else None
    )
    seed_random(recipe.train.seed)
    with around_training.errors_at(place):
        return method.objective(
            recipe.method,
            MethodContext(
                recipe.data.image_size,
                teacher,
                recipe.train.steps,
                texture,
                resumes,
                tuple(class_names),
            ),
        )


def _export_on_the_way(
    plan: TokenizerPlan,
    objective: TokenizerObjective,
    averaged: nn.Module,
    step: int,
    features: CachedFeatures | None,
) -> None:
    """In the middle of a run; an export that is there already stays."""
    target = around_training.export_at(plan.folder, step)
    if around_training.is_export(target):
        return
    tokenizer = objective.tokenizer(averaged).to(next(averaged.parameters()).device)
    with together():
        export_tokenizer(
            tokenizer,
            plan.recipe,
            plan.sources[0],
            target,
            step=step,
            metrics={},
            pictures=around_training.card_pictures(plan.folder),
            features=features,
        )
        export_generator(objective, averaged, tokenizer, target)
