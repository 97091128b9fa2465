"""``evaluate latents``: what latents promise before a diffusion model is trained on them."""

import argparse
from typing import Any

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.table import print_table
from semtok.errors import UserError
from semtok.evaluation.predictors import NUM_NEIGHBOURS, PREDICTORS, PROBE, evaluate_latents
from semtok.evaluation.probe import probed
from semtok.evaluation.protocol import (
    PixelDigest,
    Protocol,
    data_protocol,
    shown_names,
    teacher_protocol,
    weights_digest,
)

MEASURES = (
    "predictors as their texts say, on draws from the posterior, standardised; the attribute probe on its mean, see "
    "evaluate probe"
)


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "latents", help="predictors of how well a diffusion model will generate in the latents"
    )
    options.add_tokenizer_option(task)
    options.add_teacher_options(task, "whose features the latents are compared with")
    task.add_argument("--seed", type=int, default=0, help="of draws, noise and maps")
    task.set_defaults(command=_latents)
    options.add_data_options(task, default=options.SHAPES, shown="the embedded shapes")


def _latents(args: argparse.Namespace) -> dict[str, Any]:
    train, held_out = options.open_data(args)
    options.check_seed(args)
    if args.num_held_out <= NUM_NEIGHBOURS:
        raise UserError(
            f"--num-held-out: {args.num_held_out} images, but each is compared with its "
            f"{NUM_NEIGHBOURS} nearest; give at least {NUM_NEIGHBOURS + 1}"
        )
    tokenizers = options.load_tokenizers(args.tokenizer, held_out)
    teacher = options.load_teacher(args)
    scores: dict[str, dict[str, float]] = {}
    shown, models = shown_names(args.tokenizer), {}
    for reference, tokenizer in tokenizers:
        digest = PixelDigest()
        with errors_at(f"--tokenizer {reference}"):
            scores[reference] = evaluate_latents(
                tokenizer, held_out, args.num_held_out, teacher, seed=args.seed, digest=digest
            )
            mean = probed(tokenizer, train, held_out, args.num_train, args.num_held_out)
        if mean is not None:
            scores[reference][PROBE] = mean.f1
        models[shown[reference]] = weights_digest(tokenizer)
        print(f"{reference}: done", flush=True)
        del tokenizer  # before the next is loaded
    _print(scores, f"latents of {args.num_held_out} held-out images, teacher {args.teacher}")
    told = Protocol(
        "latents",
        MEASURES,
        {args.teacher: teacher_protocol(teacher)},
        models,
        data_protocol(held_out, args.num_held_out, str(digest)),  # the same for each tokenizer
        fitted_on=data_protocol(train, args.num_train, None) if mean is not None else None,
        latents="sample",
        seed=args.seed,
    )
    print("\n".join(told.lines()))
    return {
        "protocol": told.to_json(),
        "data": held_out.name,
        "num_images": args.num_held_out,
        "num_train": args.num_train,
        "teacher": args.teacher,
        "seed": args.seed,
        "predictors": {name: predictor.model_dump() for name, predictor in PREDICTORS.items()},
        "scores": {shown[reference]: own for reference, own in scores.items()},
    }


def _print(scores: dict[str, dict[str, float]], title: str) -> None:
    measured = {name for own in scores.values() for name in own}
    rows = [
        (predictor.label, predictor.better, *(_shown(own.get(name)) for own in scores.values()))
        for name, predictor in PREDICTORS.items()
        if name in measured
    ]
    print_table(title, rows, ("predictor", "better", *scores))
    if any(measured - own.keys() for own in scores.values()):
        print("-: not measured, as these latents can't be scaled or turned")
    if PROBE not in measured:
        print(
            "attribute probe: missing; the images have no attributes (--attributes of evaluate probe)"
        )
    for predictor in PREDICTORS.values():
        print(f"{predictor.label}: {predictor.meaning} ({predictor.source})")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
