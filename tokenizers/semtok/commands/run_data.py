"""What the folder of a run notes of the images that it began with, so that a resumed run finds the same."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from semtok.data.source import DataConfig, ImageSource
from semtok.errors import UserError
from semtok.progress import announce
from semtok.storage import read_json, write_json

_FILE = "data_files.json"
_MOST_CLASSES = 10_000  # of more a digest is noted


def check_data(folder: Path, sources: tuple[ImageSource, ImageSource]) -> None:
    """Checks that a resumed run finds the images that it began with: files, classes, and the class of each image.

    Args:
        sources: of training and of held-out images.

    Raises:
        UserError: a file has changed, is gone, or is new; a class has another number; or images another class.
    """
    now, file = _about(sources), folder / _FILE
    if not now:
        return
    if not file.is_file():
        print(
            f"{folder}: an earlier version began this run and noted nothing of its images; it goes on with those that "
            "are there now",
            flush=True,
        )
        return
    was = _noted(file)
    changes = [
        *_changed_classes(was.get("classes"), now["classes"]),
        *_changed_files(was.get("files"), now.get("files")),
    ]
    for part, before, after in zip(
        ("training", "held-out"), was.get("labels", ()), now["labels"], strict=False
    ):
        if before and after and before != after:
            changes.append(f"the {part} images, or their classes, have changed")
    if changes:
        more = f" (and {len(changes) - 1} more changes)" if len(changes) > 1 else ""
        raise UserError(
            f"{folder}: can't resume with other images: {changes[0]} since the run began{more}; put them back, or "
            "start anew with --output"
        )


def record_data(folder: Path, sources: tuple[ImageSource, ImageSource]) -> None:
    """Notes the images that the run begins with; what an earlier start noted stays."""
    if not (folder / _FILE).is_file() and (about := _about(sources)):
        write_json(folder / _FILE, about)


def knows_files(folder: Path) -> bool:
    """Whether the run noted its files, so that they may lie elsewhere now."""
    file = folder / _FILE
    return file.is_file() and bool(_noted(file).get("files"))


def _about(sources: tuple[ImageSource, ImageSource]) -> dict[str, Any]:
    """What there is to note; empty where the library makes the images itself, or a cache tells nothing of them."""
    train, _ = sources
    files, labels = train.file_states, [source.labels_state for source in sources]
    if not files and not any(labels):
        return {}
    names: Sequence[str] | str = train.class_names
    if len(names) > _MOST_CLASSES:
        names = hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()
    return {
        "classes": names if isinstance(names, str) else list(names),
        "labels": labels,
        **({"files": files} if files else {}),
    }


def _noted(file: Path) -> dict[str, Any]:
    content = read_json(file)
    # Earlier versions noted files alone, and of streamed Parquet only.
    is_flat = all(isinstance(value, str) for value in content.values())
    return {"files": content} if is_flat else content


def _changed_classes(was: Sequence[str] | None, now: Sequence[str]) -> list[str]:
    if was is None or list(was) == list(now) or len(was) == len(now) == 1:
        return []  # the one class of a folder has the folder's name, which may change
    if isinstance(was, str) or isinstance(now, str):
        return ["the classes have changed"]
    for number, (before, after) in enumerate(zip(was, now, strict=False)):
        if before != after:
            return [f"class {number} was '{before}' and has become '{after}'"]
    return [f"the number of classes, {len(was)}, has become {len(now)}"]


def _changed_files(was: Mapping[str, str] | None, now: Mapping[str, str] | None) -> list[str]:
    if not was or not now:  # none are read, as latents are cached
        return []
    changes = []
    for name in sorted(was.keys() | now.keys()):
        if name not in now:
            changes.append(f"{name} is gone")
        elif name not in was:
            changes.append(f"{name} is new")
        elif was[name] != now[name]:
            changes.append(f"{name} changed")
    return changes


def note_licence(data: DataConfig, overrides: Sequence[str]) -> None:
    """Says which licence of the images an export will state where other images than a recipe's were named.

    Args:
        overrides: of the command, as ``data.path=…``.
    """
    given = {word.partition("=")[0] for word in overrides}
    if (
        data.licence is not None
        and given & {"data.path", "data.kind"}
        and "data.licence" not in given
    ):
        announce(
            f"note: the export will state {data.licence}, which is of the recipe's own images; "
            "pass data.licence=… for others, or null"
        )
