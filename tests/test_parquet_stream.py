"""Images in Parquet files that stay where they are."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import processes
import stored
import tiny
from file_server import FileServer, file_server
from semtok import Tokenizer, UserError
from semtok.commands import cache_latents, evaluate
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.caches.latent_cache import open_latent_cache
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import Key
from semtok.recipe import parse_data, parse_recipe

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from semtok.data.images.parquet import Parquet, ParquetConfig  # noqa: E402
from semtok.data.images.parquet_stream import KEPT  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Nothing is kept outside of the test; each row group is a block of its own, small as it is."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("semtok.data.images.parquet_stream.BLOCK_BYTES", 0)
    return tmp_path / "cache" / "parquet"


def write(file: Path, numbers: range, *, rows: int = 4, padding: int = 0, **options: Any) -> str:
    """Numbered images of three classes; a row group has so many rows, of so many bytes more each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(numbers.start)
    images = [{"bytes": stored.png(n) + noise.bytes(padding), "path": f"{n}.png"} for n in numbers]
    columns = {
        "text": [f"caption {number}" for number in numbers],
        "image": images,
        "label": [number % 3 for number in numbers],
        "odd": [bool(number % 2) for number in numbers],
    }
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["c", "a", "b"]),
            "odd": datasets.Value("bool"),
        }
    )
    table = pyarrow.table(columns, schema=features.arrow_schema)
    parquet.write_table(table, file, row_group_size=rows, **options)
    return str(file)


def open_parquet(path: str, **settings) -> tuple[Parquet, Parquet]:
    return Parquet.open(ParquetConfig(**({"path": path, "size": 8, "streaming": True} | settings)))


def write_set(folder: Path) -> str:
    """Files that differ in how they are written, with 23 images in row groups of 1 to 5."""
    write(folder / "train-0.parquet", range(9), rows=5, compression="none", use_dictionary=False)
    write(folder / "train-2.parquet", range(9, 12), rows=1, compression="gzip")
    write(folder / "train-3.parquet", range(12, 23), rows=4, data_page_version="2.0")
    return str(folder)


@pytest.mark.parametrize("block_bytes", [0, 400, 2**24])
@pytest.mark.parametrize("held_out", [None, "DIR/v.parquet"])
def test_each_image_and_label_is_that_of_the_converted_set(
    tmp_path, monkeypatch, block_bytes, held_out
):
    monkeypatch.setattr("semtok.data.images.parquet_stream.BLOCK_BYTES", block_bytes)
    path = write_set(tmp_path / "data")
    write(tmp_path / "v.parquet", range(500, 507), rows=3)
    validation = held_out and held_out.replace("DIR", str(tmp_path))
    settings = {"validation": validation, "validation_fraction": 0.3, "attributes": ("odd",)}
    converted = open_parquet(path, streaming=False, **settings)
    streamed = open_parquet(path, **settings)
    for ours, theirs in zip(streamed, converted, strict=True):
        assert len(ours) == len(theirs) and ours.class_names == theirs.class_names
        assert sum(ours.block_size) == len(ours) and ours.identity != theirs.identity
        backwards = list(range(len(ours)))[::-1]
        for indices in (backwards, backwards[::3], [0, 0, len(ours) - 1]):
            a, b = ours.load(indices), theirs.load(indices)
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert torch.equal(a.attributes["odd"], b.attributes["odd"])
        names = [source.image_name(len(source) - 1) for source in (ours, theirs)]
        assert names[0] == names[1]
        assert sorted(ours.chosen(len(ours))) == list(range(len(ours)))
    assert not (tmp_path / "cache").exists(), "nothing of local files is copied"


