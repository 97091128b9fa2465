"""``evaluate probe``: what a linear layer reads off the latents."""

import argparse
import json
from typing import Any

import numpy as np

from semtok.commands import evaluate_options as options
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.errors import UserError, did_you_mean
from semtok.evaluation.probe import (
    MEASURES,
    AttributeScore,
    LatentTable,
    free_texts,
    latent_table,
    mean_score,
    probe,
)
from semtok.evaluation.protocol import Protocol, data_protocol, shown_names, weights_digest
from semtok.settings import apply_overrides


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "probe",
        help="held-out F1 and balanced accuracy of every attribute, "
        + MEASURES.replace("%", "%%"),  # argparse formats its help
    )
    options.add_tokenizer_option(task)
    task.add_argument(
        "--attributes",
        metavar="FILE",
        help="CSV table of attributes of a folder of images, short for --data attributes=FILE",
    )
    task.add_argument("--only", nargs="+", metavar="NAME", help="probe for these attributes alone")
    task.set_defaults(command=_probe)
    options.add_data_options(task, default=options.SHAPES, shown="the embedded shapes")


def _probe(args: argparse.Namespace) -> dict[str, Any]:
    if args.attributes is not None:
        args.data = _with_attributes(args.data, args.attributes)
    train, held_out = options.open_data(args)
    names, texts = _names(train, held_out, args.only)
    results: dict[str, dict[str, AttributeScore]] = {}
    means: dict[str, AttributeScore] = {}
    shown = shown_names(args.tokenizer)
    models: dict[str, str] = {}
    for reference, tokenizer in options.load_tokenizers(args.tokenizer, train):
        tables = (
            latent_table(tokenizer, train, args.num_train),
            latent_table(tokenizer, held_out, args.num_held_out),
        )
        scores = probe(*tables, only=names)
        if not scores:
            raise _nothing_to_tell(args, tables, names)
        results[reference], means[reference] = scores, mean_score(scores)
        models[shown[reference]] = weights_digest(tokenizer)
        _print(f"{reference}: linear probe, in %", scores, means[reference], tables[1])
        del tokenizer  # before the next is loaded

    # Which images there are, and what they show, is the same for every tokenizer.
    probed = list(next(iter(results.values())))
    skipped = _not_probed(tables, names, probed, texts)
    for reason, attributes in skipped.items():
        print(f"not probed, as {reason}: {', '.join(attributes)}")
    if len(means) > 1:
        rows = [(reference, *_cells(score)) for reference, score in means.items()]
        print_table("mean over attributes, in %", rows, ("tokenizer", *_HEADER))
    print(f"{args.num_train} training images, {args.num_held_out} held-out images, {train.name}")
    chance = {name: 1 / tables[1].num_shown(name) for name in probed}
    return {
        # The last tokenizer saw the images that all saw.
        "protocol": _protocol(args, (train, held_out), tables, models),
        "data": train.name,
        "num_train": args.num_train,
        "num_held_out": args.num_held_out,
        "categories": {name: list(train.attributes[name]) for name in probed},
        "categories_held_out": {name: tables[1].num_shown(name) for name in probed},
        "not_probed": [name for attributes in skipped.values() for name in attributes],
        "chance_balanced_accuracy": {
            "mean": float(np.mean(list(chance.values()))),
            "attributes": chance,
        },
        "scores": {
            shown[reference]: {
                "mean": _plain(means[reference]),
                "attributes": {name: _plain(score) for name, score in scores.items()},
            }
            for reference, scores in results.items()
        },
    }


def _protocol(
    args: argparse.Namespace,
    sources: tuple[ImageSource, ImageSource],
    tables: tuple[LatentTable, LatentTable],
    models: dict[str, str],
) -> dict[str, Any]:
    """What was measured on what, which is printed too."""
    (train, held_out), (fitted_on, measured_on) = sources, tables
    told = Protocol(
        "probe",
        MEASURES,
        {},
        models,
        data_protocol(held_out, args.num_held_out, measured_on.digest),
        fitted_on=data_protocol(train, args.num_train, fitted_on.digest),
        latents="mean",
    )
    print("\n".join(told.lines()))
    return told.to_json()


