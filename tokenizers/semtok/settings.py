"""Typed settings: reading YAML, overriding, and messages that people can act on."""

import copy
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from semtok.errors import UserError, did_you_mean
from semtok.sampler.config import Config, first_changed

ConfigType = TypeVar("ConfigType", bound=Config)


_PRESETS = ("diffusion.network", "method.diffusion.network")
"""Settings that name a preset, or change one: ``SiT-B/2``, or ``{preset: SiT-B/2, qk_norm: true}``."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # libyaml is ten times as fast
    """YAML 1.1 reads ``1e-4`` as text; this loader reads it as the number that was meant."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


_MOST_VALUES, _DEEPEST = 100_000, 50
"""Of one YAML text, with every alias written out."""


def _load(text: str) -> Any:
    """What a YAML text says, if it is no more than anybody would write: a few lines of aliases can stand for more
    values than a machine holds.

    Raises:
        yaml.YAMLError: no YAML, or more than that.
    """
    try:
        content = yaml.load(text, Loader=_Loader)
    except (ValueError, LookupError, TypeError, AttributeError) as error:  # of 2020-13-45, or 0b
        raise yaml.MarkedYAMLError(problem=str(error)) from None
    except RecursionError:
        raise yaml.MarkedYAMLError(problem="nested too deeply") from None
    left, waiting = _MOST_VALUES, [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        if isinstance(inner, list | tuple | set):
            left -= len(inner)
            waiting += [(one, depth + 1) for one in inner]
        if left < 0 or depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem="too many values, or nested too deeply")
    return content


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
        content = _load(text)
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
        UserError: an override is not of the form ``key=value``, its value is not YAML, a shell has made several
            of one, or one is of a setting that another makes a single value.
    """
    content = copy.deepcopy(content)
    for one, other in pairwise(overrides):
        if one != other and one.partition("=")[0] == other.partition("=")[0]:
            raise UserError(
                f"override {other!r} follows {one!r}; give one value, in quotes if it holds {{…}}, which shells expand"
            )
    given: dict[str, tuple[str, Any]] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(
                f"override {override!r}: expected key=value, for example train.steps=200"
            )
        try:
            value = _load(text)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML") from None
        _check_agrees(key, value, override, given)
        given[key] = override, value
        *parents, last = key.split(".")
        node = content
        for depth, parent in enumerate(parents, start=1):
            if not isinstance(node.get(parent), dict):
                named = isinstance(node.get(parent), str) and ".".join(parents[:depth]) in _PRESETS
                node[parent] = {"preset": node[parent]} if named else {}
            node = node[parent]
        node[last] = value
    return content


def _check_agrees(
    key: str, value: Any, override: str, given: Mapping[str, tuple[str, Any]]
) -> None:
    """Raises UserError where one of two overrides is within the other's single value: one of them would have no effect.

    Args:
        given: by key, the overrides before and their values.
    """
    for other, (text, before) in given.items():
        within = key.startswith(f"{other}.") and not isinstance(before, dict)
        is_preset = isinstance(before, str) and other in _PRESETS
        around = other.startswith(f"{key}.") and not isinstance(value, dict)
        if (within and not is_preset) or around:
            raise UserError(f"override {override!r} contradicts {text!r}; leave one of them out")


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


def check_used(config: Config, place: str, because: str, *names: str) -> None:
    """Raises ValueError where one of these settings is not its default, as another leaves it without effect.

    Args:
        place: of the section that ``config`` is.
        because: of which setting.
    """
    name = first_changed(config, *names)
    if name is not None:
        default = type(config).model_fields[name].default
        shown = f"{default:g}" if isinstance(default, float) else default
        raise ValueError(
            f"{place}.{name} takes no effect with {because}; leave it out, or pass {place}.{name}={shown}"
        )


_OF_A_METHOD = "method.tokenizer"
"""The section that holds the settings of another method, whose checks name them ``method.…`` as they are alone."""


def _explain(model: type[BaseModel], content: dict[str, Any], error: ValidationError) -> str:
    problem = min(error.errors(), key=lambda each: _rank(each, content))
    kind, value = problem["type"], problem["input"]
    if kind == "json_invalid":  # all that Python writes as JSON and nothing else reads
        return "holds half a character (\\ud800 to \\udfff); write it anew"
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
    if key == _OF_A_METHOD:
        message = re.sub(r"\bmethod\.(?!tokenizer\.)", f"{key}.", message)
    if key and message.startswith(f"{key}."):  # a check of a section names its setting itself
        return message
    if kind == "value_error":
        return f"{key}: {message}" if key else message
    taken = _taken_at(model, keys) if kind.endswith(_OF_KIND) else []
    is_mapping = any(_is_model(one) or get_origin(one) is dict for one in taken)
    if len(taken) - (type(None) in taken) > 1 or is_mapping:
        return f"{key}: expected {_said_of_all(taken)}, got {value!r}"
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
    for part in map(str, problem["loc"]):
        held = dict(enumerate(content)) if isinstance(content, list) else content
        named = {str(key): key for key in held} if isinstance(held, dict) else {}
        if part in named:
            keys.append(part)
            content = held[named[part]]
    return keys


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> set[str]:
    models = [model]
    for part in location:
        fields = [m.model_fields[part] for m in models if part in m.model_fields]
        inner = [m for field in fields for m in _models_in(field.annotation)]
        models = inner or [m for m in models if m.__name__ == part] or models
    return {name for m in models for name in m.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_model(annotation):
        return [annotation]
    return [m for argument in get_args(annotation) for m in _models_in(argument)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


# What a setting takes -----------------------------------------------------------------------------


_OF_KIND = ("_type", "_parsing", "literal_error")
"""Ends of pydantic's words for a value that is of no kind that a setting takes, or none of its names."""
_NOUNS = {int: "whole number", float: "number", str: "text", Path: "path"}


