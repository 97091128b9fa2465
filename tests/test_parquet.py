"""Images in Parquet files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import stored
from hub_server import hub_server
from semtok import UserError
from semtok.commands import evaluate
from semtok.commands.cli import run
from semtok.data.images.folder import Folder, FolderConfig

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

from semtok.data.images.parquet import Parquet, ParquetConfig  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "hf"


def write(file: Path, columns: dict[str, Any]) -> str:
    """Plain columns, of which bytes are no known images."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file)
    return str(file)


def write_shard(file: Path, numbers: range, names: tuple[str, ...] = ()) -> str:
    """Rows of numbered images as the Hub has them; the class is the number modulo 3."""
    file.parent.mkdir(parents=True, exist_ok=True)
    label = datasets.ClassLabel(names=list(names)) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), "label": label})
    images = [{"bytes": stored.png(number), "path": f"{number}.png"} for number in numbers]
    content = {"image": images, "label": [number % 3 for number in numbers]}
    datasets.Dataset.from_dict(content, features=features).to_parquet(file)
    return str(file)


def write_shards(folder: Path, num_images: int = 11, split: str = "train") -> str:
    """Shards of at most four numbered images."""
    for shard, first in enumerate(range(0, num_images, 4)):
        own = range(first, min(first + 4, num_images))
        write_shard(folder / f"{split}-{shard:05}-of-00009.parquet", own)
    return str(folder)


def open_parquet(path: str, **settings) -> tuple[Parquet, Parquet]:
    return Parquet.open(ParquetConfig(**({"path": path, "size": 8} | settings)))


def test_shards_of_a_folder_are_one_set_and_their_names_tell_the_splits(tmp_path):
    folder = write_shards(tmp_path / "data")
    write_shard(tmp_path / "data" / "validation-00000-of-00001.parquet", range(300, 302))
    write_shard(tmp_path / "data" / "test-00000-of-00001.parquet", range(400, 403))
    (tmp_path / "data" / "README.md").write_text("not a table")
    train, held_out = open_parquet(folder)
    assert stored.numbers_in(train) == list(range(11))
    assert stored.numbers_in(held_out) == [300, 301]
    assert train.load(range(11)).labels.tolist() == [number % 3 for number in range(11)]
    assert held_out.load([1]).labels.tolist() == [301 % 3]
    train, held_out = open_parquet(folder, split="test", validation="train")
    assert (len(train), len(held_out)) == (3, 11)


@pytest.mark.parametrize("path", ["data/*.parquet", "data/train-00000-of-00009.parquet"])
def test_files_and_patterns_name_sets_and_held_out_sets(tmp_path, path):
    write_shards(tmp_path / "data", num_images=4)
    validation = write_shard(tmp_path / "other" / "x.parquet", range(7, 9))
    for other in (validation, str(tmp_path / "other")):
        train, held_out = open_parquet(str(tmp_path / path), validation=other)
        assert stored.numbers_in(train) == [0, 1, 2, 3]
        assert stored.numbers_in(held_out) == [7, 8]


def test_images_are_held_out_as_those_of_folders_are(tmp_path):
    path = write_shards(tmp_path / "data")
    (tmp_path / "folder").mkdir()
    for number in range(11):
        (tmp_path / "folder" / f"{number:04}.png").write_bytes(stored.png(number))
    for seed in (0, 1):
        settings = {"size": 8, "validation_fraction": 0.3, "seed": seed}
        folders = Folder.open(FolderConfig(path=str(tmp_path / "folder"), **settings))
        for ours, theirs in zip(open_parquet(path, **settings), folders, strict=True):
            assert stored.numbers_in(ours) == stored.numbers_in(theirs)


