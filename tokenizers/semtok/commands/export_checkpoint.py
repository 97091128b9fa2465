"""A checkpoint that a run has kept, as the export that the run would have made then."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands.run_folder import RECIPE_FILE
from semtok.commands.train_dit import GeneratorPlan, plan_dit, training_info
from semtok.commands.train_tokenizer import TokenizerPlan, export_tokenizer, plan_tokenizer
from semtok.errors import UserError, did_you_mean
from semtok.objective import Objective
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from semtok.references import RUNS
from semtok.settings import read_yaml
from semtok.speed import allow_tf32
from semtok.training.checkpoint import list_checkpoints, load_networks, step_of


def export_checkpoint(run: str, step: int | None, output: Path) -> int:
    """Writes the averaged network of a kept checkpoint as an export; a tokenizer's statistics are measured anew.

    Args:
        run: a folder, or the name of one in ``runs/``.
        step: None: the last that is kept.
        output: the export's folder.

    Returns:
        the step.

    Raises:
        UserError: no run, a step that is not kept, or a checkpoint, images or a teacher that can't be read.
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
        tokenizer_plan = plan_tokenizer(recipe, folder, resume=True, place=place)
        _export_tokenizer(tokenizer_plan, checkpoint, output)
    else:
        diffusion = parse_diffusion_recipe(content, place)
        _export_generator(plan_dit(diffusion, folder, resume=True, place=place), checkpoint, output)
    return step_of(checkpoint)


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


def _export_tokenizer(plan: TokenizerPlan, checkpoint: Path, output: Path) -> None:
    averaged = _averaged(plan.objective, plan.recipe.train, checkpoint)
    tokenizer = plan.objective.tokenizer(averaged).to(_device())
    export_tokenizer(
        tokenizer,
        plan.recipe,
        plan.sources[0],
        output,
        step=step_of(checkpoint),
        metrics={},
        pictures=_pictures(plan.folder, checkpoint),
    )


def _export_generator(plan: GeneratorPlan, checkpoint: Path, output: Path) -> None:
    averaged = _averaged(plan.objective, plan.recipe.train, checkpoint)
    generator = plan.objective.generator(averaged)
    source = (plan.latents or plan.images)[0]
    generator.training_info = training_info(plan.recipe, source, step_of(checkpoint), {})
    generator.save_pretrained(output, pictures=_pictures(plan.folder, checkpoint))


def _averaged(objective: Objective, train: Any, checkpoint: Path) -> nn.Module:
    """What the run would have exported then, on the device where it measures."""
    allow_tf32(train.precision)
    averaged = objective.averaged_module()
    modules: dict[str, nn.Module] = {"learners": objective.learners}
    if train.ema_decay is not None:
        averaged = modules["ema"] = copy.deepcopy(averaged)
    load_networks(checkpoint, modules=modules, way_out="take another --step")
    for module in (objective.learners, averaged, *objective.frozen_modules()):
        module.to(_device())
    return averaged


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _pictures(folder: Path, checkpoint: Path) -> dict[str, Path]:
    """Samples that the run drew at that step, where it did."""
    file = folder / "samples" / f"{checkpoint.name}.png"
    return {"samples": file} if file.is_file() else {}
