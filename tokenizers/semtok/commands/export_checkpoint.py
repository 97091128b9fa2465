"""A checkpoint that a run has kept, as an export: of the weights that the run would have exported then, or of another
average of them."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands.around_training import kept_weights
from semtok.commands.run_folder import RECIPE_FILE
from semtok.commands.tokenizer_export import export_generator, export_tokenizer
from semtok.commands.train_dit import GeneratorPlan, plan_dit, training_info
from semtok.commands.train_tokenizer import TokenizerPlan, plan_tokenizer
from semtok.data.source import ImageBatch
from semtok.errors import UserError, did_you_mean
from semtok.objective import Batch
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from semtok.references import RUNS
from semtok.settings import read_yaml
from semtok.speed import allow_tf32, computing
from semtok.training.averages import AVERAGES, names_of, reconstruct
from semtok.training.checkpoint import list_checkpoints, load_networks, step_of
from semtok.training.held_out import HeldOut
from semtok.training.inputs import in_float32, on_device
from semtok.training.train_config import LARGEST, SMALLEST

_WORDS = ("ema", "trained")


@dataclass(frozen=True)
class Kept:
    """A checkpoint that a run has kept, and the plan of the run."""

    plan: TokenizerPlan | GeneratorPlan
    checkpoint: Path

    @property
    def step(self) -> int:
        """After which it was written."""
        return step_of(self.checkpoint)

    def check(self, average: str | None) -> None:
        """Raises UserError where the run has followed no such average, see ``averaged``."""
        train = self.plan.recipe.train
        average = average or kept_weights(train)
        if average == "ema" and train.ema_decay is None:
            raise UserError(
                f"--average ema: {self.plan.folder} has followed no EMA (train.ema_decay); leave it out"
            )
        if average not in _WORDS and train.averages is None:
            raise UserError(
                f"--average {average}: {self.plan.folder} has followed none (train.averages); leave it out"
            )

    def averaged(self, average: str | None) -> tuple[nn.Module, str]:
        """The module to export, on the device where the run measures, and what its weights are.

        Args:
            average: ``ema``, ``trained``, or a number, the σ_rel of an average that is put together from the run's
                ``train.averages``; None: as the run exports.

        Raises:
            UserError: the run has no such average, or can't give it.
        """
        objective, train = self.plan.objective, self.plan.recipe.train
        self.check(average)
        allow_tf32(train.precision)
        average = average or kept_weights(train)
        own = objective.averaged_module()
        names = [] if average == "trained" else [average]
        if average not in _WORDS:
            names = names_of(train.averages)
        copies = {name: copy.deepcopy(own) for name in names}
        modules = {"learners": objective.learners, **copies}
        load_networks(self.checkpoint, modules=modules, way_out="take another --step")
        for module in (*modules.values(), *objective.frozen_modules()):
            module.to(_device())
        if average in _WORDS:
            return copies.get("ema", own), average
        folder, latest = self.plan.folder / AVERAGES, list(copies.values())
        sigma_rel = float(average)
        result, missed = reconstruct(sigma_rel, train.averages, self.step, latest, folder)
        print(f"average of sigma_rel {sigma_rel:g}: its profile is met but for {missed:.2%}")
        return result, f"average of sigma_rel {sigma_rel:g}"

    def export(self, average: str | None, output: Path) -> None:
        """Writes an export; a tokenizer's statistics are measured anew. See ``averaged``."""
        plan, (averaged, weights) = self.plan, self.averaged(average)
        pictures = _pictures(plan.folder, self.checkpoint) if average is None else {}
        if isinstance(plan, TokenizerPlan):
            tokenizer = plan.objective.tokenizer(averaged).to(_device())
            export_tokenizer(
                tokenizer,
                plan.recipe,
                plan.sources[0],
                output,
                step=self.step,
                metrics={},
                pictures=pictures,
                weights=weights,
            )
            export_generator(plan.objective, averaged, tokenizer, output)
            return
        generator = plan.objective.generator(averaged)
        source = (plan.latents or plan.images)[0]
        generator.training_info = training_info(plan.recipe, source, self.step, {}, weights)
        generator.save_pretrained(output, pictures=pictures)

    def measured(self, average: str) -> dict[str, float]:
        """Held-out metrics of an average, as a run measures them at its end. See ``averaged``."""
        plan, train = self.plan, self.plan.recipe.train
        averaged, _ = self.averaged(average)
        sources = plan.sources if isinstance(plan, TokenizerPlan) else plan.latents or plan.images

        def prepared(images: ImageBatch) -> tuple[Batch, dict[str, Any]]:
            batch = on_device(images, _device())
            with computing(_device(), train.precision):
                inputs = plan.objective.prepare(batch)
            return batch, {name: in_float32(value) for name, value in inputs.items()}

        held_out = HeldOut(plan.objective, sources[1], min(64, train.batch_size), prepared)
        return held_out.metrics(averaged.eval(), train.num_validation_images)


def kept_checkpoint(run: str, step: int | None) -> Kept:
    """A checkpoint of a run.

    Args:
        run: a folder, or the name of one in ``runs/``.
        step: None: the last that is kept.

    Raises:
        UserError: no run, a step that is not kept, or images or a teacher that can't be read.
    """
    folder = next((f for f in (Path(run), RUNS / run) if (f / RECIPE_FILE).is_file()), None)
    if folder is None:
        runs = [file.parent.name for file in RUNS.glob(f"*/{RECIPE_FILE}")]
        hint = did_you_mean(run, runs)
        raise UserError(
            f"{run}: is no run (no {RECIPE_FILE}), nor is {RUNS / run}{'; ' + hint if hint else ''}"
        )
    checkpoint = _kept(folder, step)
    place = str(folder / RECIPE_FILE)
    content = read_yaml(folder / RECIPE_FILE)
    if "method" in content:
        recipe = parse_recipe(content, place)
        return Kept(plan_tokenizer(recipe, folder, resume=True, place=place), checkpoint)
    diffusion = parse_diffusion_recipe(content, place)
    return Kept(plan_dit(diffusion, folder, resume=True, place=place), checkpoint)


def check_average(word: str) -> str:
    """What ``Kept.averaged`` takes.

    Raises:
        UserError: the word is none of that.
    """
    try:
        is_width = SMALLEST <= float(word) <= LARGEST
    except ValueError:
        is_width = word in _WORDS
    if not is_width:
        raise UserError(
            f"--average {word}: expected a width from {SMALLEST} to {LARGEST}, {' or '.join(_WORDS)}"
        )
    return word


def _kept(folder: Path, step: int | None) -> Path:
    kept = {step_of(path): path for path in list_checkpoints(folder / "checkpoints")}
    if not kept:
        raise UserError(f"{folder}: this run keeps no checkpoint")
    if step is None:
        return kept[max(kept)]
    if step not in kept:
        raise UserError(
            f"--step {step}: {folder} keeps no checkpoint of it, but of {', '.join(map(str, kept))}; "
            "while a run trains, train.export_at names steps to export, train.keep_last says how many stay"
        )
    return kept[step]


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """Samples that the run drew at that step, where it did."""
    file = folder / "samples" / f"{checkpoint.name}.png"
    return {"samples": file} if file.is_file() else {}
