"""``convert``: stored images as shards in the MDS format."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch

import mds_set
import stored
from processes import succeed
from semtok.commands import convert
from semtok.commands.cli import run
from semtok.data.images import mds_writer
from semtok.data.images.encoded import StoredImages
from semtok.data.images.kinds import open_sources
from semtok.recipe import parse_data
from semtok.unfinished import beside, is_unfinished

pytest.importorskip("webdataset")

STREAMING_WRITES = "d52cbd2c4a1fcafed84a0286346e71a564a53e2bd5ef4313382183fa35fcdf25"
"""Digest of the shards and the index that ``MDSWriter`` of mosaicml-streaming 0.13.0 writes of the images of a test."""
STREAMING_READS = """
import json, sys, streaming
rows = streaming.StreamingDataset(local=sys.argv[1], batch_size=1, validate_hash="sha256")
rows = [rows[i] for i in range(len(rows))]
print(json.dumps([[row["image"].hex(), row["label"]] for row in rows]))
"""
"""In a process of its own, as it leaves memory that is shared behind."""


@pytest.fixture(autouse=True)
def _nothing_outside_of_the_test(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))


def opened(*words: str) -> tuple[StoredImages, StoredImages]:
    return open_sources(parse_data([*words, "size=8"], place="test"))


def write_folder(root: Path) -> list[str]:
    lines = ["image,bright"]
    for number in range(12):
        file = root / "folder" / ("über", "b", "a")[number % 3] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(stored.png(number))
        lines.append(f"{file.name},{'yes' if number % 2 else 'no'}")
    (root / "table.csv").write_text("\n".join(lines))
    return ["kind=folder", f"path={root / 'folder'}", f"attributes={root / 'table.csv'}"]


def write_tar(root: Path) -> list[str]:
    members = []
    for number in range(12):
        members.append((f"{number:04}.png", stored.png(number)))
        members.append((f"{number:04}.cls", str(number % 4).encode()))
    stored.write_tar(root / "a.tar", members)
    return ["kind=tars", f"path={root / 'a.tar'}"]


def write_parquet(root: Path) -> list[str]:
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    names = datasets.ClassLabel(names=["c", "unseen", "a"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    images = [{"bytes": stored.png(n), "path": None} for n in range(12)]
    columns = {"image": images, "label": [2 * (n % 2) for n in range(12)]}
    table = pyarrow.table(columns, schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, root / "a.parquet")
    return ["kind=parquet", f"path={root / 'a.parquet'}", "streaming=true"]


def write_unlabelled(root: Path) -> list[str]:
    stored.write_tar(root / "b.tar", [(f"{n:04}.png", stored.png(n)) for n in range(12)])
    return ["kind=tars", f"path={root / 'b.tar'}"]


def write_shards(root: Path) -> list[str]:
    mds_set.write_numbers(root / "shards", range(12))
    return ["kind=mds", f"path={root / 'shards'}"]


@pytest.mark.parametrize(
    "write", [write_folder, write_tar, write_parquet, write_unlabelled, write_shards]
)
def test_a_converted_set_is_the_set(tmp_path, capsys, write):
    words = [*write(tmp_path), "validation_fraction=0.25"]
    arguments = ["--data", *words, "--output", str(tmp_path / "set")]
    arguments += ["--shard-megabytes", "0.0007"]
    assert run(convert.main, arguments) == 0
    shown = capsys.readouterr().out
    assert "9 training and 3 held-out images in" in shown and "data.kind=mds data.path=" in shown
    more = ["attributes=[bright]"] if write is write_folder else []
    ours = opened("kind=mds", f"path={tmp_path / 'set'}", *more)
    assert "reading" not in capsys.readouterr().out, "labels lie beside the index"
    assert len(ours[0].block_size) > 1
    for mine, theirs in zip(ours, opened(*words), strict=True):
        indices = range(len(theirs))
        files = [c if isinstance(c, bytes) else c.read_bytes() for c in theirs.contents(indices)]
        assert mine.contents(indices) == files and mine.class_names == theirs.class_names
        assert torch.equal(mine.labels, theirs.labels)
        assert mine.attributes == theirs.attributes
        for name in mine.attributes:
            assert torch.equal(mine.attribute_values(name), theirs.attribute_values(name))
    for part in ("train", "val"):
        (tmp_path / "set" / part / "columns.safetensors").write_bytes(b"damaged")
    names = opened("kind=mds", f"path={tmp_path / 'set'}")[0].class_names
    assert set(names) <= set(ours[0].class_names), "of the shards, where the file is none"
    assert run(convert.main, arguments) == 0, "is finished"
    (tmp_path / "set" / "train" / "shard.00001.mds").unlink()
    assert run(convert.main, arguments) == 0, "what has gone is written again"
    assert run(convert.main, ["--verify", str(tmp_path / "set")]) == 0
    assert "every shard is as its index says" in capsys.readouterr().out


def test_another_column_as_the_label_has_classes_of_its_own(tmp_path):
    lines = ["image,bright"]
    for number in range(12):
        stored_at = tmp_path / "folder" / str(number % 3) / f"{number:02}.png"
        stored_at.parent.mkdir(parents=True, exist_ok=True)
        stored_at.write_bytes(stored.png(number))
        lines.append(f"{stored_at.name},{number % 2}")
    (tmp_path / "table.csv").write_text("\n".join(lines))
    words = ["kind=folder", f"path={tmp_path / 'folder'}", f"attributes={tmp_path / 'table.csv'}"]
    assert run(convert.main, ["--data", *words, "--output", str(tmp_path / "set")]) == 0
    again = ("kind=mds", f"path={tmp_path / 'set'}")
    assert opened(*again)[0].class_names == ("0", "1", "2")
    assert opened(*again, "label_column=bright")[0].class_names == ("0", "1")


def test_shards_are_those_that_streaming_writes(tmp_path):
    for number in range(12):
        file = tmp_path / "folder" / "train" / "ba"[number % 2] / f"{number:02}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"BM" + bytes([number]) * (20 + number))
    for name in ("train/a", "val/a"):
        (tmp_path / "folder" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name / "x.png").write_bytes(stored.png(1))
    source, _ = opened("kind=folder", f"path={tmp_path / 'folder'}")
    index = mds_writer.MdsWriter(source, tmp_path / "set", shard_bytes=700).write("writing")
    assert [shard.samples for shard in index.shards] == [11, 2]
    content = b"".join(f.read_bytes() for f in sorted((tmp_path / "set").glob("*.mds")))
    content += (tmp_path / "set" / "index.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == STREAMING_WRITES


def test_an_interrupted_command_goes_on_and_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch):
    words = write_tar(tmp_path)
    arguments = ["--data", *words, "--output", str(tmp_path / "set"), "--shard-megabytes", "0.0007"]
    written = []

    def full(path: Path, content: object) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write_json(path, content)

    write_json = mds_writer.write_json
    monkeypatch.setattr(mds_writer, "write_json", full)
    assert run(convert.main, arguments) == 2
    assert capsys.readouterr().err.startswith("error: ") and len(written) == 2
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "set").rglob("*.mds")}
    assert run(convert.main, ["--verify", str(tmp_path / "set")]) == 2, "it is not finished"
    monkeypatch.setattr(mds_writer, "write_json", write_json)
    for file in list((tmp_path / "set").rglob("*")):  # as a command that was killed leaves them
        beside(file).touch()
    assert run(convert.main, arguments) == 0
    note = written[0].with_name(".shard.00000.json")
    note.touch()  # the index was written, and notes not yet removed
    assert run(convert.main, arguments) == 0
    assert not note.exists()
    assert not [file for file in (tmp_path / "set").rglob("*") if is_unfinished(file.name)]
    first = written[0].with_name("shard.00000.mds")
    assert first.stat().st_mtime_ns == before[first], "what is there is not written again"
    assert run(convert.main, [*arguments[:-3], str(tmp_path / "whole"), *arguments[-2:]]) == 0
    ours, theirs = (mds_set.served(tmp_path / name) for name in ("set", "whole"))
    assert ours == theirs and "/train/index.json" in ours
    shard = tmp_path / "set" / "train" / "shard.00001.mds"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert run(convert.main, ["--verify", str(tmp_path / "set")]) == 2
    assert "shard.00001.mds: has another sha256 than by the index" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "OUT"], "convert needs --data key=value …"),
        (["--data", "TAR"], "convert needs --output DIR"),
        (
            ["--data", "TAR", "size=64", "--output", "OUT"],
            "--data: size: images are written as they",
        ),
        (["--data", "kind=shapes", "--output", "OUT"], "kind=shapes are drawn, not stored; give"),
        (
            ["--data", "TAR", "--output", "OUT", "--shard-megabytes", "0"],
            "--shard-megabytes: expec",
        ),
        (["--data", "TAR", "--output", "OUT", "--shard-megabytes", "4000"], "0.001 to 2147"),
        (["--data", "TAR", "--output", "OUT", "--shard-megabytes", "nan"], "0.001 to 2147"),
        (["--data", "TAR", "--output", "OUT", "--shard-megabytes", "inf"], "0.001 to 2147"),
        (["--data", "TAR", "--output", "HERE"], "holds other files (b.tar); choose another folder"),
        (["--verify", "HERE"], "holds no index.json; name the folder of the shards"),
    ],
)
def test_what_can_not_be_converted_is_one_line(tmp_path, capsys, words, message):
    tar = write_unlabelled(tmp_path)
    places = {"TAR": tar, "OUT": [str(tmp_path / "set")], "HERE": [str(tmp_path)]}
    arguments = [each for word in words for each in places.get(word, [word])]
    assert run(convert.main, arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_a_folder_of_other_shards_is_left_alone(tmp_path, capsys):
    arguments = ["--output", str(tmp_path / "set"), "--shard-megabytes", "0.001", "--data"]
    assert run(convert.main, [*arguments, *write_tar(tmp_path)]) == 0
    before = mds_set.served(tmp_path / "set")
    assert run(convert.main, [*arguments, *write_unlabelled(tmp_path)]) == 2
    assert "holds shards of other images" in capsys.readouterr().err
    assert mds_set.served(tmp_path / "set") == before


def test_streaming_reads_what_is_written_here_and_is_read_where_it_compresses(tmp_path):
    streaming = pytest.importorskip("streaming")
    arguments = ["--data", *write_folder(tmp_path), "--output", str(tmp_path / "set")]
    assert run(convert.main, [*arguments, "--shard-megabytes", "0.0007"]) == 0
    source, _ = opened("kind=mds", f"path={tmp_path / 'set'}")
    words = ["-c", STREAMING_READS, str(tmp_path / "set" / "train")]
    (output,) = succeed(words, tmp_path / "logs", num=1)
    labels = [source.class_names[label] for label in source.labels]
    images = source.contents(range(len(source)))
    assert json.loads(output.splitlines()[-1]) == [
        [image.hex(), label] for image, label in zip(images, labels, strict=True)
    ]
    for compression, hashes in (("zstd:7", ["xxh64"]), ("gz", ["sha1"]), (None, ["xxh64"])):
        place = tmp_path / f"{compression}"
        columns = {"image": "bytes", "label": "str"}
        options = {"compression": compression, "hashes": hashes, "size_limit": 700}
        with streaming.MDSWriter(out=str(place), columns=columns, **options) as writer:
            for image, label in zip(images, labels, strict=True):
                writer.write({"image": image, "label": label})
        train, held_out = opened("kind=mds", f"path={place}")
        assert sorted(stored.numbers_in(train) + stored.numbers_in(held_out)) == sorted(
            stored.numbers_in(source)
        )


def test_compressed_shards_without_streaming_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    index = mds_set.write_numbers(tmp_path / "set", range(4))
    shard = index["shards"][0]
    shard |= {"compression": "zstd", "zip_data": {**shard["raw_data"], "basename": "a.mds.zstd"}}
    (tmp_path / "set" / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\(zstd\) and needs mosaicml-streaming; pip install 'se"):
        opened("kind=mds", f"path={tmp_path / 'set'}")
