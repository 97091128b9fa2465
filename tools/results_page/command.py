"""``results``: draws what docs/results/*.json holds: tables of docs/results.md, switches.md and performance.md and of
README, and the curves that these pages show.

``--take FOLDER NAME`` first keeps what a comparison found, every score of every seed, as docs/results/NAME.json.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.figure import curves
from comparison.stored import RESULTS_FILE, read_stored
from results_page.gpus import gpus
from results_page.tables import TABLES, markdown
from semtok.commands.cli import Parser
from semtok.errors import UserError
from semtok.privacy import fit_to_show
from semtok.storage import new_file, read_json, write_json, write_text

_ROOT = Path(__file__).parents[2]
_PAGES = ("docs/results.md", "docs/switches.md", "docs/performance.md", "README.md")
_MARK = re.compile(
    r"(?P<begin><!-- table: (?P<name>[\w-]+) (?P<kind>\w+) -->\n).*?(?P<end><!-- end of table -->)",
    re.DOTALL,
)


def _parser() -> Parser:
    parser = Parser(prog="results", description=__doc__)
    parser.add_argument(
        "--take",
        nargs=2,
        metavar=("FOLDER", "NAME"),
        help="a comparison's folder, or an evaluation's JSON, to keep as docs/results/NAME.json",
    )
    parser.add_argument(
        "--root", type=Path, default=_ROOT, help="of the checkout that is drawn; default: this one"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit code 1 where a page is not what the results say",
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    results = args.root / "docs" / "results"
    if args.take is not None:
        folder, name = args.take
        _take(Path(folder), results / f"{_checked(name)}.json")
    stale = []
    for page in _pages(args.root):
        text = page.read_text(encoding="utf-8")
        drawn = _MARK.sub(lambda mark: _table(mark, results), text)
        if drawn == text:
            continue
        stale.append(str(page))
        if not args.check:
            write_text(page, drawn)
            print(f"drawn: {page}")
    if args.check:
        print(
            "\n".join(f"{page}: tables are not what docs/results/ says" for page in stale)
            or "up to date"
        )
        return int(bool(stale))
    shown = "".join(page.read_text(encoding="utf-8") for page in _pages(args.root))
    for file in sorted(results.glob("*.json")):
        picture = args.root / "docs" / "images" / f"results_{file.stem}.png"
        if picture.name in shown:
            with new_file(picture) as temporary:
                temporary.write_bytes(curves(read_stored(file).scores))
            print(f"drawn: {picture}")
    return 0


def _pages(root: Path) -> list[Path]:
    return [page for name in _PAGES if (page := root / name).is_file()]


def _checked(name: str) -> str:
    if not re.fullmatch(r"\w+", name):
        raise UserError(
            f"--take: '{name}' is no name for a file of results; use letters, digits and _"
        )
    return name


def _take(source: Path, file: Path) -> None:
    """Keeps results without places of this machine."""
    source = source / RESULTS_FILE if source.is_dir() else source
    if not source.is_file():
        raise UserError(
            f"--take: {source}: no such file; give the folder of a comparison that has a report"
        )
    write_json(file, _without_places(read_json(source)))
    print(f"kept: {file}")


def _without_places(value: Any) -> Any:
    """Paths from the root are cut to their last part, also behind the ``key=`` of a setting and within a command."""
    if isinstance(value, dict):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if isinstance(value, str) and "/" in value:
        return re.sub(
            r"(?<![\w.…])/[^\s,'\"\]})]+", lambda place: str(fit_to_show(place[0])), value
        )
    return value


def _table(mark: re.Match[str], results: Path) -> str:
    file, kind = results / f"{mark['name']}.json", mark["kind"]
    if kind == "gpu":  # of as many GPUs as there are files
        files = sorted(results.glob(f"{mark['name']}_*.json"))
        return f"{mark['begin']}{gpus(files)}\n{mark['end']}"
    if not file.is_file() or kind not in TABLES:
        raise UserError(
            f"<!-- table: {mark['name']} {kind} -->: no results of that name in {results}, or none of the kinds "
            f"{', '.join((*TABLES, 'gpu'))}"
        )
    return f"{mark['begin']}{markdown(*TABLES[kind](file))}\n{mark['end']}"
