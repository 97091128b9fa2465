"""``convert --data key=value … --output DIR``: writes images as shards for object stores, in the MDS format of MosaicML
Streaming.

Encoded images stay as they are. An interrupted command goes on where it stopped. ``data.kind=mds data.path=DIR`` then
trains on the shards, also behind a URL.
"""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from semtok import stopping
from semtok.commands.cli import Parser
from semtok.data.images.encoded import StoredConfig, StoredImages
from semtok.data.images.kinds import open_sources
from semtok.data.images.mds_index import INDEX, MdsIndex, read_index
from semtok.data.images.mds_shards import MdsFiles, check_file
from semtok.data.images.mds_writer import LARGEST, MdsWriter
from semtok.errors import UserError
from semtok.lock import LOCK_FILE, only_one_in
from semtok.progress import progress
from semtok.recipe import parse_data
from semtok.settings import apply_overrides
from semtok.storage import read_json, write_json
from semtok.unfinished import remove_unfinished

PARTS = ("train", "val")
_PLAN = ".convert.json"
_MEGABYTE = 10**6
_WITHOUT_EFFECT = ("size", "flip", "crop", "cache", "num_workers", "licence")


def _parser() -> Parser:
    parser = Parser(prog="convert", description=__doc__)
    parser.add_argument(
        "--data", nargs="+", metavar="key=value", help="images, as kind=folder path=…"
    )
    parser.add_argument("--output", type=Path, metavar="DIR")
    parser.add_argument(
        "--shard-megabytes", type=float, default=64.0, help="of a shard; default: 64"
    )
    parser.add_argument(
        "--verify", type=Path, metavar="DIR", help="compare shards on disk with their index"
    )
    return parser


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    args = _parser().parse_args(arguments)
    if args.verify is not None:
        return _verify(args.verify)
    needed = {"--data key=value …": args.data, "--output DIR": args.output}
    missing = [option for option, value in needed.items() if value is None]
    if missing:
        raise UserError(f"convert needs {' and '.join(missing)}")
    if not 1 <= args.shard_megabytes * _MEGABYTE <= LARGEST:  # nan is neither
        raise UserError(f"--shard-megabytes: expected 0.001 to {LARGEST // _MEGABYTE}")
    shard_bytes = int(args.shard_megabytes * _MEGABYTE)
    sources = _opened(args.data)
    with (
        stopping.with_way_on("the same command goes on"),
        only_one_in(args.output, "a command that converts images"),
    ):
        remove_unfinished(args.output)
        _check_folder(args.output, sources, shard_bytes)
        indices = [
            _written(source, args.output / part, shard_bytes, part)
            for part, source in zip(PARTS, sources, strict=True)
        ]
    _report(args, indices)
    return 0


def _opened(words: list[str]) -> tuple[StoredImages, StoredImages]:
    given = apply_overrides({}, words)
    for name in _WITHOUT_EFFECT:
        if name in given:
            raise UserError(f"--data: {name}: images are written as they are stored; leave it out")
    data = parse_data([*words, "size=1"], place="--data")
    if not isinstance(data, StoredConfig):
        raise UserError(
            f"--data: images of kind={data.kind} are drawn, not stored; give kind=folder, tars, parquet or mds"
        )
    train, held_out = open_sources(data)
    assert isinstance(train, StoredImages) and isinstance(held_out, StoredImages)
    return train, held_out


def _check_folder(folder: Path, sources: Sequence[StoredImages], shard_bytes: int) -> None:
    """Raises UserError where there is something else than what the same command began."""
    plan = {"images": [source.identity for source in sources], "shard_bytes": shard_bytes}
    known = {*PARTS, _PLAN, LOCK_FILE}
    foreign = sorted(file.name for file in folder.iterdir() if file.name not in known)
    if foreign:
        raise UserError(
            f"--output: {folder} holds other files ({foreign[0]}); choose another folder"
        )
    if not (folder / _PLAN).is_file():
        write_json(folder / _PLAN, plan)
    elif read_json(folder / _PLAN) != plan:
        raise UserError(
            f"--output: {folder} holds shards of other images, or of another --shard-megabytes; choose another folder"
        )


def _written(source: StoredImages, folder: Path, shard_bytes: int, part: str) -> MdsIndex:
    remove_unfinished(folder)
    writer = MdsWriter(source, folder, shard_bytes=shard_bytes)
    index = read_index(str(folder)) if (folder / INDEX).is_file() else None
    if index is None or not _is_there(index):
        what = "training" if part == PARTS[0] else "held-out"
        return writer.write(f"writing the {what} images")
    writer.remove_notes(len(index.shards))  # a command that was killed has not come to it
    return index


def _is_there(index: MdsIndex) -> bool:
    """Whether its shards lie beside it, by their sizes."""
    try:
        MdsFiles(index, 0).check()
    except UserError:
        return False
    return True


def _report(args: argparse.Namespace, indices: Sequence[MdsIndex]) -> None:
    counts = [index.num_samples for index in indices]
    shards = [shard for index in indices for shard in index.shards]
    size = sum(shard.stored.bytes for shard in shards)
    place = shlex.quote(f"data.path={args.output}")
    print(
        f"{args.output}: {counts[0]} training and {counts[1]} held-out images in {len(shards)} shards of "
        f"{size / _MEGABYTE:.1f} MB in all; train on them by: data.kind=mds {place} data.size=…"
    )


def _verify(folder: Path) -> int:
    places = [folder, *(folder / part for part in PARTS)]
    indices = [index for index in map(read_index, map(str, places)) if index is not None]
    if (folder / _PLAN).is_file() and len(indices) < len(PARTS):
        raise UserError(f"--verify: {folder} is not finished; the command that began it goes on")
    if not indices:
        raise UserError(f"--verify: {folder} holds no {INDEX}; name the folder of the shards")
    shards = [(index.place, shard.stored) for index in indices for shard in index.shards]
    with progress(f"comparing {folder}", len(shards), "shards") as advance:
        for place, info in shards:
            file = Path(place) / info.basename
            check_file(file, info, f"--verify: {file}")
            advance(1)
    print(f"{folder}: every shard is as its index says")
    return 0
