"""What all commands share: reading arguments, and telling of errors in one line."""

import argparse
import contextlib
import importlib
import io
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TextIO

from semtok import stopping
from semtok.errors import Interrupted, NonFiniteLoss, UserError, did_you_mean
from semtok.processes import leave
from semtok.registry import trouble_in_plugin
from semtok.storage import DISK_TROUBLE, mend_of

_DEBUG = "--debug"


class Parser(argparse.ArgumentParser):
    """argparse with errors like all others: one line, what may have been meant, and where to read more."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        help = "show the whole traceback of an error in a plugin"
        self.add_argument(_DEBUG, action="store_true", default=argparse.SUPPRESS, help=help)

    def error(self, message: str) -> NoReturn:
        wrong, known = _misspelt(message), [*self._words()]
        hints = [did_you_mean(word, known) for word in wrong if word not in known]
        told = " ".join(hint for hint in hints if hint)
        raise UserError(f"{message}; {told + ' ' if told else ''}see {self.prog} --help")

    def _words(self) -> Iterator[str]:
        """Options, and names of commands within this one with their own options."""
        for action in self._actions:
            yield from action.option_strings
            if action.option_strings and action.choices is not None:
                yield from map(str, action.choices)
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices
                for inner in action.choices.values():
                    yield from inner._words()


def _misspelt(message: str) -> list[str]:
    """Of argparse's message, the words that nothing here is called."""
    unknown = re.search("unrecognized arguments: (.*)", message)
    if unknown:
        return [w.partition("=")[0] for w in unknown[1].split() if w.startswith("--")]
    choice = re.search("invalid choice: '([^']*)'", message)
    return [choice[1]] if choice else []


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    """Where methods may come from, for commands without a recipe."""
    help = "a Python file that registers a method"
    parser.add_argument("--plugin", action="append", default=[], help=help)


def run(main: Callable[[Sequence[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Runs a command's main; what is not a bug becomes one line and an exit code.

    2: wrong input, or the disk; 1: the loss was not finite, or a plugin has raised; 128 + n: stopped by signal n,
    or by a pipe that nobody reads (SIGPIPE).
    """
    # Third-party notes that no user of a command can act on.
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    warnings.filterwarnings("ignore", category=UserWarning, module="torchvision|huggingface_hub")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # names of files may be in another encoding, or in none
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in given if word != _DEBUG]
    try:
        with stopping.listening():
            return main(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not any(map(_is_unread, (sys.stdout, sys.stderr))):
            raise
        with contextlib.suppress(OSError):
            told = "stopped: nobody reads what is printed; print to a file, and give the same command again"
            print(f"{told}, a training with --resume auto", file=sys.stderr)
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in DISK_TROUBLE:
            raise
        is_trouble = error.errno in DISK_TROUBLE
        way_on = f"; {mend_of(error)} and give the same command again" if is_trouble else ""
        print(f"error: {error.filename or 'disk'}: {error.strerror}{way_on}", file=sys.stderr)
        return 2
    except NonFiniteLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return interruption.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        told = trouble_in_plugin(error)
        if told is None or _DEBUG in given:
            raise
        print(f"error: {told}; {_DEBUG} shows where from", file=sys.stderr)
        return 1
    finally:
        leave()


def _is_unread(stream: TextIO) -> bool:
    """Whether what is printed goes to a pipe that nobody reads any more, as after ``| head``."""
    try:
        number = stream.fileno()
    except (OSError, ValueError, AttributeError):  # it is closed, or no file of the system's
        return False
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def launch(name: str) -> int:
    """Runs the command of that name with the process's arguments; its exit code."""
    return run(importlib.import_module(f"semtok.commands.{name}").main)
