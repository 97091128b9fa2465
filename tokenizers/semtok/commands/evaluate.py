"""``evaluate probe …`` and ``evaluate classes …``: what latents hold, and what generated images show."""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from semtok.commands.cli import Parser
from semtok.commands.stage import errors_at
from semtok.commands.table import print_table
from semtok.commands.train_tokenizer import tokenizer_from_reference
from semtok.data.source import ImageSource
from semtok.data.sources import open_sources
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.classes import PROTOCOL as CLASSES
from semtok.evaluation.classes import ClassReader, accuracy, real_batches
from semtok.evaluation.probe import PROTOCOL, latent_table, probe
from semtok.images import to_uint8
from semtok.recipe import parse_data
from semtok.registry import load_plugins
from semtok.storage import write_json
from semtok.teachers import Teacher, TeacherConfig


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="evaluate", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    task = tasks.add_parser(
        "probe", help="held-out balanced accuracy of every attribute, " + PROTOCOL
    )
    task.add_argument(
        "--tokenizer",
        nargs="+",
        required=True,
        metavar="REF",
        help="folder, run, Hub id or recipe name; several are compared",
    )
    task.set_defaults(command=_probe)
    _add_data_options(task, default=["kind=shapes", "size=32"], shown="the embedded shapes")

    task = tasks.add_parser(
        "classes", help="share of generated images that show their class, read by a " + CLASSES
    )
    task.add_argument("--model", required=True, metavar="REF", help="folder, run or Hub id")
    task.add_argument("--num", type=int, help="generated images; default: 20 of each class")
    task.add_argument("--seed", type=int, default=0, help="of the generated images")
    task.add_argument("--guidance", type=float, metavar="W", help="default: the model's own")
    task.add_argument("--steps", type=int, help="sampler steps; default: the model's own")
    task.add_argument("--teacher", default="demo", help="whose features the classifier reads")
    task.add_argument("--teacher-checkpoint", metavar="FILE", help="its local weights")
    task.set_defaults(command=_classes)
    _add_data_options(task, default=None, shown="what the model was trained on")

    args = parser.parse_args(arguments)
    load_plugins(args.plugin)
    return args.command(args)


def _add_data_options(
    task: argparse.ArgumentParser, *, default: list[str] | None, shown: str
) -> None:
    task.add_argument(
        "--data", nargs="*", default=default, metavar="key=value", help=f"default: {shown}"
    )
    task.add_argument("--num-train", type=int, default=4000, help="real images to fit on")
    task.add_argument("--num-held-out", type=int, default=2000, help="real images to score on")
    task.add_argument("--output", type=Path, help="also write the scores as JSON")
    task.add_argument(
        "--plugin", action="append", default=[], help="a Python file that registers a method"
    )


def _open(
    args: argparse.Namespace, trained_on: dict[str, Any] | None = None
) -> tuple[ImageSource, ImageSource]:
    """The real images; checks what else the options say, and cuts the numbers to what there is.

    Args:
        trained_on: a model's data settings, for where ``--data`` is not given.
    """
    if args.num_train < 20 or args.num_held_out < 1:
        raise UserError("--num-train must be at least 20 and --num-held-out at least 1")
    if args.output is not None and (
        args.output.is_dir() or not os.access(args.output.absolute().parent, os.W_OK)
    ):
        raise UserError(f"--output {args.output}: not a file that can be written")
    settings = args.data
    if settings is None:
        if not trained_on:
            raise UserError("--data: the model does not say what it was trained on; give --data")
        settings = [f"{key}={json.dumps(value)}" for key, value in trained_on.items()]
    train, held_out = open_sources(parse_data(settings, place="--data"))
    args.num_train = min(args.num_train, len(train))
    args.num_held_out = min(args.num_held_out, len(held_out))
    return train, held_out


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _probe(args: argparse.Namespace) -> int:
    train, held_out = _open(args)
    _check_attributes(train)
    scores: dict[str, dict[str, float]] = {}
    for reference in args.tokenizer:
        tokenizer = tokenizer_from_reference(reference).to(_device())
        with errors_at(f"--data with {reference}"):
            tokenizer.spec.check_image_size(train.image_size)
        tables = (
            latent_table(tokenizer, train, args.num_train),
            latent_table(tokenizer, held_out, args.num_held_out),
        )
        values = probe(*tables)
        scores[reference] = {**values, "mean": float(np.mean(list(values.values())))}
        print(f"{reference}: mean {scores[reference]['mean']:.3f}", flush=True)

    names = list(next(iter(scores.values())))
    chance = {n: 1 / len(train.attributes[n]) for n in train.attributes}
    chance["mean"] = float(np.mean(list(chance.values())))
    rows = [
        (r, *(f"{100 * s[n]:.1f}" for n in names)) for r, s in [("chance", chance), *scores.items()]
    ]
    print_table(
        f"linear probe: held-out balanced accuracy in %, {args.num_train} training images",
        rows,
        ("tokenizer", *names),
    )
    if args.output:
        write_json(
            args.output,
            {
                "protocol": PROTOCOL,
                "data": train.name,
                "num_train": args.num_train,
                "num_held_out": args.num_held_out,
                "chance": chance,
                "scores": scores,
            },
        )
    return 0


