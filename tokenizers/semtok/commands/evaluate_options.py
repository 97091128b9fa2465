"""What the tasks of ``evaluate`` share: the images to evaluate on, and where the scores go."""

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from semtok.commands.around_training import errors_at
from semtok.commands.cli import add_plugin_option
from semtok.commands.run_folder import RECIPE_FILE
from semtok.commands.train_tokenizer import tokenizer_from_reference
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import Shapes
from semtok.data.source import ImageSource
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.privacy import first_left_out, fit_to_show
from semtok.recipe import parse_data
from semtok.references import locate_export
from semtok.settings import read_yaml
from semtok.teachers import Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer

SHAPES = ["kind=shapes", "size=32"]


def add_data_options(
    task: argparse.ArgumentParser, *, default: list[str] | None, shown: str, num_train: bool = True
) -> None:
    """Options of every task.

    Args:
        default: data settings; None: the task knows them otherwise, as ``shown`` says.
        num_train: whether something is fitted on training images.
    """
    task.add_argument(
        "--data", nargs="*", default=default, metavar="key=value", help=f"default: {shown}"
    )
    if num_train:
        task.add_argument("--num-train", type=int, default=4000, help="real images to fit on")
    task.add_argument("--num-held-out", type=int, default=2000, help="real images to score on")
    add_output_options(task)


def add_output_options(task: argparse.ArgumentParser) -> None:
    """Where scores go, and where methods may come from."""
    task.add_argument("--output", type=Path, help="also write the scores as JSON")
    add_plugin_option(task)


def add_tokenizer_option(task: argparse.ArgumentParser) -> None:
    """Which tokenizers a task compares."""
    task.add_argument(
        "--tokenizer",
        nargs="+",
        required=True,
        metavar="REF",
        help="folder, run, Hub id or recipe name; several are compared",
    )


def add_teacher_options(task: argparse.ArgumentParser, purpose: str) -> None:
    """Which teacher a task looks through, and what for."""
    task.add_argument("--teacher", default="demo", help=purpose)
    task.add_argument("--teacher-checkpoint", metavar="FILE", help="its local weights")
    task.add_argument(
        "--teacher-input-size",
        type=int,
        metavar="PIXELS",
        help="shorter side of what it sees; default: the size it was trained at",
    )


def load_teacher(args: argparse.Namespace) -> Teacher:
    """The teacher that the options name, on the device."""
    return Teacher(teacher_config(args)).to(device())


def teacher_config(args: argparse.Namespace) -> TeacherConfig:
    """Which teacher the options name.

    Raises:
        UserError: a size of less than a pixel.
    """
    size = args.teacher_input_size
    if size is not None and size < 1:
        raise UserError(f"--teacher-input-size: expected at least 1 pixel, got {size}")
    return TeacherConfig(name=args.teacher, checkpoint=args.teacher_checkpoint, input_size=size)


def load_tokenizer(
    reference: str, *sources: ImageSource, places: Sequence[str] = ("--data",)
) -> Tokenizer:
    """One of the tokenizers that the options name, on the device.

    Args:
        sources: the images that it is for.
        places: the option of each, for messages.

    Raises:
        UserError: there is none, or it does not take images of such a size.
    """
    drawn = all(isinstance(source, Shapes) for source in sources)
    tokenizer = tokenizer_from_reference(reference, drawn=drawn).to(device())
    for source, place in zip(sources, places, strict=True):
        with errors_at(f"{place} with {reference}"):
            tokenizer.check_image_size(source.image_size)
    return tokenizer


def load_tokenizers(
    references: Iterable[str], *sources: ImageSource, places: Sequence[str] = ("--data",)
) -> Iterator[tuple[str, Tokenizer]]:
    """Each with its reference, one after another. Each is loaded once before the first is given, so that none is found
    wanting after the work of those before it.

    Who deletes a tokenizer before the next is asked for has one in memory at a time.

    Raises:
        UserError: see ``load_tokenizer``; at once, not when its turn comes.
    """
    own = list(dict.fromkeys(references))
    kept: list[Tokenizer] = []  # the one that comes first
    for reference in reversed(own):
        kept.clear()
        kept.append(load_tokenizer(reference, *sources, places=places))

    def in_turn() -> Iterator[tuple[str, Tokenizer]]:
        for reference in own:
            yield (
                reference,
                kept.pop() if kept else load_tokenizer(reference, *sources, places=places),
            )

    return in_turn()