def test_a_resumed_run_looks_at_every_file_wherever_it_was_moved(tmp_path):
    path, validation = (write(tmp_path / part / "x.parquet", range(9)) for part in "ab")
    first = open_parquet(path, validation=validation)[0].file_states
    moved = shutil.move(tmp_path / "a", tmp_path / "c") / Path("x.parquet")
    moved.touch()
    again, _ = open_parquet(str(moved), validation=validation)
    assert again.file_states == first
    for file in (str(moved), validation):
        kept = Path(file).read_bytes()
        write(Path(file), range(9), rows=3)
        assert open_parquet(str(moved), validation=validation)[0].file_states != first
        Path(file).write_bytes(kept)


def test_a_file_without_rows_adds_none(tmp_path):
    path = write_set(tmp_path / "data")
    write(tmp_path / "data" / "train-1.parquet", range(0))
    train, held_out = open_parquet(path)
    assert len(train) + len(held_out) == 23


@pytest.mark.parametrize("column", [pyarrow.binary(), pyarrow.large_binary()])
def test_images_may_be_plain_bytes_and_types_may_differ(tmp_path, column):
    for name, kind, own in (("a", pyarrow.int32(), range(3)), ("b", pyarrow.int64(), range(3, 6))):
        images = pyarrow.array([stored.png(number) for number in own], column)
        labels = pyarrow.array([number % 2 for number in own], kind)
        parquet.write_table(
            pyarrow.table({"image": images, "label": labels}), tmp_path / f"{name}.parquet"
        )
    path, validation = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    for streaming in (False, True):
        train, held_out = open_parquet(path, validation=validation, streaming=streaming)
        assert stored.numbers_in(train) == [0, 1, 2] and stored.numbers_in(held_out) == [3, 4, 5]
        assert held_out.load([0, 1]).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("num_processes", "accumulate", "num_workers"),
    [(1, 1, 0), (2, 1, 2), (3, 2, 0), (5, 1, 1)],
)
def test_epochs_are_whole_in_any_number_of_processes(
    tmp_path, num_processes, accumulate, num_workers
):
    train, _ = open_parquet(
        write_set(tmp_path / "data"), validation=write(tmp_path / "v.parquet", range(2))
    )
    stored.check_order(
        train, num_processes=num_processes, accumulate=accumulate, num_workers=num_workers
    )


def test_a_source_is_handed_to_another_process_without_what_it_holds(tmp_path):
    train, _ = open_parquet(write(tmp_path / "a.parquet", range(20), padding=50_000))
    assert stored.numbers_in(train)
    sent = pickle.dumps(train)
    assert len(sent) < 50_000
    assert stored.numbers_in(pickle.loads(sent)) == stored.numbers_in(train)  # noqa: S301


# Behind a server -----------------------------------------------------------------------------------

NUM_ROWS, NUM_GROUPS = 3, 40
"""Of the served set; more row groups than are kept."""


@pytest.fixture
def server(tmp_path):
    num_images, half = NUM_ROWS * NUM_GROUPS, NUM_ROWS * NUM_GROUPS // 2
    padding = {"rows": NUM_ROWS, "padding": 30_000}
    write(tmp_path / "s-0.parquet", range(half), **padding)
    write(tmp_path / "s-1.parquet", range(half, num_images), **padding)
    write(tmp_path / "v.parquet", range(500, 502), **padding)
    with file_server({f"/{f.name}": f.read_bytes() for f in tmp_path.glob("*.parquet")}) as running:
        yield running


def open_served(server: FileServer, **settings) -> tuple[Parquet, Parquet]:
    held_out = f"{server.address}/v.parquet"
    return open_parquet(f"{server.address}/s-{{0..1}}.parquet", validation=held_out, **settings)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_urls_are_read_as_files_are(server, tmp_path, num_workers):
    train, held_out = open_served(server)
    local, _ = open_parquet(f"{tmp_path}/s-*.parquet", validation=str(tmp_path / "v.parquet"))
    assert torch.equal(train.load(range(120)).labels, local.load(range(120)).labels)
    assert train.class_names == ("c", "a", "b") and stored.numbers_in(held_out) == [500, 501]
    stored.check_order(train, num_processes=2, num_workers=num_workers)


