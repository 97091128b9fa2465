"""What every training command does around the loop: starting, and what it leaves and shows at its end."""

import argparse
import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from semtok import stopping
from semtok.commands.cli import Parser
from semtok.commands.run_data import check_data, record_data
from semtok.commands.run_folder import (
    RECIPE_FILE,
    check_run_folder,
    is_finished,
    remove_what_was_begun,
)
from semtok.commands.run_recipe import Resume, record_overrides
from semtok.commands.table import print_table
from semtok.commands.texture_quality import TextureQuality
from semtok.data.source import ImageSource
from semtok.errors import Interrupted, UserError
from semtok.lock import only_one_in, remove_what_is_held_by_nobody
from semtok.objective import Objective
from semtok.privacy import without_secrets
from semtok.processes import gather, interruptible, process_index, together, watching
from semtok.progress import is_first
from semtok.recipe import DiffusionRecipe, TokenizerRecipe, write_recipe
from semtok.settings import flatten
from semtok.storage import disk_told_with, read_json, write_json
from semtok.tokenizer import library_version
from semtok.training.checkpoint import (
    CHECKPOINTS,
    list_checkpoints,
    random_state,
    restore_random_state,
)
from semtok.training.loop import Trainer
from semtok.training.precision import settled
from semtok.training.process import join_processes
from semtok.training.scoring import CLASSES, FD
from semtok.training.train_config import TrainConfig

Recipe = TokenizerRecipe[Any, Any] | DiffusionRecipe[Any]
RecipeType = TypeVar("RecipeType", TokenizerRecipe[Any, Any], DiffusionRecipe[Any])

_EXPORTS = "exports"
_START = "validation_before.json"
_LOSS_DB = 0.5
_LABELS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.3f}"),
    "alignment_cosine": ("alignment cosine", "{:.3f}"),
    "alignment_distance": ("difference of similarities", "{:.3f}"),
    "kl_per_dim": ("KL", "{:.2f} nats per dimension"),
    "velocity": ("squared error of the velocity", "{:.4f}"),
    CLASSES: ("images that show their class", "{:.1%}"),
    FD: ("Fréchet distance", "{:.4g}"),
}
_SCORE_FORMS = {name: _LABELS[name][1].format for name in (CLASSES, FD)}


def add_run_options(parser: argparse.ArgumentParser, default_folder: str) -> None:
    """What every training command takes beside its recipe."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, for example train.steps=200"
    )
    parser.add_argument("--output", help=f"run folder; default: {default_folder}")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="yes",
        choices=("yes", "auto"),
        metavar="auto",
        help="go on from the run's newest checkpoint, with the run's own recipe; auto: start the run where there is "
        "none, and leave a finished one alone",
    )
    parser.add_argument(
        "--print-recipe", action="store_true", help="show the resolved recipe and stop"
    )


def read_run_options(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """The options; after ``--resume`` any word but ``auto`` is a setting.

    Returns:
        the options, of which ``resume`` is as ``Resume`` says.
    """
    words = [*arguments, ""]
    joined = []
    for word, after in pairwise(words):
        is_resume = len(word) > len("--r") and "--resume".startswith(word)
        if word == "auto" and joined[-1:] == ["--resume="]:
            joined[-1] += word
        else:
            joined.append("--resume=" + "yes" * (after != "auto") if is_resume else word)
    args = parser.parse_intermixed_args(joined)
    args.resume = "auto" if args.resume == "auto" else args.resume is not None
    return args


_training = threading.RLock()


@contextlib.contextmanager
def one_training() -> Iterator[None]:
    """Within this context no other thread of this process plans or runs a training: torch's random numbers, which
    weights are drawn from, are the whole process's.

    Raises:
        UserError: another thread is at it.
    """
    if not _training.acquire(blocking=False):
        raise UserError(
            "another training is at work in this process, and would share its random numbers; wait for it, or start "
            "this one in a process of its own"
        )
    try:
        yield
    finally:
        _training.release()


def planning() -> contextlib.AbstractContextManager[None]:
    """Within this context a signal ends a run of which no file is written, and says so."""
    return stopping.with_way_on("nothing was begun; give the same command again")


@contextlib.contextmanager
def at_work(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Within this context a run has its folder for itself, in all processes, hears signals, and says how to go on.

    Raises:
        UserError: another run is at work there, or the disk is full or fails.
        Interrupted: a signal came, see ``stopping.listening``.
    """
    disk = disk_told_with("go on with --resume auto", place=folder)
    with stopping.listening(), disk, contextlib.ExitStack() as stack:
        try:
            join_processes()
            stack.enter_context(watching())
            stack.enter_context(interruptible())
            with together():
                if not process_index():
                    stack.enter_context(only_one_in(folder, "a run"))
                    check_run_folder(folder, recipe, resume=resume)  # as it is now
                    remove_what_was_begun(folder)
            yield
        except Interrupted as stopped:
            if stopped.way_on:  # of a run that comes first
                raise
            checkpoints = list_checkpoints(folder / CHECKPOINTS)
            begun = (folder / RECIPE_FILE).is_file()
            raise Interrupted(
                stopped.signal_number,
                checkpoint=checkpoints[-1] if checkpoints else None,
                way_on="go on with --resume" if begun else "the same command starts it again",
            ) from None


