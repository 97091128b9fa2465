"""Typed settings: reading YAML, overriding, and messages that people can act on."""

import copy
import difflib
import json
import re
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from semtok.errors import UserError
from semtok.sampler.config import Config

ConfigType = TypeVar("ConfigType", bound=Config)


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


def apply_overrides(content: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Returns a copy of ``content`` with dotted ``key=value`` settings applied; values are YAML.

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
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
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
        raise UserError(f"{place}: {_explain(model, error)}") from None


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    problem = _likeliest(error)
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        *parents, last = location
        key = ".".join([*(part for part in parents if not _is_union_member(part)), last])
    else:
        key = ".".join(part for part in location if not _is_union_member(part))
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, problem["loc"][:-1])
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(sorted(known))}"
        return f"unknown key '{key}'; {hint}"
    if not location and problem["type"] == "model_type":  # no mapping at all
        return f"expected settings, got {problem['input']!r}"
    if problem["type"] == "missing" and location[-1].isdigit():
        return f"{key.removesuffix('.' + location[-1])}: too few values, got {problem['input']!r}"
    if problem["type"] == "missing":
        return f"'{key}' is missing; give {key}=…"
    message = problem["msg"].removeprefix("Value error, ")
    if key and message.startswith(f"{key}."):  # a check of a section names its setting itself
        return message
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}: {message[0].lower()}{message[1:]}, got {problem['input']!r}"


def _likeliest(error: ValidationError) -> ErrorDetails:
    """The problem to tell: an unknown key is the likeliest slip, so it is told first.

    Where a setting takes values of several kinds, pydantic reports each of them; those that the
    value is not even meant as are told last.
    """

    def rank(problem: ErrorDetails) -> int:
        if problem["type"] == "extra_forbidden":
            return 0
        last = str(problem["loc"][-1]) if problem["loc"] else ""
        return 2 if last and problem["type"].endswith("_type") and _is_union_member(last) else 1

    return min(error.errors(), key=rank)


def _is_union_member(part: str) -> bool:
    """Whether a part of a location is a type's name, which no key of a recipe is."""
    return part in ("int", "float", "str", "bool") or not re.fullmatch(
        r"[a-z_][a-z0-9_]*|\d+", part
    )


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            nested = [m for m in _models_in(field.annotation)]
            if nested:
                model = nested[0]
        else:  # a union member, named by its class
            model = next((m for m in Config.__subclasses__() if m.__name__ == part), model)
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType):
        return [m for arg in get_args(annotation) for m in _models_in(arg)]
    return []
