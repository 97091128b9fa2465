"""``evaluate classes``: whether generated images show their class."""

import argparse
from collections.abc import Iterable, Iterator
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
from semtok.evaluation.protocol import (
    Network,
    PixelDigest,
    Protocol,
    data_protocol,
    drawn_protocol,
    shown_names,
    teacher_protocol,
)
from semtok.progress import progress


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "classes", help="share of generated images that show their class, read by a " + MEASURES
    )
    task.add_argument("--model", required=True, metavar="REF", help="folder, run or Hub id")
    task.add_argument("--num", type=int, help="generated images; default: 20 of each class")
    task.add_argument("--seed", type=int, default=0, help="of the generated images")
    add_sampler_options(task)
    add_weak_option(task)
    options.add_teacher_options(task, "whose features the classifier reads")
    task.set_defaults(command=_classes)
    options.add_data_options(task, default=None, shown="what the model was trained on")


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


def _classes(args: argparse.Namespace) -> dict[str, Any]:
    generator = sped_up(Generator.from_pretrained(args.model).to(options.device()), args)
    train, held_out = options.open_data(args, options.data_trained_on(args.model, generator))
    _check_data(generator, train)
    teacher = options.load_teacher(args)
    num = args.num = args.num if args.num is not None else 20 * len(train.class_names)
    sampler = sampler_from(args, generator)
    if num < 1:
        raise UserError("--num must be at least 1")
    weak = load_weak(args, generator, sampler)
    weak = sped_up(weak.to(options.device()), args) if weak is not None else None
    digests = {name: PixelDigest() for name in ("train", "held out", "drawn")}

    with errors_at("--data"):
        batches = _seen(real_batches(train, args.num_train), digests["train"])
        reader = class_reader(*features_and_labels(teacher, batches))

    def read(batches: Iterable[tuple[Tensor, Tensor]], name: str) -> tuple[float, dict[int, float]]:
        features, labels = features_and_labels(teacher, _seen(batches, digests[name]))
        return accuracy(reader(features), labels)

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
    network = teacher_protocol(teacher)
    drawing = Drawing(generator, weak, sampler, labels, args.seed, DRAWN_AT_ONCE, uint8="round")
    told = _protocol(args, (train, held_out), drawing, network, digests)
    print("\n".join(told.lines()))
    return {
        "protocol": told.to_json(),
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
    network: Network,
    digests: dict[str, PixelDigest],
) -> Protocol:
    """What is to be recorded.

    Args:
        sources: training and held-out images.
        network: that reads the images.
    """
    train, held_out = sources
    names = shown_names(filter(None, (args.model, args.weak)))
    written = protocol_of(drawing, args)
    digest = str(digests["drawn"])
    drawn = drawn_protocol(names[args.model], "model", args.num, written, digest)
    real = data_protocol(held_out, args.num_held_out, str(digests["held out"]))
    return Protocol(
        "classes",
        MEASURES,
        {args.teacher: network},
        {
            names[reference]: written[role]["digest"]
            for role, reference in (("model", args.model), ("weak", args.weak))
            if reference is not None
        },
        drawn,
        references={args.teacher: real},
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
