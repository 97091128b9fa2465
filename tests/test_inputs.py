"""What people's folders hold: every image is used, or told of by its kind; nothing changes its meaning in silence."""

import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin

import tiny
from semtok import UserError
from semtok.commands import sample, train_tokenizer
from semtok.data.images.decoding import (
    MAX_PIXELS_VARIABLE,
    Unreadable,
    adm_center_crop,
    decode,
    image_suffixes,
    read_image,
)
from semtok.data.images.folder import Folder, FolderConfig
from semtok.recipe import parse_recipe

GREEN, RED = (10, 200, 10), (200, 10, 10)


def picture(path: Path, colour=RED, size=(20, 18), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def classes(root: Path, *names: str, num: int = 3, suffix: str = ".png") -> None:
    for name in names:
        for i in range(num):
            picture(root / name / f"{i}{suffix}")


def opened(root: Path, **settings) -> tuple[Folder, Folder]:
    return Folder.open(FolderConfig(path=str(root), size=16, **settings))


def left_out(root: Path) -> dict[str, int]:
    return opened(root)[0].left_out.counts()


# Parts and classes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [("train", "val"), ("Train", "Val"), ("training", "testing"), ("TRAIN", "Validation")],
)
def test_parts_are_known_by_their_usual_names_whatever_lies_beside_them(tmp_path, train, val):
    classes(tmp_path / train, "a", "b")
    classes(tmp_path / val, "a", "b", num=2)
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "x.json").write_text("{}")
    (tmp_path / "README").write_text("hello")
    training, held_out = opened(tmp_path)
    assert training.class_names == ("a", "b") and (len(training), len(held_out)) == (6, 4)
    assert training.left_out.counts() == {
        f"folders beside {train}/": 1,
        "files without a suffix": 1,
    }


def test_train_is_taken_without_a_held_out_part(tmp_path):
    classes(tmp_path / "train", "a", "b", num=10)
    (tmp_path / "annotations").mkdir()
    training, held_out = opened(tmp_path)
    assert training.class_names == ("a", "b") and len(training) + len(held_out) == 20


@pytest.mark.parametrize(
    ("folders", "told"),
    [
        (("train2017", "val2017"), "classes would be 'train2017', 'val2017'"),
        (("trainset", "testset"), "classes would be 'testset', 'trainset'"),
        (("Train", "train", "val"), "'Train', 'train'; keep one"),
        (("Val", "test"), "'Val', 'test', which read as parts of a set"),
        (("bus", "car", "train"), "in 'train' and in 'bus', 'car'"),
        (("set/train/a", "set/val/a"), "'set' would be a class, and holds 'train', 'val'.*/set$"),
        (("bus/Train/a", "bus/test/b", "car"), "'bus' would be a class, and holds 'Train', 'test'"),
    ],
)
def test_what_may_be_parts_or_classes_is_refused_by_name(tmp_path, folders, told):
    classes(tmp_path, *folders)
    with pytest.raises(UserError, match=told):
        opened(tmp_path)


def test_a_held_out_part_alone_is_no_class_whatever_lies_beside_it(tmp_path):
    classes(tmp_path / "val", "a", "b")
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match="holds 'val', which read as parts .*/val$"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("empty", "full", "told"),
    [
        ("val", "train/a", r"no images in '.*/val'; put images there, or remove it"),
        ("train", "val/a", r"no images in '.*/train'; put images there"),
        ("train", "a", r"no images in '.*/train'; .*left out: folders beside train/: 1 \(a\)"),
        ("a", "b", None),
    ],
)
def test_an_empty_part_is_named(tmp_path, empty, full, told):
    (tmp_path / empty).mkdir()
    classes(tmp_path, full)
    if told is None:
        assert opened(tmp_path)[0].class_names == (full,)
        return
    with pytest.raises(UserError, match=told):
        opened(tmp_path)


