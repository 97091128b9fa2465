"""Draws the floors of the package and the imports between them: ``python tools/architecture.py``.

The table of docs/architecture.md says which room stands on which floor; the code says who imports whom.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tokenizers" / "semtok"
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "images" / "architecture.png"


@dataclass(frozen=True)
class Import:
    """One import statement's target, within the package or not.

    Attributes:
        importer, imported: dotted names; of the package without ``semtok.``, as ``sampler.dit``.
        line: of the statement.
    """

    importer: str
    imported: str
    line: int
    is_own: bool


def floors() -> dict[str, int]:
    """Floor of each room, by its name in the table: ``sampler/`` or ``tokenizer``."""
    found: dict[str, int] = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        row = re.match(r"\| (\d+) \| (.+?) \|", line)
        if row:
            found |= {name: int(row[1]) for name in re.findall(r"`([^`]+)`", row[2])}
    return found


def modules() -> dict[str, Path]:
    """Files of the package by dotted name without ``semtok.``; the package itself is ``__init__``."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and parts[:-1] else parts)] = path
    return names


def room_of(module: str, rooms: dict[str, int]) -> str | None:
    """The room of a module, by the longest name that fits; None: it stands nowhere."""
    path = module.replace(".", "/")
    fitting = [r for r in rooms if path == r or (r.endswith("/") and f"{path}/".startswith(r))]
    return max(fitting, key=len, default=None)


def imports() -> Iterator[Import]:
    """Every import of the package's files, those inside functions and of modules named in text included."""
    known = modules()
    for importer, path in known.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for target in _targets(node, path):
                own = target == "semtok" or target.startswith("semtok.")
                name = target.removeprefix("semtok").removeprefix(".") or "__init__"
                while own and name not in known and "." in name:
                    name = name.rpartition(".")[0]
                yield Import(importer, name if own else target, node.lineno, own)


def _targets(node: ast.AST, path: Path) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=module, names=names, level=level):
            if level:  # relative to the file's own folder
                own = ("semtok", *path.relative_to(PACKAGE).parts[:-1])
                module = ".".join([*own[: len(own) - level + 1], *([module] if module else [])])
            return [f"{module}.{alias.name}" for alias in names]
        case ast.Call(
            func=ast.Name(id=name) | ast.Attribute(attr=name),
            args=[ast.Constant(value=str(text)) | ast.JoinedStr([ast.Constant(str(text)), *_]), *_],
        ):
            return [text.rstrip(".")] if name in ("import_module", "__import__") else []
        case _:
            return []


def draw(picture: Path) -> None:
    """One box a room, one row a floor, an arrow where a room imports another; what follows from other arrows is left
    out."""
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyArrowPatch

    rooms = floors()
    height = max(rooms.values())
    figure = Figure(figsize=(12, 1.15 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 12), ylim=(0.3, height + 0.7))
    axes.axis("off")
    places: dict[str, tuple[float, float]] = {}
    for floor in range(1, height + 1):
        own = [room for room, number in rooms.items() if number == floor]
        axes.axhspan(
            floor - 0.42, floor + 0.42, color="#f3f1ec" if floor % 2 else "#faf9f6", zorder=0
        )
        axes.text(0.15, floor, str(floor), va="center", fontsize=11, color="#999999")
        for i, room in enumerate(own):
            places[room] = (0.6 + 11.2 * (i + 0.5) / len(own), floor)
    for upper, lower in sorted(_direct(rooms)):
        (x0, y0), (x1, y1) = places[upper], places[lower]
        arrow = FancyArrowPatch(
            (x0, y0 - 0.2),
            (x1, y1 + 0.2),
            arrowstyle="-|>",
            mutation_scale=7,
            linewidth=0.9,
            color="#7a8ca8",
            alpha=0.8,
            zorder=1,
        )
        axes.add_patch(arrow)
    for room, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": "#44546a"}
        weight = "bold" if room.endswith("/") else "normal"
        axes.text(
            x, y, room, ha="center", va="center", fontsize=10, bbox=box, weight=weight, zorder=2
        )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=90, metadata={"Software": None})


def _direct(rooms: dict[str, int]) -> set[tuple[str, str]]:
    """Pairs of rooms of which one imports the other, and reaches it in no other way."""
    below: dict[str, set[str]] = {room: set() for room in rooms}
    for one in imports():
        upper, lower = room_of(one.importer, rooms), room_of(one.imported, rooms)
        if one.is_own and upper and lower and upper != lower:
            below[upper].add(lower)

    def reached(room: str) -> set[str]:  # down alone, as another check tells of what goes up
        lower = {r for r in below[room] if rooms[r] < rooms[room]}
        return lower.union(*map(reached, lower))

    return {
        (room, lower)
        for room in rooms
        for lower in below[room]
        if not any(lower in reached(other) for other in below[room] - {lower})
    }


def main() -> None:
    """Draws the picture that the page shows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PICTURE, help="default: the page's picture")
    output = parser.parse_args().output
    draw(output)
    print(output)


if __name__ == "__main__":
    main()
