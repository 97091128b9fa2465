"""Typed settings: reading YAML, overriding, and messages that people can act on."""

import copy
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from semtok.errors import UserError, did_you_mean
from semtok.sampler.config import Config

ConfigType = TypeVar("ConfigType", bound=Config)


_PRESETS = ("diffusion.network", "method.diffusion.network")
"""Settings that name a preset, or change one: ``SiT-B/2``, or ``{preset: SiT-B/2, qk_norm: true}``."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as text; this loader reads it as the number that was meant."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML mapping.

    Raises:
        UserError: the file is missing, is not YAML, or holds something other than a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as text ({error})") from None
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable"
        raise UserError(f"{path}{where}: not valid YAML ({problem})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a recipe; expected 'key: value' lines at the top level")
    return content


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as a flat mapping of dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Returns a copy of ``content`` with dotted ``key=value`` settings applied; values are YAML.

    A setting below one that names a preset changes that preset.

    Raises:
        UserError: an override is not of the form ``key=value``, its value is not YAML, or a shell has made several
            of one.
    """
    content = copy.deepcopy(content)
    for one, other in pairwise(overrides):
        if one != other and one.partition("=")[0] == other.partition("=")[0]:
            raise UserError(
                f"override {other!r} follows {one!r}; give one value, in quotes if it holds {{…}}, which shells expand"
            )
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(
                f"override {override!r}: expected key=value, for example train.steps=200"
            )
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML") from None
        *parents, last = key.split(".")
        node = content
        for depth, parent in enumerate(parents, start=1):
            if not isinstance(node.get(parent), dict):
                named = isinstance(node.get(parent), str) and ".".join(parents[:depth]) in _PRESETS
                node[parent] = {"preset": node[parent]} if named else {}
            node = node[parent]
        node[last] = value
    return content


def parse(model: type[ConfigType], content: dict[str, Any], place: str) -> ConfigType:
    """Validates ``content`` as ``model``; ``place`` (a file name) starts every message.

    Raises:
        UserError: the first unknown key, wrong type or impossible combination.
    """
    try:
        text = json.dumps(content)
    except (TypeError, ValueError) as error:  # dates, bytes, a mapping that holds itself
        raise UserError(
            f"{place}: a value is of a kind that recipes can't hold ({error})"
        ) from None
    try:
        # JSON mode lets lists stand for tuples while everything else stays strict.
        return model.model_validate_json(text)
    except ValidationError as error:
        raise UserError(f"{place}: {_explain(model, content, error)}") from None


def _explain(model: type[BaseModel], content: dict[str, Any], error: ValidationError) -> str:
    problem = min(error.errors(), key=lambda each: _rank(each, content))
    kind, value = problem["type"], problem["input"]
    keys = _keys(problem, content)
    key = ".".join(keys)
    if kind == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        hint = did_you_mean(keys[-1], known, f"known here: {', '.join(sorted(known))}", cutoff=0.5)
        return f"unknown key '{key}'; {hint}"
    if not keys and kind == "model_type":  # no mapping at all
        return f"expected settings, got {value!r}"
    if kind == "missing" and isinstance(problem["loc"][-1], int):
        return f"{key}: too few values, got {value!r}"
    if kind == "missing":
        key = ".".join([*keys, str(problem["loc"][-1])])
        return f"'{key}' is missing; give {key}=…"
    message = problem["msg"].removeprefix("Value error, ")
    if key and message.startswith(f"{key}."):  # a check of a section names its setting itself
        return message
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {value!r}"


def _rank(problem: ErrorDetails, content: dict[str, Any]) -> int:
    """The lowest is told: an unknown key, as the likeliest slip. Where a setting takes values of several kinds,
    pydantic reports each of them; those that the value is not even meant as come last."""
    if problem["type"] == "extra_forbidden":
        return 0
    names_kind = [str(part) for part in problem["loc"][-1:]] != _keys(problem, content)[-1:]
    return 2 if names_kind and problem["type"].endswith("_type") else 1


def _keys(problem: ErrorDetails, content: Any) -> list[str]:
    """A problem's place in what was given. Its location holds names of types too, where a setting takes several."""
    keys = []
    for part in problem["loc"]:
        known = content if isinstance(content, dict) else ()
        if part in (range(len(content)) if isinstance(content, list) else known):
            keys.append(str(part))
            content = content[part]
    return keys


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    models = [model]
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        inner = [m for field in fields for m in _models_in(field.annotation)]
        models = inner or [m for m in models if m.__name__ == part] or models
    return {name for m in models for name in m.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for argument in get_args(annotation) for m in _models_in(argument)]