def test_a_folder_without_usable_images_tells_what_it_holds(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.heic").write_text("x")
    with pytest.raises(UserError, match=r"left out: files with the suffix .heic: 3 \(0.heic"):
        opened(tmp_path)


def test_a_folder_has_its_name_however_it_is_given(tmp_path, monkeypatch):
    classes(tmp_path, "pets")
    (tmp_path / "pets" / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "pets")
    assert opened(Path("."))[0].class_names == ("pets",)
    assert opened(Path("."))[0].name == "pets (2 images)"
    assert opened(Path("inner/.."))[0].class_names == ("pets",)


def test_classes_of_the_held_out_part_alone_are_refused_at_the_path(tmp_path):
    classes(tmp_path, "train/a", "val/a", "val/B")
    with pytest.raises(UserError, match="^data.path: .* that training lacks: B"):
        opened(tmp_path)


def test_classes_may_be_named_like_parts_beside_others(tmp_path):
    classes(tmp_path, "test", "other")
    assert opened(tmp_path)[0].class_names == ("other", "test")


def test_parts_of_two_layouts_are_refused_with_the_way_out(tmp_path):
    classes(tmp_path / "train", "n01", "n02")
    for i in range(3):
        picture(tmp_path / "val" / f"ILSVRC2012_val_{i:08d}.JPEG", format="JPEG")
    with pytest.raises(
        UserError, match=r"val holds 3 images without classes; sort these .*/train "
    ):
        opened(tmp_path)
    assert len(opened(tmp_path / "train")[0]) == 5


def test_numbered_classes_have_the_numbers_of_their_folders(tmp_path):
    classes(tmp_path, "0", "1", "2", "10", "11")
    training, held_out = opened(tmp_path)
    assert training.class_names == tuple(map(str, range(12)))
    for source in (training, held_out):
        for index, file in enumerate(source.contents(range(len(source)))):
            assert source.load([index]).labels.item() == int(file.parent.name)
    assert training.left_out.counts() == {"class numbers without images": 7}


def test_one_folder_of_images_is_one_class_also_where_its_name_is_a_number(tmp_path):
    for i in range(4):
        picture(tmp_path / "2019" / f"{i}.png")
    assert opened(tmp_path / "2019")[0].class_names == ("2019",)


def test_folders_of_one_number_are_refused(tmp_path):
    for first, second in (("1", "01"), ("2", "+2")):
        classes(tmp_path / second, first, second)
        with pytest.raises(UserError, match="two class folders have one number"):
            opened(tmp_path / second)


def test_names_of_digits_that_are_no_class_numbers_are_refused_with_a_way_out(tmp_path):
    classes(tmp_path, "20190101", "20190102")
    with pytest.raises(UserError, match="label 20190101; .*need a letter before them"):
        opened(tmp_path)


def test_one_name_in_two_ways_of_writing_is_one_class(tmp_path):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    classes(tmp_path / "train", composed, "b")
    classes(tmp_path / "val", decomposed, "b")
    training, held_out = opened(tmp_path)
    assert training.class_names == held_out.class_names == ("b", composed)
    classes(tmp_path / "train", decomposed)
    with pytest.raises(UserError, match="have one name, 'caf\u00e9'"):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("names", "words", "numbers"),
    [
        (("a", "b"), ["b", "0", "none"], [1, 0, 2]),
        (("caf\u00e9", "b"), ["cafe\u0301"], [0]),
        (("none", "b"), ["none", "2"], [0, 2]),  # a class goes before any class
        (("0", "1", "10"), ["10"], [2]),
        (("0", "1", "10"), ["2"], "no class '2'; this model has 0, 1, 10; none is any class"),
        (("red", "blue"), ["bleu"], "no class 'bleu'; did you mean 'blue'"),
        (("red", "all"), ["ALL"], "no class 'ALL'; did you mean 'all'"),
        (
            ("none", "b"),
            ["c"],
            "no class 'c'; this model has 0 to 1, or by name none, b; 2 is any class",
        ),
    ],
)
def test_classes_on_the_command_line(names, words, numbers):
    class Model:
        class_names = names

    if isinstance(numbers, str):
        with pytest.raises(UserError, match=numbers):
            sample._classes(words, Model)
    else:
        assert sample._classes(words, Model) == numbers


# What is left out --------------------------------------------------------------------------------


def test_hidden_things_are_never_trained_on(tmp_path):
    classes(tmp_path, "a/@eaDir", "$RECYCLE.BIN", "lost+found")
    classes(tmp_path, "a", "b", "__MACOSX/a", "a/.ipynb_checkpoints", "a/deep/__MACOSX", ".thumbs")
    picture(tmp_path / "a" / "._0.png", format="PNG")
    training, held_out = opened(tmp_path)
    assert training.class_names == ("a", "b") and len(training) + len(held_out) == 6
    assert training.left_out.counts() == {"hidden folders": 7, "hidden files": 1}


