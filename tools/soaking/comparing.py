"""What two runs of one command have left, compared to the last bit."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from semtok.lock import LOCK_FILE
from semtok.unfinished import is_unfinished

_TIMES = {"seconds", "images_per_second", "training_seconds", "total_seconds"}
_OF_PROCESSES = ("health/", "processes")
"""How names begin of what follows from seconds, and of what processes take."""
_MOST_TOLD = 5


def differences(whole: Path, killed: Path) -> list[str]:
    """What of a folder is missing, new, or other than in one whose run was not interrupted; a line each, the first few.

    Seconds and what follows from them are not compared. What a whole run leaves of what it was writing is told too.
    """
    ours, theirs = _files(killed), _files(whole)
    told = [f"missing: {name}" for name in sorted(theirs - ours)]
    told += [f"left: {name}" for name in sorted(ours - theirs)]
    told += [f"stays: {name}" for name in sorted(theirs) if _is_temporary(name)]
    told += [
        f"other: {name}{_where(whole / name, killed / name)}"
        for name in sorted(ours & theirs)
        if not name.endswith("/") and not _same(whole / name, killed / name)
    ]
    return told[:_MOST_TOLD] + ([f"{len(told) - _MOST_TOLD} more"] * (len(told) > _MOST_TOLD))


def _files(folder: Path) -> set[str]:
    """Everything below a folder, by relative names; folders end with ``/``."""
    found = set()
    for place, folders, files in os.walk(folder):
        inside = Path(place).relative_to(folder)
        found |= {str(inside / name) for name in files} | {f"{inside / n}/" for n in folders}
    return found


def _is_temporary(name: str) -> bool:
    return any(part == LOCK_FILE or is_unfinished(part) for part in Path(name).parts)


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes() or _content(one) == _content(other)


def _content(file: Path) -> Any:
    """What a file holds, without seconds, in a form that can be compared; of most kinds its bytes."""
    if file.suffix == ".jsonl":
        return [_timeless(json.loads(line)) for line in file.read_text().splitlines()]
    if file.name == "summary.json":
        return _timeless(json.loads(file.read_text()))
    if file.suffix == ".pt":
        return _timeless(torch.load(file, map_location="cpu", weights_only=True))
    return file.read_bytes()


def _timeless(content: Any) -> Any:
    if isinstance(content, dict):
        return {k: _timeless(v) for k, v in content.items() if not _is_of_time(k)}
    if isinstance(content, list | tuple):
        return [_timeless(value) for value in content]
    if isinstance(content, torch.Tensor):
        return (str(content.dtype), tuple(content.shape), content.contiguous().numpy().tobytes())
    return content


def _is_of_time(key: Any) -> bool:
    return key in _TIMES or (isinstance(key, str) and key.startswith(_OF_PROCESSES))


def _where(one: Path, other: Path) -> str:
    """Where the contents first differ."""
    places = zip(_leaves(_content(one)), _leaves(_content(other)), strict=False)
    return next((f" ({a[0]})" for a, b in places if a != b), "")


def _leaves(content: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict | list):
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in pairs:
            yield from _leaves(value, f"{place}.{key}" if place else str(key))
    elif not isinstance(content, bytes):
        yield place, content
