"""``evaluate probe``: what a linear layer reads off the latents."""

import argparse

import numpy as np

from semtok.commands.evaluation.options import (
    SHAPES,
    add_data_options,
    add_tokenizer_option,
    load_tokenizer,
    open_data,
)
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.probe import PROTOCOL, latent_table, probe
from semtok.storage import write_json


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "probe", help="held-out balanced accuracy of every attribute, " + PROTOCOL
    )
    add_tokenizer_option(task)
    task.set_defaults(command=_probe)
    add_data_options(task, default=SHAPES, shown="the embedded shapes")


def _probe(args: argparse.Namespace) -> int:
    train, held_out = open_data(args)
    _check_attributes(train)
    scores: dict[str, dict[str, float]] = {}
    for reference in args.tokenizer:
        tokenizer = load_tokenizer(reference, train)
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