def test_every_format_that_pillow_reads_here_is_used_and_others_are_counted(tmp_path):
    classes(tmp_path, "a")
    suffixes = [".gif", ".jfif", ".jpe", ".ico", ".JPG", ".tga"]
    suffixes += [".avif"] if ".avif" in image_suffixes() else []
    for suffix in suffixes:
        picture(tmp_path / "b" / f"x{suffix}")
    for name in ("photo.heic", "notes.txt", "more.txt", "nosuffix"):
        (tmp_path / "b" / name).write_text("x")
    (tmp_path / "b" / "gone.png").symlink_to("nowhere")
    (tmp_path / "b" / "round.png").symlink_to("round.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    suffixes.append(".mpo")
    picture(tmp_path / "b" / "x.mpo", format="JPEG")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.heic").write_text("x")
    training, held_out = opened(tmp_path)
    assert len(training) + len(held_out) == 3 + len(suffixes)
    assert not training.load(range(len(training))).skipped
    assert training.class_names == ("a", "b")
    assert training.left_out.counts() == {
        "files with the suffix .heic": 2,
        "files with the suffix .txt": 2,
        "files without a suffix": 1,
        "links that lead nowhere": 2,
        "things that are no files": 1,
        "folders without images": 1,
    }
    assert "folders without images: 1 (c)" in training.left_out.line()


def test_links_to_folders_are_followed_but_for_loops(tmp_path):
    classes(tmp_path / "store", "more")
    classes(tmp_path / "set", "a", "b")
    (tmp_path / "set" / "a" / "more").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "store" / "more")
    (tmp_path / "set" / "a" / "again").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "b" / "up").symlink_to(tmp_path / "set" / "b")
    training, held_out = opened(tmp_path / "set")
    assert training.class_names == ("a", "b", "c") and len(training) + len(held_out) == 12
    assert training.left_out.counts() == {
        "links that lead back": 2,
        "names of folders within classes": 1,
    }


def test_links_to_a_folder_above_are_no_class_and_bring_no_image_twice(tmp_path):
    classes(tmp_path / "set" / "train", "a", "b")
    classes(tmp_path, "others")
    (tmp_path / "set" / "train" / "all").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "train" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "way").symlink_to(tmp_path / "set")
    for root in (tmp_path / "set", tmp_path / "way"):
        training, held_out = opened(root)
        assert training.class_names == ("a", "b") and len(training) + len(held_out) == 6
        assert training.left_out.counts() == {"links that lead back": 2}


def test_folders_within_classes_count_to_them_and_their_names_are_told(tmp_path):
    classes(tmp_path, "animals/cat", "animals/dog", "things")
    training, held_out = opened(tmp_path)
    assert training.class_names == ("animals", "things") and len(training) + len(held_out) == 9
    assert training.left_out.line() == (
        "names of folders within classes: 2 (animals/cat, animals/dog)"
    )


def test_a_training_tells_of_what_it_leaves_out_before_it_begins(tmp_path, capsys):
    classes(tmp_path / "images", "a", "b", num=4)
    (tmp_path / "images" / "b" / "photo.heic").write_text("x")
    content = tiny.content({"name": "vae"}, steps=2)
    content["data"] = {"kind": "folder", "path": str(tmp_path / "images"), "size": 16}
    train_tokenizer.train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    told = capsys.readouterr().out
    line = "left out of images (7 images): files with the suffix .heic: 1 (b/photo.heic)"
    assert told.index(line) < told.index("training vae")
    assert "classes: 2 (a, b)" in told
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["left_out"] == {"files with the suffix .heic": 1}


