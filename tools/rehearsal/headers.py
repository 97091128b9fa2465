"""The commands that stand in the comments at the head of a recipe: what a user copies is what is rehearsed."""

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from semtok.errors import UserError

TRAINING = ("train_tokenizer", "train_dit")
_COMMAND = re.compile(
    r"(?:(?:accelerate launch|torchrun|python3?)\s+(?:-\S+\s+)*)?(?:tools/(\w+)\.py|semtok\s+(\w+))\s+(.+)"
)
# Of a sample command: which model, where to, and how many images are the rehearsal's.
_OWN_OPTIONS = ("--output", "--num", "--batch-size")
_FEW_STEPS = "2"


@dataclass(frozen=True)
class Sampling:
    """A sample command.

    Attributes:
        options: as they stand there, without the model, its guide, the output and how many images; of few steps.
        weak: the model that guides; None: there is none.
    """

    options: tuple[str, ...] = ()
    weak: str | None = None


@dataclass(frozen=True)
class Header:
    """What the head of a recipe says.

    Attributes:
        words: options and settings of its training command, beside the recipe, the run folder, and settings
            whose value is an absolute path: they are places of somebody's machine.
        output: the run folder; None: the command's default.
        samplings: its sample commands, of those that differ only in numbers other than 1 the first: a guidance of 1 is
            none.
    """

    words: tuple[str, ...] = ()
    output: str | None = None
    samplings: tuple[Sampling, ...] = ()


def read_header(path: Path) -> Header:
    """Reads the comments before a recipe's first key. A recipe without commands there has an empty header."""
    words: tuple[str, ...] = ()
    output, has_training = None, False
    samplings: dict[tuple[str, ...], Sampling] = {}
    for command, given in _commands(path):
        if command in TRAINING and not has_training and _is_of(path, given):
            output, rest = take(given, "--output")
            words = tuple(w for w in _without_recipe(path, rest) if not _is_absolute(w))
            has_training = True
        elif command == "sample":
            sampling = _sampling(given)
            kind = *(_kind(word) for word in sampling.options), str(sampling.weak is not None)
            samplings.setdefault(kind, sampling)
    return Header(words, output, tuple(samplings.values()))


def take(words: Sequence[str], option: str) -> tuple[str | None, list[str]]:
    """An option's value, and the words without both; None: it is not given."""
    rest, value = [], None
    waiting = iter(words)
    for word in waiting:
        if word == option:
            value = next(waiting, None)
        elif word.startswith(f"{option}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def _commands(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Names of commands and their words, in order."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        found = _COMMAND.fullmatch(line)
        if found is None:
            continue
        try:
            words = shlex.split(found[3], comments=True)
        except ValueError as error:
            raise UserError(f"{path}: the command '{line}' can't be read ({error})") from None
        yield found[1] or found[2], words


def _is_of(path: Path, words: Sequence[str]) -> bool:
    """Whether a training command starts this recipe's run, rather than going on with it or starting another's."""
    return "--resume" not in words and any(Path(word).name == path.name for word in words)


def _without_recipe(path: Path, words: Sequence[str]) -> list[str]:
    _, rest = take(words, "--recipe")
    return [word for word in rest if Path(word).name != path.name]


def _is_absolute(word: str) -> bool:
    return word.partition("=")[2].startswith("/")


def _sampling(words: Sequence[str]) -> Sampling:
    weak, rest = take(words[1:], "--weak")  # the model comes first
    for option in _OWN_OPTIONS:
        _, rest = take(rest, option)
    steps, rest = take(rest, "--steps")
    return Sampling((*rest, *(("--steps", _FEW_STEPS) if steps is not None else ())), weak)


def _kind(word: str) -> str:
    try:
        return word if float(word) == 1 else "number"
    except ValueError:
        return word
