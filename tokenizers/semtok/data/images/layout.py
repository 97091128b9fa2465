"""How a folder of images is laid out: its parts, its classes, its files, and what of it is not used."""

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from semtok.data.images.decoding import image_suffixes
from semtok.data.left_out import LeftOut
from semtok.errors import UserError, printable
from semtok.progress import progress

TRAINING_NAMES = ("train", "training")
VALIDATION_NAMES = ("val", "validation", "valid", "test", "testing")
"""What held-out parts are called, the likeliest first."""

_OF_SYSTEMS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
"""Folders that archives, stores and systems make for themselves."""


@dataclass
class Part:
    """A folder, or one part of it.

    Attributes:
        place: relative to the whole folder, with ``/`` at its end; empty: the folder itself.
        classes: name by name the image files of a class, each relative to the whole folder; empty where images lie in
            the part itself.
        flat: image files that lie in the part itself.
    """

    place: str
    classes: dict[str, list[str]] = field(default_factory=dict)
    flat: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.classes or self.flat)


def find_parts(root: Path, left_out: LeftOut) -> tuple[Part, Part | None]:
    """The training images of a folder, and those that are held out; None: it has no part of its own for that.

    ``train/``, in any case or as ``training``, is the training part whatever lies beside it, and of the folders beside
    it the likeliest of ``VALIDATION_NAMES`` is the held-out one. Without it the whole folder is one part.

    Raises:
        OSError: a folder can't be read.
        UserError: what is a part and what is a class can't be told.
    """
    folders = _folders(root, "", LeftOut())
    training = [name for name in folders if name.casefold() in TRAINING_NAMES]
    held_out = [
        name for wanted in VALIDATION_NAMES for name in folders if name.casefold() == wanted
    ]
    if len(training) > 1:
        raise UserError(f"data.path: '{root}' has {_named(training)}; keep one of them")
    if not training:
        whole = scan(root, "", left_out)
        _check_classes(root, whole)
        return whole, None
    part = scan(root, f"{training[0]}/", left_out)
    beside = [name for name in folders if name not in (training[0], *held_out[:1])]
    if part.flat and not held_out:
        # Trains are photographed too.
        classes = [name for name in beside if scan(root, f"{name}/", LeftOut()).flat]
        if classes:
            raise UserError(
                f"data.path: '{root}' holds images in '{training[0]}' and in {_named(classes)}: a part of the set "
                "beside other things, or one class of several? Move the others away, or put all classes into train/"
            )
    _folders(root, "", left_out)
    for name in beside:
        left_out.add(f"folders beside {training[0]}/", name)
    for name in _files(root, "", left_out):
        left_out.add(f"images beside {training[0]}/", name)
    return part, scan(root, f"{held_out[0]}/", left_out) if held_out else None


def _check_classes(root: Path, whole: Part) -> None:
    """Raises UserError where what would be classes, or lies in one, reads as the parts of a set."""
    names = list(whole.classes)
    if names and all(name.casefold() in VALIDATION_NAMES for name in names):
        raise UserError(
            f"data.path: '{root}' holds {_named(names)}, which read as parts of a set, and no train/; rename "
            f"the one to train on, or pass data.path={root / names[0]}"
        )
    alike = [name for name in names if _first_word(name) in TRAINING_NAMES]
    if alike and any(_first_word(name) in VALIDATION_NAMES for name in names):
        raise UserError(
            f"data.path: '{root}': classes would be {_named(names)}, which read as parts of a "
            f"set; rename them to train/ and val/, or pass data.path={root / alike[0]}"
        )
    for name, files in whole.classes.items():
        folder = files[0].split("/")[0]
        within = sorted({file.split("/")[1] for file in files if file.count("/") > 1})
        lower = [inner.casefold() for inner in within]
        if any(n in lower for n in TRAINING_NAMES) and any(n in lower for n in VALIDATION_NAMES):
            sorted_otherwise = ", or put the classes into the parts" if len(names) > 1 else ""
            raise UserError(
                f"data.path: '{root}': '{name}' would be a class, and holds {_named(within)}, which read as parts "
                f"of a set; pass data.path={root / folder}{sorted_otherwise}"
            )


