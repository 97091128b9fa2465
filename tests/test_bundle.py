"""The bundler: what it takes along, what it leaves out, and what it refuses."""

import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

from semtok.hub.bundle import bundle, requirements


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes the modules of a package ``house`` and bundles ``house.entry``."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**modules: str) -> str:
        (tmp_path / "house").mkdir()
        (tmp_path / "house/__init__.py").touch()
        for name, text in modules.items():
            (tmp_path / "house" / f"{name}.py").write_text(textwrap.dedent(text))
        return bundle("house.entry", note="Generated.")

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "house"]:
        del sys.modules[name]


def run(source: str, name: str = "bundled") -> ModuleType:
    """Runs a source as a module of its own."""
    module = sys.modules[name] = ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    del sys.modules[name]
    return module


def test_what_is_needed_comes_along_as_it_stands_and_nothing_else(package):
    source = package(
        entry='''
        """The entry."""

        from collections.abc import Callable

        import numpy as np

        from house.middle import Shape, area


        def main(function: Callable, unused: Heavy | None = None) -> float:  # noqa
            heavy = area(Shape(2.0, 3.0))  # a local name, and none of the package
            return function(heavy)
        ''',
        middle='''
        """Never copied."""

        import math
        import sqlite3
        from dataclasses import dataclass

        from house.base import SCALE, Heavy, double

        UNUSED = sqlite3.connect

        # In square metres.
        FACTOR: float = 2.0
        """Of all areas."""


        @dataclass(frozen=True)
        class Shape:
            """Two sides."""

            width: float
            height: float  # the other one


        def area(shape: Shape, other: Heavy | None = None) -> float:
            """Twice the area."""
            half = double(math.sqrt(shape.width**2) * shape.height) * SCALE
            return FACTOR * half


        def nobody_asks() -> Heavy:
            return Heavy()
        ''',
        base="""
        import ftplib

        SCALE, OTHER = 0.5, 0.25


        class Heavy(ftplib.FTP):
            pass


        def double(x):
            return 2 * x if x else double(x)
        """,
    )
    assert source.startswith(
        '"""The entry.\n\nGenerated.\n"""\n\nfrom __future__ import annotations\n'
    )
    assert '# In square metres.\nFACTOR: float = 2.0\n"""Of all areas."""\n' in source
    assert (
        "    height: float  # the other one\n" in source and "SCALE, OTHER = 0.5, 0.25\n" in source
    )
    for left_out in (
        "class Heavy",
        "ftplib",
        "sqlite3",
        "numpy",
        "UNUSED",
        "nobody_asks",
        "from house",
    ):
        assert left_out not in source
    assert source.index("def double") < source.index("class Shape") < source.index("def main")
    assert run(source).main(lambda x: x + 1) == 13.0
    assert requirements(source) == []


def test_a_pydantic_models_fields_come_along(package):
    source = package(
        entry="""
        from house.base import Config, Name, Side


        class Model(Config):
            name: Name = "a"
            side: Side

            def other(self) -> "Missing":
                side: Missing = self.side
                return side
        """,
        base="""
        from typing import Annotated, Literal

        from pydantic import BaseModel, Field

        Name = Literal["a", "b"]
        Side = Annotated[int, Field(ge=1)]


        class Config(BaseModel):
            pass
        """,
    )
    model = run(source).Model
    assert model(side=2).other() == 2 and requirements(source) == ["pydantic"]
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        model(side=0)


def test_annotations_that_can_be_evaluated_are(package):
    source = package(
        entry="""
        from pathlib import Path


        def main(place: Path) -> str:
            return place.name
        """
    )
    assert run(source).main.__annotations__ == {"place": Path, "return": str}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "from house.one import a\nfrom house.two import b\nx = a() + b()",
            "two things named '_helper' are needed: of house.one and of house.two; rename one",
        ),
        (
            "from house.one import a\nfrom collections import deque as _helper\nx = a(), _helper()",
            "two things named '_helper'",
        ),
        (
            "from house.one import a as other\nx = other()",
            "import other from house.one by its own name",
        ),
        ("from house import one\nx = one.a()", "house: 'one' is defined nowhere"),
        ("from house.one import *\nx = a()", "line 1: relative and star imports"),
        (
            "from house.two import late\nx = late()",
            "line 7: 'late' imports from house when it runs",
        ),
        (
            "from house.two import TABLE\nx = TABLE",
            "line 12: defines 'TABLE' again or does something",
        ),
        ("from house.two import again\nx = again", "line 15: defines 'again' again"),
        ("def x():\n    return nothing", "house.entry: 'nothing' is defined nowhere"),
        (
            "from house.one import y\nfrom house.two import sum\nx = sum([y])",
            "'sum' are needed: of house.two and of builtins",
        ),
    ],
)
def test_what_would_mean_something_else_is_refused(package, entry, message):
    one = "def _helper():\n    return 1\n\n\ndef a():\n    return _helper()\n\n\ny = sum([1])\n"
    two = """
        def _helper():
            return 2

        def b():
            return _helper()

        def late():
            from house.one import a
            return a()

        TABLE = {}
        TABLE["b"] = 1

        again = 1
        again = 2

        def sum(numbers):
            return 0
        """
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        package(entry=entry, one=one, two=textwrap.dedent(two).lstrip())
