"""Which images a step sees, however the data is loaded and shared out."""

import pytest
import torch
from PIL import Image

from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.passes import chosen_images
from semtok.data.source import ImageBatch, ImageSource, Key

ALONE = {"process_index": 0, "num_processes": 1}


def shapes(num_images: int = 20) -> Shapes:
    return Shapes(ShapesConfig(size=8, num_images=num_images), train=True)


def load(
    source: ImageSource,
    order: DataOrder,
    share: BatchSlice,
    steps: tuple[int, int],
    num_workers: int = 0,
) -> list[ImageBatch]:
    first, last = steps
    batches = training_batches(
        source,
        order,
        share,
        first_step=first,
        last_step=last,
        num_workers=num_workers,
        pin_memory=False,
    )
    return list(batches)


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 3), (7, 7), (5, 12), (13, 4), (1, 2)])
def test_every_epoch_shows_every_image_once_whatever_the_batch_size(num_images, batch_size):
    order = DataOrder(num_images, batch_size, seed=5, flip=True)
    steps = [order.keys(step) for step in range(4 * num_images)]
    assert all(len(keys) == batch_size for keys in steps)
    seen = [index for keys in steps for index, _, _ in keys]
    for start in range(0, len(seen) - num_images + 1, num_images):
        assert sorted(seen[start : start + num_images]) == list(range(num_images))


def test_a_step_does_not_depend_on_which_steps_were_asked_for_before():
    one, other = (DataOrder(11, 4, seed, flip=True) for seed in (1, 2))
    forwards = [(one.keys(step), other.keys(step)) for step in range(12)]
    for step in (11, 3, 0, 7, 7, 5):
        assert (one.keys(step), other.keys(step)) == forwards[step]
    assert forwards[0][0] != forwards[0][1], "seeds shuffle differently"


def test_the_batch_size_changes_where_steps_end_not_the_sequence():
    def sequence(batch_size: int) -> list[Key]:
        order = DataOrder(10, batch_size, seed=0, flip=True)
        return [key for step in range(60 // batch_size) for key in order.keys(step)]

    assert sequence(4) == sequence(6) == sequence(15)


def test_without_flips_the_images_are_in_the_same_order():
    with_flips, without = (DataOrder(50, 50, seed=0, flip=flip) for flip in (True, False))
    for epoch in range(3):
        assert not any(mirrored for _, mirrored, _ in without.keys(epoch))
        assert [i for i, _, _ in with_flips.keys(epoch)] == [i for i, _, _ in without.keys(epoch)]


@pytest.mark.parametrize(("num_processes", "accumulate"), [(2, 2), (1, 4), (4, 1)])
def test_the_slices_of_all_processes_are_the_global_batch_in_order(num_processes, accumulate):
    source, order = shapes(), DataOrder(20, 8, seed=1, flip=True)
    parts = [
        load(source, order, BatchSlice(8, accumulate, process, num_processes), (1, 4))
        for process in range(num_processes)
    ]
    assert all(len(part) == 3 * accumulate for part in parts)
    whole = load(source, order, BatchSlice(8, 1, **ALONE), (1, 4))
    for step, expected in enumerate(whole):
        pieces = [
            part[step * accumulate + micro_step]
            for micro_step in range(accumulate)
            for part in parts
        ]
        assert torch.equal(torch.cat([p.images for p in pieces]), expected.images)
        assert torch.equal(torch.cat([p.labels for p in pieces]), expected.labels)


@pytest.mark.parametrize("first_step", [0, 1, 5, 9])
def test_a_loader_that_starts_later_continues_the_same_steps(first_step):
    source, order, share = shapes(), DataOrder(20, 6, seed=0, flip=True), BatchSlice(6, 2, **ALONE)
    whole = load(source, order, share, (0, 10))
    rest = load(source, order, share, (first_step, 10))
    assert len(whole) == 20 and len(rest) == 2 * (10 - first_step)
    for a, b in zip(whole[2 * first_step :], rest, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_labels_and_attributes_belong_to_the_images_they_come_with():
    source, order = shapes(), DataOrder(20, 20, seed=3, flip=False)
    (batch,) = load(source, order, BatchSlice(20, 1, **ALONE), (0, 1))
    expected = source.load([index for index, _, _ in order.keys(0)])
    assert torch.equal(batch.images, expected.images)
    assert torch.equal(batch.labels, expected.labels)
    for name, values in expected.attributes.items():
        assert torch.equal(batch.attributes[name], values)


def test_two_loader_processes_give_the_batches_of_none(tmp_path):
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_text("hello")
    config = FolderConfig(path=str(tmp_path), size=8, validation_fraction=0.2)
    for source in (shapes(), Folder.open(config)[0]):
        order = DataOrder(len(source), 4, seed=2, flip=True)
        share = BatchSlice(4, 1, **ALONE)
        inside, outside = (load(source, order, share, (0, 6), workers) for workers in (0, 2))
        for a, b in zip(inside, outside, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert a.skipped == b.skipped
            assert all(torch.equal(a.attributes[name], b.attributes[name]) for name in a.attributes)


@pytest.mark.parametrize(
    ("num_images", "expected"), [(7, [3, 3, 1]), (6, [3, 3]), (50, [3] * 6 + [2])]
)
def test_images_in_order_end_where_asked_or_where_the_set_ends(num_images, expected):
    source = shapes()
    batches = list(chosen_images(source, num_images, batch_size=3))
    assert [len(batch.images) for batch in batches] == expected
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images, source.load(range(sum(expected))).images)