def _not_probed(
    tables: tuple[LatentTable, LatentTable], names: list[str], probed: list[str], texts: list[str]
) -> dict[str, list[str]]:
    """By reason, the attributes that have no score."""
    train, _ = tables
    of_one: dict[str, list[str]] = {"training": [], "held-out": []}
    for name in names:
        if name not in probed:
            of_one["held-out" if train.num_shown(name) > 1 else "training"].append(name)
    reasons = {f"the {part} images show one category": own for part, own in of_one.items()}
    reasons[
        "they have nearly as many values as there are images (--only names them all the same)"
    ] = texts
    return {reason: attributes for reason, attributes in reasons.items() if attributes}


def _nothing_to_tell(
    args: argparse.Namespace, tables: tuple[LatentTable, LatentTable], names: list[str]
) -> UserError:
    """What to say where no attribute can be probed for."""
    train_tells = any(tables[0].num_shown(name) > 1 for name in names)
    option, number = (
        ("--num-held-out", args.num_held_out) if train_tells else ("--num-train", args.num_train)
    )
    return UserError(
        f"{option} {number}: these images show one category of each attribute; give more"
        + (", or hold out more by --data validation_fraction=…" if train_tells else "")
    )


_HEADER = ("F1", "95 % interval", "balanced accuracy")


def _print(
    title: str,
    scores: dict[str, AttributeScore],
    mean: AttributeScore,
    held_out: LatentTable,
) -> None:
    rows = []
    for name, score in scores.items():
        there, known = held_out.num_shown(name), held_out.num_categories[name]
        categories = str(known) if there == known else f"{there} of {known}"
        rows.append((name, *_cells(score), f"{100 / there:.1f}", categories))
    mean_chance = float(np.mean([1 / held_out.num_shown(name) for name in scores]))
    rows.append(("mean", *_cells(mean), f"{100 * mean_chance:.1f}", ""))
    print_table(title, rows, ("attribute", *_HEADER, "its chance", "categories"))


def _cells(score: AttributeScore) -> tuple[str, str, str]:
    low, high = score.f1_interval
    return (
        f"{100 * score.f1:.1f}",
        f"{100 * low:.1f} to {100 * high:.1f}",
        f"{100 * score.balanced_accuracy:.1f}",
    )


def _plain(score: AttributeScore) -> dict[str, Any]:
    return {
        "f1": score.f1,
        "f1_interval": list(score.f1_interval),
        "balanced_accuracy": score.balanced_accuracy,
    }


def _with_attributes(settings: list[str], file: str) -> list[str]:
    given = apply_overrides({}, settings)
    if given.get("attributes") is not None:
        raise UserError("--attributes: --data gives attributes=… already; leave one out")
    kind = given.get("kind", "folder")
    if kind not in ("folder", "tars"):
        way_out = (
            "name its columns by --data attributes=[…]"
            if kind in ("parquet", "mds")
            else "give --data kind=folder path=… size=…"
        )
        raise UserError(f"--attributes: kind={kind} has its own; {way_out}")
    return [*settings, f"attributes={json.dumps(file, ensure_ascii=False)}"]


def _names(
    train: ImageSource, held_out: ImageSource, only: list[str] | None
) -> tuple[list[str], list[str]]:
    """The attributes to probe for; and those that are free text, which are probed for only where they are named."""
    if not train.attributes:
        raise UserError(
            f"--data: {train.name} has no attributes to probe for; give --attributes FILE, or use kind=shapes"
        )
    for name in only or ():
        if name not in train.attributes:
            raise UserError(
                f"--only: no attribute '{name}'; {did_you_mean(name, train.attributes, cutoff=0)}"
            )
    if only:
        return list(dict.fromkeys(only)), []
    texts = free_texts(train, held_out)
    names = [name for name in train.attributes if name not in texts]
    if not names:
        raise UserError(
            f"--data: each attribute has nearly as many values as there are images ({', '.join(texts[:5])}); name "
            "those to probe for all the same by --only"
        )
    return names, texts