def test_an_epoch_fetches_each_row_group_once(server):
    train, _ = open_served(server)
    content = sum(len(server.files[f"/s-{i}.parquet"]) for i in range(2))
    assert server.num_bytes < content / 4, (
        "footers, labels, and a row group to look at of each part"
    )
    server.num_bytes = server.num_parts = 0
    again, _ = open_served(server)
    assert server.num_parts == 3 + 2, "footers and a first image each; the labels are kept"
    order = DataOrder(len(again), 4, 0, False, again.block_size)
    server.num_bytes = server.num_parts = 0
    seen = []
    for step in range(30):
        seen += stored.numbers(again.load_keys(order.keys(step)).images)
    assert sorted(seen) == list(range(120))
    assert NUM_GROUPS - 1 <= server.num_parts <= NUM_GROUPS and server.num_bytes < content
    assert len(again.cells._held) == KEPT
    server.num_parts = 0
    again.load(again.chosen(KEPT * NUM_ROWS))
    assert server.num_parts <= KEPT, "what stands for the whole set lies together too"


def test_neighbouring_row_groups_of_a_column_come_in_one_request(server, tmp_path, monkeypatch):
    monkeypatch.setattr("semtok.data.images.parquet_stream.BLOCK_BYTES", 2**24)
    images = [stored.png(n) + np.random.default_rng(n).bytes(20_000) for n in range(30)]
    columns = {"text": [f"caption {n}" * 20 for n in range(30)], "image": images}
    table = pyarrow.table(columns | {"label": [n % 3 for n in range(30)]})
    parquet.write_table(table, tmp_path / "g.parquet", row_group_size=3, compression="none")
    server.files["/g.parquet"] = (tmp_path / "g.parquet").read_bytes()
    settings = {"path": f"{server.address}/g.parquet", "validation": f"{server.address}/v.parquet"}
    with pytest.raises(UserError, match="its columns are"):
        open_parquet(**settings)
    del settings["validation"]
    train, held_out = open_parquet(**settings, validation_fraction=0.2)
    server.num_parts = 0
    again, _ = open_parquet(**settings, validation_fraction=0.2)
    assert server.num_parts == 1 + 2, "the footer, and of each part all images"
    assert sorted(stored.numbers_in(again) + stored.numbers_in(held_out)) == list(range(30))
    assert server.num_parts == 1 + 2 and server.num_bytes < 5 * len(server.files["/g.parquet"])


def test_a_cell_that_names_a_file_of_ones_own_is_refused(tmp_path):
    (tmp_path / "private.png").write_bytes(stored.png(7))
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema

    def write_cells(name: str, path: str | None) -> str:
        cells = [{"bytes": stored.png(n), "path": f"/x/{n}.png"} for n in range(3)]
        cells[1] = cells[1] if path is None else {"bytes": None, "path": path}
        parquet.write_table(pyarrow.table({"image": cells}, schema=schema), tmp_path / name)
        return str(tmp_path / name)

    held_out = write_cells("b.parquet", None)
    for streaming in (False, True):
        for path in (str(tmp_path / "private.png"), "../private.png", "private.png"):
            file = write_cells("a.parquet", path)
            source, _ = open_parquet(file, validation=held_out, streaming=streaming)
            if path == "private.png":
                assert stored.numbers(source.load([1]).images) == [2]
            else:
                with pytest.raises(UserError, match=f"row 1 names the file '{path}'") as raised:
                    source.load([1])
                assert "\n" not in str(raised.value)


def test_each_loader_process_fetches_its_own(server):
    train, _ = open_served(server)
    server.num_parts = 0
    list(
        training_batches(
            train,
            DataOrder(len(train), 4, 0, False, train.block_size),
            BatchSlice(4, 1, 0, 1),
            first_step=0,
            last_step=30,
            num_workers=2,
            pin_memory=False,
        )
    )
    assert server.num_parts <= 2 * NUM_GROUPS