def test_names_that_are_no_utf_8_train_and_cache_and_are_told_of(tmp_path):
    for i in range(4):
        picture(tmp_path / "images" / "a" / f"{i}.png")
    folder = os.fsencode(tmp_path / "images" / "a")
    Path(os.fsdecode(folder + b"/odd\xff.png")).write_bytes(
        (tmp_path / "images/a/0.png").read_bytes()
    )
    Path(os.fsdecode(folder + b"/bad\xff.png")).write_bytes(b"no image")
    content = tiny.content({"name": "vae"}, steps=4)
    content["data"] = {
        "kind": "folder",
        "path": str(tmp_path / "images"),
        "size": 16,
        "validation_fraction": 0.2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    words = ["train_tokenizer", "recipe.yaml", "--output", "run", ",", "cache_latents"]
    words += ["--tokenizer", "run", "--output", "cache", "--data", "kind=folder", "path=images"]
    words += ["size=16", "validation_fraction=0.2"]
    script = (
        "import itertools, sys, semtok_cli\n"
        "for is_comma, words in itertools.groupby(sys.argv[1:], ','.__eq__):\n"
        "    sys.argv = ['semtok', *words]\n"
        "    assert is_comma or semtok_cli.main() == 0, sys.argv"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (tmp_path / "cache" / "latents.json").is_file()
    assert b"Traceback" not in done.stderr


# Modes and sizes ---------------------------------------------------------------------------------


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def seen(content: bytes) -> np.ndarray | Unreadable:
    return read_image(content, lambda c: decode(c, (8, 8)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_a_mode_comes_out_as_its_colour(mode, form):
    colour = (200, 200, 200) if mode in ("1", "L", "LA") else (180, 60, 40)
    image = Image.new("RGB", (8, 8), (255,) * 3 if mode == "1" else colour)
    if mode == "LAB":
        lab = pytest.importorskip("PIL.ImageCms")
        space = lab.createProfile("LAB")
        image = lab.profileToProfile(image, lab.createProfile("sRGB"), space, outputMode="LAB")
    else:
        image = image.quantize() if mode == "P" else image.convert(mode)
    try:
        content = saved(image, form)
    except OSError:
        pytest.skip(f"{form} has no {mode}")
    expected = 255 if mode == "1" else colour
    assert np.abs(seen(content).astype(int) - expected).max() <= 6


def tiff(data: bytes, num_bits: int, photometric: int) -> bytes:
    """A grey TIFF file of 8x8 pixels, as scanners write it and Pillow does not; ``photometric`` 0: white is zero."""
    tags = {256: 8, 257: 8, 258: num_bits, 259: 1, 262: photometric, 277: 1, 278: 8}
    tags |= {273: 10 + 12 * (len(tags) + 2) + 4, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, tags[tag], 0) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_sixteen_bits_are_scaled_and_unknown_ranges_are_refused_by_name():
    grey = np.full((8, 8), 0x8000, dtype=np.uint16)
    pgm = b"P5 8 8 65535\n" + grey.astype(">u2").tobytes()
    small = b"P5 8 8 1023\n" + np.full((8, 8), 512, dtype=">u2").tobytes()
    for content in (
        pgm,
        small,
        saved(Image.fromarray(grey), "PNG"),
        saved(Image.fromarray(grey), "TIFF"),
    ):
        assert np.abs(seen(content).astype(int) - 128).max() <= 1
    assert np.abs(seen(tiff(grey.tobytes(), 16, 0)).astype(int) - 127).max() <= 1
    assert np.abs(seen(tiff(bytes([0x80, 0x08, 0x00]) * 32, 12, 1)).astype(int) - 128).max() <= 1
    for dtype, kind in ((np.int32, "32-bit whole numbers"), (np.float32, "floating-point numbers")):
        unknown = seen(saved(Image.fromarray(np.ones((8, 8), dtype)), "TIFF"))
        assert isinstance(unknown, Unreadable) and kind in unknown.reason


def test_long_texts_do_not_hide_an_image():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 2_000_000, zip=True)
    content = saved(Image.new("RGB", (8, 8), GREEN), "PNG", pnginfo=info)
    assert (seen(content) == GREEN).all()


def test_a_reason_stands_beside_what_can_not_be_read(tmp_path, monkeypatch):
    large = saved(Image.new("L", (600, 500), 99), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    assert "more than 200,000 pixels; make it smaller, or set SEMTOK_MAX" in seen(large).reason
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "300000")
    assert (seen(large) == 99).all()
    monkeypatch.setenv(MAX_PIXELS_VARIABLE, "many")
    with pytest.raises(UserError, match="SEMTOK_MAX_PIXELS: expected a number of pixels"):
        seen(large)
    monkeypatch.delenv(MAX_PIXELS_VARIABLE)
    cut = saved(Image.new("RGB", (64, 64), GREEN), "JPEG")[:-2]
    assert "truncated" in seen(cut).reason
    assert seen(b"").reason == "the file is empty"
    assert "no format" in seen(b"hello").reason
    picture(tmp_path / "a.png").write_bytes(b"hello")
    picture(tmp_path / "b.png").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"can be read; .*\.png: no format that Pillow knows"):
        opened(tmp_path)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA"])
@pytest.mark.parametrize("size", [(200, 130), (67, 95)])
def test_halving_first_changes_no_pixel(mode, size):
    random = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    image = Image.fromarray(random).convert("RGB" if mode == "P" else mode).convert(mode)
    whole = Image.open(io.BytesIO(saved(image, "PNG")))
    if mode == "RGBA":
        whole = Image.alpha_composite(Image.new("RGBA", whole.size, "white"), whole)
    expected = np.array(adm_center_crop(whole.convert("RGB"), (16, 16)))
    assert (decode(saved(image, "PNG"), (16, 16)) == expected).all()


def test_a_kind_of_pixels_that_pillow_does_not_know_is_unreadable():
    header = (124, 0x1007, 16, 16, 64, 0, 0, *[0] * 11, 32, 0, 0, 0, 0, 0, 0, 0, 0x1000, 0, 0, 0, 0)
    assert isinstance(seen(b"DDS " + struct.pack("<31I", *header)), Unreadable)


@pytest.mark.parametrize("place", [None, (0.5, 0.5)])
def test_a_line_of_millions_of_pixels_is_unreadable_and_does_not_fill_the_memory(place):
    file = io.BytesIO()
    Image.new("L", (2**23, 1)).save(file, "PNG")
    found = read_image(file.getvalue(), lambda content: decode(content, (64, 64), place))
    assert isinstance(found, Unreadable) and "too narrow" in found.reason
