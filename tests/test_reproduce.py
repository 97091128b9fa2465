"""The page of the papers' runs: its commands are parsed, follow one another, and their recipes are whole."""

import argparse
import re
import shlex
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from semtok.commands.cli import Parser

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reproduce.md"
FETCHED = ("weights/", "stabilityai/", "guided-diffusion", "/data/imagenet")
"""What the page says that it is not made by its commands begins with these."""


@dataclass
class Page:
    """Commands in their order, words with the page's names put in.

    Attributes:
        others: commands that are none of this project's.
    """

    commands: list[list[str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@cache
def page() -> Page:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, str] = {}
    found = Page()
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        body = re.sub(r"\w+\(\) \{\n.*?\n\}\n", _function(names), block, flags=re.DOTALL)
        for line in body.replace("\\\n", " ").splitlines():
            assignment = re.fullmatch(r"(\w)=(.*)", line)
            if assignment:
                names[assignment[1]] = shlex.split(assignment[2])[0]
            elif line.strip():
                _add(found, line, names)
    return found


def _function(names: dict[str, str]):
    def keep(match: re.Match[str]) -> str:
        name, body = re.match(r"(\w+)\(\) \{\n(.*)\n\}\n", match[0], re.DOTALL).groups()
        names[name] = body
        return ""

    return keep


def _add(found: Page, line: str, names: dict[str, str]) -> None:
    word, _, rest = line.strip().partition(" ")
    if word in names and len(word) > 1:  # a function of the page's own
        for inner in names[word].splitlines():
            _add(found, inner.replace('"$1"', rest), names)
        return
    for name, value in names.items():
        if len(name) == 1:
            line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
    assert "$" not in line, f"a name that the page does not explain: {line}"
    words = shlex.split(line, comments=True)
    tool = next((i for i, w in enumerate(words) if w.startswith("tools/")), None)
    if tool is None:
        found.others.append(line)
    else:
        found.commands.append(words[tool:])


class _Parsed(Exception):
    """Ends a command where its arguments are understood."""


def parsed(words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    def stop(self: Parser, args=None, namespace=None):
        raise _Parsed(argparse.ArgumentParser.parse_args(self, args, namespace))

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(_Parsed) as caught:
        import_module(f"semtok.commands.{Path(words[0]).stem}").main(words[1:])
    return caught.value.args[0]


def resolved(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict:
    """The recipe of a training command, as the command itself prints it."""
    main = import_module(f"semtok.commands.{Path(words[0]).stem}").main
    assert main([*words[1:], "--print-recipe"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def _output(words: list[str]) -> str:
    return words[words.index("--output") + 1]


def test_the_page_has_a_chain_for_every_recipe(monkeypatch):
    monkeypatch.chdir(ROOT)
    named = {word for words in page().commands for word in words if word.endswith(".yaml")}
    there = {str(p.relative_to(ROOT)) for p in (ROOT / "recipes" / "imagenet256").glob("*.yaml")}
    assert there - named == {
        "recipes/imagenet256/vae_f8d4.yaml"
    }  # of which no paper reports a number
    assert named <= there


def test_every_command_is_understood(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in page().commands:
        if words[0].startswith("tools/train_"):
            resolved(words, capsys)
        else:
            parsed(words, monkeypatch)


def test_what_a_command_reads_was_made_before_it_or_is_said_to_be_fetched(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    made: dict[str, list[int]] = {}
    for words in page().commands:
        output = _output(words) if "--output" in words else None
        read = [w.split("=", 1)[-1] for w in words[1:] if "/" in w and w != output]
        read = [w for w in read if not w.startswith("SiT-")]  # the name of a network
        for path in read:
            if path.endswith(".yaml") or path.startswith(FETCHED):
                continue
            run, _, step = path.partition("/exports/")
            assert run in made, f"{path} is read before it is made: {shlex.join(words)}"
            assert not step or int(step) in made[run], f"{path} is not exported"
        if output is not None:
            assert output not in made, f"two commands write {output}"
            training = words[0].startswith("tools/train_")
            made[output] = resolved(words, capsys)["train"]["export_at"] if training else []


def test_every_set_of_images_is_fifty_thousand_and_is_scored(monkeypatch):
    monkeypatch.chdir(ROOT)
    drawn, scored = set(), set()
    for words in page().commands:
        if words[0] == "tools/sample.py":
            assert parsed(words, monkeypatch).num == 50_000
            drawn.add(_output(words))
        elif words[:2] == ["tools/evaluate.py", "generation"]:
            scored.add(words[words.index("--images") + 1])
    assert drawn == scored and len(drawn) > 20
