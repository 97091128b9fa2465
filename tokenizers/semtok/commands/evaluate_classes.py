"""``evaluate classes``: whether generated images show their class."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.sample_set import Drawing, protocol_of
from semtok.commands.sampler_options import (
    add_sampler_options,
    add_weak_option,
    load_weak,
    sampler_from,
    sped_up,
)
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.classes import (
    MEASURES,
    Judge,
    accuracy,
    class_reader,
    features_and_labels,
    real_batches,
)
from semtok.evaluation.image_sets import (
    DRAWN_AT_ONCE,
    ImageSet,
    images_of_generator,
    labels_for,
)
from semtok.evaluation.judge import STEPS, TRAINED
from semtok.evaluation.judges import TEACHER, WORDS, judge_choices, load_judge
from semtok.evaluation.protocol import (
    PixelDigest,
    Protocol,
    data_protocol,
    drawn_protocol,
    shown_names,
)
from semtok.progress import progress
from semtok.teachers import DEMO

_NUM_TRAIN = 4000
_OF_TEACHER = ("teacher", "teacher_checkpoint", "teacher_input_size")
_OF_TRAINED = ("judge_steps", "judge_seed")


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "classes",
        help="share of generated images that show their class, read by a judge: a "
        + MEASURES
        + "; or another, see --judge",
    )
    task.add_argument("--model", required=True, metavar="REF", help="folder, run or Hub id")
    task.add_argument("--num", type=int, help="generated images; default: 20 of each class")
    task.add_argument("--seed", type=int, default=0, help="of the generated images")
    add_sampler_options(task)
    add_weak_option(task)
    task.add_argument(
        "--judge",
        nargs="+",
        action="append",
        metavar="WORD",
        help=f"who reads the classes, by default {TEACHER}: {WORDS}",
    )
    task.add_argument(
        "--judge-steps",
        type=int,
        help=f"of the training of --judge trained, 64 images each; default: {STEPS}",
    )
    task.add_argument("--judge-seed", type=int, help="of --judge trained; default: 0")
    options.add_teacher_options(task, "whose features the classifier reads; default: demo")
    options.add_data_options(
        task, default=None, shown="what the model was trained on", num_train=False
    )
    told = f"real images to fit on; default: {_NUM_TRAIN}, of --judge trained all"
    task.add_argument("--num-train", type=int, help=told)
    task.set_defaults(command=_classes, teacher=None)


def _check_data(generator: Generator, train: ImageSource) -> None:
    """Raises UserError where real images are of other sizes or classes than the model's."""
    if generator.image_size != train.image_size:
        raise UserError(
            f"--data: images of {train.image_size}, but the model makes {generator.image_size}; pass size=…"
        )
    if generator.class_names != train.class_names:
        raise UserError(
            f"--data: {train.name} has {len(train.class_names)} classes ({', '.join(train.class_names[:3])} …), "
            f"the model {len(generator.class_names)} ({', '.join(generator.class_names[:3])} …)"
        )


def _check_judge(args: argparse.Namespace) -> None:
    """Refuses what would have no effect, and fills in what the judge's kind decides."""
    judges = args.judge or [[TEACHER]]
    if len(judges) > 1:
        raise UserError("--judge: one reads the classes here; evaluate generation takes several")
    own = " ".join(judges[0])
    for word, names in ((TEACHER, _OF_TEACHER), (TRAINED, _OF_TRAINED)):
        given = [name for name in names if getattr(args, name) is not None]
        if given and own != word:
            raise UserError(
                f"--{given[0].replace('_', '-')}: goes with --judge {word}, and the judge is {own}; leave it out"
            )
    is_trained = own == TRAINED
    args.judge_steps = STEPS if args.judge_steps is None else args.judge_steps
    args.judge_seed = 0 if args.judge_seed is None else args.judge_seed
    if args.judge_steps < 1 or not 0 <= args.judge_seed < 2**32:
        raise UserError("--judge-steps must be at least 1 and --judge-seed from 0 to 4294967295")
    args.teacher = args.teacher or DEMO
    (args.judge,) = judge_choices(judges, options.teacher_config(args))
    if args.num_train is None:
        args.num_train = sys.maxsize if is_trained else _NUM_TRAIN


