"""``hub push RUN org/name``: tokenizers and generators to the Hugging Face Hub; ``hub import FORMAT PATH``:
published checkpoints as exports of this library; ``hub export MODEL``: a generator or a RAE for diffusers; ``hub
checkpoint RUN``: what a run has kept of an earlier step, as an export."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from semtok.card import PICTURES, loading_lines
from semtok.commands.cli import Parser, add_plugin_option
from semtok.commands.export_checkpoint import check_average, kept_checkpoint
from semtok.commands.table import print_table
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.hub.export_pipeline import export_pipeline
from semtok.hub.export_rae import export_autoencoder
from semtok.hub.formats import Format
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.methods.rae import RAETokenizer
from semtok.publish import check_repo_id, export_files, is_pipeline, push_export
from semtok.references import locate_export
from semtok.registry import load_plugins
from semtok.settings import apply_overrides, parse
from semtok.storage import read_json
from semtok.teachers import Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="hub", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    push = tasks.add_parser("push", help="upload an export as one commit")
    push.add_argument(
        "run", metavar="RUN", help="a run's name, its folder, an export, or an exported pipeline"
    )
    push.add_argument("repo_id", metavar="org/name", help="on the Hub; created where it is missing")
    push.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    push.add_argument("--yes", action="store_true", help="ask nothing")
    push.add_argument("--dry-run", action="store_true", help="list files and sizes, and stop")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--branch", help="default: the main one")
    push.set_defaults(command=_push)
    _add_import(tasks.add_parser("import", help="a published checkpoint, as an export"))
    _add_export(tasks.add_parser("export", help="a generator or a RAE, for diffusers alone"))
    _add_checkpoint(tasks.add_parser("checkpoint", help="a run's checkpoint, as an export"))
    args = parser.parse_args(arguments)
    args.command(args)
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder, run name or Hub id of a generator, or of a RAE tokenizer, which becomes an AutoencoderRAE",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    add_plugin_option(parser)
    parser.set_defaults(command=_export)


def _add_import(parser: argparse.ArgumentParser) -> None:
    formats = ("auto", *get_args(Format))
    parser.add_argument("format", choices=formats, metavar="FORMAT", help=", ".join(formats))
    parser.add_argument("path", type=Path, metavar="PATH", help="a file; a folder of diffusers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--tokenizer", metavar="REF", help="whose latents the checkpoint generates, or codes beside"
    )
    parser.add_argument(
        "--teacher", nargs="+", metavar="key=value", help="whose features a coder codes: name=…"
    )
    parser.add_argument(
        "--statistics",
        type=_number_or_path,
        metavar="FILE|NUMBER",
        help="mean and std of raw latents, or a scaling factor; of REGLUE's compressor, of the features; "
        "default: the statistics file beside PATH",
    )
    parser.add_argument(
        "--image-size", type=int, help="of a coder's images, or of DDT's; default: 256"
    )
    parser.add_argument(
        "--semantic-channels",
        type=int,
        help="how many of a transformer's channels are semantic, where neither --tokenizer nor the file says it; "
        "components to keep of ReDi's PCA",
    )
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--heads", type=int, help="of a network of unpublished width")
    parser.add_argument(
        "--encoder-blocks",
        type=int,
        help="of a transformer with a head, how many blocks stand before it; default: as its tensors tell, or as "
        "published",
    )
    parser.set_defaults(command=_import)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's name or its folder")
    parser.add_argument("--step", type=int, help="of a checkpoint that is kept; default: the last")
    parser.add_argument(
        "--average",
        metavar="WIDTH",
        help="which weights: ema, trained, or the sigma_rel of an average of train.averages, such as 0.08; default: "
        "as the run exports. Several, joined by commas, are compared on the held-out images and not exported",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="where one is exported")
    parser.set_defaults(command=_checkpoint)


def _checkpoint(args: argparse.Namespace) -> None:
    averages = [check_average(word) for word in args.average.split(",")] if args.average else [None]
    if len(averages) > 1 and args.output is not None:
        raise UserError("--average: several are compared and none is exported; leave --output out")
    if args.output is not None:
        _check_new(args.output)
    kept = kept_checkpoint(args.run, args.step)
    for average in averages:
        kept.check(average)
    if len(averages) == 1:
        if args.output is None:
            raise UserError("--output is missing; give a folder for the export")
        kept.export(averages[0], args.output)
        print(f"exported as after step {kept.step}: {args.output}")
        return
    columns = [kept.measured(average) for average in averages]
    rows = [[name, *(f"{column[name]:.6g}" for column in columns)] for name in columns[0]]
    print_table(f"{args.run} after step {kept.step}", rows, ("held out", *averages))


def _check_new(output: Path) -> None:
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; choose another or remove it")


def _import(args: argparse.Namespace) -> None:
    _check_new(args.output)
    teacher = None
    if args.teacher is not None:
        content = apply_overrides({}, args.teacher)
        teacher = Teacher(parse(TeacherConfig, content, "--teacher"))
    numbers = (args.image_size, args.heads, args.semantic_channels, args.encoder_blocks)
    if min(number if number is not None else 1 for number in numbers) < 1:
        raise UserError(
            "--image-size, --heads, --semantic-channels and --encoder-blocks must be at least 1"
        )
    options = ImportOptions(
        weights=args.weights,
        tokenizer=Tokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None,
        teacher=teacher,
        statistics=args.statistics,
        heads=args.heads,
        semantic_channels=args.semantic_channels,
        image_size=args.image_size,
        encoder_blocks=args.encoder_blocks,
    )
    imported = import_checkpoint(args.path, args.format, options)
    imported.save(args.output)
    rows = _by_fate(imported.became)
    print_table(f"{args.path}, {imported.format}", rows, ("what became of it", "number", "such as"))
    for note in imported.notes:
        print(f"note: {note}")
    kind = type(imported.model).__name__
    print(f"imported as {kind}: {args.output}")


def _by_fate(became: Mapping[str, str]) -> list[tuple[str, str, str]]:
    rows = []
    for fate in dict.fromkeys(became.values()):
        names = [name for name, value in became.items() if value == fate]
        rows.append((fate, str(len(names)), ", ".join(names[:2]) + (" …" if names[2:] else "")))
    return rows


def _number_or_path(word: str) -> float | Path:
    try:
        return float(word)
    except ValueError:
        return Path(word)


def _push(args: argparse.Namespace) -> None:
    check_repo_id(args.repo_id)
    folder = Path(args.run)
    if not is_pipeline(folder):
        folder = locate_export(args.run, "tokenizer", local_files_only=True)
    files = export_files(folder)
    total = sum(size for _, size in files)
    rows = [(name, _size(size)) for name, size in files]
    print_table(f"{folder} to {args.repo_id}", [*rows, ("in all", _size(total))], ("file", "size"))
    if args.dry_run:
        return
    if not args.yes:
        _ask(f"push to {args.repo_id}, {'public' if args.public else 'private'} where it is new?")
    address = push_export(
        folder, args.repo_id, private=not args.public, message=args.message, branch=args.branch
    )
    print(f"pushed: {address}")


def _export(args: argparse.Namespace) -> None:
    load_plugins(args.plugin)
    folder = locate_export(args.model, "model")
    config = read_json(folder / "config.json")
    if isinstance(config, dict) and config.get("kind") == "tokenizer":
        _export_tokenizer(Tokenizer.from_pretrained(folder), args)
        return
    generator = Generator.from_pretrained(folder)
    shown = sorted((folder / PICTURES).glob("*.png"))
    export_pipeline(generator, args.output, pictures={file.stem: file for file in shown})
    print(f"diffusers pipeline: {args.output}")
    for line in loading_lines(str(args.output), generator.class_names[:2]):
        print(f"    {line}")


def _export_tokenizer(tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    if not isinstance(tokenizer, RAETokenizer):
        raise UserError(
            f"{args.model}: a tokenizer of the method '{tokenizer.method}'; the vae/ of an image VAE's export is of "
            "diffusers already, and a RAE or a generator can be exported"
        )
    for note in export_autoencoder(tokenizer, args.output):
        print(f"note: {note}")
    print(f"diffusers AutoencoderRAE: {args.output}")


def _ask(question: str) -> None:
    """Raises UserError unless somebody answers yes."""
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody is there to answer; give --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not pushed")


def _size(size: int) -> str:
    return f"{tqdm.format_sizeof(size)}B"
