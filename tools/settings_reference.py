"""Writes docs/settings.md out of the settings' classes and their docstrings: ``python tools/settings_reference.py``."""

import argparse
import ast
import inspect
import json
import re
import textwrap
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from semtok.data.images.encoded import StoredConfig
from semtok.data.images.kinds import data_config_class
from semtok.data.source import DataConfig
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.methods.composite import CompositeConfig
from semtok.recipe import DiffusionRecipe, TokenizerRecipe
from semtok.registry import get_method
from semtok.sampler.sampling import SamplerConfig
from semtok.settings import Config
from semtok.teachers import TeacherConfig
from semtok.training.scoring import ScoreConfig
from semtok.training.train_config import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
METHODS = ("vae", "send_vae", "va_vae", "repae", "rae", "reglue", "semvae", "redi")
KINDS = ("shapes", "folder", "tars", "parquet", "mds")
HEAD = """# Settings

Every setting of a recipe, with its type, its default and its meaning. `python tools/settings_reference.py` makes this
page from the docstrings of the code.

A recipe is a YAML file. On the command line `section.name=value` overrides a setting, as in `train.steps=200`. The
value is YAML. Quote values with braces or spaces: `'diffusion.repa={weight: 0.5}'`. `--print-recipe` prints a recipe
with every default and trains nothing. An unknown name and a value of the wrong type are errors before anything is
loaded. Options of commands (`--output`, `--resume`, …) are no settings: `semtok COMMAND --help` lists them.

A dash in the column of defaults means that a recipe must give the setting. `null` means "none".
"""
_ELSEWHERE: Mapping[Any, str] = {DiffusionConfig: "diffusion", SamplerConfig: "sampler"}
"""Settings that have sections of their own, by these titles."""
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


@cache
def _meanings(config: type[Config]) -> dict[str, str]:
    """Docstrings below the fields of a class, by field; a base's where the class has none of its own."""
    found: dict[str, str] = {}
    for each in reversed(config.__mro__):
        if each is Config or not issubclass(each, Config):
            continue
        origin = each.__pydantic_generic_metadata__["origin"] or each
        body = ast.parse(textwrap.dedent(inspect.getsource(origin))).body[0].body
        for field, after in zip(body, body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(after, ast.Expr):
                continue
            if isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found[field.target.id] = inspect.cleandoc(after.value.value)
    return found


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return "null"
    if isinstance(annotation, TypeVar):
        return "settings of another method"
    if annotation in _ELSEWHERE:
        return f"settings, as [`{_ELSEWHERE[annotation]}`](#{_ELSEWHERE[annotation]})"
    if origin is Annotated:
        return _bounded(_type(args[0]), ", ".join(filter(None, map(_bounds, args[1:]))))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in args)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type(part) for part in args))
    if origin is tuple:
        inner = [_type(part) for part in args if part is not Ellipsis]
        return f"list of {inner[0]}" if Ellipsis in args else f"[{', '.join(inner)}]"
    if origin is not None and issubclass(origin, Mapping):
        return f"mapping of {_type(args[0])} to {_type(args[1])}"
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return "settings, below"
    return {"str": "text", "bool": "true or false", "int": "whole number", "float": "number"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _bounded(kind: str, bounds: str) -> str:
    """A type with bounds that its field has for all but ``null``."""
    return re.sub(r"(?= or null$)|$", f" {bounds}", kind, count=1) if bounds else kind


def _bounds(part: Any) -> str:
    parts = part.metadata if isinstance(part, FieldInfo) else [part]
    return ", ".join(
        f"{sign} {getattr(each, name)}"
        for each in parts
        for name, sign in _SIGNS.items()
        if getattr(each, name, None) is not None
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "–"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return "their defaults"
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def _cell(text: str) -> str:
    return re.sub(
        r"\s+", " ", re.sub(r"\bNone\b", "null", text).replace("``", "`").replace("|", "\\|")
    ).strip()


def _nested(annotation: Any) -> list[type[Config]]:
    if annotation in _ELSEWHERE:
        return []
    if inspect.isclass(annotation) and issubclass(annotation, Config):
        return [annotation]
    return [each for part in get_args(annotation) for each in _nested(part)]


def table(config: type[Config], prefix: str, *, base: type[Config] = Config) -> str:
    """The rows of a class's fields and, after them, those of the settings that it holds.

    Args:
        prefix: the dotted name of the section.
        base: what another table has already; its fields are passed by where nothing about them is new.
    """
    rows, below = [], []
    for name, field in config.model_fields.items():
        known = base.model_fields.get(name)
        same = known is not None and known.default == field.default
        if (same and known.annotation == field.annotation) or field.exclude:
            continue
        kind = _bounded(_type(field.annotation), _bounds(field))
        meaning = _cell(_meanings(config).get(name, ""))
        rows.append(f"| `{prefix}.{name}` | {_cell(kind)} | {_default(field)} | {meaning} |")
        below += [(f"{prefix}.{name}", each) for each in _nested(field.annotation)]
    text = ""
    if rows:
        text = (
            "| setting | type | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    for where, each in below:
        text += f"\n**`{where}`**: {_about(each)}\n\n{table(each, where)}"
    return text


def _about(config: type[Config]) -> str:
    return _cell(inspect.getdoc(config).split("\n\n")[0])


def _section(title: str, config: type[Config], prefix: str, *, base: type[Config] = Config) -> str:
    return f"{title}\n\n{_about(config)}\n\n{table(config, prefix, base=base)}"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    whose = "\n".join(
        f"- {what}: " + ", ".join(f"`{name}`" for name in recipe.model_fields)
        for what, recipe in (
            ("a tokenizer's recipe", TokenizerRecipe),
            ("a diffusion transformer's recipe", DiffusionRecipe),
        )
    )
    texts = {
        **_meanings(TokenizerRecipe),
        **_meanings(DiffusionRecipe),
    }
    own = "\n".join(f"- `{name}`: {_cell(texts[name])}" for name in ("tokenizer", "plugins"))
    parts.append(f"The sections and settings at the top level:\n\n{whose}\n\n{own}\n")
    parts.append(_section("## train", TrainConfig, "train"))
    parts.append(_section("## data: every kind", DataConfig, "data"))
    stored = _section(
        "## data: folder, tars, parquet and mds", StoredConfig, "data", base=DataConfig
    )
    parts.append(stored)
    for kind in KINDS:
        config = data_config_class(kind, place="data.kind")
        base = StoredConfig if issubclass(config, StoredConfig) else DataConfig
        parts.append(_section(f"## data.kind={kind}", config, "data", base=base))
    both = _section("## method: reglue, semvae and redi", CompositeConfig, "method")
    for method in METHODS:
        config = get_method(method, place="method.name").config
        base, note = Config, ""
        if method in ("send_vae", "va_vae"):
            base = get_method("vae", place="method.name").config
            note = "\nAnd all settings of [`vae`](#methodnamevae).\n"
        elif issubclass(config, CompositeConfig):
            base = CompositeConfig
            note = "\nAnd the settings that [all three have](#method-reglue-semvae-and-redi).\n"
        parts.append(_section(f"## method.name={method}", config, "method", base=base) + note)
    parts.append(both)
    parts.append(_section("## teacher", TeacherConfig, "teacher"))
    parts.append(_section("## diffusion", DiffusionConfig, "diffusion"))
    parts.append(_section("## sampler", SamplerConfig, "sampler"))
    parts.append(_section("## score", ScoreConfig, "score"))
    return "\n".join(parts)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE, help="default: docs/settings.md")
    output = parser.parse_args().output
    output.write_text(page(), encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