def test_a_server_is_asked_again_and_then_given_up(server, monkeypatch):
    monkeypatch.setattr("semtok.data.remote._WAITS", (0.0, 0.0))
    train, _ = open_served(server)
    server.fails = 2
    assert stored.numbers(train.load([50]).images) == [50] and server.fails == 0
    server.fails = 1000
    with pytest.raises(UserError, match=r"s-1.parquet: 503.*Service Unavailable"):
        train.load([100])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_changes_while_training_is_one_line(server, monkeypatch, num_workers):
    monkeypatch.setattr("semtok.data.remote._WAITS", ())
    train, _ = open_served(server)
    order = DataOrder(len(train), 4, 0, False, train.block_size)
    for content in (b"\0" * len(server.files["/s-0.parquet"]), b"PAR1"):
        server.files |= {"/s-0.parquet": content, "/s-1.parquet": content}
        batches = training_batches(
            train,
            order,
            BatchSlice(4, 1, 0, 1),
            first_step=0,
            last_step=9,
            num_workers=num_workers,
            pin_memory=False,
        )
        with pytest.raises(UserError, match="416|changed since this run began") as raised:
            list(batches)
        assert "\n" not in str(raised.value)


def test_servers_that_can_not_do_are_one_line_errors(server, monkeypatch):
    monkeypatch.setattr("semtok.data.remote._WAITS", ())
    place = server.address
    for settings, message in [
        ({"path": f"{place}/x.parquet"}, r"data.path: '.*x.parquet': no such file, or no answer"),
        ({"validation": f"{place}/x.parquet"}, r"data.validation: '.*x.parquet': no such file"),
        ({"validation": f"{place}/s-0.parquet"}, "s-0.parquet' is trained on"),
        ({"path": f"{place}/s-{{0.parquet"}, "a brace has no partner"),
        ({"path": "nope://s.parquet"}, "nope"),
        ({"path": f"{place}/s-0.parquet", "split": "dev"}, "has no 'dev'; it has: train"),
        ({"revision": "v1"}, "data.revision: only datasets on the Hub have one"),
        ({"streaming": False}, "is a URL, which only data.streaming=true reads"),
    ]:
        with pytest.raises(UserError, match=message) as raised:
            open_parquet(**({"path": f"{place}/s-0.parquet"} | settings))
        assert "\n" not in str(raised.value)
    for content in (b"hello", b"", server.files["/s-0.parquet"][:-100]):
        server.files["/cut.parquet"] = content
        with pytest.raises(UserError, match="cut.parquet: damaged, cut short, or no Parquet file"):
            open_parquet(f"{place}/cut.parquet")
    server.gives_parts = False
    with pytest.raises(UserError, match="its server gives no parts of files"):
        open_served(server)


def test_kept_labels_are_read_again_where_the_file_changes(server, cache, tmp_path):
    open_served(server)
    kept = sorted(cache.iterdir())
    assert len(kept) == 3
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])
    write(tmp_path / "n.parquet", range(61), rows=NUM_ROWS)
    server.files["/s-0.parquet"] = (tmp_path / "n.parquet").read_bytes()
    train, _ = open_served(server)
    assert len(train) == 121 and len(list(cache.iterdir())) == 4
    assert train.load([60, 61]).labels.tolist() == [0, 0]


def test_a_url_may_hold_a_query_that_is_not_shown(server):
    server.files["/a.parquet?key=secret"] = server.files["/s-0.parquet"]
    source, _ = open_parquet(f"{server.address}/a.parquet?key=secret")
    assert len(source) == 57 and "secret" not in source.name + source.image_name(0)
    with pytest.raises(UserError, match=r"b\.parquet…'?:") as raised:
        open_parquet(f"{server.address}/b.parquet?key=secret")
    assert "secret" not in str(raised.value)


