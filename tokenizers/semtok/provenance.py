"""Where a recipe's settings come from, and what differs from the official run: read from its comments.

A recipe with published settings opens with a title and these sections, each a list of one fact per bullet
(``Commands`` is plain text):

    # Commands:  # Hardware:  # Expected:  # Sources:  # Differs:  # Unknown:

``Sources`` explains the tags; bullets of ``Differs`` and ``Unknown`` begin with what they are about and a colon. Beside
each setting stands one of

    # [TAG] remark                      as published there
    # ours: [TAG] official; why         differs from the official value, which is named, and why or with what effect
    # closest choice: remark            the official value is not known
    # run: remark                       of this run or machine; changes nothing that is learned

A comment goes on in lines of their own that begin with ``#`` and three spaces or more. Settings without a comment share
that of the section that they stand in.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from semtok.errors import UserError
from semtok.settings import read_yaml

SECTIONS = ("Commands", "Hardware", "Expected", "Sources", "Differs", "Unknown")
NOTHING = "nothing"
"""What a section says that has no bullets."""

Kind = Literal["published", "ours", "closest choice", "run"]

_TAG = r"\[[A-Z][\w-]*\]"
_TAGS = rf"{_TAG}(?:, {_TAG})*"
_FORMS: dict[Kind, str] = {
    "published": rf"{_TAGS}(?P<why>[ ,;].+)?",
    "ours": rf"ours: (?P<official>{_TAGS} [^;]+); (?P<why>.+)",
    "closest choice": r"closest choice: (?P<why>.+)",
    "run": r"run: (?P<why>.+)",
}


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe.

    Attributes:
        name: dotted, as on a command line.
        value: as it is written.
        official: of ``ours``: the official value, with the tag of its source.
        why: what else the comment says; may be empty.
    """

    name: str
    value: str
    kind: Kind
    official: str
    why: str


@dataclass(frozen=True)
class Fact:
    """A bullet of ``Differs`` or ``Unknown``: what it is about, and what it says."""

    about: str
    text: str


@dataclass(frozen=True)
class Provenance:
    """What a recipe says of itself.

    Attributes:
        commands: lines, to be pasted.
        hardware, expected: bullets.
        sources: by tag, without brackets.
    """

    title: str
    commands: tuple[str, ...]
    hardware: tuple[str, ...]
    expected: tuple[str, ...]
    sources: dict[str, str]
    differs: tuple[Fact, ...]
    unknown: tuple[Fact, ...]
    settings: tuple[Setting, ...]

    def of_kind(self, kind: Kind) -> tuple[Setting, ...]:
        """The settings whose comments are of that kind."""
        return tuple(setting for setting in self.settings if setting.kind == kind)


def read_title(path: Path) -> str:
    """The first sentence of a recipe's opening comment, for lists; empty where there is none."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
    return re.split(r"(?<=\.)\s", " ".join(words), maxsplit=1)[0].removesuffix(".")


def read_provenance(path: Path) -> Provenance:
    """Reads a recipe's comments.

    Raises:
        UserError: the file is no recipe, or a section, a setting's comment or a tag is not as it is to be.
    """
    read_yaml(path)  # what is not YAML is told as everywhere
    text = path.read_text(encoding="utf-8")
    sections = _sections(text, str(path))
    sources = {}
    for bullet in _bullets(sections["Sources"], f"{path}: Sources"):
        tag = re.fullmatch(r"\[([\w-]+)\] (.+)", bullet)
        if tag is None:
            raise UserError(f"{path}: Sources: expected '[TAG] source', got '{bullet}'")
        sources[tag[1]] = tag[2]
    for tag in re.findall(rf"(?<!\w){_TAG}", text):
        if tag[1:-1] not in sources:
            raise UserError(f"{path}: {tag} is not among its Sources: {', '.join(sources)}")
    return Provenance(
        read_title(path),
        tuple(sections["Commands"]),
        _bullets(sections["Hardware"], f"{path}: Hardware"),
        _bullets(sections["Expected"], f"{path}: Expected"),
        sources,
        _facts(sections["Differs"], f"{path}: Differs"),
        _facts(sections["Unknown"], f"{path}: Unknown"),
        tuple(_settings(text, str(path))),
    )


# The head ----------------------------------------------------------------------------------------


def _sections(text: str, place: str) -> dict[str, list[str]]:
    """Lines of each section, without what all of them are indented by."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        opening = re.match(rf"# ({'|'.join(SECTIONS)}):\s*(.*)", line)
        if opening:
            lines = found[opening[1]] = [opening[2]] if opening[2] else []
        elif found:
            lines.append(line.removeprefix("#").removeprefix("   ").rstrip())
    missing = [name for name in SECTIONS if name not in found]
    if missing:
        raise UserError(f"{place}: its opening comment has no section '{missing[0]}:'")
    return found


