"""The judges of a comparison: what each sees of real images, and what the report says of them."""

from pathlib import Path
from typing import Any

from comparison.plan import Comparison
from comparison.recipes import recipe_of
from semtok.commands.evaluate_options import device
from semtok.data.images.kinds import open_sources
from semtok.evaluation.generation import see_reference
from semtok.evaluation.image_sets import images_of_source
from semtok.evaluation.judges import JudgeChoice, Seat, load_judge, take_seat
from semtok.storage import read_json, write_json


def seated(comparison: Comparison) -> list[Seat]:
    """Each judge with the reference, its reader of classes and held-out images; notes what the report says of it."""
    settings, cache = comparison.settings, comparison.folder / "references"
    sources = open_sources(comparison.data())
    real = images_of_source(sources[0], settings.num_reference)
    numbers = {"num_fitted": settings.num_reference, "num_held_out": settings.num_images}
    seats = []
    for choice in comparison.judges():
        judge = load_judge(choice, sources[0], device=device())
        reference = see_reference(real, judge.network, cache)
        seats.append(take_seat(judge, reference, sources, **numbers, cache=cache))
    write_json(_file(comparison), {seat.name: seat.told() for seat in seats})
    return seats


def _file(comparison: Comparison) -> Path:
    return comparison.folder / "scores" / "judges.json"


def judges_told(comparison: Comparison) -> list[str]:
    """A sentence or more on each judge, and on FDr where there are several."""
    file, choices = _file(comparison), comparison.judges()
    known = read_json(file) if file.is_file() else {}
    lines = []
    for place, choice in enumerate(choices):
        followed = ", by which rows are followed" if place == 0 and len(choices) > 1 else ""
        told = [f"Judge {choice.name}{followed}: {_alignment(comparison, choice)}"]
        told += _trust(known[choice.name]) if choice.name in known else [_UNKNOWN]
        lines.append(" ".join(told))
    if len(choices) > 1:
        lines.append(_relative(comparison, known))
    return lines


_UNKNOWN = "An earlier version scored these rows and did not note how well it reads real images."


def _alignment(comparison: Comparison, choice: JudgeChoice) -> str:
    """What it is, and whether rows were aligned to it."""
    if choice.config is None:
        return "a network that was trained on the real images alone. No row was aligned to it."
    if choice.is_of(comparison.teacher_config()):
        return (
            "the network of --teacher. To rows that were aligned to it, it is no impartial judge."
        )
    outside = [
        row.name
        for row in comparison.rows
        if recipe_of(row.tokenizer) is None
        or any(w.startswith("teacher.") for w in (*comparison.settings.settings, *row.settings))
    ]
    told = "a frozen network, not that of --teacher. Rows that learn by --teacher were not aligned to it."
    if outside:
        told += f" What {', '.join(outside)} was aligned to before, or by a teacher of its own, is not known here."
    return told


def _trust(known: dict[str, Any]) -> list[str]:
    """What it sees by, what it learned from, and how well it reads real images."""
    sentences = []
    network, held_out = known["network"], known["held_out"]
    if network is not None:
        sentences.append(
            f"It is {network['model']} of {network['library']}, weights {network['weights']}, input {network['input']}."
        )
    right = held_out["read_right"] if held_out is not None else None
    if known["num_fitted"]:
        sentences.append(f"It learned the classes from {known['num_fitted']} real training images.")
    if right is not None:
        sentences.append(
            f"Of {held_out['num_images']} held-out real images it reads {100 * right:.1f} % right."
        )
    return sentences


def _relative(comparison: Comparison, known: dict[str, Any]) -> str:
    """What FDr is here."""
    held_out = [told["held_out"] for told in known.values() if told["held_out"] is not None]
    if not held_out:
        return "FDr is missing: there are no held-out real images."
    num, generated = held_out[0]["num_images"], comparison.settings.num_images
    fewer = (
        "" if num >= generated else f", all there are, fewer than the {generated} generated ones"
    )
    return (
        "FDr is the mean over the judges of FD(generated, reference) / FD(held-out real images, reference), which is 1 "
        f"where generated images are as far away as held-out ones. FDr-NAME is one judge's ratio. It is of {num} "
        f"held-out images{fewer}."
    )
