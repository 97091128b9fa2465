"""Images in the MDS format, on disk and behind a server."""

import json
import os
import shutil
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from PIL import Image

import mds_set
import processes
import stored
import tiny
from file_server import FileServer, file_server
from semtok import UserError
from semtok.commands.run_data import check_data, record_data
from semtok.data.images.kinds import open_sources
from semtok.data.images.mds import Mds, MdsConfig
from semtok.data.images.mds_shards import KEPT
from semtok.data.local_copies import LocalCopies
from semtok.data.order import BatchSlice, DataOrder, training_batches

pytest.importorskip("webdataset")  # with it comes what reads URLs


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("semtok.data.remote._WAITS", (0.0, 0.0))
    return tmp_path / "cache"


def open_mds(path: Path | str, **settings: Any) -> tuple[Mds, Mds]:
    return open_sources(MdsConfig(**({"path": str(path), "size": 8} | settings)))


def write_parts(root: Path, num: int = 23) -> Path:
    """A training and a held-out part."""
    mds_set.write_numbers(root / "train", range(num))
    mds_set.write_numbers(root / "val", range(500, 502))
    return root


def test_a_folder_with_train_and_val_is_a_set_in_the_order_of_its_shards(tmp_path):
    train, held_out = open_mds(write_parts(tmp_path / "set"))
    assert stored.numbers_in(train) == list(range(23))
    assert stored.numbers_in(held_out) == [500, 501]
    assert train.class_names == held_out.class_names == ("0", "1", "2")
    assert train.load(range(23)).labels.tolist() == [n % 3 for n in range(23)]
    assert train.block_size == (4, 4, 4, 4, 4, 3) and train.name == "set (23 images)"
    assert train.image_name(21) == f"{tmp_path}/set/train/shard.00005.mds, sample 1"


def test_a_folder_of_shards_holds_images_out_as_others_do(tmp_path):
    mds_set.write_numbers(tmp_path / "set", range(20))
    mds_set.write_numbers(tmp_path / "more", range(500, 503))
    for seed in (0, 1):
        train, held_out = open_mds(tmp_path / "set", validation_fraction=0.3, seed=seed)
        assert sorted(stored.numbers_in(train) + stored.numbers_in(held_out)) == list(range(20))
        assert len(held_out) == 6
    named = open_mds(tmp_path / "set", validation=str(tmp_path / "more"))
    assert [len(source) for source in named] == [20, 3]
    part, _ = open_mds(tmp_path / "set", num_images=5)
    assert len(part) == 5 and set(stored.numbers_in(part)) < set(range(20))


