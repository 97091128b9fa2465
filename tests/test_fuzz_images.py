"""Odd images, archives, Parquet files, shards and tables are read or refused in one line: see ``fuzzing``."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

import mds_set
import stored
from fuzzing import FEW, MANY, Files, Inputs, fuzz, only_place, read_files, write
from hostile import ODD_TEXTS, changed, damaged
from hostile_files import pictures, png_of_size, tar_files
from semtok.data.images.attributes import read_attributes
from semtok.data.images.kinds import open_sources
from semtok.data.source import Key
from semtok.recipe import parse_data

KINDS: dict[str, Callable[[Path], Inputs]] = {}


def kind(make: Callable[[Path], Inputs]) -> Callable[[Path], Inputs]:
    KINDS[make.__name__] = make
    return make


place = pytest.fixture(only_place)


@kind
def images(place: Path) -> Inputs:
    made = pictures()
    sides = st.sampled_from([0, 1, 7, 2**12, 2**16, 2**24, 2**31 - 1, 2**32 - 1])
    suffix = st.sampled_from(
        ["png", "jpg", "webp", "gif", "tiff", "bmp", "ico", "jp2", "tga", "sgi"]
    )
    content = (
        st.sampled_from(sorted(made)).flatmap(lambda form: damaged(made[form], head=120))
        | st.builds(png_of_size, sides, sides)
        | st.sampled_from(sorted(made.values()))
        | st.binary(max_size=64)
    )
    inputs = st.lists(st.tuples(content, suffix), min_size=1, max_size=4)

    def read(given: list[tuple[bytes, str]]) -> None:
        files = {f"a/{i}.{suffix}": content for i, (content, suffix) in enumerate(given)}
        folder = write(
            place / "images", files | {"b/x.png": stored.png(3), "b/y.png": stored.png(4)}
        )
        read_all(f"path={folder}", "kind=folder")

    return inputs, read


def read_all(*words: str) -> None:
    """Opens a set of images and reads each of them, in both crops."""
    for crop in ("center", "random"):
        config = parse_data([*words, "size=8", f"crop={crop}"], place="--data")
        for source in open_sources(config):
            source.load(range(len(source)))
            if source.crop == "random":
                source.load_keys([Key(i, True, (0.5, 0.999)) for i in range(len(source))])


@kind
def archives(place: Path) -> Inputs:
    pytest.importorskip("webdataset")

    def read(content: bytes) -> None:
        file = place / "x.tar"
        file.write_bytes(content)
        read_all(f"path={file}", "kind=tars")

    return tar_files(), read


@kind
def parquet_files(place: Path) -> Inputs:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"bytes": stored.png(number), "path": f"{number}.png"} for number in range(6)]
    made = []
    for compression in ("none", "snappy"):
        file = io.BytesIO()
        table = pyarrow.table({"image": rows, "label": [n % 2 for n in range(6)]})
        parquet.write_table(table, file, compression=compression, row_group_size=3)
        made.append(file.getvalue())
    odd = [
        pyarrow.table({"image": rows, "label": ["a", None, "\ud7ff", "../x", "a\nb", "x" * 3000]}),
        pyarrow.table({"image": [*rows[:5], None], "label": [2**62, -1, 0, 1, 2, 3]}),
        pyarrow.table({"image": [1.5, float("nan")], "label": [0, 1]}),
        pyarrow.table({"image": [b"", b"\xff"], "label": [[0], [1, 2]]}),
        pyarrow.table({"": rows, "a\nb": [0] * 6}),
    ]
    for table in odd:
        file = io.BytesIO()
        parquet.write_table(table, file)
        made.append(file.getvalue())

    def read(content: bytes) -> None:
        file = place / "x.parquet"
        file.write_bytes(content)
        read_all(f"path={file}", "kind=parquet", "streaming=true")

    # What says how the file is read stands at its end.
    whole = st.sampled_from(made)
    turned = whole.flatmap(lambda content: damaged(content[::-1])).map(
        lambda content: content[::-1]
    )
    return whole | whole.flatmap(damaged) | turned, read


@kind
def shards(place: Path) -> Inputs:
    index = mds_set.write_numbers(place / "made", range(6))
    mds_set.write_numbers(place / "more", range(3))
    files = read_files(place / "made")
    first = "shard.00000.mds"
    inputs = changed(index).map(
        lambda told: files | {"index.json": json.dumps(told).encode()}
    ) | damaged(files[first]).map(lambda content: files | {first: content})

    def read(given: Files) -> None:
        folder = write(place / "set", given)
        read_all(f"path={folder}", f"validation={place / 'more'}", "kind=mds")

    return inputs, read


@kind
def tables(place: Path) -> Inputs:
    names = [f"a/{i}.png" for i in range(4)]
    good = [
        "file,colour,size",
        *(f"{name},{'red' if i % 2 else 'blue'},{i}" for i, name in enumerate(names)),
    ]
    celeba = ["4", "Smiling Young", *(f"{i}.png {i % 2} 1" for i in range(4))]
    cell = st.sampled_from(
        [*ODD_TEXTS, '"', '"a', "a,b", "NA", "1e999", "9" * 5000, "٣", "²"]
    ) | st.text(max_size=6)

    @st.composite
    def texts(draw: st.DrawFn) -> bytes:
        lines = list(draw(st.sampled_from([good, celeba])))
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, len(lines) - 1))
            cells = lines[at].split("," if lines[0] == good[0] else " ")
            cells[draw(st.integers(0, len(cells) - 1))] = draw(cell)
            lines[at] = ("," if "," in lines[at] else " ").join(cells)
        content = (
            draw(st.sampled_from(["\n", "\r\n", "\r"])).join(lines).encode("utf-8", "surrogatepass")
        )
        return draw(damaged(content)) if draw(st.booleans()) else content

    def read(content: bytes) -> None:
        file = place / "table.csv"
        file.write_bytes(content)
        read_attributes(file, names)

    return texts(), read


@pytest.mark.parametrize("name", KINDS)
def test_odd_files_are_read_or_refused_in_one_line(name, place):
    fuzz(KINDS[name](place), place, FEW)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_many_odd_files_are_read_or_refused_in_one_line(name, place):
    fuzz(KINDS[name](place), place, MANY)
