"""``recipes``: the library's recipes; ``recipes diff NAME``: the settings that differ from the official runs."""

import argparse
import json
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from semtok.commands.cli import Parser
from semtok.errors import UserError
from semtok.provenance import Fact, Kind, Provenance, Setting, read_provenance, read_title
from semtok.recipe import PUBLISHED, embedded_recipes, locate_recipe
from semtok.storage import new_file

_WIDTH = 110
_HEADINGS: dict[Kind, str] = {
    "ours": "settings that differ from the official ones",
    "closest choice": "settings whose official value is not known",
    "published": "settings as published",
    "run": "settings of the run and the machine",
}


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="recipes", description=__doc__)
    parser.add_argument("--json", action="store_true", help="the list, for programs")
    parser.set_defaults(command=_list)
    tasks = parser.add_subparsers(metavar="{diff,show,copy}")
    diff = tasks.add_parser(
        "diff", help="what differs from the official run, and what of it is unknown"
    )
    diff.add_argument("--all", action="store_true", help="every setting with its source")
    diff.add_argument("--json", action="store_true", help="for programs")
    diff.set_defaults(command=_diff)
    show = tasks.add_parser("show", help="the file as it stands, with its comments")
    show.set_defaults(command=_show)
    copy = tasks.add_parser("copy", help="the file, to change it")
    copy.set_defaults(command=_copy)
    for task in (diff, show, copy):
        task.add_argument(
            "name",
            metavar="NAME",
            help=f"a file, or a name of the list; {PUBLISHED}/ may be left out",
        )
    copy.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args(arguments)
    try:
        print(args.command(args), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough, as head has
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return 0


def _list(args: argparse.Namespace) -> str:
    known = embedded_recipes()
    if not known:
        raise UserError("no recipes folder beside the library; install semtok again")
    titles = {name: read_title(path) for name, path in known.items()}
    if args.json:
        return json.dumps(titles, indent=2, ensure_ascii=False)
    width = max(map(len, titles))
    return "\n".join(f"{name:<{width}}  {title}" for name, title in titles.items())


def _show(args: argparse.Namespace) -> str:
    return _published(args.name).read_text(encoding="utf-8").rstrip("\n")


def _copy(args: argparse.Namespace) -> str:
    path = _published(args.name)
    target = args.folder / path.name
    if target.exists():
        raise UserError(f"{target}: exists already; choose another folder")
    args.folder.mkdir(parents=True, exist_ok=True)
    with new_file(target) as temporary:
        shutil.copyfile(path, temporary)
    return f"recipe: {target}"


def _diff(args: argparse.Namespace) -> str:
    path = _published(args.name)
    if "\n# Differs:" not in path.read_text(encoding="utf-8"):
        raise UserError(
            f"{path}: does not say what differs from an official run; the recipes of {PUBLISHED}/ do, see recipes"
        )
    found = read_provenance(path)
    kinds: tuple[Kind, ...] = tuple(_HEADINGS) if args.all else ("ours", "closest choice")
    if args.json:
        return json.dumps(_as_json(found, kinds), indent=2, ensure_ascii=False)
    lines = [str(path), found.title]
    for kind in kinds:
        lines += _block(_HEADINGS[kind], [_told(setting) for setting in found.of_kind(kind)])
    lines += _block("differs beside the settings", [_told_fact(fact) for fact in found.differs])
    lines += _block("unknown beside the settings", [_told_fact(fact) for fact in found.unknown])
    sources = [f"  [{tag}] {source}" for tag, source in found.sources.items()]
    return "\n".join([*lines, "", "sources", *sources])


def _as_json(found: Provenance, kinds: Sequence[Kind]) -> dict[str, Any]:
    return {
        "title": found.title,
        "settings": [asdict(setting) for setting in found.settings if setting.kind in kinds],
        "differs": [asdict(fact) for fact in found.differs],
        "unknown": [asdict(fact) for fact in found.unknown],
        "sources": found.sources,
    }


def _told(setting: Setting) -> tuple[str, str]:
    official = f"   official: {setting.official}" if setting.official else ""
    return f"{setting.name} = {setting.value}{official}", setting.why


def _told_fact(fact: Fact) -> tuple[str, str]:
    return fact.about, fact.text


def _block(heading: str, told: Sequence[tuple[str, str]]) -> list[str]:
    """A heading with the number of what follows, then each with its reason beside it, or below where that is long."""
    lines = ["", f"{heading}: {len(told) or 'none'}"]
    for line, why in told:
        if len(line) + len(why) < _WIDTH - 5:
            lines.append(f"  {line}   {why}")
            continue
        lines.append(f"  {line}")
        lines += textwrap.wrap(why, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


def _published(name: str) -> Path:
    """The recipe of that name; one at a paper's settings goes before the laptop's of the same name."""
    return locate_recipe(name, first=PUBLISHED)