def test_images_look_as_those_of_folders_do(tmp_path):
    files = dict(sorted(stored.odd_images().items()))
    for part in ("train", "val"):
        (tmp_path / "folder" / part).mkdir(parents=True)
        for name, content in files.items():
            (tmp_path / "folder" / part / name).write_bytes(content)
    path = write(tmp_path / "odd.parquet", {"jpg": list(files.values()) + [stored.png(0)]})
    settings = {"image_column": "jpg", "validation_fraction": 0.1}
    for size in (8, (6, 11)):
        parts = open_parquet(path, size=size, **settings)
        theirs, _ = Folder.open(FolderConfig(path=str(tmp_path / "folder"), size=size))
        expected = dict(enumerate(theirs.load(range(len(files))).images))
        for part in parts:
            for row, image in zip(part.rows, part.load(range(len(part))).images, strict=True):
                assert int(row) == len(files) or torch.equal(image, expected[int(row)])
    assert parts[0].class_names == ("images",)


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["dog", "cat", "Äffchen", "cat"], ("cat", "dog", "Äffchen"), [1, 0, 2, 0]),
        ([3, 1, 0, 1], ("0", "1", "2", "3"), [3, 1, 0, 1]),
        ([True, False, False, True], ("false", "true"), [1, 0, 0, 1]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_are_numbers_or_names(tmp_path, labels, names, expected, streaming):
    images = [stored.png(number) for number in range(4)]
    path = write(tmp_path / "a.parquet", {"image": images, "kind": labels})
    settings = {"label_column": "kind", "validation_fraction": 0.25, "streaming": streaming}
    for source in open_parquet(path, **settings):
        assert source.class_names == names
        shown = stored.numbers_in(source)
        assert source.load(range(len(source))).labels.tolist() == [expected[n] for n in shown]


@pytest.mark.parametrize("streaming", [False, True])
def test_class_labels_keep_their_names_and_their_order(tmp_path, streaming):
    path = write_shard(tmp_path / "a.parquet", range(9), names=("zebra", "ant", "mole", "bee"))
    train, held_out = open_parquet(path, streaming=streaming)
    assert train.class_names == held_out.class_names == ("zebra", "ant", "mole", "bee")
    shown = stored.numbers_in(train)
    assert train.load(range(len(train))).labels.tolist() == [number % 3 for number in shown]


@pytest.mark.parametrize("streaming", [False, True])
def test_files_whose_classes_are_in_another_order_are_refused(tmp_path, streaming):
    path = write_shard(tmp_path / "a.parquet", range(9), names=("a", "b", "c"))
    other = write_shard(tmp_path / "b.parquet", range(9), names=("a", "c", "b"))
    with pytest.raises(UserError, match="b.parquet: the classes in column 'label' are not those"):
        open_parquet(path, validation=other, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unreadable_image_gives_way_to_the_next_and_is_named(tmp_path, streaming):
    write(tmp_path / "d" / "a.parquet", {"image": [stored.png(0)], "label": [0]})
    images = [b"hello", None, stored.png(3)[:45], stored.png(4)]
    write(tmp_path / "d" / "b.parquet", {"image": images, "label": [0, 0, 0, 1]})
    validation = write(tmp_path / "v.parquet", {"image": [stored.png(0)], "label": [0]})
    train, _ = open_parquet(str(tmp_path / "d"), validation=validation, streaming=streaming)
    for _ in range(2):
        batch = train.load([0, 1])
        assert stored.numbers(batch.images) == [0, 4] and batch.labels.tolist() == [0, 1]
        bad = str(tmp_path / "d" / "b.parquet")
        assert [one.name for one in batch.skipped] == [f"{bad}, row {row}" for row in range(3)]
    assert len(train.load([1]).skipped) == len(batch.skipped)
    write(tmp_path / "c.parquet", {"image": [b"hello"] * 3})
    with pytest.raises(UserError, match="none of the 2 .* images in .*c.parquet' can be read"):
        open_parquet(str(tmp_path / "c.parquet"), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("image", "label"), [("binary_view", "int64"), ("binary", "string_view")])
def test_columns_of_views_are_read(tmp_path, image, label, streaming):
    names = ["cat", "dog"] if label == "string_view" else [0, 1]
    columns = {
        "image": pyarrow.array([stored.png(n) for n in range(4)], image),
        "label": pyarrow.array([names[n % 2] for n in range(4)], label),
    }
    path = write(tmp_path / "views.parquet", columns)
    parts = open_parquet(path, streaming=streaming)
    for part in parts:
        labels = part.load(range(len(part))).labels.tolist()
        assert labels == [n % 2 for n in stored.numbers_in(part)]
    assert parts[0].class_names == tuple(map(str, names)) and sum(map(len, parts)) == 4


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["0.png", "../flat/0.png", "/flat/0.png"])
def test_cells_that_hold_a_name_and_no_image_are_refused_by_name(tmp_path, name, streaming):
    (tmp_path / "0.png").write_bytes(stored.png(0))
    columns = {"image": [{"bytes": None, "path": name}] * 4, "label": [0] * 4}
    path = write(tmp_path / "names.parquet", columns)
    with pytest.raises(UserError) as caught:
        open_parquet(path, streaming=streaming)
    message = f"names.parquet, row {{}} names the file '{name}' and holds no image"
    assert any(message.format(row) in str(caught.value) for row in range(4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_files_without_rows_are_refused_by_name(tmp_path, streaming):
    columns = {"image": pyarrow.array([], "binary"), "label": pyarrow.array([], "int64")}
    path = write(tmp_path / "empty.parquet", columns)
    with pytest.raises(UserError, match=r"empty.parquet' holds no rows; expected rows with images"):
        open_parquet(path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_and_splits_that_are_not_used_are_counted(tmp_path, streaming):
    images = [stored.png(n) for n in range(4)]
    columns = {
        "image": images,
        "fine_label": [0, 1, 2, 3],
        "coarse_label": [0] * 4,
        "url": ["x"] * 4,
    }
    for split in ("train", "validation", "test"):
        write(tmp_path / f"{split}-0.parquet", columns)
    parts = open_parquet(str(tmp_path), streaming=streaming)
    for part in parts:
        assert part.class_names == ("images",) and part.left_out.counts() == {
            "columns that may hold labels (data.label_column=…)": 2,
            "columns": 1,
            "splits": 1,
        }
    line = parts[0].left_out.line()
    assert "(fine_label, coarse_label)" in line and "columns: 1 (url)" in line and "(test)" in line
    parts = open_parquet(str(tmp_path), streaming=streaming, label_column="fine_label")
    assert parts[0].left_out.counts() == {"columns": 2, "splits": 1}


@pytest.mark.parametrize("streaming", [False, True])
def test_labels_may_be_whole_numbers_with_a_point(tmp_path, streaming):
    images = [stored.png(n) for n in range(4)]
    path = write(tmp_path / "f.parquet", {"image": images, "label": [0.0, 1.0, 1.0, 2.0]})
    train, _ = open_parquet(path, streaming=streaming)
    assert train.class_names == ("0", "1", "2")
    for labels, message in (
        ([0.5, 1.0, 0.0, 0.0], "label 0.5 is no"),
        ([float("nan"), 1.0, 0.0, 0.0], "'nan' says nothing"),
    ):
        path = write(tmp_path / "g.parquet", {"image": images, "label": labels})
        with pytest.raises(UserError, match=message):
            open_parquet(path, streaming=streaming)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "nope.parquet"}, "data.path: no file or folder 'nope.parquet'"),
        ({"path": "a/b/c"}, "data.path: no file or folder 'a/b/c'"),
        ({"path": "DIR/*.pq"}, "data.path: no file is named like"),
        ({"path": "DIR/empty"}, "data.path: no .parquet files in"),
        ({"path": "DIR/fake.parquet"}, "fake.parquet: damaged, cut short, or no Parquet file"),
        ({"path": "DIR/cut.parquet"}, "cut.parquet: damaged, cut short, or no Parquet file"),
        (
            {"path": "DIR/data", "split": "dev"},
            "data.split: 'DIR/data' has no 'dev'; it has: train",
        ),
        ({"path": "DIR/data", "validation": "dev"}, "data.validation: no file or folder 'dev'"),
        ({"path": "DIR/data", "validation": "train"}, "is trained on; hold out other files"),
        ({"path": "DIR/data", "revision": "v1"}, "data.revision: only datasets on the Hub"),
        ({"path": "DIR/data", "image_column": "imgae"}, "no column 'imgae'; did you mean 'image'?"),
        (
            {"path": "DIR/data", "image_column": "label"},
            "'label' of 'DIR/data' holds int64, not im",
        ),
        ({"path": "DIR/data", "label_column": "x"}, "no column 'x'; choose of image, label"),
        (
            {"path": "DIR/data", "label_column": "image"},
            "expected whole numbers, truth values or t",
        ),
        ({"path": "DIR/no_image.parquet"}, "no column of images in 'DIR/no_image.parquet'; choose"),
        (
            {"path": "DIR/two.parquet"},
            "several columns of images in 'DIR/two.parquet'; choose of a",
        ),
        ({"path": "DIR/nulls.parquet"}, "'label' is empty in 1 of 3 rows"),
        ({"path": "DIR/minus.parquet"}, "label -1; class numbers start at 0"),
        ({"path": "DIR/data", "validation": "DIR/minus.parquet"}, "label -1; class numbers"),
        ({"path": "DIR/data", "validation": "DIR/nine.parquet"}, "classes that training lacks: 9"),
        ({"path": "DIR/data", "validation": "DIR/two.parquet"}, "its columns are a, b, those of"),
        ({"path": "DIR/one.parquet"}, "too few to hold some out"),
        ({"path": "DIR/data", "attributes": ("label", "colour")}, "data.attributes: no column 'c"),
    ],
)
def test_what_can_not_be_is_a_one_line_error(tmp_path, settings, message):
    write_shards(tmp_path / "data", num_images=4)
    images = [stored.png(number) for number in range(3)]
    (tmp_path / "empty").mkdir()
    (tmp_path / "fake.parquet").write_text("hello")
    whole = (tmp_path / "data" / "train-00000-of-00009.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    write(tmp_path / "no_image.parquet", {"text": ["a", "b"], "label": [0, 1]})
    two = {name: [{"bytes": image, "path": None} for image in images] for name in ("a", "b")}
    features = datasets.Features({name: datasets.Image() for name in two})
    datasets.Dataset.from_dict(two, features=features).to_parquet(tmp_path / "two.parquet")
    write(tmp_path / "nulls.parquet", {"image": images, "label": [0, None, 1]})
    write(tmp_path / "minus.parquet", {"image": images, "label": [-1, -1, -1]})
    write(tmp_path / "nine.parquet", {"image": images, "label": [9, 0, 9]})
    write(tmp_path / "one.parquet", {"image": images[:1], "label": [0]})
    place = str(tmp_path)
    settings = {k: v.replace("DIR", place) if k != "attributes" else v for k, v in settings.items()}
    for streaming in (False, True):
        with pytest.raises(UserError) as raised:
            open_parquet(**settings, streaming=streaming)
        assert message.replace("DIR", place) in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("num_processes", "accumulate", "num_workers"),
    [(1, 1, 0), (2, 1, 2), (3, 2, 0), (5, 1, 1)],
)
def test_epochs_are_whole_in_any_number_of_processes(
    tmp_path, num_processes, accumulate, num_workers
):
    path = write_shards(tmp_path / "data", num_images=23)
    train, _ = open_parquet(path, validation=write_shard(tmp_path / "v.parquet", range(1)))
    stored.check_order(
        train, num_processes=num_processes, accumulate=accumulate, num_workers=num_workers
    )


