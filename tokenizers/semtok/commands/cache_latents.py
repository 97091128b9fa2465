"""``cache_latents --tokenizer REF --data key=value … --output DIR``: latents of all images, computed once.

``train_dit data.cache=DIR`` then trains without the images. ``accelerate launch`` shares the work; an
interrupted command goes on where it stopped.
"""

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from semtok import stopping
from semtok.commands.around_training import errors_at
from semtok.commands.cli import Parser, add_plugin_option
from semtok.commands.evaluate_options import SHAPES
from semtok.commands.table import print_table
from semtok.commands.train_tokenizer import tokenizer_from_reference
from semtok.data.caches.latent_cache import CachedLatents, ensure_latent_cache, is_latent_cache
from semtok.data.caches.shards import Shards
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import ShapesConfig
from semtok.errors import UserError
from semtok.privacy import without_secrets
from semtok.processes import watching
from semtok.recipe import parse_data
from semtok.registry import load_plugins
from semtok.settings import apply_overrides, parse
from semtok.teachers import Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer


def _parser() -> Parser:
    parser = Parser(prog="cache_latents", description=__doc__)
    parser.add_argument("--tokenizer", metavar="REF", help="folder, run, Hub id or recipe name")
    parser.add_argument(
        "--data",
        nargs="+",
        default=SHAPES,
        metavar="key=value",
        help=f"default: {' '.join(SHAPES)}",
    )
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument(
        "--targets",
        nargs="*",
        metavar="key=value",
        help="keep REPA's targets too: of the tokenizer's teacher, or of the one that name=… says",
    )
    parser.add_argument("--dtype", choices=("fp16", "bf16"), default="fp16")
    parser.add_argument("--batch-size", type=int, default=64, help="images per forward pass")
    parser.add_argument("--shard-size", type=int, default=1024, help="images per file")
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="compare a cache with its checksums"
    )
    add_plugin_option(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.verify is not None:
        if not is_latent_cache(str(args.verify)):
            raise UserError(
                f"--verify: {args.verify} holds no finished cache; the command that began it goes on"
            )
        for name in ("train", "validation"):
            Shards(args.verify / name, "--verify").verify()
        print(f"{args.verify}: every shard is as it was written")
        return 0
    needed = {"--tokenizer REF": args.tokenizer, "--output DIR": args.output}
    missing = [option for option, value in needed.items() if value is None]
    if missing:
        raise UserError(f"cache_latents needs {' and '.join(missing)}")
    if min(args.batch_size, args.shard_size) < 1:
        raise UserError("--batch-size and --shard-size must be at least 1")
    load_plugins(args.plugin)
    data = parse_data(args.data, place="--data")
    if data.draws_crops:
        raise UserError(
            "--data: crop=random: a cache holds one crop of each image, the one at the centre; leave it out"
        )
    sources = open_sources(data)
    drawn = isinstance(data, ShapesConfig)
    tokenizer = tokenizer_from_reference(args.tokenizer, drawn=drawn).eval()
    with errors_at("--data"):
        tokenizer.check_image_size(data.image_size)
    targets = None
    if args.targets is not None:
        if args.targets or tokenizer.teacher is None:
            config = parse(TeacherConfig, apply_overrides({}, args.targets), "--targets")
            targets = Teacher(config)
        else:
            targets = tokenizer.teacher
    accelerator = Accelerator()
    tokenizer.to(accelerator.device)
    start = time.perf_counter()
    with stopping.with_way_on("the same command goes on"), watching():
        cached = ensure_latent_cache(
            sources,
            tokenizer,
            args.output,
            data=data,
            targets=targets,
            dtype=args.dtype,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
        )
    if accelerator.is_main_process:
        seconds = time.perf_counter() - start
        command = _training_command(args, tokenizer)
        _report(args.output, cached, seconds=seconds, command=command)
    return 0


def _training_command(args: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """What trains on the cache: of the same tokenizer, images and targets. Secrets of URLs are for the user to add."""
    data = (f"data.{without_secrets(word)}" for word in args.data)
    words = ["--tokenizer", args.tokenizer, *data]
    words.append(f"data.cache={args.output}")
    if args.targets is not None and tokenizer.diffusion_defaults.repa is None:
        words.append("diffusion.repa={weight: 0.5}")
    words += [f"teacher.{word}" for word in args.targets or ()]
    return f"semtok train_dit {shlex.join(words)}"


def _report(
    folder: Path,
    cached: tuple[CachedLatents, CachedLatents],
    *,
    seconds: float,
    command: str,
) -> None:
    train, validation = cached
    rows = [
        (name, str(dtype).removeprefix("torch."), "x".join(map(str, shape)))
        for name, (dtype, shape) in train.shards.columns.items()
    ]
    print_table(f"{folder}: {train.name}", rows, ("per image", "type", "shape"))
    mirrored = ", mirrored ones too" if train.flip else ""
    print(
        f"{len(train)} training and {len(validation)} held-out images{mirrored}; "
        f"{train.shards.bytes_per_image / 1e3:.1f} kB an image; {seconds:.0f} s; "
        f"train on it by: {command}"
    )
