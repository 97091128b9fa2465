"""The rows of a comparison, as options and a file of variants name them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comparison.asked import Row
from semtok.errors import UserError
from semtok.settings import Config, parse, read_yaml

_FORM = "expected NAME: {tokenizer: REF, settings: [key=value, …]}"


class _Variant(Config):
    """One entry of a file of variants, under its name."""

    tokenizer: str
    settings: tuple[str, ...] = ()


def read_rows(
    tokenizers: str, variants: Sequence[Sequence[str]], file: Path | None
) -> tuple[Row, ...]:
    """Rows in the order in which they are reported: tokenizers, the file's variants, and those of the command line.

    Args:
        tokenizers: references or NAME=REF, with commas between.
        variants: words of each ``--variant``.
        file: YAML, see ``--variants``; None: there is none.

    Raises:
        UserError: what is not of these forms, by name.
    """
    rows = [_row(name) for name in tokenizers.split(",") if name]
    named = {row.name: row.tokenizer for row in rows}
    rows += _in_file(file, named) if file is not None else []
    rows += [_variant(words, named) for words in variants]
    return tuple(rows)


def _row(word: str) -> Row:
    """The row of REF, or of NAME=REF."""
    name, equals, reference = word.partition("=")
    if not equals:
        name, reference = "+".join(map(_name, word.split("@"))), word
    content = {"name": name, "tokenizer": reference}
    return parse(Row, content, f"--tokenizers {word} (or NAME=REF)")


def _name(reference: str) -> str:
    """What a reference is called: the last part of a path, an export by its run."""
    path = Path(reference)
    return (path.parent if path.name == "export" else path).name


def _variant(words: Sequence[str], named: dict[str, str]) -> Row:
    """One more row; its REF may be the name that a row of ``--tokenizers`` has."""
    if len(words) < 2 or not _are_settings(words[2:]):
        raise UserError(f"--variant {' '.join(words)}: expected NAME REF key=value …")
    content = {"name": words[0], "tokenizer": named.get(words[1], words[1]), "settings": words[2:]}
    return parse(Row, content, "--variant")


def _in_file(file: Path, named: dict[str, str]) -> list[Row]:
    content = read_yaml(file)
    if not content:
        raise UserError(f"{file}: names no variant; {_FORM}")
    return [_of_entry(f"{file}: {name}", name, entry, named) for name, entry in content.items()]


def _of_entry(place: str, name: Any, entry: Any, named: dict[str, str]) -> Row:
    if not isinstance(entry, dict):
        raise UserError(f"{place}: {_FORM}")
    variant = parse(_Variant, entry, place)
    if not _are_settings(variant.settings):
        raise UserError(f"{place}: settings: expected words key=value")
    tokenizer = named.get(variant.tokenizer, variant.tokenizer)
    return parse(Row, {"name": name, "tokenizer": tokenizer, "settings": variant.settings}, place)


def _are_settings(words: Sequence[str]) -> bool:
    return all("=" in word for word in words)
