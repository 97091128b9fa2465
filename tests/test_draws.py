"""Random numbers and random orders: what they depend on, and what not."""

import hashlib
import itertools
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stored
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.tars import Tars, TarsConfig
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageSource
from semtok.sampler.draws import Draws, SampleNoise

CPU = torch.device("cpu")


class Drawn(TorchDispatchMode):
    """Counts the random numbers that operations make."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.count += made.numel()
        return made


# Of a step ---------------------------------------------------------------------------------------


def step_draws(first: int, num: int, *, step: int = 3, total: int = 300, seed: int = 0) -> Draws:
    return Draws(seed, step, global_batch=total, first=first, num=num, device=CPU)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_any_division_of_the_batch_draws_the_same_numbers(kind, shape):
    def draw(first: int, num: int, **settings: int) -> torch.Tensor:
        return getattr(step_draws(first, num, **settings), kind)("name", shape)

    whole = draw(0, 300)
    assert whole.shape == (300, *shape) and whole.unique().numel() > 0.99 * whole.numel()
    choose = torch.Generator().manual_seed(0)
    for num_cuts in (1, 2, 7, 299):
        cuts = (torch.randperm(299, generator=choose)[:num_cuts] + 1).sort().values.tolist()
        edges = list(itertools.pairwise([0, *cuts, 300]))
        assert torch.equal(torch.cat([draw(first, end - first) for first, end in edges]), whole)
    assert torch.equal(draw(40, 25, total=65), whole[40:65]), "nor does the batch's size matter"
    assert draw(5, 0).shape == (0, *shape)
    for other in (draw(0, 300, step=4), draw(0, 300, seed=1)):
        assert not (other == whole).any()


def test_uses_and_places_have_streams_of_their_own():
    draws = step_draws(0, 300)
    one, other = draws.normal("one", (50,)), draws.normal("other", (50,))
    for a, b in ((one, other), (one[:150], one[150:]), (one[:-8], one[8:])):
        assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03
    assert one.mean() == pytest.approx(0, abs=0.03) and one.std() == pytest.approx(1, abs=0.03)
    uniform = draws.uniform("one", (50,))
    assert uniform.min() >= 0 and uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("num_processes", [1, 4, 16, 64])
def test_a_process_draws_for_its_own_images_however_many_others_there_are(num_processes):
    total = 32 * num_processes
    for process in (0, num_processes - 1):
        with Drawn() as drawn:
            step_draws(32 * process, 32, total=total).normal("noise", (3, 4))
            step_draws(32 * process, 32, total=total).uniform("time")
        assert drawn.count == 32 * 12 + 32
    with Drawn() as drawn:
        step_draws(7, 2, total=total).normal("noise", (5,))
    assert drawn.count <= 3 * 8 * 5, "at most what rounding to whole chunks adds"


# Of samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 5), (4, 8, 8)])
def test_the_noise_of_a_sample_is_that_of_published_pictures(shape):
    """A change of these numbers changes every image that a seed stands for."""
    noise = SampleNoise(7, [0, 5, 50_000], CPU)
    first, second = noise(shape), noise((2,))
    for row, index in enumerate((0, 5, 50_000)):
        digest = hashlib.blake2b(f"7/{index}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        assert torch.equal(first[row], torch.randn(shape, generator=generator))
        assert torch.equal(second[row], torch.randn(2, generator=generator))
    assert SampleNoise(0, range(0), CPU)((2, 3)).shape == (0, 2, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_of_samples_reaches_a_gpu_without_waiting():
    device = torch.device("cuda")
    noise, same = SampleNoise(0, range(4), device), SampleNoise(0, range(4), CPU)
    noise((4, 32, 32)), same((4, 32, 32))  # the first makes the allocator's pool
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [noise((4, 32, 32)) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(own.cpu(), same((4, 32, 32))) for own in drawn)


# Of the data -------------------------------------------------------------------------------------

NUM = 24  # images


def folder(place: Path) -> ImageSource:
    for split, numbers in (("train", range(NUM)), ("val", range(1))):
        (place / split / "a").mkdir(parents=True)
        for number in numbers:
            (place / split / "a" / f"{number:02}.png").write_bytes(stored.png(number))
    return Folder.open(FolderConfig(path=str(place), size=8))[0]


def tars(place: Path) -> ImageSource:
    pytest.importorskip("webdataset")
    members = [(f"{number:04}.png", stored.png(number)) for number in range(NUM)]
    stored.write_tar(place / "s-0.tar", members[:10])
    stored.write_tar(place / "s-1.tar", members[10:])
    stored.write_tar(place / "held_out.tar", [("0.png", stored.png(500))])
    config = TarsConfig(path=f"{place}/s-*.tar", validation=f"{place}/held_out.tar", size=8)
    return Tars.open(config)[0]


@pytest.mark.parametrize("kind", [folder, tars])
def test_every_epoch_shows_every_image_once_in_an_order_of_its_own(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    source = kind(tmp_path / "images")
    order = DataOrder(NUM, 6, seed=0, flip=source.flip, block_size=source.block_size)
    batches = training_batches(
        source,
        order,
        BatchSlice(6, 1, process_index=0, num_processes=1),
        first_step=0,
        last_step=3 * NUM // 6,
        num_workers=0,
        pin_memory=False,
    )
    seen = [number for batch in batches for number in stored.numbers(batch.images)]
    epochs = [seen[first : first + NUM] for first in range(0, 3 * NUM, NUM)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    for one, other in itertools.combinations([list(range(NUM)), *epochs], 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < NUM // 3


@pytest.mark.parametrize("block_size", [None, 8, (10, 20, 18)])
def test_every_epoch_mirrors_other_images(block_size):
    order = DataOrder(48, 48, seed=0, flip=True, block_size=block_size)
    orders = [order.keys(epoch) for epoch in range(3)]
    mirrored = [{index for index, is_mirrored, _ in keys if is_mirrored} for keys in orders]
    for keys, own in zip(orders, mirrored, strict=True):
        assert sorted(index for index, _, _ in keys) == list(range(48))
        assert 12 <= len(own) <= 36
    for one, other in itertools.combinations(range(3), 2):
        assert orders[one] != orders[other] and mirrored[one] != mirrored[other]
