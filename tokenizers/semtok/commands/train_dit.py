"""``train_dit --tokenizer REF``: a diffusion transformer on the latents of any tokenizer."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands import around_training
from semtok.commands.cli import Parser
from semtok.commands.run_data import note_licence
from semtok.commands.run_folder import check_run_folder
from semtok.commands.run_recipe import Resume, resolve, resumes
from semtok.commands.train_tokenizer import (
    TokenizerPlan,
    check_tokenizer_of_run,
    keep_tokenizer,
    run_first,
)
from semtok.commands.when_to_cache import (
    cached_latents,
    check_targets,
    stored_latents,
    warn_of_other_images,
)
from semtok.data.caches.latent_cache import CachedLatents, open_latent_cache
from semtok.data.images.kinds import open_sources
from semtok.data.source import ImageSource
from semtok.diffusion.generator import Generator
from semtok.diffusion.training import DiffusionObjective
from semtok.errors import UserError, named_here
from semtok.evaluation.on_the_way import ScorePlan, plan_scores, scoring
from semtok.images import to_pixels
from semtok.processes import together
from semtok.recipe import (
    DiffusionRecipe,
    default_run,
    load_diffusion_recipe,
    locate_recipe,
    recipe_text,
)
from semtok.references import recipe_folder
from semtok.settings import apply_overrides, read_yaml
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer
from semtok.training.checkpoint import seed_random
from semtok.training.process import check_launch, make_accelerator
from semtok.training.sharding import check_sharding

_TOKENIZER = "tokenizer"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="train_dit", description=__doc__)
    parser.add_argument(
        "--tokenizer",
        metavar="REF",
        help="folder, run, Hub id or recipe name; an embedded recipe is trained first",
    )
    parser.add_argument(
        "--recipe", help="a YAML recipe, or the name of one of the library's; default: dit"
    )
    around_training.add_run_options(parser, "runs/<recipe>_<tokenizer>")
    args = around_training.read_run_options(parser, arguments)

    overrides = args.overrides
    if args.tokenizer is not None:
        overrides = [word for word in overrides if word != f"tokenizer={args.tokenizer}"]
        if any(word.startswith("tokenizer=") for word in overrides):
            raise UserError("--tokenizer and tokenizer=… name two tokenizers; give one of them")
        overrides = [*overrides, f"tokenizer={json.dumps(args.tokenizer)}"]
    path = locate_recipe(args.recipe) if args.recipe else None
    folder = _folder(args.output, path or _default_recipe(), overrides)
    if path is None and not resumes(folder, args.resume):
        path = _default_recipe()
    with around_training.planning():
        found = resolve(load_diffusion_recipe, path, overrides, folder=folder, resume=args.resume)
    if args.print_recipe:
        print(recipe_text(found.recipe), end="")
        return 0
    note_licence(found.recipe.data, overrides)
    train_dit(
        found.recipe, folder, resume=args.resume, place=found.place, overrides=found.overrides
    )
    return 0


def _folder(output: str | None, path: Path, overrides: list[str]) -> Path:
    if output is not None:
        return Path(output)
    content = apply_overrides(read_yaml(path), overrides)
    if not isinstance(content.get("tokenizer"), str):
        raise UserError(f"{path}: 'tokenizer' is missing; give --tokenizer REF or tokenizer=…")
    return default_run(path, content["tokenizer"])


def _default_recipe() -> Path:
    folder = recipe_folder()
    if folder is None:
        raise UserError("no recipes folder beside the library; give --recipe FILE")
    return folder / "dit.yaml"


@dataclass(frozen=True)
class GeneratorPlan:
    """A run of which everything was checked and nothing begun: no file written, no process joined.

    Attributes:
        images: of training and held out; None: a finished cache of latents stands for them.
        tokenizer: whose latents, or the run that makes it first.
        teacher: that the recipe names for REPA.
        latents: of that cache.
        scores: that are taken on the way; None: there are none.
        objective: built on the tokenizer; where it is still to be made, on what it is before its training.
    """

    recipe: DiffusionRecipe[Any]
    folder: Path
    place: str
    resume: bool
    images: tuple[ImageSource, ImageSource] | None
    tokenizer: Tokenizer | TokenizerPlan
    teacher: Teacher | None
    latents: tuple[CachedLatents, CachedLatents] | None
    objective: DiffusionObjective
    scores: ScorePlan | None = None
    overrides: tuple[str, ...] = ()


def train_dit(
    recipe: DiffusionRecipe[Any],
    folder: str | Path,
    *,
    resume: Resume = False,
    place: str = "recipe",
    overrides: Sequence[str] = (),
) -> Generator:
    """Trains, evaluates and exports a generator into a run folder.

    The tokenizer is copied into the run before the first step, and a resumed run reads that copy:
    what the reference names may change meanwhile.

    In a thread other than the main one, as of a notebook server or a web worker, it trains as well; signals are
    then not heard.

    Args:
        resume: go on with the run that is there; ``"auto"``: if there is one, and a finished one is only loaded.
        place: starts messages about the recipe.
        overrides: settings of a command line that the recipe holds already, which the run notes.

    Raises:
        UserError: see ``check_dit``.
        Interrupted, NonFiniteLoss: see ``Trainer.run``.
    """
    folder = Path(folder)
    if around_training.is_finished_already(folder, recipe, resume):
        return Generator.from_pretrained(str(folder))
    with around_training.one_training():
        with around_training.planning():
            plan = check_dit(recipe, folder, resume=resume, place=place, overrides=overrides)
        return run_dit(plan)


def check_dit(
    recipe: DiffusionRecipe[Any],
    folder: Path,
    *,
    resume: Resume = False,
    place: str = "recipe",
    overrides: Sequence[str] = (),
) -> GeneratorPlan:
    """Checks a run and those that come before it.

    Raises:
        UserError: anything about the recipe, the images, the machine or the folder that can't work.
    """
    goes_on = resumes(folder, resume)
    recipe = check_run_folder(folder, recipe, resume=goes_on)
    check_launch(recipe.train)
    plan = plan_dit(recipe, folder, resume=goes_on, place=place)
    return replace(plan, overrides=tuple(overrides))


def plan_dit(
    recipe: DiffusionRecipe[Any], folder: Path, *, resume: bool, place: str
) -> GeneratorPlan:
    """``check_dit`` without checking that this folder and this machine can take the run.

    Raises:
        UserError: see there.
    """
    stored = stored_latents(recipe.data)
    images = open_sources(recipe.data) if stored is None else None
    teacher = Teacher(recipe.teacher) if needs_teacher(recipe) and stored is None else None
    tokenizer = check_tokenizer_of_run(
        recipe.tokenizer, folder, _TOKENIZER, data=recipe.data, resume=resume
    )
    is_made = isinstance(tokenizer, Tokenizer)
    built_on, latents = tokenizer if is_made else tokenizer.stand_in, None
    if stored is not None:
        if not is_made:
            raise UserError(
                f"data.cache: {stored} holds latents of a trained tokenizer, and '{recipe.tokenizer}' is not trained "
                "yet; train it first, or pass data.cache=auto"
            )
        latents = open_latent_cache(stored, tokenizer, data=recipe.data)
    source = (latents or images)[0]
    objective = build_diffusion_objective(recipe, built_on, source, teacher, place=place)
    with around_training.errors_at(place):
        check_sharding(objective, recipe.train)
        if not resume:
            _check_use(recipe, objective)
    if is_made and images is not None:
        _check_latents(tokenizer, images[0], recipe.tokenizer)
    scores = _scores(recipe, objective, images, place=place)
    return GeneratorPlan(
        recipe, folder, place, resume, images, tokenizer, teacher, latents, objective, scores
    )


def _check_use(recipe: DiffusionRecipe[Any], objective: DiffusionObjective) -> None:
    """Raises ValueError where settings would change nothing."""
    objective.check_use()
    if recipe.score is not None and recipe.score.sampler is not None:
        with named_here(r"\bsampler\.", "score.sampler."):
            recipe.score.sampler.guidance.check_use()


def _scores(
    recipe: DiffusionRecipe[Any],
    objective: DiffusionObjective,
    images: tuple[ImageSource, ImageSource] | None,
    *,
    place: str,
) -> ScorePlan | None:
    """The scores that the recipe asks for; they need images also where cached latents stand for these."""
    if recipe.score is None:
        return None
    if images is None:
        try:
            images = open_sources(recipe.data)
        except UserError as error:
            raise UserError(
                f"{place}: score: compares with real images, and data.cache {recipe.data.cache} holds their latents "
                f"alone ({error}); bring the images back to data.path, or leave score out"
            ) from None
    with around_training.errors_at(place):
        return plan_scores(recipe.score, objective, images)


def run_dit(plan: GeneratorPlan) -> Generator:
    """Executes a plan: see ``train_dit``."""
    with around_training.at_work(plan.folder, plan.recipe, resume=plan.resume):
        return _run(plan)


def _run(plan: GeneratorPlan) -> Generator:
    start = time.perf_counter()
    folder, images = plan.folder, plan.images
    tokenizer, objective = plan.tokenizer, plan.objective
    if isinstance(tokenizer, TokenizerPlan):
        tokenizer = run_first(tokenizer)
        objective = build_diffusion_objective(
            plan.recipe, tokenizer, images[0], plan.teacher, place=plan.place
        )
    recipe = around_training.with_precision(plan.recipe, resume=plan.resume)
    accelerator = make_accelerator(recipe.train, folder)
    sources = plan.latents or cached_latents(recipe, images, objective, accelerator) or images
    if accelerator.is_main_process:
        _warn_of_size(tokenizer, recipe)
        _warn_of_scenes(tokenizer, recipe)
        if plan.latents is not None:
            warn_of_other_images(sources[0], recipe.data)
    trainer = around_training.start_trainer(
        objective,
        recipe,
        accelerator,
        folder,
        sources,
        resume=plan.resume,
        what=f"a diffusion transformer in the latents of {recipe.tokenizer}",
        overrides=plan.overrides,
    )
    with together():
        if accelerator.is_main_process:
            keep_tokenizer(tokenizer, folder / _TOKENIZER)
    if plan.scores is not None:
        trainer.score_by(scoring(plan.scores, objective, accelerator.device))

    def export_on_the_way(module: nn.Module, step: int) -> None:
        target = around_training.export_at(folder, step)
        if around_training.is_export(target):
            return
        early = objective.generator(module)
        early.training_info = training_info(recipe, sources[0], step, {})
        with together():
            if accelerator.is_main_process:
                early.save_pretrained(target, pictures=around_training.card_pictures(folder))

    averaged = trainer.run(export_on_the_way)
    metrics = trainer.validate()
    generator = objective.generator(averaged)
    generator.training_info = training_info(recipe, sources[0], trainer.step, metrics)
    with together():
        if accelerator.is_main_process:
            pictures = around_training.card_pictures(folder)
            generator.save_pretrained(folder / "export", pictures=pictures)
            seconds = time.perf_counter() - start
            around_training.summarise(trainer, metrics, folder, "generator", total_seconds=seconds)
    return generator


def training_info(
    recipe: DiffusionRecipe[Any],
    train: ImageSource,
    step: int,
    metrics: dict[str, float],
    weights: str | None = None,
) -> dict[str, Any]:
    """What a generator's export says of its training up to a step.

    Args:
        weights: which it holds; None: those that the run exports.
    """
    return {
        "data": train.name,
        "licence": recipe.data.licence,
        "metrics": metrics,
        "steps": step,
        "weights": weights or around_training.kept_weights(recipe.train),
        "recipe": json.loads(recipe.model_dump_json()),
    }


def build_diffusion_objective(
    recipe: DiffusionRecipe[Any],
    tokenizer: Tokenizer,
    train: ImageSource,
    teacher: Teacher | None,
    *,
    place: str,
) -> DiffusionObjective:
    """Builds the networks that a recipe describes, on the CPU, from its seed.

    Raises:
        UserError: settings that don't fit the tokenizer.
    """
    seed_random(recipe.train.seed)
    with around_training.errors_at(place):
        objective = DiffusionObjective(
            recipe.diffusion,
            tokenizer,
            class_names=train.class_names,
            image_size=recipe.data.image_size,
            sampler=recipe.sampler,
            teacher=teacher,
            cached_width=train.target_width if isinstance(train, CachedLatents) else None,
        )
    if isinstance(train, CachedLatents):
        check_targets(train, objective, recipe)
    return objective


def needs_teacher(recipe: DiffusionRecipe[Any]) -> bool:
    """Whether the recipe names a teacher that REPA may ask."""
    repa = recipe.diffusion.repa
    decoded = repa not in (None, False) and repa.targets == "decoded"
    return recipe.teacher is not None and repa is not False and not decoded


def _warn_of_size(tokenizer: Tokenizer, recipe: DiffusionRecipe[Any]) -> None:
    seen, given = tokenizer.training_info.get("image_size"), recipe.data.image_size
    if seen and tuple(seen) != given:
        print(
            f"warning: tokenizer '{recipe.tokenizer}' was trained on images of {seen[0]}x{seen[1]}, "
            f"these are {given[0]}x{given[1]}",
            flush=True,
        )


def _warn_of_scenes(tokenizer: Tokenizer, recipe: DiffusionRecipe[Any]) -> None:
    """Whoever trained on images of their own and names none here gets the recipe's scenes, which they hardly meant."""
    trained = tokenizer.training_info
    kind = (trained.get("recipe") or {}).get("data", {}).get("kind", "shapes")
    if recipe.data.kind == "shapes" and kind != "shapes":
        print(
            f"warning: tokenizer '{recipe.tokenizer}' was trained on {trained.get('data', kind)}, these are the "
            f"embedded scenes; for images of your own pass data.kind={kind} data.path=… data.size=…",
            flush=True,
        )


@torch.no_grad()
def _check_latents(tokenizer: Tokenizer, source: ImageSource, reference: str) -> None:
    posterior = tokenizer.posterior(to_pixels(source.load([0]).images))
    for name in posterior.mean:
        if not (posterior.mean[name].isfinite().all() and posterior.std[name].isfinite().all()):
            raise UserError(
                f"tokenizer '{reference}': its {name} latents of the first training image are not "
                "finite; train it again or choose another"
            )