def test_files_are_converted_once_and_again_when_they_change(tmp_path, capsys):
    path = write_shards(tmp_path / "data")
    first, held_out = open_parquet(path)
    assert "converting" in capsys.readouterr().out
    assert open_parquet(path)[0].identity == first.identity != held_out.identity
    assert not capsys.readouterr().out
    write_shard(tmp_path / "data" / "train-00001-of-00009.parquet", range(100, 104))
    changed, _ = open_parquet(path)
    assert changed.identity != first.identity and 103 in stored.numbers_in(changed)


def test_columns_are_attributes_to_probe_for(tmp_path, capsys):
    content = {
        "image": [stored.png(60_000 * (number % 2) + 20 * (number // 8)) for number in range(80)],
        "bright": [bool(number % 2) for number in range(80)],
        "third": [number % 3 for number in range(80)],
        "same": ["x"] * 80,
    }
    path = write(tmp_path / "a.parquet", content)
    data = ["--data", "kind=parquet", f"path={path}", "size=32", "validation_fraction=0.4"]
    arguments = ["probe", "--tokenizer", "demo", *data]
    output = tmp_path / "scores.json"
    options = ["attributes=[bright, third, same]", "--output", str(output)]
    assert run(evaluate.main, [*arguments, *options]) == 0, capsys.readouterr().err
    (scores,) = json.loads(output.read_text())["scores"].values()
    assert "bright" in str(scores) and "third" in str(scores) and "same" not in str(scores)
    capsys.readouterr()
    assert run(evaluate.main, [*arguments, "--attributes", "table.csv"]) == 2
    assert "name its columns by --data attributes=" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server in the Hub's place, with a dataset of two splits."""
    from huggingface_hub import HfFileSystem, constants
    from huggingface_hub.utils import _http

    files = {}
    for split, own in (("train", range(6)), ("test", range(6, 8))):
        file = tmp_path / f"{split}-00000-of-00001.parquet"
        write_shard(file, own, names=("c", "a", "b"))
        files[file.name] = file.read_bytes()
    with hub_server() as server:
        server.repositories["org/name"] = {"private": False, "commits": [("a" * 40, files)]}
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.address)
        monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_of_the_hub_is_read(hub, capsys, streaming):
    def opened(path: str = "org/name", **settings) -> tuple[Parquet, Parquet]:
        return open_parquet(path, streaming=streaming, **settings)

    train, held_out = opened()
    assert stored.numbers_in(train) == list(range(6)) and len(held_out) == 2
    assert train.load(range(6)).labels.tolist() == [number % 3 for number in range(6)]
    assert train.class_names == ("c", "a", "b") and "Hub" in capsys.readouterr().out
    name = train.image_name(4)
    assert name.startswith("hf://") if streaming else name == "org/name, train, row 4"
    assert name.endswith("row 4") and opened()[0].identity == train.identity
    for settings, message in [
        ({"split": "dev"}, "data.split: org/name has no 'dev'; it has: train, test"),
        ({"validation": "dev"}, "data.validation: org/name has no 'dev'"),
        ({"subset": "large"}, "'large' not found. Available: ['default']"),
        ({"image_column": "pic"}, "no column 'pic'; choose of image, label"),
        ({"path": "org/other"}, "no file or folder 'org/other', and as a dataset on the Hub: "),
    ]:
        with pytest.raises(UserError) as raised:
            opened(**settings)
        assert message in str(raised.value) and "\n" not in str(raised.value)


def test_of_a_dataset_of_the_hub_only_row_groups_are_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "semtok"))
    images = [stored.png(number) + bytes(range(256)) * 400 for number in range(40)]
    table = pyarrow.table({"image": images, "label": [number % 2 for number in range(40)]})
    parquet.write_table(table, tmp_path / "big.parquet", row_group_size=1, compression="none")
    content = (tmp_path / "big.parquet").read_bytes()
    hub.repositories["org/big"] = {
        "private": False,
        "commits": [("a" * 40, {"x.parquet": content})],
    }
    monkeypatch.setattr("semtok.data.images.parquet_stream.BLOCK_BYTES", 0)
    train, _ = open_parquet("org/big", streaming=True)
    hub.num_bytes = 0
    again, _ = open_parquet("org/big", streaming=True)
    assert stored.numbers(again.load([7]).images) == [int(again.rows[7])]
    assert hub.num_bytes < 2**16 + 4 * len(images[0]), "a footer and three images"
    for name in ("x.parquet", "*.parquet"):
        named, _ = open_parquet(f"hf://datasets/org/big/{name}", streaming=True)
        assert stored.numbers_in(named) == again.rows.tolist()
    # The set is pinned to the commit that it was opened with.
    hub.repositories["org/big"]["commits"].append(("b" * 40, {"y.parquet": content}))
    assert stored.numbers(again.load([9]).images) == [int(again.rows[9])]


def test_without_datasets_it_is_said_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"parquet needs datasets; pip install 'semtok\[data\]'"):
        open_parquet(str(tmp_path))
