"""``evaluate reconstruction``: how well tokenizers reconstruct, and what their latents are like."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.table import print_table
from semtok.data.images.resized import ResizedImages
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.generation import PUBLISHED_NUM_IMAGES
from semtok.evaluation.inception import Resize, load_inception
from semtok.evaluation.protocol import (
    AS_STORED,
    Network,
    Protocol,
    data_protocol,
    file_digest,
    shown_names,
    teacher_protocol,
    weights_digest,
    with_version,
)
from semtok.evaluation.reconstruction import (
    PROTOCOLS,
    FeatureExtractor,
    ReconstructionProtocol,
    ReconstructionReport,
    evaluate_reconstruction,
)
from semtok.images import to_pixels
from semtok.perceptual import LPIPS, backbone_file
from semtok.pictures import Row, rows_of_images, write_png
from semtok.tokenizer import Tokenizer

_DEFAULT_NUMS = {"adm": 2000, "lightningdit": PUBLISHED_NUM_IMAGES}
_RESIZES: dict[str, Resize] = {"adm": "tensorflow", "lightningdit": "pytorch"}
LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}
"""What scores are called in tables."""


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "reconstruction", help="PSNR, SSIM, LPIPS, Fréchet distances, and statistics of the latents"
    )
    options.add_tokenizer_option(task)
    task.add_argument(
        "--protocol",
        choices=tuple(PROTOCOLS),
        default="adm",
        help="adm (the default): images as training sees them, posterior mean; lightningdit: as published rFIDs "
        "of VAEs for ImageNet were measured, see docs/evaluation.md",
    )
    task.add_argument("--sample", action="store_true", help="decode a draw, not the mean")
    task.add_argument("--seed", type=int, default=0, help="of the draws")
    task.add_argument(
        "--lpips-net", choices=("vgg", "alex", "squeeze"), help="LPIPS' backbone; default: vgg"
    )
    options.add_teacher_options(task, "whose features FD-<teacher> compares")
    task.add_argument(
        "--download", action="store_true", help="fetch weights of LPIPS and FID that are not cached"
    )
    task.add_argument("--grid", type=Path, help="FILE.png: the worst and the median images")
    task.set_defaults(command=_reconstruction)
    options.add_data_options(
        task, default=options.SHAPES, shown="the embedded shapes", num_train=False
    )
    task.set_defaults(num_held_out=None)


def _reconstruction(args: argparse.Namespace) -> dict[str, Any]:
    protocol = _protocol(args)
    _, held_out = options.open_data(args)
    if args.num_held_out < 2:
        few = "--data: there is one held-out image"
        raise UserError(
            f"{few if len(held_out) < 2 else '--num-held-out'}: a Fréchet distance needs at least 2 images"
        )
    if args.protocol == "lightningdit":
        with errors_at("--data with --protocol lightningdit"):
            held_out = ResizedImages(held_out)
    tokenizers = options.load_tokenizers(args.tokenizer, held_out)
    missing: dict[str, str] = {}
    looks = looks_of(args, missing)
    reports: dict[str, ReconstructionReport] = {}
    models: dict[str, str] = {}
    names = shown_names(args.tokenizer)
    grids = []
    for reference, tokenizer in tokenizers:
        with errors_at(f"--data with {reference}"):
            reports[reference] = evaluate_reconstruction(
                tokenizer,
                held_out,
                args.num_held_out,
                perceptual=looks.perceptual,
                extractors=looks.extractors,
                protocol=protocol,
                seed=args.seed,
            )
        models[names[reference]] = weights_digest(tokenizer)
        if args.grid is not None:
            grids += _worst_and_median(tokenizer, held_out, reports[reference], names[reference])
        del tokenizer  # before the next is loaded
    images = data_protocol(held_out, args.num_held_out, next(iter(reports.values())).digest)
    told = Protocol(
        "reconstruction",
        protocol.measures,
        looks.networks,
        models,
        images,
        references=dict.fromkeys(looks.networks, images),
        latents="sample" if protocol.sample else "mean",
        seed=args.seed if protocol.sample else None,
    )
    _print(reports, missing, args, told)
    if args.grid is not None:
        write_png(args.grid, rows_of_images(grids))
        print(f"worst and median images of each, and their reconstructions: {args.grid}")
    scores = {names[reference]: _as_json(report) for reference, report in reports.items()}
    settings = {"data": held_out.name, "num_images": args.num_held_out, "sample": protocol.sample}
    return (
        {"protocol": told.to_json()}
        | settings
        | {"unavailable": options.without_places(missing), "scores": scores}
    )


def _protocol(args: argparse.Namespace) -> ReconstructionProtocol:
    """Which the options name; fills in what follows from it, and refuses what goes against it."""
    if args.protocol == "lightningdit":
        if args.lpips_net not in (None, "vgg"):
            raise UserError(
                f"--lpips-net {args.lpips_net}: --protocol lightningdit takes vgg; leave one out"
            )
        if any(word.startswith("crop=") for word in args.data):
            raise UserError("--data crop=…: --protocol lightningdit crops by itself; leave one out")
    args.lpips_net = args.lpips_net or "vgg"
    if args.num_held_out is None:
        args.num_held_out = _DEFAULT_NUMS[args.protocol]
    protocol = PROTOCOLS[args.protocol]
    return replace(protocol, sample=protocol.sample or args.sample)


@dataclass(frozen=True)
class Looks:
    """What sees images and reconstructions.

    Attributes:
        perceptual: LPIPS; None where its weights are not at hand.
        extractors: of features for Fréchet distances, by the score's name.
        networks: what to record of all of them, by their own.
    """

    perceptual: nn.Module | None
    extractors: dict[str, FeatureExtractor]
    networks: dict[str, Network]


def looks_of(args: argparse.Namespace, missing: dict[str, str]) -> Looks:
    """Those that the options name; why one is not at hand stands in ``missing``."""
    perceptual = _perceptual_distance(args, missing)
    extractors, networks = _feature_extractors(args, missing)
    if perceptual is not None:
        networks["lpips"] = _lpips_protocol(args.lpips_net)
    return Looks(perceptual, extractors, networks)


def _perceptual_distance(args: argparse.Namespace, missing: dict[str, str]) -> nn.Module | None:
    """LPIPS with the backbone that the options name; None, and why not in ``missing``, where its weights are not at
    hand."""
    file = backbone_file(args.lpips_net)
    if not file.is_file() and not args.download:
        missing["lpips"] = (
            f"{args.lpips_net}'s weights are not at {file}; put them there, or --download"
        )
        return None
    try:
        return LPIPS(args.lpips_net).to(options.device())
    except UserError as error:
        missing["lpips"] = str(error)
        return None


def _lpips_protocol(net: str) -> Network:
    """What to record of LPIPS."""
    return Network(with_version("lpips"), net, AS_STORED, file_digest(backbone_file(net)))


def _feature_extractors(
    args: argparse.Namespace, missing: dict[str, str]
) -> tuple[dict[str, FeatureExtractor], dict[str, Network]]:
    """Networks for Fréchet distances, by the score's name; and what to record of them, by their own."""
    teacher = options.load_teacher(args)
    extractors: dict[str, FeatureExtractor] = {
        f"FD-{args.teacher}": lambda images: teacher.features(to_pixels(images)).pooled
    }
    networks = {args.teacher: teacher_protocol(teacher)}
    try:
        inception = load_inception(download=args.download, resize=_RESIZES[args.protocol])
        inception.to(options.device())
        extractors["rFID"] = lambda images: inception(images).pooled
        networks["inception"] = inception.protocol
    except UserError as error:
        missing["rFID"] = str(error)
    return extractors, networks


