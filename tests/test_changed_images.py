"""Runs that are resumed: on the images that they began with, wherever these lie, and on no others."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import stored
import tiny
from semtok import UserError
from semtok.commands import run_data
from semtok.commands.run_data import check_data, record_data
from semtok.commands.run_folder import check_run_folder
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images import states
from semtok.data.images.folder import Names
from semtok.data.images.kinds import data_config_class, open_sources
from semtok.data.images.states import folder_states
from semtok.data.source import ImageSource
from semtok.recipe import parse_recipe
from semtok.storage import read_json, write_json

Sources = tuple[ImageSource, ImageSource]


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    if pytest.importorskip("datasets"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")


def opened(kind: str, path: Path | str, **settings) -> Sources:
    config = data_config_class(kind, place="test")
    return open_sources(config(kind=kind, path=str(path), size=8, **settings))


def folder(root: Path) -> Path:
    for number in range(8):
        file = root / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(stored.png(number))
    return root


def tar(file: Path, labels: str = "01010101") -> Path:
    members = []
    for number, label in enumerate(labels):
        members += [(f"{number}.png", stored.png(number)), (f"{number}.cls", label.encode())]
    stored.write_tar(file, members)
    return file


def parquet(file: Path, labels: str = "01010101") -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as arrow

    file.parent.mkdir(parents=True, exist_ok=True)
    images = [stored.png(number) for number in range(len(labels))]
    arrow.write_table(pyarrow.table({"image": images, "label": list(map(int, labels))}), file)
    return file


def rename_class(root: Path) -> None:
    (root / "a").rename(root / "c")


def swap_classes(root: Path) -> None:
    for old, new in (("a", "x"), ("b", "a"), ("x", "b")):
        (root / old).rename(root / new)


def grow(root: Path) -> None:
    (root / "a" / "new.png").write_bytes(stored.png(9))


def shrink(root: Path) -> None:
    (root / "a" / "0.png").unlink()


def repaint(root: Path) -> None:
    (root / "a" / "0.png").write_bytes(stored.png(0, size=(40, 40)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_class, r"class 0 was 'a' and has become 'b' since .* \(and \d+ more changes\)"),
        (swap_classes, "a/0.png is gone"),
        (grow, "a/new.png is new"),
        (shrink, "a/0.png is gone"),
        (repaint, "a/0.png changed"),
    ],
)
def test_a_folder_that_changed_is_refused_by_name(tmp_path, change: Callable, message: str):
    root, run = folder(tmp_path / "images"), tmp_path
    record_data(run, opened("folder", root))
    check_data(run, opened("folder", root))
    change(root)
    with pytest.raises(UserError, match=f"can't resume with other images: {message}") as caught:
        check_data(run, opened("folder", root))
    assert "\n" not in str(caught.value) and str(run) in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "write", "labels", "message"),
    [
        ("tars", tar, "10101010", "data.x changed"),
        ("tars", tar, "01010102", "the number of classes, 2, has become 3"),
        ("tars", tar, "0101010", "data.x changed"),
        ("parquet", parquet, "10101010", "the training images, or their classes, have changed"),
        ("parquet", parquet, "010101010", "data.x changed"),
    ],
)
def test_tars_and_parquet_of_other_labels_or_rows_are_refused_by_name(
    tmp_path, kind: str, write: Callable, labels: str, message: str
):
    file = tmp_path / "data.x"
    record_data(tmp_path, opened(kind, write(file)))
    write(file, labels)
    with pytest.raises(UserError, match=message):
        check_data(tmp_path, opened(kind, file))


@pytest.mark.parametrize(
    ("kind", "write"), [("folder", folder), ("tars", tar), ("parquet", parquet)]
)
def test_images_that_are_copied_or_moved_are_the_same(tmp_path, kind: str, write: Callable):
    place = write(tmp_path / "here" / "data")
    record_data(tmp_path, opened(kind, place))
    for file in (place, *place.rglob("*.png")):
        os.utime(file, (1, 1))
    (tmp_path / "here").rename(tmp_path / "there")
    check_data(tmp_path, opened(kind, tmp_path / "there" / "data"))


def test_the_one_class_of_a_folder_may_have_another_name(tmp_path):
    (tmp_path / "old").mkdir()
    for number in range(4):
        (tmp_path / "old" / f"{number}.png").write_bytes(stored.png(number))
    record_data(tmp_path, opened("folder", tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    check_data(tmp_path, opened("folder", tmp_path / "new"))


def test_of_many_files_folders_are_noted_and_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "MOST_NAMED", 7)
    root = folder(tmp_path / "images")
    record_data(tmp_path, opened("folder", root))
    assert set(read_json(tmp_path / "data_files.json")["files"]) == {"a/", "b/"}
    grow(root)
    with pytest.raises(UserError, match="other images: a/ changed since"):
        check_data(tmp_path, opened("folder", root))


def test_files_are_asked_for_in_their_order_however_many_threads_ask(tmp_path, monkeypatch):
    monkeypatch.setattr(states, "_AT_ONCE", 2)
    names = [f"{number}.png" for number in range(9)]
    for size, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / names[4]).unlink()
    sizes = ["0", "1", "2", "3", "-1", "5", "6", "7", "8"]
    found = folder_states(tmp_path, Names(names))
    assert found == {n: f"{size} bytes" for n, size in zip(names, sizes, strict=True)}


def test_a_run_of_an_earlier_version_goes_on_with_a_line(tmp_path, capsys):
    sources = opened("folder", folder(tmp_path / "images"))
    check_data(tmp_path, sources)
    assert "an earlier version began this run" in capsys.readouterr().out
    record_data(tmp_path, sources)
    check_data(tmp_path, sources)
    assert not capsys.readouterr().out


def test_a_record_of_files_alone_is_read_as_before(tmp_path):
    sources = opened("parquet", parquet(tmp_path / "data.x"), streaming=True)
    write_json(tmp_path / "data_files.json", dict(sources[0].file_states))
    check_data(tmp_path, sources)
    with pytest.raises(UserError, match="data.x changed"):
        check_data(tmp_path, opened("parquet", parquet(tmp_path / "data.x", "0101")))


def test_images_that_the_library_draws_leave_no_record(tmp_path):
    config = data_config_class("shapes", place="test")
    sources = open_sources(config(kind="shapes", size=16))
    record_data(tmp_path, sources)
    check_data(tmp_path, sources)
    assert not list(tmp_path.iterdir())


def test_of_a_great_many_classes_a_digest_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(run_data, "_MOST_CLASSES", 1)
    root = folder(tmp_path / "images")
    record_data(tmp_path, opened("folder", root))
    rename_class(root)
    with pytest.raises(UserError, match="the classes have changed"):
        check_data(tmp_path, opened("folder", root))


def test_a_resumed_training_takes_moved_images_and_refuses_other_ones(
    tmp_path, monkeypatch, capsys
):
    content = tiny.content({"name": "vae"}, checkpoint_every=3)
    content["data"] = {"kind": "folder", "path": str(folder(tmp_path / "images")), "size": 16}
    train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    (tmp_path / "images").rename(tmp_path / "moved")
    content["data"]["path"] = str(tmp_path / "moved")
    recipe = parse_recipe(content, "tiny")
    train_tokenizer(recipe, tmp_path / "run", resume=True)
    rename_class(tmp_path / "moved")
    with pytest.raises(UserError, match="can't resume with other images: class 0 was 'a'"):
        train_tokenizer(recipe, tmp_path / "run", resume=True)
    (tmp_path / "run" / "data_files.json").unlink()
    content["data"]["path"] = "elsewhere"
    with pytest.raises(UserError, match="data.path was"):  # nothing tells that they are the same
        check_run_folder(tmp_path / "run", parse_recipe(content, "tiny"), resume=True)
