"""``semtok <command>``, outside of the package: help and slips are answered without importing torch."""

import atexit
import contextlib
import difflib
import gc
import os
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import NoReturn

COMMANDS = {
    "train_tokenizer": "train a tokenizer from a recipe",
    "train_dit": "train a diffusion transformer on a tokenizer's latents",
    "cache_latents": "compute a tokenizer's latents of all images once",
    "convert": "write images as shards for object stores",
    "sample": "draw images from a trained generator",
    "evaluate": "measure what a tokenizer's latents hold",
    "recipes": "list the library's recipes, and what differs from the official runs",
    "hub": "to and from the Hugging Face Hub, published checkpoints and diffusers",
}


@contextlib.contextmanager
def importing_much() -> Iterator[None]:
    """Imports within it look for no garbage, and later searches pass over what they have made.

    They make half a million objects, which all stay. To look for garbage among them again and again takes an eighth
    of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def launched(name: str) -> int:
    """Runs a command with the process's arguments; Ctrl-C while it is imported, which takes seconds, is one line."""
    try:
        with importing_much():
            from semtok.commands.cli import launch

        return launch(name)
    except KeyboardInterrupt:
        print("stopped before anything was begun", file=sys.stderr)
        return 130


def main() -> int:
    """``semtok <command> …``; the command's name may be written with - or _."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    name = word.replace("-", "_")
    if name in COMMANDS:
        sys.argv = [f"semtok {name}", *sys.argv[2:]]
        return launched(name)
    if word in ("--version", "version"):
        print(f"semtok {version('semtok')}")
        return 0
    if word and word not in ("--help", "-h", "help"):
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "see semtok --help"
        print(f"error: no command '{word}'; {hint}", file=sys.stderr)
        return 2
    width = max(map(len, COMMANDS))
    lines = [f"  {command:<{width}}  {text}" for command, text in COMMANDS.items()]
    print(
        "usage: semtok COMMAND …\n\n"
        + "\n".join(lines)
        + "\n\nsemtok COMMAND --help tells more; semtok --version"
    )
    return 0 if word else 2


def end_process(code: int) -> NoReturn:
    """Ends the process after what is registered for its end, without taking the interpreter apart.

    That takes seconds of computing, as torch and its like are half a million objects, and a thread of a library that
    still lives then may abort a process whose results are written.
    """
    threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # Nobody reads, or it is closed.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def program() -> NoReturn:
    """The process ``semtok``."""
    end_process(main())


if __name__ == "__main__":
    program()