def _taken_at(model: type[BaseModel], keys: list[str]) -> list[Any]:
    """The kinds of values that the setting of these keys takes; values of ``Literal`` are of one kind."""
    kinds: list[Any] = [model]
    for key in keys:
        kinds = [inner for kind in kinds for inner in _taken_within(kind, key)]
    return list(dict.fromkeys(kinds))


def _taken_within(kind: Any, key: str) -> list[Any]:
    if _is_model(kind):
        return _kinds_of(kind.model_fields[key].annotation) if key in kind.model_fields else []
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return _kinds_of(arguments[1])
    if get_origin(kind) in (tuple, list):
        each = arguments[:1] if arguments[1:] in ((), (...,)) else arguments[int(key) :][:1]
        return [inner for argument in each for inner in _kinds_of(argument)]
    return []


def _kinds_of(annotation: Any) -> list[Any]:
    """The members of a union, without bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kinds_of(arguments[0])
    if origin in (Union, UnionType):
        return [kind for argument in arguments for kind in _kinds_of(argument)]
    return [annotation]


def _said_of_all(kinds: list[Any]) -> str:
    """Names first, mappings last."""
    names = [json.dumps(v) if isinstance(v, bool) else str(v) for k in kinds for v in _names(k)]
    said = names + ["null"] * (type(None) in kinds)
    said += [_said(kind) for kind in sorted(kinds, key=_is_model) if not _names(kind)]
    *others, last = [one for one in said if one]
    return f"{', '.join(others)} or {last}" if others else last


def _names(kind: Any) -> tuple[Any, ...]:
    """The values of a kind that has few."""
    if kind is bool:
        return (True, False)
    return get_args(kind) if get_origin(kind) is Literal else ()


def _said(kind: Any) -> str:
    if kind is type(None):
        return ""
    if _is_model(kind):
        fields = kind.model_fields
        needed = [f"{name}: …" for name, field in fields.items() if field.is_required()]
        others = [name for name, field in fields.items() if not field.is_required()]
        told = f" with any of {', '.join(others)}" if others else ""
        return f"{{{', '.join(needed)}}}{told}"
    if get_origin(kind) is dict:
        nouns = [_kinds_of(argument)[0] for argument in get_args(kind)]
        return f"a mapping {{{': '.join(_NOUNS.get(noun, '…') for noun in nouns)}}}"
    if get_origin(kind) in (tuple, list):
        return "a list"
    return f"a {_NOUNS.get(kind, getattr(kind, '__name__', kind))}"