def _fitted(judge: Judge, batches: Iterable[tuple[Tensor, Tensor]]) -> Judge:
    """The judge with a reader of classes, fitted on these training images."""
    if judge.read is None:
        reader = class_reader(*features_and_labels(judge.network, batches))
        return replace(judge, read=reader)
    for _ in batches:  # a judge out of the cache saw them then
        pass
    return judge


def _classes(args: argparse.Namespace) -> dict[str, Any]:
    options.check_seed(args)
    _check_judge(args)
    generator = sped_up(Generator.from_pretrained(args.model).to(options.device()), args)
    train, held_out = options.open_data(args, options.data_trained_on(args.model, generator))
    _check_data(generator, train)
    num = args.num = args.num if args.num is not None else 20 * len(train.class_names)
    sampler = sampler_from(args, generator)
    if num < 1:
        raise UserError("--num must be at least 1")
    weak = load_weak(args, generator, sampler)
    weak = sped_up(weak.to(options.device()), args) if weak is not None else None
    digests = {name: PixelDigest() for name in ("train", "held out", "drawn")}

    words = {"num_images": args.num_train, "seed": args.judge_seed, "steps": args.judge_steps}
    judge = load_judge(args.judge, train, device=options.device(), **words)
    with errors_at("--data"):
        judge = _fitted(judge, _seen(real_batches(train, args.num_train), digests["train"]))

    def read(batches: Iterable[tuple[Tensor, Tensor]], name: str) -> tuple[float, dict[int, float]]:
        assert judge.read is not None
        features, labels = features_and_labels(judge.network, _seen(batches, digests[name]))
        return accuracy(judge.read(features), labels)

    real, _ = read(real_batches(held_out, args.num_held_out), "held out")
    labels = labels_for(num, len(train.class_names), balanced=True, seed=args.seed)
    images = images_of_generator(generator, labels, seed=args.seed, sampler=sampler, weak=weak)
    batches = torch.tensor(labels).split(DRAWN_AT_ONCE)
    with errors_at("--guidance"):
        drawn = zip(_sampled(images), batches, strict=True)
        share, by_label = read(drawn, "drawn")
    worst = sorted(by_label, key=lambda label: by_label[label])[:3]
    rows = [
        ("real held-out images", f"{100 * real:.1f}"),
        (f"{num} generated images", f"{100 * share:.1f}"),
        ("chance", f"{100 / len(train.class_names):.1f}"),
        *((f"  {train.class_names[n]}", f"{100 * by_label[n]:.1f}") for n in worst),
    ]
    print_table("images that show their class, in % (the three worst classes below)", rows)
    drawing = Drawing(generator, weak, sampler, labels, args.seed, DRAWN_AT_ONCE, uint8="round")
    told = _protocol(args, (train, held_out), drawing, judge, digests)
    print("\n".join(told.lines()))
    return {
        "protocol": told.to_json(),
        "judge": judge.network.name,
        "data": train.name,
        "real": real,
        "generated": share,
        "by_class": {train.class_names[n]: value for n, value in by_label.items()},
        "num_generated": num,
        "seed": args.seed,
        "sampler": sampler.model_dump(mode="json"),
        "precision": args.precision or "fp32",
    }


def _protocol(
    args: argparse.Namespace,
    sources: tuple[ImageSource, ImageSource],
    drawing: Drawing,
    judge: Judge,
    digests: dict[str, PixelDigest],
) -> Protocol:
    """What is to be recorded.

    Args:
        sources: training and held-out images.
        judge: that reads the images.
    """
    train, held_out = sources
    names = shown_names(filter(None, (args.model, args.weak)))
    written = protocol_of(drawing, args)
    digest = str(digests["drawn"])
    drawn = drawn_protocol(names[args.model], "model", args.num, written, digest)
    real = data_protocol(held_out, args.num_held_out, str(digests["held out"]))
    return Protocol(
        "classes",
        judge.measures,
        {judge.network.name: judge.network.protocol},
        {
            names[reference]: written[role]["digest"]
            for role, reference in (("model", args.model), ("weak", args.weak))
            if reference is not None
        },
        drawn,
        references={judge.network.name: real},
        fitted_on=data_protocol(train, args.num_train, str(digests["train"])),
    )


def _sampled(images: ImageSet) -> Iterator[Tensor]:
    with progress("sampling", images.num_images) as advance:
        for batch in images.open():
            yield batch
            advance(len(batch))


def _seen(
    batches: Iterable[tuple[Tensor, Tensor]], digest: PixelDigest
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in batches:
        digest.add(images)
        yield images, labels
