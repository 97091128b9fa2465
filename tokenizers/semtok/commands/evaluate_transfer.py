"""``evaluate transfer``: tokenizers on several sets of images, those they were trained on and others, in one table."""

import argparse
from typing import Any

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.evaluate_reconstruction import (
    LABELS,
    Looks,
    looks_of,
)
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.probe import CLASS, free_texts, latent_table, mean_score, probe
from semtok.evaluation.probe import MEASURES as PROBE_MEASURES
from semtok.evaluation.protocol import (
    Protocol,
    data_protocol,
    shown_names,
    weights_digest,
)
from semtok.evaluation.reconstruction import PROTOCOLS, evaluate_reconstruction
from semtok.tokenizer import Tokenizer

_PROTOCOL = "adm"
_CLASS_PROBE, _ATTRIBUTE_PROBE = "class_probe", "attribute_probe"
SCORE_LABELS = LABELS | {
    _CLASS_PROBE: "class probe, %",
    _ATTRIBUTE_PROBE: "attribute probe, %",
}
"""What scores are called in tables; a probe's is the balanced accuracy."""


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "transfer",
        help="reconstruction, and linear probes of classes and attributes, on several sets of images in one table",
        description=__doc__,
    )
    options.add_tokenizer_option(task)
    task.add_argument(
        "--on",
        nargs="+",
        action="append",
        required=True,
        metavar="WORD",
        help="NAME key=value …: a set of images by its data settings; give it several times",
    )
    task.add_argument(
        "--num-train", type=int, default=2000, help="images of each set that probes are fitted on"
    )
    task.add_argument(
        "--num-held-out", type=int, default=1000, help="images of each set to score on"
    )
    options.add_teacher_options(task, "whose features FD-<teacher> compares")
    task.add_argument(
        "--download", action="store_true", help="fetch weights of LPIPS and FID that are not cached"
    )
    options.add_output_options(task)
    task.set_defaults(command=_transfer, lpips_net="vgg", protocol=_PROTOCOL)


def _transfer(args: argparse.Namespace) -> dict[str, Any]:
    sets = _opened(args)
    missing: dict[str, str] = {}
    looks = looks_of(args, missing)
    names = shown_names(args.tokenizer)
    held_out_sets, places = [held_out for _, held_out in sets.values()], [f"--on {n}" for n in sets]
    tokenizers = options.load_tokenizers(args.tokenizer, *held_out_sets, places=places)
    models: dict[str, str] = {}
    scores: dict[str, dict[str, dict[str, float]]] = {name: {} for name in sets}
    digests: dict[str, tuple[str, str]] = {}  # the same for each tokenizer
    for reference, tokenizer in tokenizers:
        models[names[reference]] = weights_digest(tokenizer)
        for name, (train, held_out) in sets.items():
            with errors_at(f"--on {name} with {reference}"):
                own, digests[name] = _scores(tokenizer, train, held_out, args, looks)
            scores[name][names[reference]] = own
        del tokenizer  # before the next is loaded
    protocols = {
        name: Protocol(
            "transfer",
            f"{PROTOCOLS[_PROTOCOL].measures}; probes: {PROBE_MEASURES}",
            looks.networks,
            models,
            data_protocol(held_out, min(args.num_held_out, len(held_out)), digests[name][1]),
            fitted_on=data_protocol(train, min(args.num_train, len(train)), digests[name][0]),
            latents="mean",
        )
        for name, (train, held_out) in sets.items()
    }
    _print(scores, missing)
    # They differ by their images alone.
    print("\n".join(dict.fromkeys(line for told in protocols.values() for line in told.lines())))
    return {
        "protocol": {name: told.to_json() for name, told in protocols.items()},
        "num_train": args.num_train,
        "num_held_out": args.num_held_out,
        "unavailable": options.without_places(missing),
        "sets": scores,
    }


def _opened(args: argparse.Namespace) -> dict[str, tuple[ImageSource, ImageSource]]:
    """Every set with its training and held-out images, before anything is computed."""
    if args.num_train < 20 or args.num_held_out < 2:
        raise UserError("--num-train must be at least 20 and --num-held-out at least 2")
    options.check_output(args)
    sets: dict[str, tuple[ImageSource, ImageSource]] = {}
    for name, *words in args.on:
        if "=" in name or not words:
            raise UserError(f"--on {' '.join([name, *words])}: expected NAME key=value …")
        if name in sets:
            raise UserError(f"--on {name}: two sets are called so; name one otherwise")
        sets[name] = options.data_of(words, None, place=f"--on {name}")
        if len(sets[name][1]) < 2:
            raise UserError(
                f"--on {name}: has fewer than 2 held-out images; pass validation_fraction=…"
            )
    return sets


def _scores(
    tokenizer: Tokenizer,
    train: ImageSource,
    held_out: ImageSource,
    args: argparse.Namespace,
    looks: Looks,
) -> tuple[dict[str, float], tuple[str, str]]:
    """Of one tokenizer on one set; and the digests of the images that probes were fitted and scored on."""
    report = evaluate_reconstruction(
        tokenizer,
        held_out,
        min(args.num_held_out, len(held_out)),
        perceptual=looks.perceptual,
        extractors=looks.extractors,
        protocol=PROTOCOLS[_PROTOCOL],
    )
    texts = free_texts(train, held_out)
    attributes = [name for name in train.attributes if name not in texts]
    if not attributes and train.num_classes < 2:
        return dict(report.scores), ("", report.digest)
    tables = (
        latent_table(tokenizer, train, args.num_train, classes=True),
        latent_table(tokenizer, held_out, args.num_held_out, classes=True),
    )
    found = probe(*tables, only=[*attributes, *([CLASS] if train.num_classes > 1 else [])])
    classes = found.pop(CLASS, None)
    scores = dict(report.scores)
    if classes is not None:
        scores[_CLASS_PROBE] = classes.balanced_accuracy
    if found:
        scores[_ATTRIBUTE_PROBE] = mean_score(found).balanced_accuracy
    return scores, (tables[0].digest, report.digest)


def _print(scores: dict[str, dict[str, dict[str, float]]], missing: dict[str, str]) -> None:
    rows = []
    for name, by_tokenizer in scores.items():
        for score in dict.fromkeys(score for own in by_tokenizer.values() for score in own):
            cells = [score_text(score, own.get(score)) for own in by_tokenizer.values()]
            rows.append((f"{name}: {SCORE_LABELS.get(score, score)}", *cells))
    print_table("on several sets of images", rows, ("score", *next(iter(scores.values()))))
    for name, reason in missing.items():
        print(f"{LABELS.get(name, name)} is missing: {reason}")


def score_text(score: str, value: float | None) -> str:
    """A score for a table, shares in percent; ``-`` where there is none."""
    percent = 100 if score in (_CLASS_PROBE, _ATTRIBUTE_PROBE) else 1
    return "-" if value is None else f"{percent * value:.4g}"
