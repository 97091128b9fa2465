"""Folders of images, and the order in which training sees any source."""

import errno
import gc
import hashlib
import os
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from semtok import UserError
from semtok.data.images.decoding import adm_center_crop
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.storage import new_file, write_text


def picture(path: Path, size=(20, 30), colour=(200, 10, 10), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def open_folder(path: Path, **settings) -> tuple[Folder, Folder]:
    return Folder.open(FolderConfig(**({"path": str(path), "size": 16} | settings)))


def files_of(source: Folder) -> list[Path]:
    return source.contents(range(len(source)))


def test_one_folder_per_class(tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            picture(
                tmp_path / name / f"{i}.png", colour=(0, 0, 250) if name == "cat" else (250, 0, 0)
            )
    train, held_out = open_folder(tmp_path, validation_fraction=0.2)
    assert train.class_names == held_out.class_names == ("cat", "dog")
    assert (len(train), len(held_out)) == (16, 4)
    assert not set(files_of(train)) & set(files_of(held_out))
    assert files_of(train) == files_of(open_folder(tmp_path, validation_fraction=0.2)[0])
    batch = train.load(range(16))
    blue = batch.images[:, 2].float().mean(dim=(1, 2)) > 200
    assert torch.equal(blue, batch.labels == 0)


def test_flat_train_and_val_folders_are_one_class(tmp_path):
    for i in range(3):
        picture(tmp_path / "photos" / "train" / f"{i}.png")
    picture(tmp_path / "photos" / "val" / "9.png")
    train, held_out = open_folder(tmp_path / "photos")
    assert train.class_names == held_out.class_names == ("photos",)
    assert (len(train), len(held_out)) == (3, 1)


def test_a_train_folder_alone_holds_the_classes(tmp_path):
    for name in ("ant", "bee"):
        for i in range(3):
            picture(tmp_path / "train" / name / f"{i}.png")
    train, held_out = open_folder(tmp_path, validation_fraction=0.3)
    assert train.class_names == ("ant", "bee") and (len(train), len(held_out)) == (4, 2)


def test_photographs_stand_as_the_camera_says(tmp_path):
    upright = Image.new("RGB", (16, 16))
    upright.paste((255, 255, 255), (0, 0, 16, 4))  # a white band at the top
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be turned by 90 degrees clockwise
    (tmp_path / "a").mkdir()
    for i in range(2):
        upright.rotate(90).save(tmp_path / "a" / f"{i}.png", exif=exif)
    image = open_folder(tmp_path / "a", validation_fraction=0.5)[0].load([0]).images[0]
    assert image[:, :3].min() > 200 and image[:, 6:].max() < 50


def test_train_and_val_folders_share_the_class_numbers(tmp_path):
    picture(tmp_path / "train" / "ant" / "1.png")
    picture(tmp_path / "train" / "bee" / "1.png")
    picture(tmp_path / "val" / "bee" / "2.png")
    train, held_out = open_folder(tmp_path)
    assert len(train) == 2 and held_out.load([0]).labels.tolist() == [1]
    picture(tmp_path / "val" / "cow" / "3.png")
    with pytest.raises(UserError, match="classes that training lacks: cow"):
        open_folder(tmp_path)


def test_a_flat_folder_is_one_class(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.jpg")
    (tmp_path / "notes.txt").write_text("not an image, and not taken for one")
    train, held_out = open_folder(tmp_path)
    assert train.num_classes == 1 and len(train) + len(held_out) == 5 and len(held_out) == 1


def test_images_beside_class_folders_are_an_error(tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "cat" / "1.png")
    with pytest.raises(UserError, match="both in itself and in sub-folders"):
        open_folder(tmp_path)


def test_truncated_and_fake_images_are_replaced_by_the_next_readable_one(tmp_path):
    for i in range(6):
        picture(tmp_path / "train" / "a" / f"{i}.png", size=(64, 64), colour=(40 * i, 0, 0))
    picture(tmp_path / "val" / "a" / "v.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(tmp_path / "train" / "a" / "2.png")
    whole = (tmp_path / "train" / "a" / "2.png").read_bytes()
    (tmp_path / "train" / "a" / "2.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train" / "a" / "3.png").write_text("hello")
    train, _ = open_folder(tmp_path)
    batch = train.load([1, 2, 5])
    assert torch.equal(batch.images[1], train.load([4]).images[0])
    assert [(place, Path(name).name) for place, name, _ in batch.skipped] == [
        (1, "2.png"),
        (1, "3.png"),
    ]
    assert not train.load([0, 1]).skipped


def test_nothing_readable_is_an_error_before_training(tmp_path):
    with pytest.raises(UserError, match="data.path: no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(UserError, match="data.path: no images"):
        open_folder(tmp_path)
    for i in range(4):
        (tmp_path / f"{i}.png").write_text("hello")
    with pytest.raises(UserError, match="can be read"):
        open_folder(tmp_path)


def test_transparency_lies_on_white_and_grey_becomes_rgb(tmp_path):
    picture(tmp_path / "0.png", colour=(0, 0, 0, 0), mode="RGBA")
    picture(tmp_path / "1.png", colour=77, mode="L")
    picture(tmp_path / "2.png")
    source = open_folder(tmp_path, validation_fraction=0.4)
    images = {p.name: s.load([i]).images[0] for s in source for i, p in enumerate(files_of(s))}
    assert (images["0.png"] == 255).all()
    assert (images["1.png"] == 77).all()


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's crop as its paper's code defines it, for square targets."""
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(33, 70), (16, 16), (129, 64), (64, 257), (15, 40), (7, 9)])
def test_the_crop_is_adms(size):
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(array)
    assert np.array_equal(np.array(adm_center_crop(image, (16, 16))), reference_crop(image, 16))


@pytest.mark.parametrize("target", [(16, 24), (24, 16)])
def test_non_square_crops_have_the_size_asked_for(target):
    for size in [(100, 30), (30, 100), (17, 17)]:
        cropped = adm_center_crop(Image.new("RGB", size), target)
        assert (cropped.height, cropped.width) == target


@pytest.mark.parametrize("target", [15, 16, 31, 64])
def test_the_crop_is_adms_for_many_odd_sizes(target):
    rng = np.random.default_rng(target)
    around = [
        target - 3,
        target,
        target + 1,
        2 * target - 1,
        2 * target,
        2 * target + 1,
        5 * target,
    ]
    for width in around:
        for height in (target - 1, 2 * target + 1, 4 * target, 3 * target + 2):
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            cropped = np.array(adm_center_crop(image, (target, target)))
            assert np.array_equal(cropped, reference_crop(image, target)), (width, height)


def test_non_square_crops_show_the_centre_undistorted():
    row, column = np.mgrid[0:64, 0:64]
    ramps = np.stack([row * 4, column * 4, row * 0], axis=2).astype(np.uint8)
    cropped = np.array(adm_center_crop(Image.fromarray(ramps), (16, 32))).astype(float)
    # 64x64 is halved once, to 32x32, of which the middle 16 rows are kept.
    expected = np.array(Image.fromarray(ramps).reduce(2)).astype(float)[8:24]
    assert np.abs(cropped - expected).max() <= 1


def test_a_flat_folder_splits_without_loss_and_by_its_seed_alone(tmp_path):
    for i in range(40):
        picture(tmp_path / f"{i:02}.png")
    names = {}
    for seed in (0, 1):
        train, held_out = open_folder(tmp_path, validation_fraction=0.25, seed=seed)
        assert (len(train), len(held_out)) == (30, 10)
        assert sorted(files_of(train) + files_of(held_out)) == sorted(tmp_path.iterdir())
        again = open_folder(tmp_path, validation_fraction=0.25, seed=seed)
        assert [files_of(s) for s in again] == [files_of(train), files_of(held_out)]
        names[seed] = files_of(held_out)
    assert names[0] != names[1]


def test_all_layouts_find_images_in_any_case_and_in_nested_folders(tmp_path):
    picture(tmp_path / "a" / "deep" / "1.PNG")
    picture(tmp_path / "a" / "2.jpeg")
    picture(tmp_path / "b" / "3.webp")
    (tmp_path / "c").mkdir()
    (tmp_path / ".cache").mkdir()
    train, held_out = open_folder(tmp_path)
    assert train.class_names == ("a", "b"), "folders without images are no classes"
    assert len(train) + len(held_out) == 3


@pytest.mark.parametrize("name", ["val", "validation", "valid", "test"])
def test_the_held_out_folder_may_have_any_usual_name(tmp_path, name):
    picture(tmp_path / "train" / "a" / "1.png")
    picture(tmp_path / name / "a" / "2.png")
    train, held_out = open_folder(tmp_path)
    assert train.class_names == ("a",)
    assert [p.name for p in files_of(train)] == ["1.png"]
    assert [p.name for p in files_of(held_out)] == ["2.png"]


def test_a_text_file_named_jpg_gives_way_to_the_next_image_and_to_its_label(tmp_path):
    picture(tmp_path / "train" / "a" / "0.png", colour=(250, 0, 0))
    picture(tmp_path / "train" / "b" / "1.png", colour=(0, 0, 250))
    (tmp_path / "train" / "a" / "1.jpg").write_text("hello")
    (tmp_path / "train" / "b" / "2.jpg").write_text("hello")
    picture(tmp_path / "val" / "b" / "1.png")
    train, _ = open_folder(tmp_path)
    for _ in range(2):  # a file that was found unreadable once is named every time
        batch = train.load([1, 3])
        assert batch.labels.tolist() == [1, 0], "of the picture shown; the last wraps to the first"
        assert batch.images[0, 2].min() > 200 and batch.images[1, 0].min() > 200
        assert [Path(one.name).name for one in batch.skipped] == ["1.jpg", "2.jpg"]


def test_a_held_out_part_without_readable_images_is_an_error(tmp_path):
    picture(tmp_path / "train" / "a" / "1.png")
    (tmp_path / "val" / "a").mkdir(parents=True)
    (tmp_path / "val" / "a" / "1.png").write_text("hello")
    with pytest.raises(UserError, match="data.path: none of the 1 held-out images"):
        open_folder(tmp_path)


def test_a_single_image_cannot_be_split(tmp_path):
    picture(tmp_path / "1.png")
    with pytest.raises(UserError, match="data.path: no images.*too few to hold some out"):
        open_folder(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
def test_every_kind_of_transparency_lies_on_white(tmp_path, mode):
    path = tmp_path / "a" / "1.png"
    path.parent.mkdir()
    colour = {"RGBA": (9, 9, 9, 0), "LA": (9, 0), "P": 0, "RGB": (9, 9, 9), "L": 9}[mode]
    image = Image.new(mode, (16, 16), colour)
    if mode == "P":
        image.putpalette([9, 9, 9])
    image.save(path, **({} if mode.endswith("A") else {"transparency": colour}))
    picture(tmp_path / "a" / "2.png")
    source = next(
        s for s in open_folder(tmp_path, validation_fraction=0.5) if files_of(s)[0] == path
    )
    assert (source.load([0]).images == 255).all()


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path):
    for i in range(2):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.full((16, 16), 30_000, dtype=np.uint16)).save(path)
    train, _ = open_folder(tmp_path, validation_fraction=0.5)
    assert (train.load([0]).images == 30_000 // 256).all()


# Disks -------------------------------------------------------------------------------------------


def failing(monkeypatch, name: str, number: int, times: int) -> list[str]:
    """Reading a file of that name fails so often; returns what was tried."""
    tried, read_bytes = [], Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == name:
            tried.append(path.name)
            if len(tried) <= times:
                raise OSError(number, os.strerror(number), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr("semtok.data.remote._WAITS", (0.0, 0.0))
    return tried


def three(folder: Path) -> Folder:
    for i in range(4):
        picture(folder / ("val" if i == 3 else "train") / "a" / f"{i}.png", colour=(60 * i, 0, 0))
    return open_folder(folder)[0]


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM])
def test_a_disk_that_fails_is_asked_again_and_no_image_is_replaced(tmp_path, monkeypatch, number):
    train = three(tmp_path)
    expected = train.load([1]).images
    tried = failing(monkeypatch, "1.png", number, times=2)
    batch = train.load([1])
    assert torch.equal(batch.images, expected) and not batch.skipped and len(tried) == 3


def test_a_disk_that_goes_on_failing_ends_the_run_in_one_line(tmp_path, monkeypatch):
    train = three(tmp_path)
    failing(monkeypatch, "1.png", errno.EIO, times=99)
    with pytest.raises(UserError, match="data.path: .*1.png: Input/output error") as raised:
        train.load([1])
    assert "\n" not in str(raised.value)
    order, share = DataOrder(3, 3, 0, False), BatchSlice(3, 1, 0, 1)
    settings = {"first_step": 0, "last_step": 1, "num_workers": 0, "pin_memory": False}
    with pytest.raises(UserError, match="Input/output error"):
        list(training_batches(train, order, share, **settings))


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_a_file_that_is_gone_or_closed_to_us_is_an_unreadable_image(tmp_path, monkeypatch, number):
    train = three(tmp_path)
    tried = failing(monkeypatch, "1.png", number, times=99)
    batch = train.load([1])
    assert [Path(one.name).name for one in batch.skipped] == ["1.png"] and len(tried) == 1
    assert torch.equal(batch.images, train.load([2]).images)


def test_a_fault_of_the_library_is_no_unreadable_image_and_one_of_pillow_is(tmp_path, monkeypatch):
    folder = three(tmp_path)

    def fault(*_: object, **__: object) -> None:
        raise TypeError("a fault")

    with monkeypatch.context() as patch:
        patch.setattr("semtok.data.images.decoding.adm_center_crop", fault)
        with pytest.raises(TypeError, match="a fault"):
            folder.load([0])
    monkeypatch.setattr(Image.Image, "getexif", fault)
    with pytest.raises(UserError, match="none of the . training images .*: a fault"):
        folder.load([0])


def test_a_million_images_take_little_memory_and_keep_their_identity(tmp_path):
    names = [f"n{i % 7:08}/n{i % 7:08}_{i:05}.JPEG" for i in range(1000)]
    for name in names:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).touch()
    for part in ("train", "val"):
        picture(tmp_path / part / "n00000000" / "n00000000_00000.JPEG")
    open_folder(tmp_path)
    gc.collect()
    tracemalloc.start()
    parts = open_folder(tmp_path)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / sum(map(len, parts)) < 120, "bytes"
    train, _ = parts
    files = sorted((tmp_path / "train").rglob("*.JPEG"))
    assert files_of(train) == files
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        name, state = file.relative_to(tmp_path).as_posix(), file.stat()
        digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    assert train.identity == f"{tmp_path.name} (1000 images) {digest.hexdigest()}"


def test_names_of_any_kind_are_found_in_the_order_of_their_parts(tmp_path):
    names = ["a/x.png", "a-b/x.png", "a/b/y.png", "a/b-c.png", "é/ü x.png", "a/B.PNG", "z/png.png"]
    for name in names:
        picture(tmp_path / "train" / name)
    (tmp_path / "train" / "z" / "odd\udcff.png").write_bytes(
        (tmp_path / "train" / "a" / "x.png").read_bytes()
    )
    (tmp_path / "train" / "z" / "nowhere.png").symlink_to("missing")
    (tmp_path / "train" / "link").symlink_to(tmp_path / "train" / "a", target_is_directory=True)
    picture(tmp_path / "val" / "a" / "1.png")
    train, _ = open_folder(tmp_path)
    classes = sorted(folder for folder in (tmp_path / "train").iterdir())
    expected = [p for c in classes for p in sorted(c.rglob("*")) if p.is_file()]
    assert files_of(train) == expected and len(expected) == 12
    assert train.class_names == tuple(folder.name for folder in classes)


# The order of the data ---------------------------------------------------------------------------


def test_each_epoch_has_each_image_once_even_across_step_borders():
    order = DataOrder(num_images=10, batch_size=4, seed=0, flip=False)
    seen = [index for step in range(5) for index, _, _ in order.keys(step)]
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))
    assert seen[:10] != seen[10:20], "epochs are shuffled anew"
    big = DataOrder(num_images=3, batch_size=8, seed=0, flip=False).keys(0)
    assert sorted(index for index, _, _ in big[:3]) == [0, 1, 2] and len(big) == 8


def test_flips_are_half_of_the_images_and_change_by_epoch():
    order = DataOrder(num_images=400, batch_size=400, seed=0, flip=True)
    first, second = ({i: mirrored for i, mirrored, _ in order.keys(step)} for step in range(2))
    assert 150 < sum(first.values()) < 250
    assert 120 < sum(first[i] != second[i] for i in range(400)) < 280
    assert not any(flip for _, flip, _ in DataOrder(400, 400, 0, flip=False).keys(0))


def test_processes_and_micro_batches_share_out_the_global_batch():
    taken = []
    for micro_step in range(2):
        for process in range(2):
            share = BatchSlice(16, accumulate=2, process_index=process, num_processes=2)
            first = share.first(micro_step)
            taken += range(first, first + share.micro_batch_size)
    assert taken == list(range(16))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_starts_anywhere_and_workers_change_nothing(num_workers):
    source = Shapes(ShapesConfig(size=8, num_images=20), train=True)
    order = DataOrder(20, 4, seed=1, flip=True)
    share = BatchSlice(4, 2, 0, 1)

    def load(first_step: int, num_workers: int) -> list[torch.Tensor]:
        batches = training_batches(
            source,
            order,
            share,
            first_step=first_step,
            last_step=6,
            num_workers=num_workers,
            pin_memory=False,
        )
        return [batch.images for batch in batches]

    whole, rest = load(0, 0), load(4, num_workers)
    assert len(whole) == 12 and len(rest) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole[8:], rest, strict=True))


def test_flipped_images_are_mirrored():
    source = Shapes(ShapesConfig(size=8, num_images=20), train=True)
    share = BatchSlice(20, 1, 0, 1)
    order = DataOrder(20, 20, seed=1, flip=True)
    settings = {"first_step": 0, "last_step": 1, "num_workers": 0, "pin_memory": False}
    (batch,) = training_batches(source, order, share, **settings)
    for image, (index, flip, _) in zip(batch.images, order.keys(0), strict=True):
        original = source.load([index]).images[0]
        assert torch.equal(image, original.flip(-1) if flip else original)


def test_loading_draws_nothing_from_global_generators():
    source = Shapes(ShapesConfig(size=8, num_images=20), train=True)
    before = torch.get_rng_state(), random.getstate()
    settings = {"first_step": 0, "last_step": 2, "num_workers": 0, "pin_memory": False}
    list(training_batches(source, DataOrder(20, 4, 0, True), BatchSlice(4, 1, 0, 1), **settings))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


# Files that are whole or not there ---------------------------------------------------------------


def test_writers_of_one_file_never_share_a_temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("os.getpid", lambda: 1)  # as in two containers
    with new_file(tmp_path / "a.npy") as one, new_file(tmp_path / "a.npy") as other:
        assert one != other and one.suffix == other.suffix == ".npy"
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a.npy").read_text() == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_written_file_is_open_to_others_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "a.txt", "hello")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask
