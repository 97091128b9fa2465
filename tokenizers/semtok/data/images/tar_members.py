"""The members of tar files, and the samples that WebDataset makes of them: links followed, joined archives read on."""

import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from semtok.data.left_out import LeftOut

_BLOCK = 512  # bytes; of tar
_CHUNK = 2**20  # bytes
_MOST_LINKS = 40  # in a row, as Linux has it
_METADATA = re.compile(r"__[^/]*__($|/)")  # members that WebDataset keeps for itself
_LABELS = (".cls", ".json")


class Place(NamedTuple):
    """A member of a tar file.

    Attributes:
        name: in the archive.
        offset, size: of its content, in bytes of the file.
    """

    name: str
    offset: int
    size: int


class HasLinks(Exception):
    """A file holds links, which ``find_links`` finds and ``read_samples`` then follows."""


Links = Mapping[tuple[int, str], tarfile.TarInfo]
"""By the number of an archive in its file, and the name of a link there: the member that it leads to."""


def read_samples(
    file: BinaryIO, place: str, links: Links | None, left_out: LeftOut
) -> Iterator[dict[str, Any]]:
    """What WebDataset makes one sample of: neighbours whose names are equal up to the first dot.

    Archives that were joined are read one after the other.

    Args:
        place: the file, for samples to name.
        links: see ``find_links``; None: there are none.
        left_out: hidden members, and what is no file or can't be part of a sample, are added.

    Yields:
        by ending a ``Place``, or of labels (``.cls``, ``.json``) what they hold; ``__key__`` and ``__url__``.

    Raises:
        HasLinks: there are links.
        tarfile.TarError: the file is damaged, cut short, or goes on behind its end as no archive does.
        ValueError: two members have one name.
    """
    from webdataset.tariterators import base_plus_ext, group_by_keys

    def contents() -> Iterator[dict[str, Any]]:
        last = 0
        for number, member in _members(file):
            if number != last:
                yield {}  # no sample goes on from one archive to the next
                last = number
            target = _target(number, member, links, left_out)
            if target is None or _METADATA.match(member.name):
                continue
            if _is_hidden(member.name):
                left_out.add("hidden members", member.name)
            elif base_plus_ext(member.name)[0] is None:
                left_out.add("members without an ending", member.name)
            else:
                where = Place(member.name, target.offset_data, target.size)
                is_label = member.name.lower().endswith(_LABELS)
                data = _content(file, where) if is_label else where
                yield {"fname": member.name, "data": data, "__url__": place}

    try:
        yield from group_by_keys(contents())
    except ValueError as error:  # its arguments after the first are what WebDataset was at
        raise ValueError(error.args[0]) from None


def find_links(file: BinaryIO) -> Links:
    """Where the links of a tar file lead, hard and symbolic ones; those that lead to no member of it are missing.

    Raises:
        tarfile.TarError: the file is damaged.
    """
    leads: dict[tuple[int, str], str] = {}
    for number, member in _members(file):
        if member.issym():  # from where it lies
            folder = posixpath.dirname(member.name)
            leads[number, _plain(member.name)] = _plain(posixpath.join(folder, member.linkname))
        elif member.islnk():
            leads[number, _plain(member.name)] = _plain(member.linkname)
    ends = {}
    for number, name in leads:
        end = name
        for _ in range(_MOST_LINKS):
            end = leads.get((number, end), end)
        ends[number, name] = (number, end)
    wanted, found = set(ends.values()), {}
    for number, member in _members(file):
        if member.isreg() and (key := (number, _plain(member.name))) in wanted:
            found[key] = member
    return {link: found[end] for link, end in ends.items() if end in found}


def _target(
    number: int, member: tarfile.TarInfo, links: Links | None, left_out: LeftOut
) -> tarfile.TarInfo | None:
    """The file that a member is, or leads to; None: none."""
    if member.isdir():
        return None
    if member.issym() or member.islnk():
        if links is None:
            raise HasLinks
        target = links.get((number, _plain(member.name)))
        if target is None:
            left_out.add("links that lead to no file of the archive", member.name)
            return None
    else:
        target = member
    if not target.isreg() or target.issparse():  # of a sparse one the gaps are left out
        left_out.add("members that are no plain files", member.name)
        return None
    return target


def _plain(name: str) -> str:
    return posixpath.normpath(name)


def _is_hidden(name: str) -> bool:
    """Whether an operating system or an editor has made it; ``./`` at the beginning is how tar names its own folder."""
    parts = name.split("/")
    return any(
        part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in parts
    )


def _content(file: BinaryIO, where: Place) -> bytes:
    file.seek(where.offset)
    content = file.read(where.size)
    if len(content) < where.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _members(file: BinaryIO) -> Iterator[tuple[int, tarfile.TarInfo]]:
    """The members of all archives that are joined in a file, each with the number of its archive."""
    start: int | None = 0
    number = 0
    while start is not None:
        file.seek(start)
        archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - the file stays open
        is_empty = True
        while (member := archive.next()) is not None:
            archive.members.clear()  # of millions, they would fill the memory
            is_empty = False
            yield number, member
        file.seek(archive.offset)  # tarfile takes damage between members for the end
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError(
                f"behind its end mark, at byte {start}, it holds something that is no archive"
                if number and is_empty
                else f"no end mark at byte {archive.offset}"
            )
        start, number = _next_start(file), number + 1


def _next_start(file: BinaryIO) -> int | None:
    """Where behind zeros the next archive begins; None: nowhere."""
    position = file.tell()
    while chunk := file.read(_CHUNK):
        rest = chunk.lstrip(b"\0")
        if rest:
            return (position + len(chunk) - len(rest)) // _BLOCK * _BLOCK
        position += len(chunk)
    return None
