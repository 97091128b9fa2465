"""``evaluate components``: a picture of what latents hold, beside what a teacher sees in the same images."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.predictors import NUM_NEIGHBOURS, PREDICTORS, evaluate_latents
from semtok.evaluation.protocol import (
    PixelDigest,
    Protocol,
    data_protocol,
    shown_names,
    teacher_protocol,
    weights_digest,
)
from semtok.evaluation.reconstruction import evaluate_reconstruction
from semtok.images import to_pixels
from semtok.pictures import (
    Row,
    parts_in_colours_of,
    principal_components,
    rows_of_images,
    write_png,
)
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

_MEASURES = (
    "PSNR of the posterior mean; CKNNA and self-similarity of draws, as evaluate latents has them"
)
_SCORES = ("psnr", "cknna", "self_similarity")


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "components", help="a picture: latents' principal components beside a teacher's"
    )
    options.add_tokenizer_option(task)
    task.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="of the tokenizers in the picture, in their order",
    )
    options.add_teacher_options(task, "whose tokens the latents are shown beside")
    task.add_argument("--num", type=int, default=9, help="images shown; classes take turns")
    task.add_argument("--seed", type=int, default=0, help="of the draws that are scored")
    task.add_argument("--grid", type=Path, required=True, help="FILE.png: the picture")
    task.add_argument("--credit", default="", help="a line below the picture")
    task.set_defaults(command=_components)
    options.add_data_options(
        task, default=options.SHAPES, shown="the embedded shapes", num_train=False
    )
    task.set_defaults(num_held_out=256)


@torch.no_grad()
def _components(args: argparse.Namespace) -> dict[str, Any]:
    names = _names(args)
    _, held_out = options.open_data(args)
    if args.num_held_out <= NUM_NEIGHBOURS or not 1 <= args.num <= args.num_held_out:
        raise UserError(
            f"--num-held-out {args.num_held_out} and --num {args.num}: CKNNA needs at least {NUM_NEIGHBOURS + 1} "
            "images, and no more are shown than are scored"
        )
    options.check_seed(args)
    tokenizers = options.load_tokenizers(names, held_out)
    teacher = options.load_teacher(args)
    pixels, classes = _shown(held_out, args.num, args.num_held_out)
    tokens = teacher.features(pixels).patches[-1]
    rows = [Row("image", pixels, classes)]
    scores: dict[str, dict[str, float]] = {}
    models: dict[str, str] = {}
    for reference, tokenizer in tokenizers:
        name = names[reference]
        digest = PixelDigest()
        with errors_at(f"--tokenizer {reference}"):
            scores[name] = _scores(tokenizer, held_out, teacher, args, digest)
        models[name] = weights_digest(tokenizer)
        rows += _rows(tokenizer, name, scores[name], pixels, tokens)
        print(f"{reference}: done", flush=True)
        del tokenizer  # before the next is loaded
    rows.append(Row(f"{args.teacher}\nthe teacher's tokens", principal_components(tokens)))
    write_png(args.grid, rows_of_images(rows, footer=args.credit))
    _print(scores, args)
    told = Protocol(
        "components",
        _MEASURES,
        {args.teacher: teacher_protocol(teacher)},
        models,
        data_protocol(held_out, args.num_held_out, str(digest)),  # the same for each tokenizer
        latents="sample",
        seed=args.seed,
    )
    print("\n".join(told.lines()))
    return {"protocol": told.to_json(), "num_images": args.num_held_out, "scores": scores}


def _names(args: argparse.Namespace) -> dict[str, str]:
    """What each tokenizer is called, by its reference.

    Raises:
        UserError: not one name for each.
    """
    if args.names is None:
        return shown_names(args.tokenizer)
    if len(set(args.names)) != len(args.tokenizer) or len(args.names) != len(args.tokenizer):
        raise UserError(
            f"--names: {len(args.names)} names ({', '.join(args.names)}) for {len(args.tokenizer)} tokenizers; "
            "give each its own"
        )
    return dict(zip(args.tokenizer, args.names, strict=True))


def _shown(source: ImageSource, num: int, among: int) -> tuple[Tensor, list[str]]:
    """Pixels of the first images of each class in turn, and the names of their classes where there are several.

    Args:
        among: images that are looked at, in the order of ``source.chosen``.
    """
    batch = source.load(source.chosen(among))
    seen: dict[int, int] = {}
    turns = []
    for place, label in enumerate(batch.labels.tolist()):
        seen[label] = seen.get(label, 0) + 1
        turns.append((seen[label], label, place))
    chosen = [place for _, _, place in sorted(turns)[:num]]
    labels = batch.labels[chosen].tolist()
    names = [source.class_names[label] for label in labels] if source.num_classes > 1 else []
    return to_pixels(batch.images[chosen], device=options.device()), names


def _scores(
    tokenizer: Tokenizer,
    source: ImageSource,
    teacher: Teacher,
    args: argparse.Namespace,
    digest: PixelDigest,
) -> dict[str, float]:
    report = evaluate_reconstruction(tokenizer, source, args.num_held_out)
    found = evaluate_latents(
        tokenizer, source, args.num_held_out, teacher, seed=args.seed, digest=digest
    )
    return {name: {**report.scores, **found}[name] for name in _SCORES}


def _rows(
    tokenizer: Tokenizer, name: str, scores: dict[str, float], pixels: Tensor, tokens: Tensor
) -> list[Row]:
    """The reconstruction, and each spatial part of the latents in the colours of the teacher's tokens."""
    latents = tokenizer.encode(pixels, value_range=(-1, 1))
    decoded = tokenizer.decode(latents)
    parts = parts_in_colours_of(latents, tokens)
    rows = [Row(f"{name}\nreconstruction\nPSNR {scores['psnr']:.1f} dB", decoded)]
    # The score is of all parts together: beside one of several it would read as that part's.
    score = f"\nself-similarity {scores['self_similarity']:.2f}" if len(parts) == 1 else ""
    for part, x in parts.items():
        what = f"latents: {part}" if len(parts) > 1 else "latents"
        rows.append(Row(f"{name}\n{what}{score}", x))
    return rows


def _print(scores: dict[str, dict[str, float]], args: argparse.Namespace) -> None:
    labels = {"psnr": "PSNR, dB"} | {name: PREDICTORS[name].label for name in _SCORES[1:]}
    rows = [(labels[name], *(f"{own[name]:.4g}" for own in scores.values())) for name in _SCORES]
    print_table(
        f"{args.num_held_out} held-out images, teacher {args.teacher}", rows, ("score", *scores)
    )
    print(f"{args.num} of them, with principal components: {args.grid}")