def pixels(number: int, mode: str = "RGB") -> bytes:
    """As Streaming stores Pillow's images that are not encoded."""
    image = Image.new("RGB", (12, 9), (number // 256, number % 256, 99)).convert(mode)
    return struct.pack("<3I", *image.size, len(mode)) + mode.encode() + image.tobytes()


@pytest.mark.parametrize("hashes", [(), ("md5", "sha256")])
def test_columns_of_other_names_and_types_are_read(tmp_path, hashes):
    columns = {"x": "pil", "class": "str", "mood": "uint8", "notes": "pkl", "odd": "ndarray:uint8"}
    rows = [
        {
            "x": pixels(n),
            "class": ("cat", "dog")[n % 2].encode(),
            "mood": bytes([n % 3]),
            "notes": b"cos\nsystem\n(S'exit 1'\ntR.",
            "odd": b"?" * n,
        }
        for n in range(9)
    ]
    mds_set.write_shards(tmp_path / "set", columns, rows, hashes=hashes)
    settings = {"label_column": "class", "attributes": ("mood",), "validation_fraction": 0.2}
    train, held_out = open_mds(tmp_path / "set", **settings)
    assert sorted(stored.numbers_in(train) + stored.numbers_in(held_out)) == list(range(9))
    assert train.class_names == ("cat", "dog") and train.attributes == {"mood": ("0", "1", "2")}
    batch, numbers = train.load(range(len(train))), stored.numbers_in(train)
    assert batch.labels.tolist() == [n % 2 for n in numbers]
    assert batch.attributes["mood"].tolist() == [n % 3 for n in numbers]
    assert train.left_out.counts() == {"columns of pickles, which are never read": 1, "columns": 1}
    unlabelled, _ = open_mds(tmp_path / "set")
    assert unlabelled.class_names == ("images",)
    assert unlabelled.left_out.counts()["columns that may hold labels (data.label_column=…)"] == 1


def test_pixels_that_can_not_be_are_unreadable_images(tmp_path):
    bad = [struct.pack("<3I", 60_000, 60_000, 3) + b"RGB", b"", pixels(1)[:-1], pixels(1, "CMYK")]
    rows = [{"image": each} for each in (pixels(7), *bad)]
    mds_set.write_shards(tmp_path / "set", {"image": "pil"}, rows)
    mds_set.write_shards(tmp_path / "more", {"image": "pil"}, rows[:1])
    train, _ = open_mds(tmp_path / "set", validation=str(tmp_path / "more"))
    batch = train.load(range(5))
    assert stored.numbers(batch.images) == [7] * 5
    assert {one.reason for one in batch.skipped} >= {"no format that Pillow knows here"}


# What strangers write -----------------------------------------------------------------------------


def changed(index: dict[str, Any], **shard: Any) -> dict[str, Any]:
    """The index, with other things said of its second shard."""
    first, second, *others = index["shards"]
    return {**index, "shards": [first, second | shard, *others]}


def raw(**told: Any) -> dict[str, Any]:
    return {"raw_data": {"basename": "shard.00001.mds", "bytes": 5000, "hashes": {}} | told}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (raw(basename="../../x"), "names the file '../../x'; a shard's name is a path within"),
        (raw(basename="/etc/passwd"), "names the file '/etc/passwd'"),
        (raw(basename="http://127.0.0.1:9/x"), "names the file 'http://127.0.0.1:9/x'"),
        (raw(basename="a\\b"), "names the file"),
        (raw(basename=".."), "names the file"),
        (raw(basename="x\n.mds"), "names the file"),
        (raw(basename="%2e%2e/x.mds"), "names the file '%2e%2e/x.mds'; a shard's name is a path"),
        (raw(basename="x::file"), "names the file 'x::file'"),
        (raw(basename="shard.00000.mds"), "names the file 'shard.00000.mds' twice"),
        (raw(basename="\ud800"), "holds half a character"),
        (raw(basename="none.mds"), "none.mds: No such file or directory; copy it again"),
        (raw(bytes=2**32), "raw_data.bytes"),
        (raw(bytes=4999), "bytes, and 4999 by the index; copy it again"),
        ({"samples": 2**31}, "2147483648 samples don't fit into"),
        ({"samples": -1}, "samples"),
        ({"samples": 3}, "damaged, or changed since"),
        ({"version": 3}, "version"),
        ({"format": "csv"}, "format"),
        ({"column_sizes": [None, 4]}, "its columns are"),
        ({"column_names": ["image"]}, "its columns have no names, types and sizes"),
        ({"compression": "zstd"}, "tells of compression and of no compressed file"),
        ({"zip_data": raw()["raw_data"]}, "or the other way round"),
        ({"raw_data": None}, "raw_data"),
    ],
)
def test_an_index_that_can_not_be_is_one_line(tmp_path, change, message):
    index = mds_set.write_numbers(tmp_path / "set", range(9))
    (tmp_path / "set" / "index.json").write_text(json.dumps(changed(index, **change)))
    with pytest.raises(UserError, match="data.path: ") as raised:
        open_mds(tmp_path / "set")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_an_index_of_more_samples_than_memory_holds_numbers_of_is_one_line(tmp_path):
    index = mds_set.write_numbers(tmp_path, range(1))
    (shard,) = index["shards"]
    claimed = {"bytes": 2**32 - 1, "hashes": {}}
    shards = [
        shard | {"samples": 10**9, "raw_data": claimed | {"basename": f"{n}.mds"}}
        for n in range(400)
    ]
    (tmp_path / "index.json").write_text(json.dumps(index | {"shards": shards}))
    with pytest.raises(UserError, match="tells of 400,000,000,000 samples, and 2,147,483,648 are"):
        open_mds(tmp_path)


def test_a_column_larger_than_its_shard_is_one_line(tmp_path):
    index = mds_set.write_shards(tmp_path, {"a": "str", "image": "png"}, [{"a": b"", "image": b""}])
    index["shards"][0]["column_sizes"] = [10**30, None]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="'a' has 1000000000000000000000000000000 bytes, which str"):
        open_mds(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"version": 2}', b"[" * 100_000])
