"""The house is as docs/architecture.md draws it."""

import ast
import functools
import re
import sys

import pytest

import architecture

ALLOWED_IN_SAMPLER = {"torch", "einops", "timm", "pydantic"}
MOST_LINES = 64
MOST_LINES_OF_A_LOSS = 40


@pytest.fixture(scope="module")
def rooms() -> dict[str, int]:
    return architecture.floors()


@pytest.fixture(scope="module")
def imports() -> list[architecture.Import]:
    return list(architecture.imports())


def test_every_file_stands_in_a_room_of_the_table_and_every_room_is_there(rooms):
    homeless = [m for m in architecture.modules() if architecture.room_of(m, rooms) is None]
    # Folders that only hold rooms have an empty __init__.
    homeless = [m for m in homeless if architecture.modules()[m].read_text().strip()]
    assert not homeless, "give them a floor in docs/architecture.md"
    inhabited = {architecture.room_of(m, rooms) for m in architecture.modules()}
    assert set(rooms) <= inhabited, "the table names rooms that are not there"


def test_imports_go_down(rooms, imports):
    wrong = []
    for one in imports:
        if not one.is_own:
            continue
        upper = architecture.room_of(one.importer, rooms)
        lower = architecture.room_of(one.imported, rooms)
        if upper != lower and not rooms[lower] < rooms[upper]:
            wrong.append(f"{one.importer}:{one.line} (floor {rooms[upper]}) imports {one.imported}")
    assert not wrong


def test_no_files_import_each_other_in_a_circle(imports):
    graph: dict[str, set[str]] = {}
    for one in imports:
        if one.is_own and one.importer != one.imported:
            graph.setdefault(one.importer, set()).add(one.imported)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module in done:
            return
        for imported in sorted(graph.get(module, ())):
            visit(imported, (*path, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_sampler_room_is_closed(imports):
    foreign = set()
    for one in imports:
        if not one.importer.startswith("sampler"):
            continue
        if one.is_own:
            assert one.imported.startswith("sampler"), f"{one.importer}:{one.line} {one.imported}"
        else:
            foreign.add(one.imported.partition(".")[0])
    foreign -= sys.stdlib_module_names
    assert foreign <= ALLOWED_IN_SAMPLER


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("sampler/dit.py", "def f():\n    from semtok.tokenizer import Tokenizer\n"),
        ("registry.py", "from semtok import methods\n"),
        ("data/source.py", "import importlib\nimportlib.import_module('semtok.objective')\n"),
        ("data/source.py", "import importlib\nimportlib.import_module(f'semtok.commands.{x}')\n"),
        ("data/source.py", "from ..commands import cli\n"),
        ("tokenizer.py", "from .objective import Batch\n"),
    ],
)
def test_an_import_against_the_table_is_found(importer, statement, rooms, tmp_path, monkeypatch):
    """The check itself can fail: also inside functions, of the package, and by name."""
    for path in architecture.modules().values():
        copy = tmp_path / path.relative_to(architecture.PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / importer).write_text((tmp_path / importer).read_text() + statement)
    monkeypatch.setattr(architecture, "PACKAGE", tmp_path)
    with pytest.raises(AssertionError, match=importer.removesuffix(".py").replace("/", ".")):
        test_imports_go_down(rooms, list(architecture.imports()))


@functools.cache
def functions() -> list[tuple[str, ast.FunctionDef]]:
    """Every function of the package and the tools, by file and name."""
    found = []
    for folder in (architecture.PACKAGE, architecture.ROOT / "tools"):
        for path in sorted(folder.rglob("*.py")):
            place = path.relative_to(architecture.ROOT)
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.append((f"{place}:{node.lineno} {node.name}", node))
    return found


def lines_of(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def test_no_function_is_long():
    long = [name for name, node in functions() if lines_of(node) > MOST_LINES]
    assert not long


@pytest.mark.parametrize(
    "method", ["vae", "send_vae", "va_vae", "rae", "semvae", "reglue", "redi", "repae"]
)
def test_a_method_says_in_one_short_function_what_is_minimised(method):
    own = [
        (name, node)
        for name, node in functions()
        if f"methods/{method}.py:" in name
        and (ast.get_docstring(node) or "").startswith("What is minimised")
    ]
    assert len(own) == 1
    assert lines_of(own[0][1]) <= MOST_LINES_OF_A_LOSS, own[0][0]


def test_the_ways_of_a_batch_name_files_that_are_there():
    page = architecture.PAGE.read_text(encoding="utf-8")
    for title, most in (
        ("## A batch through a Send-VAE step", 11),
        ("## A batch through an SFD step", 15),
    ):
        section = page.split(title)[1].split("\n## ")[0]
        files = re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE)
        assert 5 < len(files) <= most
        for file in files:
            is_recipe = file.endswith(".yaml")
            path = architecture.ROOT / file if is_recipe else architecture.PACKAGE / f"{file}.py"
            assert path.is_file(), file


def test_the_figure_is_drawn_from_the_table(tmp_path):
    architecture.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