def scan(root: Path, place: str, left_out: LeftOut) -> Part:
    """The images of a part: of its sub-folders, which are its classes, or in itself.

    Raises:
        OSError: a folder can't be read.
        UserError: images lie in both, or two folders have one name.
    """
    part, written = Part(place), {}
    folders = _folders(root, place, left_out)
    with progress(f"looking through {root / place}", len(folders), "folders") as advance:
        for folder in folders:
            files = _files_within(root, f"{place}{folder}/", left_out)
            advance(1)
            if not files:
                left_out.add("folders without images", f"{place}{folder}")
                continue
            name = class_name(folder)
            if name in written:
                raise UserError(
                    f"data.path: '{root / place}': the folders {written[name]!a} and {folder!a} have one name, "
                    f"'{name}', written in two ways; put their images into one"
                )
            written[name] = folder
            part.classes[name] = files
            for inner in sorted({os.path.dirname(file) for file in files} - {f"{place}{folder}"}):
                left_out.add("names of folders within classes", inner)
    part.flat = _files(root, place, left_out)
    if part.flat and part.classes:
        raise UserError(
            f"data.path: '{root / place}' holds images both in itself and in sub-folders; use one layout"
        )
    return part


def class_name(name: str) -> str:
    """A name as classes have it: accents as one character with their letter, whatever the disk makes of them."""
    return unicodedata.normalize("NFC", printable(name))


def _named(names: Sequence[str]) -> str:
    told = ", ".join(f"'{printable(name)}'" for name in names[:5])
    return told + (" …" if len(names) > 5 else "")


def _first_word(name: str) -> str:
    """``train`` of ``Train2017``, ``train_images`` and ``trainset``."""
    lower = name.casefold()
    end = next((i for i, letter in enumerate(lower) if not letter.isalpha()), len(lower))
    return lower[:end].removesuffix("set")


# Names on the disk --------------------------------------------------------------------------------


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _OF_SYSTEMS


def _folders(root: Path, place: str, left_out: LeftOut) -> list[str]:
    """Names of the folders in a place, and of links to folders, but for hidden ones."""
    found, above = [], _above(root / place)
    with os.scandir(root / place) as entries:
        for entry in entries:
            if not _is_folder(entry):
                continue
            if _is_hidden(entry.name):
                left_out.add("hidden folders", f"{place}{entry.name}")
            elif entry.is_symlink() and _identity(entry) in above:
                left_out.add("links that lead back", f"{place}{entry.name}")
            else:
                found.append(entry.name)
    return sorted(found, key=lambda name: (class_name(name), name))


def _files(root: Path, place: str, left_out: LeftOut) -> list[str]:
    """The image files in a place itself, sorted, relative to the root."""
    with os.scandir(root / place) as entries:
        names = [f"{place}{e.name}" for e in entries if _is_image(e, place, left_out)]
    return sorted(names)


def _files_within(root: Path, place: str, left_out: LeftOut) -> list[str]:
    """The image files in a place and in all folders within it, sorted by the parts of their names.

    Links to folders are followed, but for those that lead back to a folder which they lie in.
    """
    names: list[str] = []
    todo = [(place, _above(root / place))]
    while todo:
        inside, above = todo.pop()
        try:
            entries = list(os.scandir(root / inside))
        except PermissionError:  # lost+found, where a disk is one set
            left_out.add("folders that may not be read", inside)
            continue
        for entry in entries:
            if not _is_folder(entry):
                if _is_image(entry, inside, left_out):
                    names.append(f"{inside}{entry.name}")
            elif _is_hidden(entry.name):
                left_out.add("hidden folders", f"{inside}{entry.name}")
            elif (own := _identity(entry)) in above:
                left_out.add("links that lead back", f"{inside}{entry.name}")
            else:
                todo.append((f"{inside}{entry.name}/", above | {own}))
    return sorted(names, key=lambda name: name.split("/"))


def _above(folder: Path) -> frozenset[tuple[int, int]]:
    """A folder and all that it lies in, as its path tells and as links lead to it."""
    resolved = folder.resolve()
    return frozenset(
        map(_identity, (folder, *folder.absolute().parents, resolved, *resolved.parents))
    )


def _identity(folder: Path | os.DirEntry[str]) -> tuple[int, int]:
    state = folder.stat()
    return state.st_dev, state.st_ino


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_image(entry: os.DirEntry[str], place: str, left_out: LeftOut) -> bool:
    """Whether an entry is an image file; what else is no folder is left out, by kind."""
    name = f"{place}{entry.name}"
    try:
        is_file = entry.is_file()
    except OSError:
        is_file = False
    if not is_file:
        if not _is_folder(entry):
            left_out.add(
                "links that lead nowhere" if entry.is_symlink() else "things that are no files",
                name,
            )
        return False
    if _is_hidden(entry.name):
        left_out.add("hidden files", name)
        return False
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in image_suffixes():
        kind = f"files with the suffix {printable(suffix)}" if suffix else "files without a suffix"
        left_out.add(kind, name)
        return False
    return True
