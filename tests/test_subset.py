"""A part of the stored images: ``data.num_images``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import stored
import tiny
from semtok import UserError
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.kinds import open_sources
from semtok.data.source import ImageSource
from semtok.recipe import parse_data, parse_recipe

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("webdataset")

NUM_IMAGES = 24


@pytest.fixture(autouse=True)
def _nothing_outside_of_the_test(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("semtok.data.images.parquet_stream.BLOCK_BYTES", 0)


def write_folder(root: Path) -> list[str]:
    for number in range(NUM_IMAGES):
        file = root / "folder" / "abc"[number % 3] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(stored.png(number))
    return ["kind=folder", f"path={root / 'folder'}"]


def write_tars(root: Path) -> list[str]:
    members = []
    for number in range(NUM_IMAGES):
        members.append((f"{number:04}.png", stored.png(number)))
        members.append((f"{number:04}.cls", b"abc"[number % 3 :][:1]))
    stored.write_tar(root / "a.tar", members)
    return ["kind=tars", f"path={root / 'a.tar'}"]


def write_parquet(root: Path) -> list[str]:
    images = [{"bytes": stored.png(n), "path": f"{n}.png"} for n in range(NUM_IMAGES)]
    names = datasets.ClassLabel(names=["a", "b", "c"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    columns = {"image": images, "label": [n % 3 for n in range(NUM_IMAGES)]}
    table = pyarrow.table(columns, schema=features.arrow_schema)
    parquet.write_table(table, root / "a.parquet", row_group_size=1)
    return ["kind=parquet", f"path={root / 'a.parquet'}", "streaming=true"]


def opened(words: list[str], *more: str) -> tuple[ImageSource, ImageSource]:
    settings = [*words, "size=8", "validation_fraction=0.25", *more]
    return open_sources(parse_data(settings, place="data"))


@pytest.mark.parametrize("write", [write_folder, write_tars, write_parquet])
def test_a_part_is_the_same_each_time_and_none_of_the_whole(tmp_path, write):
    words = write(tmp_path)
    whole, held_out = opened(words)
    assert len(whole) == 18
    sizes = [2, 7, 18]
    parts = [opened(words, f"num_images={number}") for number in sizes]
    numbers = [stored.numbers_in(train) for train, _ in parts]
    assert [len(each) for each in numbers] == sizes
    assert set(numbers[0]) < set(numbers[1]) < set(numbers[2]) == set(stored.numbers_in(whole))
    assert numbers[1] != stored.numbers_in(whole)[:7], "the first may be of one class"
    assert stored.numbers_in(opened(words, "num_images=7")[0]) == numbers[1]
    for train, rest in parts:
        assert train.class_names == rest.class_names == ("a", "b", "c")
        labels = train.load(range(len(train))).labels
        assert torch.equal(labels, torch.tensor([n % 3 for n in stored.numbers_in(train)]))
        assert rest.identity == held_out.identity and rest.labels_state == held_out.labels_state
        assert stored.numbers_in(rest) == stored.numbers_in(held_out)
    for state in ("identity", "labels_state", "name"):
        states = [getattr(train, state) for train, _ in parts]
        assert len(set(states)) == 3 and states[2] == getattr(whole, state)
    assert parts[1][0].name.endswith("(7 of 18 images)")
    assert dict(parts[0][0].left_out.counts())["classes without an image in data.num_images"] >= 1
    with pytest.raises(UserError, match=r"data.num_images: 19 is more than the 18 training images"):
        opened(words, "num_images=19")


def test_streamed_row_groups_of_a_part_lie_together(tmp_path):
    words = write_parquet(tmp_path)
    part, _ = opened(words, "num_images=5")
    assert part.block_size == (1,) * 5
    assert sorted(part.chosen(5)) == list(range(5))


def recipe(words: list[str], **data: Any) -> Any:
    kind, path = (word.partition("=")[2] for word in words)
    content = tiny.content({"name": "vae"}, steps=2)
    content["data"] = {"kind": kind, "path": path, "size": 16, "num_workers": 0} | data
    return parse_recipe(content, "tiny")


def test_a_run_says_of_which_part_it_is_and_is_resumed_with_no_other(tmp_path):
    words = write_folder(tmp_path)
    folder = tmp_path / "run"
    train_tokenizer(recipe(words, num_images=8), folder)
    card = (folder / "export" / "README.md").read_text()
    assert "8 of 23 images" in card
    config = json.loads((folder / "export" / "config.json").read_text())
    assert config["trained"]["recipe"]["data"]["num_images"] == 8
    for other in (9, None):
        with pytest.raises(UserError, match=f"data.num_images was 8 and is now {other}"):
            train_tokenizer(recipe(words, num_images=other), folder, resume=True)
    # Of the same number others are chosen where the whole set is another.
    (tmp_path / "folder" / "a" / "24.png").write_bytes(stored.png(24))
    with pytest.raises(UserError, match="can't resume with other images"):
        train_tokenizer(recipe(words, num_images=8), folder, resume=True)
    train_tokenizer(recipe(words, num_images=8), tmp_path / "again")