def test_an_index_that_is_none_is_one_line(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"data.path: .*index.json: ") as raised:
        open_mds(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"image": "pkl"}, {}, "'image' of 'SET' holds pickles (pkl), which can run code and are"),
        ({"image": "png", "label": "pkl"}, {}, "data.label_column: 'label' of 'SET' holds pickles"),
        (
            {"image": "magic"},
            {},
            "data.image_column: no column of images in 'SET'; choose of image",
        ),
        ({"image": "magic"}, {"image_column": "image"}, "holds magic; expected jpeg, png, pil"),
        ({"a": "png", "b": "jpeg"}, {}, "several columns of images in 'SET'; choose of a, b"),
        ({"image": "png"}, {"label_column": "lable"}, "data.label_column: no column 'lable' in"),
        ({"image": "png", "x": "json"}, {"attributes": ("x",)}, "data.attributes: 'x' of 'SET'"),
    ],
)
def test_columns_that_can_not_be_are_one_line(tmp_path, columns, settings, message):
    rows = [dict.fromkeys(columns, stored.png(n)) for n in range(4)]
    mds_set.write_shards(tmp_path / "set", columns, rows)
    with pytest.raises(UserError) as raised:
        open_mds(tmp_path / "set", **settings)
    assert message.replace("SET", str(tmp_path / "set")) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_shard_damaged_anywhere_is_one_line_or_an_unreadable_image(tmp_path):
    mds_set.write_numbers(tmp_path / "set", range(4))
    mds_set.write_numbers(tmp_path / "more", range(4))
    file = tmp_path / "set" / "shard.00000.mds"
    whole, told = file.read_bytes(), set()
    for place in (*range(0, 24), *range(300, len(whole), 23)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x84]) + whole[place + 1 :])
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        try:
            train, _ = open_mds(tmp_path / "set", validation=str(tmp_path / "more"))
            train.load(range(len(train)))
        except UserError as error:
            assert "\n" not in str(error)
            told.add(str(error).partition(": ")[2].partition(";")[0].rpartition(": ")[2])
    assert "damaged, or changed since this run began" in told


def test_what_is_not_there_or_twice_is_one_line(tmp_path):
    root = write_parts(tmp_path / "set")
    for settings, message in [
        (
            {"path": str(tmp_path / "x")},
            "no index.json in '.*x' or in train/ there, or none that",
        ),
        ({"validation": str(tmp_path)}, "data.validation: no index.json in"),
        ({"validation": f"{root}/train/"}, "is trained on; hold out others"),
        ({"path": "nope://x"}, "Protocol not known: nope"),
    ]:
        with pytest.raises(UserError, match=message):
            open_mds(**({"path": f"{root}/train"} | settings))


# Order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_processes", "accumulate", "num_workers"), [(1, 1, 0), (2, 1, 1), (3, 2, 0)]
)
def test_epochs_are_whole_in_any_number_of_processes(
    tmp_path, num_processes, accumulate, num_workers
):
    train, _ = open_mds(write_parts(tmp_path / "set"))
    stored.check_order(
        train, num_processes=num_processes, accumulate=accumulate, num_workers=num_workers
    )


def test_a_run_finds_its_shards_where_they_were_moved_and_no_others(tmp_path):
    root = write_parts(tmp_path / "set")
    record_data(tmp_path, open_mds(root))
    root.rename(tmp_path / "moved")
    check_data(tmp_path, open_mds(tmp_path / "moved"))
    with file_server(mds_set.served(tmp_path / "moved")) as server:
        check_data(tmp_path, open_mds(server.address))
    write_parts(tmp_path / "moved", num=20)
    with pytest.raises(UserError, match="can't resume with other images: shard.00005.mds is gone"):
        check_data(tmp_path, open_mds(tmp_path / "moved"))


# Behind a server ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    with file_server(mds_set.served(write_parts(tmp_path / "set"))) as running:
        yield running


def shard_bytes(server: FileServer) -> int:
    """Of all shards."""
    return sum(len(content) for name, content in server.files.items() if name.endswith(".mds"))


def test_urls_are_read_as_folders_are_and_each_shard_is_fetched_once(server, tmp_path):
    train, held_out = open_mds(server.address)
    local, _ = open_mds(tmp_path / "set")
    assert torch.equal(train.labels, local.labels) and train.class_names == local.class_names
    assert stored.numbers_in(held_out) == [500, 501] and train.block_size == local.block_size
    stored.check_order(train, num_processes=2)
    server.num_bytes = 0
    again, _ = open_mds(server.address)
    stored.check_order(again, num_processes=2, num_workers=1)
    assert server.num_bytes == sum(len(server.files[f"/{p}/index.json"]) for p in ("train", "val"))
    assert again.identity == train.identity


def read_together(address: str) -> None:
    dist.init_process_group("gloo")
    train, _ = open_mds(address)
    dist.barrier()
    order = DataOrder(len(train), 4, 0, True, train.block_size)
    share = BatchSlice(4, 1, dist.get_rank(), 2)
    options = {"num_workers": 1, "pin_memory": False}
    list(training_batches(train, order, share, first_step=0, last_step=12, **options))


def test_processes_of_a_machine_share_what_one_of_them_fetches(server, ranks):
    ranks.run("test_mds:read_together", server.address)
    small = sum(len(c) for name, c in server.files.items() if name.endswith(".json"))
    assert server.num_bytes == shard_bytes(server) + 2 * small


