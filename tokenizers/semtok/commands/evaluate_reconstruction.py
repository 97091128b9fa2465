"""``evaluate reconstruction``: how well tokenizers reconstruct, and what their latents are like."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from semtok.commands import evaluate_options as options
from semtok.commands.around_training import errors_at
from semtok.commands.table import print_table
from semtok.data.source import ImageSource
from semtok.errors import UserError
from semtok.evaluation.inception import load_inception
from semtok.evaluation.reconstruction import (
    FeatureExtractor,
    ReconstructionReport,
    evaluate_reconstruction,
)
from semtok.images import to_pixels
from semtok.perceptual import LPIPS, backbone_file
from semtok.pictures import rows_of_images, write_png
from semtok.tokenizer import Tokenizer

_LABELS = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS"}


def add_task(tasks: argparse._SubParsersAction) -> None:
    """Adds the task to the command."""
    task = tasks.add_parser(
        "reconstruction", help="PSNR, SSIM, LPIPS, Fréchet distances, and statistics of the latents"
    )
    options.add_tokenizer_option(task)
    task.add_argument("--sample", action="store_true", help="decode a draw, not the mean")
    task.add_argument("--seed", type=int, default=0, help="of the draws")
    task.add_argument("--lpips-net", choices=("vgg", "alex", "squeeze"), default="vgg")
    options.add_teacher_options(task, "whose features FD-<teacher> compares")
    task.add_argument(
        "--download", action="store_true", help="fetch weights of LPIPS and FID that are not cached"
    )
    task.add_argument("--grid", type=Path, help="FILE.png: the worst and the median images")
    task.set_defaults(command=_reconstruction)
    options.add_data_options(
        task, default=options.SHAPES, shown="the embedded shapes", num_train=False
    )


def _reconstruction(args: argparse.Namespace) -> dict[str, Any]:
    _, held_out = options.open_data(args)
    if args.num_held_out < 2:
        raise UserError("--num-held-out: a Fréchet distance needs at least 2 images")
    missing: dict[str, str] = {}
    perceptual = _perceptual(args, missing)
    extractors = _extractors(args, missing)
    reports: dict[str, ReconstructionReport] = {}
    grids = []
    for reference in args.tokenizer:
        tokenizer = options.load_tokenizer(reference, held_out)
        with errors_at(f"--data with {reference}"):
            reports[reference] = evaluate_reconstruction(
                tokenizer,
                held_out,
                args.num_held_out,
                perceptual=perceptual,
                extractors=extractors,
                sample=args.sample,
                seed=args.seed,
            )
        if args.grid is not None:
            grids += _worst_and_median(tokenizer, held_out, reports[reference])
    _print(reports, missing, args.num_held_out)
    if args.grid is not None:
        write_png(args.grid, rows_of_images(grids))
        print(f"worst four and median four of each, with the images above: {args.grid}")
    scores = {reference: _as_json(report) for reference, report in reports.items()}
    settings = {"data": held_out.name, "num_images": args.num_held_out, "sample": args.sample}
    return settings | {"unavailable": missing, "scores": scores}


def _perceptual(args: argparse.Namespace, missing: dict[str, str]) -> nn.Module | None:
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


def _extractors(args: argparse.Namespace, missing: dict[str, str]) -> dict[str, FeatureExtractor]:
    teacher = options.load_teacher(args)
    extractors: dict[str, FeatureExtractor] = {
        f"FD-{args.teacher}": lambda images: teacher.features(to_pixels(images)).pooled
    }
    try:
        inception = load_inception(download=args.download).to(options.device())
        extractors["rFID"] = lambda images: inception(images).pooled
    except UserError as error:
        missing["rFID"] = str(error)
    return extractors


@torch.no_grad()
def _worst_and_median(
    tokenizer: Tokenizer, source: ImageSource, report: ReconstructionReport
) -> list[torch.Tensor]:
    """Two rows: images, and their reconstructions; of the lowest PSNR, and of the middle one."""
    order = report.psnr.argsort().tolist()
    middle = max(0, len(order) // 2 - 2)
    seen = source.chosen(len(order))
    chosen = [seen[i] for i in (*order[:4], *order[middle : middle + 4])]
    pixels = to_pixels(source.load(chosen).images, device=options.device())
    return [pixels, tokenizer.decode(tokenizer.encode(pixels))]


def _print(
    reports: dict[str, ReconstructionReport], missing: dict[str, str], num_images: int
) -> None:
    names = [*next(iter(reports.values())).scores, *missing]
    rows = [
        (_LABELS.get(name, name), *(_number(r.scores.get(name)) for r in reports.values()))
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
    print_table(
        f"reconstruction of {num_images} held-out images", rows, ("score", *map(str, reports))
    )
    for name, reason in missing.items():
        print(f"{_LABELS.get(name, name)} is missing: {reason}")


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
