"""``evaluate probe``: what a linear layer reads off the latents."""

import argparse
import difflib
import json
from typing import Any

import numpy as np

from semtok.commands import evaluate_options as options
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.probe import MEASURES, AttributeScore, latent_table, mean_score, probe
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
    names = _names(train, args.only)
    chance = {name: 1 / len(train.attributes[name]) for name in names}
    results: dict[str, dict[str, AttributeScore]] = {}
    means: dict[str, AttributeScore] = {}
    shown = shown_names(args.tokenizer)
    models: dict[str, str] = {}
    for reference in args.tokenizer:
        tokenizer = options.load_tokenizer(reference, train)
        tables = (
            latent_table(tokenizer, train, args.num_train),
            latent_table(tokenizer, held_out, args.num_held_out),
        )
        scores = probe(*tables, only=names)
        if not scores:
            raise UserError(
                f"--num-train {args.num_train}: these images show one category of each attribute; give more"
            )
        results[reference], means[reference] = scores, mean_score(scores)
        models[shown[reference]] = weights_digest(tokenizer)
        _print(f"{reference}: linear probe, in %", scores, means[reference], chance)

    # Which images there are, and what they show, is the same for every tokenizer.
    probed = list(next(iter(results.values())))
    skipped = [name for name in names if name not in probed]
    if skipped:
        print(f"not probed, as the training images show one category: {', '.join(skipped)}")
    if len(means) > 1:
        rows = [(reference, *_cells(score)) for reference, score in means.items()]
        print_table("mean over attributes, in %", rows, ("tokenizer", *_HEADER))
    print(f"{args.num_train} training images, {args.num_held_out} held-out images, {train.name}")
    # The last tokenizer saw the images that all saw.
    told = Protocol(
        "probe",
        MEASURES,
        {},
        models,
        data_protocol(held_out, args.num_held_out, tables[1].digest),
        fitted_on=data_protocol(train, args.num_train, tables[0].digest),
        latents="mean",
    )
    print("\n".join(told.lines()))
    return {
        "protocol": told.to_json(),
        "data": train.name,
        "num_train": args.num_train,
        "num_held_out": args.num_held_out,
        "categories": {name: list(train.attributes[name]) for name in probed},
        "not_probed": skipped,
        "chance_balanced_accuracy": {
            "mean": float(np.mean([chance[name] for name in probed])),
            "attributes": {name: chance[name] for name in probed},
        },
        "scores": {
            shown[reference]: {
                "mean": _plain(means[reference]),
                "attributes": {name: _plain(score) for name, score in scores.items()},
            }
            for reference, scores in results.items()
        },
    }


_HEADER = ("F1", "95 % interval", "balanced accuracy")


def _print(
    title: str,
    scores: dict[str, AttributeScore],
    mean: AttributeScore,
    chance: dict[str, float],
) -> None:
    rows = [
        (name, *_cells(score), f"{100 * chance[name]:.1f}", str(round(1 / chance[name])))
        for name, score in scores.items()
    ]
    mean_chance = float(np.mean([chance[name] for name in scores]))
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
            if kind == "parquet"
            else "give --data kind=folder path=… size=…"
        )
        raise UserError(f"--attributes: kind={kind} has its own; {way_out}")
    return [*settings, f"attributes={json.dumps(file, ensure_ascii=False)}"]


def _names(source: ImageSource, only: list[str] | None) -> list[str]:
    """The attributes to probe for."""
    if not source.attributes:
        raise UserError(
            f"--data: {source.name} has no attributes to probe for; give --attributes FILE, or use kind=shapes"
        )
    for name in only or ():
        if name not in source.attributes:
            near = difflib.get_close_matches(name, source.attributes, n=1, cutoff=0)
            raise UserError(f"--only: no attribute '{name}'; did you mean '{near[0]}'?")
    return list(dict.fromkeys(only)) if only else list(source.attributes)
