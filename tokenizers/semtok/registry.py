"""Methods by name. A user's own method in a user's own file joins by the same call as ours."""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from semtok.errors import UserError, did_you_mean, printable
from semtok.settings import Config


class MethodConfig(Config):
    """Base of every method's settings; ``name`` is the one it is registered under."""

    name: str
    """The method."""

    @classmethod
    def of(cls, content: Mapping[str, Any], *, place: str) -> type["MethodConfig"]:
        """The class of these settings: of a method that holds another one's, the one for that.

        Args:
            content: the settings, not yet checked.
            place: starts messages.

        Raises:
            UserError: they don't say which.
        """
        return cls

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

    def check_use(self, image_size: tuple[int, int]) -> None:
        """Called before a run begins. One that goes on is not asked: an earlier version may have begun it.

        Args:
            image_size: (height, width) of the training images.

        Raises:
            ValueError: settings that would train nothing, or change nothing.
        """

    def starts_from_weights(self) -> bool:
        """Whether training goes on from weights that somebody has trained."""
        return False

    def warnings(self, learning_rate: float) -> list[str]:
        """What to tell before the first step of settings that do harm without being wrong; a line each."""
        return []

    def needs_same_images(self) -> bool:
        """Whether training keeps what it has computed of an image, which then has to look the same in each epoch."""
        return False

    def texture_reference(self) -> str | None:
        """The tokenizer that this one is built on, where there is one."""
        return None

    def least_texture_psnr(self) -> float | None:
        """In dB, on the training images, what that tokenizer has to reach; 0: it is measured and nothing refused; None:
        it is not measured."""
        return 0.0


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
_PLUGIN = "semtok_plugin_"  # begins the names of modules that are users' files


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
    """The method of that name, which a user has written.

    Raises:
        UserError: there is none; ``place`` (a file name) starts the message.
    """
    if not isinstance(name, str) or name not in _METHODS:
        known = f"known: {', '.join(sorted(_METHODS))}."
        # Methods of users' own are often called after ours: edge_vae is no slip of send_vae.
        hint = did_you_mean(str(name), _METHODS, known, cutoff=0.8)
        raise UserError(
            f"{place}: unknown method '{name}'; {hint} A method of your own needs its file: under the recipe's "
            "plugins:, by --plugin where a command has it, or by plugin= in Python"
        )
    return _METHODS[name]


def method_of_export(config: Mapping[str, Any], *, place: str) -> Method:
    """The method that an export's config.json names. No code that lies beside it is run.

    Raises:
        UserError: it isn't registered here; the message names the file that brings it, where that is known.
    """
    name, file = config["method"], config.get("plugin")
    if isinstance(name, str) and name in _METHODS:
        return _METHODS[name]
    file = printable(Path(file).name) if isinstance(file, str) else None
    source = f"{file} brings" if file else "no method here is called"
    raise UserError(
        f"{place}: is of the method '{name}', which {source}; pass its file by --plugin {file or 'FILE.py'}, "
        "plugin= in Python, or plugins: in a recipe"
    )


def plugin_of(name: str) -> str | None:
    """The name (without folders) of the user's file that has registered a method; None: there is no such file."""
    module = _METHODS[name].config.__module__ if name in _METHODS else ""
    return Path(sys.modules[module].__file__).name if module.startswith(_PLUGIN) else None


def papers_of(name: str) -> tuple[str, ...]:
    """What to cite for a method; nothing for one that is not registered."""
    return _METHODS[name].papers if name in _METHODS else ()


def load_plugins(files: Iterable[str | Path]) -> None:
    """Runs users' files, which register their methods.

    Raises:
        UserError: a file is missing, is not Python, or raises; the message says in which line.
    """
    for file in files:
        path = Path(file).resolve()
        if not path.is_file():
            raise UserError(f"plugins: no such file '{file}'")
        name = f"{_PLUGIN}{path.stem}"
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
            told = trouble_in_plugin(error)
            del sys.modules[name]  # a second try is not to take the half-run file for loaded
            if isinstance(error, SyntaxError) and error.filename == str(path):
                raise UserError(
                    f"plugins: '{file}', line {error.lineno}: not valid Python ({error.msg})"
                ) from None
            if isinstance(error, Exception | SystemExit):
                way_out = f"'python {path.name}' shows where from"
                raise UserError(f"plugins: {told or f'{file}: {error}'}; {way_out}") from error
            raise


def trouble_in_plugin(error: BaseException) -> str | None:
    """``edge_vae.py:12: NameError: …`` of an exception that a user's file has raised, or something that it called;
    None: no user's file was on the way."""
    plugins = {
        str(module.__file__) for name, module in [*sys.modules.items()] if name.startswith(_PLUGIN)
    }
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename in plugins]
    if not own:
        return None
    words = " ".join(str(error).split())
    place = f"{printable(Path(own[-1].filename).name)}:{own[-1].lineno}"
    return f"{place}: {type(error).__name__}" + (f": {words}" if words else "")