def test_no_more_stays_on_the_disk_than_is_asked_for(server, monkeypatch):
    monkeypatch.setattr("semtok.data.images.mds_shards.KEPT", 2)
    train, _ = open_mds(server.address, local_gigabytes=1e-9)
    folder = train.store.parts[0].file(0).parent
    left = folder / ".0123.shard.mds"
    left.write_bytes(b"of a process that was killed")
    read = [stored.numbers(train.load([index]).images)[0] for index in range(23)]
    assert read == list(range(23))
    largest = max(map(len, server.files.values()))
    assert sum(file.stat().st_size for file in folder.glob("[!.]*")) <= 2 * largest
    assert left.exists(), "it may be at work"
    os.utime(left, (1, 1))
    assert stored.numbers_in(train) == list(range(23)) and not left.exists()
    assert KEPT > 16, "the order draws from so many at a time"
    assert open_mds(server.address, local_gigabytes=1e300), "more than there is a number for"


def test_copies_that_come_at_once_make_room_for_each_other(tmp_path):
    copies = LocalCopies(tmp_path / "copies", 20, place="test")
    together = threading.Barrier(6, timeout=60)

    def write(temporary: Path) -> None:
        together.wait()
        temporary.write_bytes(bytes(10))

    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda n: copies.make(str(n), 10, write), range(6)))
    assert len(set(made)) == 6
    assert sum(file.stat().st_size for file in copies.folder.iterdir()) <= 20


def test_a_shard_that_comes_changed_cut_or_not_at_all_is_one_line(server, cache):
    name = "/train/shard.00003.mds"
    whole = server.files[name]
    for content, message in [
        (whole[:-1], "and .* by the index; put it there again"),
        (whole[:-1] + b"?", "has another sha1 than by the index; put it there again"),
        (None, "no such file"),
    ]:
        server.files.pop(name, None)
        if content is not None:
            server.files[name] = content
        with pytest.raises(
            UserError, match=rf"data.path: http://.*00003.mds: .*{message}"
        ) as raised:
            open_mds(server.address)[0].load([13])
        assert "\n" not in str(raised.value)
    server.files[name] = whole
    train, _ = open_mds(server.address)
    shutil.rmtree(cache)
    server.fails = 2
    assert stored.numbers(train.load([13]).images) == [13] and server.fails == 0


def test_digests_that_python_has_and_can_not_compare_are_one_line(server):
    name = "/train/index.json"
    index = json.loads(server.files[name])
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {"shake_128": "00"}
    server.files[name] = json.dumps(index).encode()
    with pytest.raises(UserError, match="shake_128"):
        open_mds(server.address)


def test_a_server_that_fails_is_no_set_without_held_out_images(server):
    server.fails = 1000
    with pytest.raises(UserError, match="503"):
        open_mds(server.address)


def test_a_url_may_hold_a_query_that_is_not_shown(server, cache):
    server.files |= {f"{name}?key=secret": c for name, c in server.files.items()}
    for name in [name for name in server.files if "secret" not in name]:
        del server.files[name]
    train, _ = open_mds(f"{server.address}/?key=secret")
    assert len(train) == 23 and "secret" not in train.name + train.image_name(0)
    shutil.rmtree(cache)
    assert (
        "user"
        not in open_mds(f"{server.address}/?key=secret".replace("//", "//user:pass@"))[0].name
    )
    server.files["/train/shard.00003.mds?key=secret"] = b""
    with pytest.raises(UserError) as raised:
        train.store.parts[0].file(3)
    assert "secret" not in str(raised.value)


def test_labels_in_shards_are_read_once_and_anew_where_the_shards_change(tmp_path, capsys):
    for hashes in (("sha1",), ()):
        root = tmp_path / f"set{len(hashes)}"
        mds_set.write_numbers(root, range(9), hashes=hashes)
        first, _ = open_mds(root)
        assert "reading label of 3 shards, once" in capsys.readouterr().out
        assert torch.equal(open_mds(root)[0].labels, first.labels)
        assert "reading" not in capsys.readouterr().out
        rows = [{"image": stored.png(n), "label": struct.pack("<q", 1)} for n in range(9)]
        mds_set.write_shards(root, {"image": "png", "label": "int"}, rows, hashes=hashes)
        assert set(open_mds(root)[0].labels.tolist()) == {1}, "of equal sizes"


def train(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semtok.training.log.RunLog.draw_curves", lambda self: None)  # slow
        processes.run_command("train_tokenizer", words)


def test_two_processes_resume_to_the_weights_of_a_run_that_was_not_stopped(server, tmp_path, ranks):
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content({"name": "vae"}, checkpoint_every=3)
    content["data"] = {"kind": "mds", "path": server.address, "size": 16, "num_workers": 1}
    recipe.write_text(yaml.safe_dump(content))
    words = [str(recipe), "--output", str(tmp_path / "run")]
    ranks.run("test_mds:train", words)
    whole = tiny.final_tensors(tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    shutil.rmtree(tmp_path / "cache")
    ranks.run("test_mds:train", [*words, "--resume"])
    resumed = tiny.final_tensors(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