def is_finished_already(folder: Path, recipe: Recipe, resume: Resume) -> bool:
    """Whether ``--resume auto`` has nothing to do; then it says so.

    Raises:
        UserError: the run that is finished was of another recipe.
    """
    if resume != "auto" or not is_finished(folder, recipe):
        return False
    check_run_folder(folder, recipe, resume=True)
    remove_what_is_held_by_nobody(folder)
    if is_first():
        print(
            f"{folder}: is finished, {recipe.train.steps} steps; train.steps=… goes on for more, --resume alone "
            "measures and exports it again",
            flush=True,
        )
    return True


@contextlib.contextmanager
def errors_at(place: str) -> Iterator[None]:
    """What can't be built is the user's to mend: one line that starts with the recipe's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    except ValueError as error:
        message = str(error).strip().splitlines()[0]
        key = "data.size: " if "image size" in message else ""
        raise UserError(f"{place}: {key}{message}") from None


def with_precision(recipe: RecipeType, *, resume: bool) -> RecipeType:
    """The recipe with what ``train.precision=auto`` comes to on these machines; all processes have to ask."""
    return recipe.model_copy(update={"train": settled(recipe.train, resume=resume)})


def start_trainer(
    objective: Objective,
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    sources: tuple[ImageSource, ImageSource],
    *,
    resume: bool,
    what: str,
    overrides: Sequence[str] = (),
) -> Trainer:
    """Makes the run's trainer, goes back to its checkpoint if asked, and claims the folder for it.

    Args:
        sources: of training and of held-out images.
        what: is trained, in a few words.
        overrides: see ``run_recipe.resolve``.

    Raises:
        UserError: the run can't go on with its checkpoint, or with these images.
    """
    train, validation = sources
    settings = flatten(recipe.model_dump(mode="json"))
    trainer = Trainer(
        objective,
        recipe.train,
        accelerator=accelerator,
        folder=folder,
        source=train,
        validation=validation,
        num_workers=0 if train.is_cheap else recipe.data.num_workers,
        tracked={
            k: v if isinstance(v, int | float) else without_secrets(str(v))
            for k, v in settings.items()
        },
    )
    with together():
        if resume:
            if accelerator.is_main_process:  # a look at each file
                check_data(folder, sources)
            trainer.resume()
            _check_exports_on_the_way(trainer)
        if accelerator.is_main_process:
            write_recipe(recipe, folder / RECIPE_FILE)
            record_overrides(folder, overrides)
            record_data(folder, sources)
            height, width = recipe.data.image_size
            print(
                f"training {what} on {train.name} at {height}x{width}; output: {folder}", flush=True
            )
            if train.num_classes > 1:
                print(f"classes: {_some(train.class_names)}", flush=True)
            if trainer.memory_line:
                print(trainer.memory_line, flush=True)
            if trainer.averages is not None:
                print(trainer.averages.disk_line(), flush=True)
            if trainer.step:
                print(f"resuming after step {trainer.step}", flush=True)
            _tell_of_more_steps(recipe, trainer.step)
    return trainer


def _some(names: Sequence[str]) -> str:
    """How many there are, with the first few."""
    return f"{len(names)} ({', '.join(names[:6])}{', …' if len(names) > 6 else ''})"


def _tell_of_more_steps(recipe: Recipe, step: int) -> None:
    until, steps = max(recipe.train.planned_before, default=(None, 0))
    if until == step:
        share = recipe.train.learning_rate_factor(step)
        print(
            f"train.steps is {recipe.train.steps} and was {steps}: the cosine is planned anew, and from step {step} on "
            f"the rate is {share:.3g} of train.optimiser.learning_rate",
            flush=True,
        )


def measure_start(trainer: Trainer) -> None:
    """Notes and prints the held-out metrics of the weights that a training starts from, in all processes together;
    what comes after draws the random numbers that it would have drawn."""
    random = random_state()
    metrics = trainer.validate()
    restore_random_state(random)
    if trainer.accelerator.is_main_process:
        write_json(trainer.folder / _START, metrics)
        told = ", ".join(" ".join(_row(name, value)) for name, value in metrics.items())
        print(f"before training: {told}", flush=True)


def _row(name: str, value: float) -> tuple[str, str]:
    """A metric as people read it: what it is, and the number."""
    label, form = _LABELS.get(name, (name, "{:.4g}"))
    return label, form.format(value)


def summarise(
    trainer: Trainer,
    metrics: dict[str, float],
    folder: Path,
    what: str,
    *,
    total_seconds: float,
    texture: TextureQuality | None = None,
) -> None:
    """Writes ``summary.json``, prints the closing table, and tells where the run has left what people look for.

    Args:
        metrics: held-out metrics, means over images.
        what: the export is.
        texture: how well the tokenizer that this one is built on shows the training images.
    """
    summary = _figures(trainer, metrics, total_seconds)
    if texture is not None:
        summary["texture"] = asdict(texture)
    start = read_json(folder / _START) if (folder / _START).is_file() else {}
    if start:
        summary["validation_before"] = start
    if trainer.scoring is not None:
        own = trainer.scores.state_dict()
        summary["scores"] = trainer.scoring.about | own
    write_json(folder / "summary.json", summary)
    rows = []
    for name, value in metrics.items():
        label, shown = _row(name, value)
        rows.append((label, f"{shown}, before {_row(name, start[name])[1]}" if start else shown))
    if metrics.get("psnr", 0.0) < start.get("psnr", 0.0) - _LOSS_DB:
        print(
            f"warning: PSNR fell from {start['psnr']:.2f} to {metrics['psnr']:.2f} dB; a smaller "
            "train.optimiser.learning_rate does less harm to weights that were trained before",
            flush=True,
        )
    if texture is not None:
        found = f"{texture.psnr:.2f} dB on {texture.num_images} training images"
        rows.append(("PSNR of the texture", found))
    rows += [
        ("speed", f"{summary['images_per_second']:.1f} images/s" if trainer.seconds else "-"),
        ("time", f"{total_seconds:.0f} s in all, {trainer.seconds:.0f} s training"),
    ]
    rows += _score_rows(trainer)
    if trainer.skipped:
        rows.append(("unreadable files", str(len(trainer.skipped))))
    print_table(
        f"held-out images: {summary['num_validation_images']}, {summary['weights']} weights", rows
    )
    places = {what: "export", "on the way": _EXPORTS, "pictures": "samples", "curves": "curves.png"}
    found = {name: folder / file for name, file in places.items() if (folder / file).exists()}
    print("   ".join(f"{name}: {path}" for name, path in found.items()))


def _score_rows(trainer: Trainer) -> list[tuple[str, str]]:
    """The last scores, and when those that were asked for were first reached."""
    if trainer.scoring is None:
        return []
    about, form = trainer.scoring.about, _SCORE_FORMS
    by = f"judge {about['judge']}, {about['num']} images of seed {about['seed']}"
    rows = []
    for name, value in trainer.scores.last.items():
        real = about["held_out"].get(name)
        beside = f"; real held-out images: {form[name](real)}" if real is not None else ""
        rows.append((_LABELS[name][0], f"{form[name](value)} ({by}{beside})"))
    for row in trainer.scores.first_reached:
        what = f"{_LABELS[row['score']][0]}: {form[row['score']](row['at'])}"
        told = "not reached"
        if row["step"] is not None:
            told = (
                f"reached at step {row['step']}, {row['images']} images, {row['seconds']:.0f} s of training "
                f"({form[row['score']](row['value'])})"
            )
        rows.append((what, told))
    return rows


def _figures(trainer: Trainer, metrics: dict[str, float], total_seconds: float) -> dict[str, Any]:
    images = trainer.step * trainer.config.batch_size
    return {
        "steps": trainer.step,
        "images": images,
        "images_per_second": images / trainer.seconds if trainer.seconds else None,
        "training_seconds": trainer.seconds,
        "total_seconds": total_seconds,
        "weights": kept_weights(trainer.config),
        "num_validation_images": min(trainer.config.num_validation_images, len(trainer.validation)),
        "validation": metrics,
        "skipped_files": sorted(trainer.skipped),
        "num_skipped_files": len(trainer.skipped),
        "left_out": trainer.source.left_out.counts() if trainer.source.left_out else {},
        "library_version": library_version(),
        "torch_version": torch.__version__,
        "num_processes": trainer.accelerator.num_processes,
        "accumulate": trainer.accumulate,
    }


def kept_weights(train: TrainConfig) -> str:
    """Which weights a run evaluates and exports: ``ema`` or ``trained``."""
    return "ema" if train.ema_decay is not None and train.steps else "trained"


def export_at(folder: Path, step: int) -> Path:
    """Where a run keeps the export that it made after a step on the way."""
    return folder / _EXPORTS / f"{step:07d}"


def is_export(folder: Path) -> bool:
    """Whether a whole export is there, as the first process sees it; all have to ask."""
    return gather((folder / "config.json").is_file())[0]


def _check_exports_on_the_way(trainer: Trainer) -> None:
    """Raises UserError where ``train.export_at`` names a step that is past and was not exported."""
    for step in trainer.config.export_at:
        if step < trainer.step and not export_at(trainer.folder, step).is_dir():
            raise UserError(
                f"{trainer.folder}: train.export_at names step {step}, which is past and was not exported; leave it "
                f"out, or where its checkpoint is kept: hub checkpoint {trainer.folder} --step {step}"
            )


def card_pictures(folder: Path) -> dict[str, Path]:
    """Of a run, what its export's card shows: the newest samples, and the curves."""
    found = {"samples": max((folder / "samples").glob("step_*.png"), default=None)}
    found["curves"] = folder / "curves.png"
    return {name: file for name, file in found.items() if file is not None and file.is_file()}
