"""Blocks of README and docs/: commands as the shell hands them on, and their own parsers.

A page's bash blocks run in bash one after the other, so that names, loops, braces and functions mean what they mean to
a reader. No program is started: what the page calls is a function that notes its words.
"""

import argparse
import importlib
import os
import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from semtok.commands.cli import Parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_NOTED = ("python", "semtok", "accelerate", "torchrun", "sbatch")
_PASSED_BY = ("pip", "git", "awk", "find", "cat", "cd", "ruff", ".ci/run")
_TOOLS = {
    "benchmark": "benchmarks",
    "compare": "comparison",
    "rehearse": "rehearsal",
    "results": "results_page",
    "soak": "soaking",
}


@dataclass(frozen=True)
class Command:
    """One command of this library on a page.

    Attributes:
        module: where its ``main`` is.
        words: its arguments.
    """

    page: str
    module: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {self.module} {' '.join(self.words)}"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language, in their order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def _noted(page: Path, folder: Path) -> list[list[str]]:
    """The words of each call, as bash expands them; an unknown program is an error."""
    noting = " ".join(f'{n}() {{ printf "%s\\0" {n} "$@" "" >&3; }};' for n in _NOTED)
    passing = " ".join(f"{name}() {{ :; }};" for name in _PASSED_BY)
    script = "\n".join([f"set -eu; {noting} {passing}", *blocks(page, "bash")])
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "words"
    done = subprocess.run(
        ["/bin/bash", "-c", f"exec 3>words\n{script}"],
        cwd=folder,
        env={"PATH": "", "LC_ALL": os.environ.get("LC_ALL", "C.UTF-8")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{page.name}: {done.stderr}"
    calls: list[list[str]] = [[]]
    for word in record.read_text(encoding="utf-8").split("\0")[:-1]:
        if word:
            calls[-1].append(word)
        else:
            calls.append([])
    return calls[:-1]


@cache
def commands(page: Path, folder: Path) -> list[Command]:
    """This library's commands on a page, in their order, each once for each round of a loop.

    Args:
        folder: where redirections may write.
    """
    found = []
    for words in _noted(page, folder):
        if words[0] == "semtok":
            tool, rest = words[1], words[2:]
        elif words[0] == "sbatch":
            assert (ROOT / words[1]).is_file()
            tool, rest = words[2], words[3:]
        else:
            place = next((i for i, w in enumerate(words) if w.startswith("tools/")), None)
            if place is None:
                continue
            assert (ROOT / words[place]).is_file(), f"{page.name}: {words[place]}"
            tool, rest = Path(words[place]).stem, words[place + 1 :]
        room = _TOOLS.get(tool)
        module = f"{room}.command" if room else f"semtok.commands.{tool}"
        if rest or room or (ROOT / f"tokenizers/semtok/commands/{tool}.py").is_file():
            found.append(Command(page.name, module, tuple(rest)))
    return found


class _Parsed(Exception):
    """Ends a command where its arguments are understood."""


def parsed(command: Command, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What the command's own parser makes of its words.

    Raises:
        UserError: it does not understand them.
    """

    inner = False  # sub-commands have parsers of their own, which the outermost calls

    def stop_after(name: str):
        method = getattr(argparse.ArgumentParser, name)

        def parse(self: Parser, args=None, namespace=None):
            nonlocal inner
            if inner:
                return method(self, args, namespace)
            inner = True
            found = method(self, args, namespace)
            if isinstance(found, tuple):
                found, rest = found
                assert all(re.fullmatch(r"[\w.]+=.*", word) for word in rest), str(command)
            raise _Parsed(found)

        return parse

    main = importlib.import_module(command.module).main
    with monkeypatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args", "parse_known_args"):
            patch.setattr(Parser, name, stop_after(name))
        with pytest.raises(_Parsed) as caught:
            main(list(command.words))
    return caught.value.args[0]


def resolved(command: Command, capsys: pytest.CaptureFixture[str]) -> dict:
    """The recipe of a training command, as the command itself prints it."""
    main = importlib.import_module(command.module).main
    assert main([*command.words, "--print-recipe"]) == 0, str(command)
    return yaml.safe_load(capsys.readouterr().out)
