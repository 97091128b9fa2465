"""The judges of ``evaluate generation``: which, what they know of real images, and what is said of them."""

import argparse
from collections.abc import Mapping, Sequence

from semtok.commands import evaluate_options as options
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.classes import MEASURES as READS
from semtok.evaluation.classes import Judge
from semtok.evaluation.generation import MEASURES, FeatureNetwork, SetFeatures
from semtok.evaluation.judges import (
    JudgeChoice,
    Seat,
    class_share,
    judge_choices,
    load_judge,
    take_seat,
)
from semtok.storage import cache_folder

Sources = tuple[ImageSource, ImageSource]
"""Training and held-out images."""
_NUM_FITTED = 4000
_RELATIVE = (
    "FDr: mean over the judges of FD(generated, reference) / FD(held-out real images, reference)"
)


def chosen_judges(args: argparse.Namespace) -> tuple[JudgeChoice, ...]:
    """Those that ``--judge`` names.

    Raises:
        UserError: unknown words, or two networks of one name.
    """
    teacher = options.teacher_config(args)
    choices = judge_choices(args.judge, teacher)
    for choice in choices:
        if choice.name == teacher.name and choice.config != teacher:
            raise UserError(
                f"--judge: '{choice.name}' is --teacher's network with other settings; give --judge teacher"
            )
    return choices


def load_judges(
    choices: Sequence[JudgeChoice], networks: Sequence[FeatureNetwork], sources: Sources | None
) -> list[Judge]:
    """The judges, without readers; a network that is there already is not loaded again.

    Raises:
        UserError: one would learn from images that are not at hand, or can't be loaded.
    """
    there = {network.name: network for network in networks}
    train = sources[0] if sources is not None else None
    return [
        Judge(there[choice.name], None, READS)
        if choice.name in there
        else load_judge(choice, train, device=options.device())
        for choice in choices
    ]


def seated(
    judges: Sequence[Judge],
    references: Mapping[str, SetFeatures],
    sources: Sources | None,
    num_images: int,
) -> list[Seat]:
    """Each judge with its reference; where that is of data, with its reader and what it makes of held-out images.

    Args:
        references: by the network's name.
        num_images: generated; of as many held-out images, or of all there are, is FDr.
    """
    pairs = [(judge, references[judge.network.name]) for judge in judges]
    if sources is None:
        return [Seat(judge, reference) for judge, reference in pairs]
    numbers = {"num_fitted": _NUM_FITTED, "num_held_out": num_images}
    cache = cache_folder("references")
    return [take_seat(*pair, sources, **numbers, cache=cache) for pair in pairs]


def labels_to_show(
    seats: Sequence[Seat],
    labels: Sequence[int] | None,
    class_names: Sequence[str],
    sources: Sources | None,
    missing: dict[str, str],
) -> Sequence[int] | None:
    """The labels of the generated images, where judges read such classes; notes why scores are missing.

    Args:
        class_names: of the model that drew them; empty: not known.
        missing: reasons, by the score's name; they are added.
    """
    files = "the reference is files; give it as data settings, key=value"
    reason = None
    if sources is None:
        reason = files
    elif labels is None:
        reason = "the images have no labels, or one class"
    elif class_names and tuple(class_names) != tuple(sources[0].class_names):
        reason = "the reference has other classes than the model"
    elif max(labels) >= sources[0].num_classes:
        reason = (
            f"labels go to {max(labels)}, and the reference has {sources[0].num_classes} classes"
        )
    for seat in seats:
        told = reason or (None if seat.judge.read is not None else "the reference has one class")
        if told is not None:
            missing[class_share(seat.name)] = told
    if len(seats) > 1 and any(seat.held_out is None for seat in seats):
        missing["FDr"] = files if sources is None else "fewer than two held-out images"
    return labels if reason is None else None


def measures(seats: Sequence[Seat], num_images: int) -> str:
    """How scores are measured, with what judges add.

    Args:
        num_images: generated.
    """
    told = [MEASURES]
    told += [f"classes by {s.name}: {s.judge.measures}" for s in seats if s.judge.read is not None]
    numbers = [s.held_out.num_images for s in seats if s.held_out is not None]
    if len(numbers) > 1:
        fewer = ", fewer than those generated" if numbers[0] < num_images else ""
        told.append(f"{_RELATIVE}, of {numbers[0]} held-out images{fewer}")
    return "; ".join(told)


def print_judges(seats: Sequence[Seat]) -> None:
    """How far to trust each."""
    for seat in seats:
        words = [f"judge {seat.name}"]
        if seat.judge.num_fitted:
            words.append(f"classes learned from {seat.judge.num_fitted} real training images")
        if (real := seat.held_out) is not None:
            right = (
                f"{100 * real.read_right:.1f} % read right, " if real.read_right is not None else ""
            )
            words.append(
                f"{real.num_images} held-out real images: {right}FD {real.distance:.4g}, digest {real.digest}"
            )
        print("; ".join(words))
