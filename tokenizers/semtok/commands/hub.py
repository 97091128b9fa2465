"""``hub push RUN org/name``: tokenizers and generators to the Hugging Face Hub."""

import argparse
import sys
from collections.abc import Sequence

from semtok.commands.cli import Parser
from semtok.commands.table import print_table
from semtok.errors import UserError
from semtok.hub.publish import check_repo_id, export_files, push_export
from semtok.references import locate_export


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="hub", description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    push = tasks.add_parser("push", help="upload an export as one commit")
    push.add_argument("run", metavar="RUN", help="a run's name, its folder, or an export")
    push.add_argument("repo_id", metavar="org/name", help="on the Hub; created where it is missing")
    push.add_argument("--public", action="store_true", help="a new repository is private otherwise")
    push.add_argument("--yes", action="store_true", help="ask nothing")
    push.add_argument("--dry-run", action="store_true", help="list files and sizes, and stop")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--branch", help="default: the main one")
    push.set_defaults(command=_push)
    args = parser.parse_args(arguments)
    return args.command(args)


def _push(args: argparse.Namespace) -> int:
    check_repo_id(args.repo_id)
    folder = locate_export(args.run, "tokenizer", local_files_only=True)
    files = export_files(folder)
    total = sum(size for _, size in files)
    rows = [(name, _size(size)) for name, size in files]
    print_table(f"{folder} to {args.repo_id}", [*rows, ("in all", _size(total))], ("file", "size"))
    if args.dry_run:
        return 0
    if not args.yes:
        _ask(f"push to {args.repo_id}, {'public' if args.public else 'private'} where it is new?")
    address = push_export(
        folder, args.repo_id, private=not args.public, message=args.message, branch=args.branch
    )
    print(f"pushed: {address}")
    return 0


def _ask(question: str) -> None:
    """Raises UserError unless somebody answers yes."""
    if not sys.stdin.isatty():
        raise UserError(f"{question} Nobody is there to answer; give --yes")
    if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not pushed")


def _size(size: int) -> str:
    """Bytes as people read them."""
    number = float(size)
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.4g} {unit}"
        number /= 1000
    return f"{number:.4g} GB"
