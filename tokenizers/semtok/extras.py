"""Packages that only some users need."""

import importlib.util

from semtok.errors import UserError


def need(module: str, package: str, *, extra: str, place: str = "") -> None:
    """Raises UserError where a package is not installed.

    Args:
        module: what it is imported as.
        extra: of this library, that installs it.
        place: what asks for it, for the message.
    """
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{place}needs {package}; pip install 'semtok[{extra}]'")
