"""Any number of processes share a run's work: what is simulated here for 64 and 1,024 of them needs none started."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from semtok.commands import sample_set
from semtok.data import order as data_order
from semtok.data import passes
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.sampler.draws import Draws
from test_draws import Drawn

WORLDS = (64, 1024)
PER_RANK = 4  # images of a step, in two micro-batches
CPU = torch.device("cpu")


class Numbers(ImageSource):
    """Images that are their numbers, 251 at a time in a block where these are asked for."""

    image_size, class_names, flip, name = (1, 1), (), False, "numbers"

    def __init__(self, num: int, block_size: int | None = None) -> None:
        self.num, self.block_size, self.num_workers = num, block_size, 0
        self.attributes: dict[str, Any] = {}

    def __len__(self) -> int:
        return self.num

    def load(self, indices: Sequence[int]) -> ImageBatch:
        numbers = torch.tensor(indices)
        return ImageBatch(numbers[:, None, None, None].expand(-1, 3, 1, 1).byte(), numbers)


@pytest.mark.parametrize("block_size", [None, 251])
def test_a_step_of_any_number_of_processes_sees_the_images_of_one(block_size, monkeypatch):
    made = [0]

    def key(*values: Any) -> Key:
        made[0] += 1
        return Key(*values)

    monkeypatch.setattr(data_order, "Key", key)
    costs = {}
    for num in WORLDS:
        source = Numbers(5000, block_size)
        order = DataOrder(len(source), PER_RANK * num, 3, flip=True, block_size=block_size)
        step = 5000 // (PER_RANK * num)  # an epoch ends within it
        whole = [key.index for key in order.keys(step)]
        seen = torch.full((PER_RANK * num,), -1)
        costs[num] = set()
        for rank in range(num):
            share = BatchSlice(PER_RANK * num, 2, rank, num)
            made[0] = 0
            batches = training_batches(
                source,
                order,
                share,
                first_step=step,
                last_step=step + 1,
                num_workers=0,
                pin_memory=False,
            )
            for micro_step, batch in enumerate(batches):
                first = share.first(micro_step)
                seen[first : first + share.micro_batch_size] = batch.labels
            costs[num].add(made[0])
        assert seen.tolist() == whole
    assert costs == dict.fromkeys(WORLDS, {PER_RANK}), "a process makes the keys of its share"


@pytest.mark.parametrize("num", WORLDS)
def test_the_noise_of_any_number_of_processes_is_that_of_one(num):
    total = PER_RANK * num
    whole = Draws(3, 7, total, 0, total, CPU).normal("noise", (3,))
    parts = torch.full_like(whole, torch.nan)
    for rank in range(num):
        share = BatchSlice(total, 2, rank, num)
        for micro_step in range(2):
            first, size = share.first(micro_step), share.micro_batch_size
            with Drawn() as drawn:
                own = Draws(3, 7, total, first, size, CPU).normal("noise", (3,))
            parts[first : first + size] = own
            assert drawn.count <= 3 * 8, "the numbers of a chunk, however many processes there are"
    assert torch.equal(parts, whole)


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[range]:
    """The ranks, of which each is this process when it is drawn."""
    num, rank = request.param, [0]
    for module in (passes, sample_set):
        monkeypatch.setattr(module, "num_processes", lambda: num)
        monkeypatch.setattr(module, "process_index", lambda: rank[0])
        monkeypatch.setattr(module, "gather", lambda value: [value] * num)

    def each() -> Iterator[int]:
        for rank[0] in range(num):
            yield rank[0]

    return each()


@pytest.mark.parametrize(
    ("block_size", "together", "apart"), [(None, None, 1), (7, None, 7), (None, 4, 4)]
)
def test_a_pass_reads_every_image_once_in_equal_shares(block_size, together, apart, world):
    """Statistics, validation, caches of latents and of a teacher's features are such passes."""
    num_images = 3000
    source, keys = Numbers(num_images, block_size), [Key(i) for i in range(num_images)]
    read, sizes = [], []
    for _ in world:
        own = [
            int(label)
            for _, batch in passes.read_images(source, keys, batch_size=3, together=together)
            for label in batch.labels
        ]
        read += own
        sizes.append(len(own))
    assert sorted(read) == list(range(num_images))
    assert max(sizes) - min(sizes) <= apart, "what lies together stays together"


def test_a_set_is_drawn_once_in_equal_shares(world, monkeypatch, tmp_path):
    generator = SimpleNamespace(image_size=(1, 1))
    drawing = sample_set.Drawing(generator, None, None, [0] * 2050, 0, 2, "round")
    drawn: list[int] = []

    def draw(_: Any, __: Path, number: int) -> int:
        drawn.append(number)
        return 2

    monkeypatch.setattr(sample_set, "_draw_batch", draw)
    monkeypatch.setattr(sample_set, "_begin", lambda *_: None)
    sizes = []
    for _ in world:
        before = len(drawn)
        sample_set.draw_set(drawing, tmp_path, {})
        sizes.append(len(drawn) - before)
    assert sorted(drawn) == list(range(1025)) and max(sizes) - min(sizes) <= 1