@torch.no_grad()
def _worst_and_median(
    tokenizer: Tokenizer, source: ImageSource, report: ReconstructionReport, name: str
) -> list[Row]:
    """Two rows: images, and their reconstructions; of the lowest PSNR, and of the middle one."""
    order = report.psnr.argsort().tolist()
    middle = max(0, len(order) // 2 - 2)
    shown = {"worst": order[:4], "median": order[middle : middle + 4]}
    seen = source.chosen(len(order))
    chosen = [seen[i] for places in shown.values() for i in places]
    words = [word for word, places in shown.items() for _ in places]
    decibels = [f"{report.psnr[i]:.1f} dB" for places in shown.values() for i in places]
    pixels = to_pixels(source.load(chosen).images, device=options.device())
    reconstruction = tokenizer.decode(tokenizer.encode(pixels, value_range=(-1, 1)))
    return [Row("image", pixels, words), Row(f"{name}\nreconstruction", reconstruction, decibels)]


def _print(
    reports: dict[str, ReconstructionReport],
    missing: dict[str, str],
    args: argparse.Namespace,
    told: Protocol,
) -> None:
    names = [*next(iter(reports.values())).scores, *missing]
    rows = [
        (LABELS.get(name, name), *(_number(r.scores.get(name)) for r in reports.values()))
        for name in names
    ]
    parts = dict.fromkeys(part for report in reports.values() for part in report.parts)
    for part in parts:
        seen = [report.parts.get(part) for report in reports.values()]
        rows += [
            (f"{part}: KL, bits per dimension", *(_number(s.kl_bits if s else None) for s in seen)),
            (f"{part}: dead channels", *(str(s.num_dead) if s else "-" for s in seen)),
            (f"{part}: mean", *(_range(s.mean) if s else "-" for s in seen)),
            (f"{part}: std", *(_range(s.std) if s else "-" for s in seen)),
        ]
    title = f"reconstruction of {args.num_held_out} held-out images, protocol {args.protocol}"
    if args.protocol == "lightningdit" and args.num_held_out != PUBLISHED_NUM_IMAGES:
        title += "; published scores use 50,000"
    print_table(title, rows, ("score", *map(str, reports)))
    print("\n".join(told.lines()))
    for name, reason in missing.items():
        print(f"{LABELS.get(name, name)} is missing: {reason}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _range(values: torch.Tensor) -> str:
    return f"{values.min():.2f} to {values.max():.2f}"


def _as_json(report: ReconstructionReport) -> dict[str, Any]:
    parts = {
        name: {
            "mean": part.mean.tolist(),
            "std": part.std.tolist(),
            "kl_bits_per_dimension": part.kl_bits,
            "num_dead_channels": part.num_dead,
        }
        for name, part in report.parts.items()
    }
    return {**report.scores, "latents": parts}
