"""``train_teacher``: trains the embedded teacher again (about 15 minutes on 2 cores)."""

import math
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch

from demo_models import ASSETS
from demo_models.teacher import DemoTeacherObjective
from semtok.commands.cli import Parser
from semtok.commands.run_folder import RECIPE_FILE, check_run_folder
from semtok.commands.table import print_table
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.errors import UserError
from semtok.optimiser import OptimiserConfig
from semtok.recipe import write_recipe
from semtok.settings import Config
from semtok.storage import new_file, write_json
from semtok.teachers import DEMO_FILE
from semtok.training.loop import Trainer
from semtok.training.process import make_accelerator
from semtok.training.train_config import TrainConfig


class TeacherRecipe(Config):
    """What the embedded teacher was trained with."""

    data: ShapesConfig = ShapesConfig(size=32, seed=1000, num_images=1_000_000)
    train: TrainConfig


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="train_teacher", description=__doc__)
    parser.add_argument(
        "--steps", type=int, default=3000, help="default: 3000, as the embedded teacher was trained"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/demo_teacher"), help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--to-assets", action="store_true", help="let it take the embedded one's place"
    )
    args = parser.parse_args(arguments)

    if args.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {args.steps}")
    recipe = TeacherRecipe(
        train=TrainConfig(
            steps=args.steps,
            batch_size=64,
            optimiser=OptimiserConfig(learning_rate=1.2e-3, weight_decay=0.05),
            schedule="cosine",
            warmup_steps=math.ceil(args.steps / 15),
            ema_decay=0.995,
            log_every=100 if args.steps >= 100 else args.steps,
            checkpoint_every=500,
        )
    )
    recipe = check_run_folder(args.output, recipe, resume=args.resume)
    torch.manual_seed(recipe.train.seed)
    trainer = Trainer(
        DemoTeacherObjective(),
        recipe.train,
        accelerator=make_accelerator(recipe.train, args.output),
        folder=args.output,
        source=Shapes(recipe.data, train=True),
        validation=Shapes(recipe.data, train=False),
        num_workers=0,
        tracked={},
    )
    if args.resume:
        trainer.resume()
    write_recipe(recipe, args.output / RECIPE_FILE)
    network = trainer.run()
    metrics = trainer.validate()
    places = [args.output / DEMO_FILE, *([ASSETS / DEMO_FILE] if args.to_assets else [])]
    for place in places:
        with new_file(place) as temporary:
            safetensors.torch.save_file(network.state_dict(), temporary)
    write_json(args.output / "summary.json", {"steps": trainer.step, "validation": metrics})
    print_table("held-out accuracy", [(name, f"{value:.3f}") for name, value in metrics.items()])
    print("weights: " + "   ".join(map(str, places)))
    return 0