def _bullets(lines: list[str], place: str) -> tuple[str, ...]:
    if lines == [NOTHING]:
        return ()
    bullets: list[str] = []
    for line in filter(None, lines):
        if line.startswith("- "):
            bullets.append(line[2:])
        elif line.startswith("  ") and bullets:
            bullets[-1] += f" {line.strip()}"
        else:
            raise UserError(f"{place}: expected '- ' and one fact, got '{line}'")
    if not bullets:
        raise UserError(f"{place}: is empty; say '{NOTHING}'")
    return tuple(bullets)


def _facts(lines: list[str], place: str) -> tuple[Fact, ...]:
    facts = []
    for bullet in _bullets(lines, place):
        about, colon, text = bullet.partition(": ")
        if not colon or "[" in about:
            raise UserError(f"{place}: expected what it is about and a colon first, got '{bullet}'")
        facts.append(Fact(about, text))
    return tuple(facts)


# The settings ------------------------------------------------------------------------------------


def _settings(text: str, place: str) -> Iterator[Setting]:
    root = yaml.compose(text, yaml.SafeLoader)
    yield from _leaves(root, (), "", text.splitlines(), place)


def _leaves(
    node: yaml.Node, names: tuple[str, ...], inherited: str, lines: list[str], place: str
) -> Iterator[Setting]:
    """The settings in a node.

    Args:
        names: of the sections around it.
        inherited: the comment of the nearest of them that has one.
    """
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            # A section's comment stands beside its name, a setting's behind its value.
            begins = isinstance(value, yaml.MappingNode) and not value.flow_style
            own = _comment(lines, key.end_mark if begins else value.end_mark)
            yield from _leaves(value, (*names, key.value), own or inherited, lines, place)
        return
    name = ".".join(names)
    for kind, form in _FORMS.items():
        said = re.fullmatch(form, inherited)
        if said:
            groups = said.groupdict()
            why = inherited if kind == "published" else groups["why"]
            yield Setting(name, _written(node, lines), kind, groups.get("official") or "", why)
            return
    where = f"{place}, line {node.start_mark.line + 1}: {name}"
    raise UserError(
        f"{where}: expected a comment '[SOURCE] …', 'ours: [SOURCE] official value; why', "
        f"'closest choice: …' or 'run: …', got '{inherited}'"
    )


def _comment(lines: list[str], mark: yaml.Mark) -> str:
    """What is commented behind a place, and goes on in the following lines."""
    found = re.search(r"(?:^|\s)# ?(.*)$", lines[mark.line][mark.column :])
    if found is None:
        return ""
    words = [found[1].strip()]
    for line in lines[mark.line + 1 :]:
        more = re.fullmatch(r"\s*#\s{3,}(.+)", line)
        if more is None:
            break
        words.append(more[1].strip())
    return " ".join(words)


def _written(node: yaml.Node, lines: list[str]) -> str:
    begin, end = node.start_mark, node.end_mark
    if begin.line == end.line:
        return lines[begin.line][begin.column : end.column]
    return " ".join(line.strip() for line in lines[begin.line : end.line])