def open_data(
    args: argparse.Namespace, trained_on: dict[str, Any] | None = None
) -> tuple[ImageSource, ImageSource]:
    """The real images, training and held-out; checks what else the options say, and cuts the numbers to
    what there is.

    Args:
        trained_on: a model's data settings, for where ``--data`` is not given.

    Raises:
        UserError: options that can't be.
    """
    if getattr(args, "num_train", 20) < 20 or args.num_held_out < 1:
        raise UserError("--num-train must be at least 20 and --num-held-out at least 1")
    check_output(args)
    train, held_out = data_of(args.data, trained_on, place="--data")
    if hasattr(args, "num_train"):
        args.num_train = min(args.num_train, len(train))
    args.num_held_out = min(args.num_held_out, len(held_out))
    return train, held_out


def check_seed(args: argparse.Namespace) -> None:
    """Raises UserError where ``--seed`` is none."""
    if args.seed < 0:
        raise UserError(f"--seed: expected at least 0, got {args.seed}")


def data_trained_on(reference: str, model: Generator) -> dict[str, Any] | None:
    """The data settings that a model was trained on: whole, as its run has them, or as much as its export says.

    Args:
        reference: what the model was loaded by.
    """
    told = model.training_info.get("recipe", {}).get("data")
    export = locate_export(reference, "model", local_files_only=True).absolute()
    beside = export.parent / RECIPE_FILE
    if told is None or not beside.is_file() or export.name != "export":
        return told
    whole = read_yaml(beside).get("data")
    return whole if fit_to_show(whole) == told else told  # else of another run


def data_of(
    settings: list[str] | None, trained_on: dict[str, Any] | None, *, place: str
) -> tuple[ImageSource, ImageSource]:
    """Training and held-out images: as the words say, or else what a model was trained on.

    Raises:
        UserError: neither says where they are.
    """
    is_told = settings is not None
    if settings is None:
        if not trained_on:
            raise UserError(
                f"{place}: the model does not say what it was trained on; give {place} key=value …"
            )
        if (cut := first_left_out(trained_on | {"cache": None})) is not None:
            raise UserError(
                f"{place}: the model was trained on '{cut}', of which its export leaves out what is private; "
                f"give {place} kind={trained_on['kind']} path=… size=…"
            )
        settings = [f"{key}={json.dumps(value)}" for key, value in trained_on.items()]
    data = parse_data(settings, place=place)
    if is_told and data.draws_crops:
        raise UserError(
            f"{place}: crop=random: only training sees random crops, scores are of the crop at the centre; leave it out"
        )
    return open_sources(data)


def without_places(missing: dict[str, str]) -> dict[str, str]:
    """Why scores are missing, without the folder of this machine in which torch keeps weights."""
    return {name: reason.replace(torch.hub.get_dir(), "…") for name, reason in missing.items()}


def check_one_process() -> None:
    """Raises UserError within a launcher's processes, each of which would do all of the work."""
    number = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and number.isdecimal() and int(number) > 1:
        raise UserError(
            f"evaluate: runs in one process, but {number} were launched; draw in all of them with sample, then give "
            "evaluate generation --images to one"
        )


def check_output(args: argparse.Namespace) -> None:
    """Raises UserError where a file that the options name can't be written."""
    for option in ("output", "grid", "save_reference"):
        file = getattr(args, option, None)
        if file is not None and (file.is_dir() or not os.access(file.absolute().parent, os.W_OK)):
            shown = option.replace("_", "-")
            raise UserError(f"--{shown} {file}: not a file that can be written")


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