# Commands -----------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_weights_unless_a_file_changed(
    tmp_path, server, monkeypatch
):
    content = tiny.content({"name": "vae"}, checkpoint_every=3)
    content["data"] = {"kind": "parquet", "path": f"{server.address}/s-0.parquet", "size": 16}
    content["data"] |= {"streaming": True, "num_workers": 1}
    recipe = parse_recipe(content, "tiny")
    train_tokenizer(recipe, tmp_path / "run")
    whole = tiny.final_tensors(tmp_path / "run")
    shutil.rmtree(sorted((tmp_path / "run" / "checkpoints").iterdir())[-1])
    train_tokenizer(recipe, tmp_path / "run", resume=True)
    resumed = tiny.final_tensors(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    server.files["/s-0.parquet"] = server.files["/s-1.parquet"]
    with pytest.raises(UserError, match="can't resume with other images: s-0.parquet changed"):
        train_tokenizer(recipe, tmp_path / "run", resume=True)


def test_evaluation_takes_files_where_they_are(server, tmp_path, capsys):
    output = tmp_path / "scores.json"
    data = ["--data", "kind=parquet", "streaming=true", f"path={server.address}/s-0.parquet"]
    options = ["size=32", "validation_fraction=0.4", "attributes=[odd]", "--output", str(output)]
    arguments = ["probe", "--tokenizer", "demo", *data, *options]
    assert run(evaluate.main, arguments) == 0, capsys.readouterr().err
    assert "odd" in output.read_text()


def train_in_blocks(words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("semtok.data.images.parquet_stream.BLOCK_BYTES", 0)
        processes.run_command("train_tokenizer", words)


def test_two_processes_train_to_the_weights_of_one(server, tmp_path, ranks):
    recipe = tmp_path / "recipe.yaml"
    content = tiny.content({"name": "vae"}, steps=3, schedule="constant")
    content["train"]["optimiser"] = {"learning_rate": 1e-4}
    content["data"] = {"kind": "parquet", "path": f"{server.address}/s-0.parquet", "size": 16}
    content["data"] |= {"streaming": True, "num_workers": 1}
    recipe.write_text(yaml.safe_dump(content))
    words = [str(recipe), "--output"]
    train_in_blocks([*words, str(tmp_path / "one")])
    outputs = ranks.run("test_parquet_stream:train_in_blocks", [*words, str(tmp_path / "two")])
    assert "training" in outputs[0] and "training" not in outputs[1]
    one, two = tiny.final_tensors(tmp_path / "one"), tiny.final_tensors(tmp_path / "two")
    for key in (k for k in one if k.startswith(("learners.", "ema."))):
        torch.testing.assert_close(one[key], two[key], atol=2e-5, rtol=1e-3)


def test_latents_are_cached_as_those_of_the_converted_set(server, tmp_path):
    cached = []
    for streaming, place in ((True, server.address), (False, str(tmp_path))):
        words = ["kind=parquet", f"path={place}/s-0.parquet", "size=16"]
        words += [f"streaming={streaming}".lower()]
        output = tmp_path / f"latents_{streaming}"
        options = ["--output", str(output), "--shard-size", "32", "--batch-size", "8"]
        if streaming:
            server.num_parts = 0
        assert run(cache_latents.main, ["--tokenizer", "demo", "--data", *words, *options]) == 0
        settings = parse_data(words, place="test")
        cached.append(open_latent_cache(output, Tokenizer.from_pretrained("demo"), data=settings))
    assert server.num_parts < 3 * NUM_GROUPS, "of half as many, for each part, mirrored or not"
    keys = [Key(index, bool(index % 2)) for index in range(57)]
    ours, theirs = (train.load_keys(keys) for train, _ in cached)
    assert torch.equal(ours.labels, theirs.labels)
    assert torch.equal(ours.latents.mean["texture"], theirs.latents.mean["texture"])
