"""Weights of a part of a network to start from, out of files that hold more than it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from semtok.errors import UserError
from semtok.storage import read_weights


def read_part(
    path: Path, names: re.Pattern[str], place: str, nests: Sequence[str] = ("state_dict",)
) -> dict[str, Tensor]:
    """The tensors of a part of a network in a file: of those whose whole names match, by the pattern's first group.
    Empty where there are none.

    Args:
        place: the setting that names the file.
        nests: entries in which they may stand; the first that is there goes before the rest of the file.

    Raises:
        UserError: the file can't be read.
    """
    try:
        content = read_weights(path)
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    while isinstance(content, Mapping):
        nested = (content[nest] for nest in nests if isinstance(content.get(nest), Mapping))
        inner = next(nested, None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    found = {name: names.fullmatch(name) for name in content if isinstance(name, str)}
    return {
        match[1]: content[name]
        for name, match in found.items()
        if match is not None and isinstance(content[name], Tensor)
    }


def unfit(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that only one side has, or that differ in their shapes, sorted."""
    return sorted(
        name
        for name in own.keys() | found.keys()
        if name not in own or name not in found or own[name].shape != found[name].shape
    )


def take_part(module: nn.Module, found: Mapping[str, Tensor], place: str) -> None:
    """Gives a module the tensors that were found, all of which fit it.

    Raises:
        UserError: one is not finite; ``place`` starts the message.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in found.values()):
        raise UserError(f"{place}: a number in it is not finite; choose another file")
    module.load_state_dict(found)
