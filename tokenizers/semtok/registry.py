"""Methods by name. A user's own method in a user's own file joins by the same call as ours."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semtok.errors import UserError, did_you_mean
from semtok.settings import Config


class MethodConfig(Config):
    """Base of every method's settings; ``name`` is the one it is registered under."""

    name: str

    def needs_teacher(self) -> bool:
        """Whether training reads a teacher's features."""
        return False

    def has_steps(self) -> bool:
        """Whether anything is learned by optimiser steps."""
        return True

    def check_references(self) -> None:
        """Called before anything is loaded.

        Raises:
            UserError: weights to start from that lead nowhere.
        """

    def needs_same_images(self) -> bool:
        """Whether training keeps what it has computed of an image, which then has to look the same in each epoch."""
        return False

    def texture_reference(self) -> str | None:
        """The tokenizer that this one is built on, where there is one."""
        return None


@dataclass(frozen=True)
class Method:
    """One way to make a tokenizer.

    Attributes:
        config: its settings, the ``method:`` section of a recipe.
        objective: builds what the training loop trains.
        tokenizer: the class that its exports load as.
        papers: to cite, one line each.
    """

    name: str
    config: type[MethodConfig]
    objective: Callable[[Any, Any], Any]
    tokenizer: type[Any]
    papers: tuple[str, ...] = ()


_METHODS: dict[str, Method] = {}


def register_method(
    name: str,
    *,
    config: type[MethodConfig],
    objective: Callable[[Any, Any], Any],
    tokenizer: type[Any],
    papers: tuple[str, ...] = (),
) -> None:
    """Makes a method available to recipes under ``name``; its exports' cards cite ``papers``.

    Raises:
        ValueError: another method has that name.
    """
    method = Method(name, config, objective, tokenizer, papers)
    old = _METHODS.get(name)
    if old is not None and old.config.__qualname__ != config.__qualname__:
        raise ValueError(
            f"a method named '{name}' is registered already, by {old.config.__module__}"
        )
    _METHODS[name] = method


def get_method(name: object, *, place: str) -> Method:
    """The method of that name.

    Raises:
        UserError: there is none; ``place`` (a file name) starts the message.
    """
    if not isinstance(name, str) or name not in _METHODS:
        hint = did_you_mean(str(name), _METHODS, f"known: {', '.join(sorted(_METHODS))}.")
        raise UserError(
            f"{place}: unknown method '{name}'; {hint} A method of your own needs its file under the "
            "recipe's plugins:, or --plugin where a command has it"
        )
    return _METHODS[name]


def papers_of(name: str) -> tuple[str, ...]:
    """What to cite for a method; nothing for one that is not registered."""
    return _METHODS[name].papers if name in _METHODS else ()


def load_plugins(files: Iterable[str]) -> None:
    """Runs users' files, which register their methods.

    Raises:
        UserError: a file is missing or is not Python.
    """
    for file in files:
        path = Path(file).resolve()
        if not path.is_file():
            raise UserError(f"plugins: no such file '{file}'")
        name = f"semtok_plugin_{path.stem}"
        if getattr(sys.modules.get(name), "__file__", None) == str(path):
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise UserError(f"plugins: '{file}' is not a Python file; expected a name in .py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]  # a second try is not to take the half-run file for loaded
            if isinstance(error, SyntaxError):
                raise UserError(
                    f"plugins: '{file}', line {error.lineno}: not valid Python ({error.msg})"
                ) from None
            if isinstance(error, ImportError | ValueError):
                raise UserError(f"plugins: '{file}': {error}") from None
            raise