def _check_attributes(source: ImageSource) -> None:
    if not source.attributes:
        raise UserError(f"--data: {source.name} has no attributes to probe for; use kind=shapes")


def _classes(args: argparse.Namespace) -> int:
    generator = Generator.from_pretrained(args.model).to(_device())
    train, held_out = _open(args, generator.training_info.get("recipe", {}).get("data"))
    if generator.image_size != train.image_size:
        raise UserError(
            f"--data: images of {train.image_size}, but the model makes {generator.image_size}; pass size=…"
        )
    if generator.class_names != train.class_names:
        raise UserError(
            f"--data: {train.name} has {len(train.class_names)} classes ({', '.join(train.class_names[:3])} …), "
            f"the model {len(generator.class_names)} ({', '.join(generator.class_names[:3])} …)"
        )
    teacher = Teacher(TeacherConfig(name=args.teacher, checkpoint=args.teacher_checkpoint))
    teacher.to(_device())
    num = args.num if args.num is not None else 20 * len(train.class_names)
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise UserError(f"--guidance: expected a number, got {args.guidance}")
    if num < 1 or (args.steps is not None and args.steps < 1):
        raise UserError("--num and --steps must be at least 1")
    sampler = generator.sampler
    if args.guidance is not None:
        guidance = sampler.guidance.model_copy(update={"scale": args.guidance})
        sampler = sampler.model_copy(update={"guidance": guidance})
    if args.steps is not None:
        sampler = sampler.model_copy(update={"steps": args.steps})

    with errors_at("--data"):
        reader = ClassReader.fit(teacher, train, args.num_train)
    real, _ = accuracy(reader, real_batches(held_out, args.num_held_out))
    labels = [i % len(train.class_names) for i in range(num)]

    def generated() -> Iterator[tuple[Tensor, Tensor]]:
        for first in tqdm(range(0, num, 64), desc="sampling", unit="batch"):
            own = labels[first : first + 64]
            images = generator.sample(own, seed=args.seed, first=first, sampler=sampler)
            # As files would hold them.
            yield to_uint8(images), torch.tensor(own)

    share, by_label = accuracy(reader, generated())
    worst = sorted(by_label, key=lambda label: by_label[label])[:3]
    rows = [
        ("real held-out images", f"{100 * real:.1f}"),
        (f"{num} generated images", f"{100 * share:.1f}"),
        ("chance", f"{100 / len(train.class_names):.1f}"),
        *((f"  {train.class_names[n]}", f"{100 * by_label[n]:.1f}") for n in worst),
    ]
    print_table("images that show their class, in % (the three worst classes below)", rows)
    if args.output:
        scores = {
            "protocol": CLASSES,
            "data": train.name,
            "real": real,
            "generated": share,
            "by_class": {train.class_names[n]: value for n, value in by_label.items()},
            "num_generated": num,
            "seed": args.seed,
            "sampler": sampler.model_dump(mode="json"),
        }
        write_json(args.output, scores)
    return 0
