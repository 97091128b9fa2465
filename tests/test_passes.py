"""One pass over images: shared by processes, block by block, and ended by all where one fails."""

import json
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from processes import Ranks
from semtok import UserError, processes, progress
from semtok.commands import sample, tokenizer_export, train_dit, train_tokenizer, when_to_cache
from semtok.data import passes
from semtok.data.caches import shards
from semtok.data.caches.latent_cache import ensure_latent_cache
from semtok.data.images.folder import FolderConfig
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.passes import read_images
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.recipe import DiffusionRecipe, parse_diffusion_recipe, parse_recipe
from semtok.tokenizer import Tokenizer
from semtok.training.loop import Trainer
from semtok.training.process import make_accelerator
from stored import png

NUM_HELD_OUT, NUM_MEASURED = 7, 22
SIZES = (5, 3, 8, 1, 6, 2, 7, 4)  # of blocks


class Blocks(ImageSource):
    """Images in blocks; labels tell which process has loaded them."""

    image_size, class_names, flip, name = (4, 4), (), False, "blocks"
    block_size = SIZES

    def __init__(self, num_workers: int = 0) -> None:
        self.attributes, self.num_workers = {}, num_workers
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return sum(SIZES)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        self.loaded += indices
        images = torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
        return ImageBatch(images, torch.full((len(indices),), os.getpid()))


def block_of(index: int) -> int:
    return int(np.searchsorted(np.cumsum(SIZES), index, side="right"))


# In two processes --------------------------------------------------------------------------------


def diffusion_recipe(root: Path, **changes: Any) -> DiffusionRecipe[Any]:
    content = {key: tiny.content(steps=2)[key] for key in ("data", "train")}
    content["train"] |= {"num_validation_images": NUM_HELD_OUT, "ema_decay": None}
    content["train"] |= changes.pop("train", {})
    content["data"] |= changes
    content["diffusion"] = {"network": {"depth": 1, "width": 32, "heads": 2}}
    content["tokenizer"], content["sampler"] = str(root / "tokenizer"), {"steps": 2}
    return parse_diffusion_recipe(content, "tiny")


def diffusion_trainer(root: Path, folder: Path, **train: Any) -> Trainer:
    recipe = diffusion_recipe(root, train=train)
    sources = open_sources(recipe.data)
    tokenizer = Tokenizer.from_pretrained(root / "tokenizer")
    accelerator = make_accelerator(recipe.train, folder)
    objective = train_dit.build_diffusion_objective(
        recipe, tokenizer, sources[0], None, place="tiny"
    )
    tiny.awake(objective.averaged_module())
    return Trainer(
        objective,
        recipe.train,
        accelerator=accelerator,
        folder=folder,
        source=sources[0],
        validation=sources[1],
        num_workers=0,
        tracked={},
    )


def loads_of(work: Callable[[], Any]) -> tuple[Any, dict[str, list[int]]]:
    """What work gives, and which training and held-out images it loads meanwhile."""
    loaded: dict[str, list[int]] = {"train": [], "held_out": []}
    original = Shapes.load

    def load(self: Shapes, indices: Sequence[int]) -> ImageBatch:
        loaded["train" if len(self) == 24 else "held_out"] += map(int, indices)
        return original(self, indices)

    Shapes.load = load
    try:
        return work(), loaded
    finally:
        Shapes.load = original


def measured(root: Path) -> dict[str, list[float]]:
    """Statistics of the tokenizer's latents, measured anew."""
    recipe = parse_recipe(tiny.content(num_statistics_images=NUM_MEASURED), "tiny")
    tokenizer = Tokenizer.from_pretrained(root / "tokenizer")
    source, cpu = Shapes(recipe.data, train=True), torch.device("cpu")
    batches = tokenizer_export.statistics_batches(source, recipe, cpu)
    tokenizer.measure_statistics(((i, b.pixels) for i, b in batches), seed=3)
    assert int(tokenizer.num_measured_images) == NUM_MEASURED
    return {"mean": tokenizer.texture_mean.tolist(), "std": tokenizer.texture_std.tolist()}


def exported(root: Path, folder: Path) -> dict[str, list[int]]:
    """Which images the end of a run loads."""
    recipe = parse_recipe(tiny.content({"name": "vae"}, steps=1, warmup_steps=0), "tiny")
    original, loads = Tokenizer.measure_statistics, {}

    def measure_statistics(self: Tokenizer, *arguments: Any) -> None:
        _, own = loads_of(lambda: original(self, *arguments))
        loads.update(own)

    Tokenizer.measure_statistics = measure_statistics
    try:
        train_tokenizer.train_tokenizer(recipe, folder)
    finally:
        Tokenizer.measure_statistics = original
    return loads


def failing_caches(root: Path, folder: Path) -> dict[str, Any]:
    """Process 1 can't write; what becomes of a cache that was asked for, and of one by default."""
    original = shards.write_tensors

    def write_tensors(path: Path, *arguments: Any) -> None:
        if processes.process_index() == 1:
            raise OSError(28, "No space left on device")
        original(path, *arguments)

    shards.write_tensors = write_tensors
    when_to_cache._SAVED, when_to_cache.RUNS = 0, folder
    try:
        recipe = diffusion_recipe(root, cache="auto", train={"batch_size": 40})
        sources = open_sources(recipe.data)
        tokenizer = Tokenizer.from_pretrained(root / "tokenizer")
        try:
            ensure_latent_cache(
                sources, tokenizer, folder / "named", data=recipe.data, batch_size=2, shard_size=4
            )
        except UserError as error:
            told = str(error)
        accelerator = make_accelerator(recipe.train, folder)
        objective = train_dit.build_diffusion_objective(
            recipe, tokenizer, sources[0], None, place="tiny"
        )
        original_size = when_to_cache.ensure_latent_cache

        def ensure(*arguments: Any, **options: Any) -> Any:
            return original_size(*arguments, **options, shard_size=4)

        when_to_cache.ensure_latent_cache = ensure
        by_default = when_to_cache.cached_latents(recipe, sources, objective, accelerator)
    finally:
        shards.write_tensors = original
    return {"named": told, "by_default": by_default, "after": processes.gather(1)}


def drawn(root: Path, output: Path) -> int:
    """Draws images; the bytes that the largest exchange between processes holds."""
    original, sizes = processes._exchange, [0]

    def exchange(value: Any) -> list[Any]:
        sizes.append(len(pickle.dumps(value)))
        return original(value)

    processes._exchange = exchange
    try:
        sample.main(
            [str(root / "generator"), *["--num", "5", "--batch-size", "2", "--output"], str(output)]
        )
    finally:
        processes._exchange = original
    return max(sizes)


def in_processes(root: str) -> None:
    """All that two processes do in these tests."""
    place, work = Path(root), Path(root) / "two"
    results: dict[str, Any] = {}
    trainer = diffusion_trainer(place, work)
    results["validated"] = loads_of(trainer.validate)
    results["measured"] = loads_of(lambda: measured(place))
    source = Blocks()
    recipe = parse_recipe(tiny.content(num_statistics_images=len(source) - 4), "tiny")
    for _ in tokenizer_export.statistics_batches(source, recipe, torch.device("cpu")):
        pass
    results["blocks"] = source.loaded
    results["exported"] = exported(place, work / "run")
    results["failing"] = failing_caches(place, work)
    results["drawn"] = [drawn(place, work / name) for name in ("x.npz", "x.png", "folder")]
    (work / f"{processes.process_index()}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("passes")
    tiny.measured({"name": "vae"}).save_pretrained(root / "tokenizer")
    objective = diffusion_trainer(root, root).objective
    objective.generator(objective.averaged_module()).save_pretrained(root / "generator")
    return root


@pytest.fixture(scope="module")
def two(root: Path, ranks: Ranks) -> tuple[list[dict[str, Any]], list[str]]:
    """What each of two processes has found, and printed."""
    (root / "two").mkdir()
    printed = ranks.run("test_passes:in_processes", str(root))
    return [json.loads((root / "two" / f"{rank}.json").read_text()) for rank in range(2)], printed


def test_two_processes_validate_half_each_to_the_numbers_of_one(root, two, tmp_path):
    metrics, whole = loads_of(diffusion_trainer(root, tmp_path).validate)
    assert whole == {"train": [], "held_out": list(range(NUM_HELD_OUT))}
    found, loads = zip(*(rank["validated"] for rank in two[0]), strict=True)
    assert loads[0]["held_out"] + loads[1]["held_out"] == list(range(NUM_HELD_OUT))
    assert {len(own["held_out"]) for own in loads} == {3, 4}
    assert found[0] == found[1] == pytest.approx(metrics, rel=1e-5)


def test_two_processes_measure_half_each_to_the_statistics_of_one(root, two):
    expected, whole = loads_of(lambda: measured(root))
    found, loads = zip(*(rank["measured"] for rank in two[0]), strict=True)
    assert [len(own["train"]) for own in loads] == [NUM_MEASURED // 2] * 2
    assert loads[0]["train"] + loads[1]["train"] == whole["train"]
    for name, values in expected.items():
        assert found[0][name] == found[1][name] == pytest.approx(values, rel=1e-5)


def test_all_processes_measure_what_is_exported(two):
    loads = [rank["exported"]["train"] for rank in two[0]]
    assert [len(set(own)) for own in loads] == [4, 4] and not set(loads[0]) & set(loads[1])


def test_no_block_is_fetched_by_two_processes(two):
    blocks = [[block_of(i) for i in rank["blocks"]] for rank in two[0]]
    assert not set(blocks[0]) & set(blocks[1])
    for own in blocks:
        changes = sum(a != b for a, b in zip(own, own[1:], strict=False))
        assert changes == len(set(own)) - 1, "one after the other"


def test_where_one_process_can_not_write_a_cache_all_do_without(two):
    results, printed = two
    first, second = (rank["failing"] for rank in results)
    line = r"data.cache: .*named/train/shard-\d+\.safetensors: No space left on device; make room.*"
    assert re.fullmatch(f"process 1: {line}", first["named"])
    assert re.fullmatch(line, second["named"]), "one line"
    assert first["by_default"] is second["by_default"] is None
    assert "note: latents are computed in each step (process 1: data.cache" in printed[0]
    assert "note:" not in printed[1], "one process speaks"
    assert first["after"] == [1, 1], "and they are in step"


def test_two_processes_draw_the_images_of_one_and_exchange_none(root, two, tmp_path):
    assert max(max(rank["drawn"]) for rank in two[0]) < 1000, "bytes"
    for name in ("x.npz", "x.png", "folder"):
        drawn(root, tmp_path / name)
    ours, theirs = (np.load(place / "x.npz") for place in (tmp_path, root / "two"))
    assert theirs["arr_0"].shape == (5, 16, 16, 3) and theirs["arr_1"].dtype == np.int64
    assert all(np.array_equal(ours[k], theirs[k]) for k in ("arr_0", "arr_1"))
    for file in ("x.png", *(f"folder/{i:06d}.png" for i in range(5))):
        assert (tmp_path / file).read_bytes() == (root / "two" / file).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "x.npz", "x.png"]


# In one process ----------------------------------------------------------------------------------


def shares(
    monkeypatch: pytest.MonkeyPatch, source: ImageSource, keys: list[Key], num: int, **options: Any
) -> list[list[list[int]]]:
    """Which of the keys each of some processes reads, a list for each batch."""
    found = []
    monkeypatch.setattr(passes, "num_processes", lambda: num)
    monkeypatch.setattr(passes, "gather", lambda value: [value] * num)
    for process in range(num):
        monkeypatch.setattr(passes, "process_index", lambda process=process: process)
        batches = []
        for places, batch in read_images(source, keys, **options):
            expected = source.load_keys([keys[i] for i in places])
            assert torch.equal(batch.images, expected.images)
            batches.append(places)
        found.append(batches)
    return found


@pytest.mark.parametrize("num", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("num_images", [1, 7, 24])
def test_every_image_is_read_once_whatever_the_number_of_processes(monkeypatch, num, num_images):
    source = Shapes(ShapesConfig(size=8, num_images=24), train=True)
    keys = [Key((5 * i) % 24, bool(i % 2)) for i in range(num_images)]
    found = shares(monkeypatch, source, keys, num, batch_size=3)
    places = [place for batches in found for batch in batches for place in batch]
    assert places == list(range(num_images)), "in order"
    sizes = [sum(map(len, batches)) for batches in found]
    assert max(sizes) - min(sizes) <= 1 and all(len(b) <= 3 for bs in found for b in bs)


@pytest.mark.parametrize("num", [1, 2, 3, 20])
def test_images_of_a_block_are_read_together(monkeypatch, num):
    source = Blocks()
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    found = shares(monkeypatch, source, [Key(i) for i in order], num, batch_size=4)
    whole = [order[place] for batches in found for batch in batches for place in batch]
    assert sorted(whole) == list(range(len(source)))
    read = [block_of(i) for i in whole]
    assert sum(a != b for a, b in zip(read, read[1:], strict=False)) == len(SIZES) - 1
    own = [{block_of(order[p]) for batch in batches for p in batch} for batches in found]
    assert sum(map(len, own)) == len(SIZES), "none in two processes"


@pytest.mark.parametrize("num", [1, 2, 5])
def test_what_belongs_together_is_read_by_one_process_in_batches_of_its_own(monkeypatch, num):
    source = Shapes(ShapesConfig(size=8, num_images=24), train=True)
    keys = [Key(i) for i in range(22)]
    found = shares(monkeypatch, source, keys, num, batch_size=3, together=5)
    whole = [batch for batches in found for batch in batches]
    assert [place for batch in whole for place in batch] == list(range(22))
    assert [len(batch) for batch in whole] == [3, 2] * 4 + [2]
    shards_read = [{p // 5 for batch in batches for p in batch} for batches in found]
    assert sum(map(len, shards_read)) == 5


def test_each_block_is_fetched_by_one_loader_process():
    source = Blocks(num_workers=2)
    keys = [Key(i) for i in range(len(source))]
    fetched = [
        (block_of(keys[place][0]), int(label))
        for places, batch in read_images(source, keys, batch_size=3)
        for place, label in zip(places, batch.labels, strict=True)
    ]
    assert len(fetched) == len(source) and len({pid for _, pid in fetched}) == 2
    assert len(set(fetched)) == len(SIZES)


def test_a_long_pass_tells_how_far_it_is(monkeypatch, capsys):
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    source = Shapes(ShapesConfig(size=8, num_images=24), train=True)
    keys = [Key(i) for i in range(24)]
    for _ in read_images(source, keys, batch_size=6, what="held-out images"):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[1].startswith("held-out images: 12 of 24 images (50%), ")
    assert " images/" in lines[1] and lines[1].endswith(" left")
    for _ in read_images(source, keys, batch_size=6):
        pass
    assert not capsys.readouterr().out, "short ones say nothing"


def test_the_noise_of_a_held_out_image_is_its_own(root, tmp_path):
    """Whatever the size of the batches: not that of another image, and not another in another batch."""
    found = []
    for settings in ({"batch_size": 8}, {"batch_size": 8, "accumulate": 4}):
        found.append(diffusion_trainer(root, tmp_path, **settings).validate())
    assert found[0] == pytest.approx(found[1], rel=1e-5)

    trainer = diffusion_trainer(root, tmp_path)
    _, inputs = trainer._prepared(trainer.validation.load([0, 0]))
    with torch.no_grad():
        values = trainer.objective.validate(trainer.averaged, None, inputs, indices=[0, 4])
    assert values["velocity"][0] != values["velocity"][1]


@pytest.fixture
def pictures(tmp_path: Path, root: Path) -> Iterator[tuple[FolderConfig, Tokenizer]]:
    """Eight training images of which the third can't be read, and a tokenizer."""
    for i in range(8):
        file = tmp_path / "images" / "train" / "a" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(i, (16, 16)) if i != 2 else b"no image")
    (tmp_path / "images" / "val" / "a").mkdir(parents=True)
    (tmp_path / "images" / "val" / "a" / "v.png").write_bytes(png(9, (16, 16)))
    config = FolderConfig(kind="folder", path=str(tmp_path / "images"), size=16)
    yield config, Tokenizer.from_pretrained(root / "tokenizer")


def test_a_cache_notes_which_image_could_not_be_read(pictures, tmp_path):
    config, tokenizer = pictures
    cached, _ = ensure_latent_cache(
        open_sources(config), tokenizer, tmp_path / "cache", data=config, batch_size=4
    )
    (index,) = cached.shards.skipped
    assert index == 2 and cached.shards.skipped[2].endswith("2.png")
    assert [one.position for one in cached.load([5, 2, 1]).skipped] == [1]


def test_an_image_is_decoded_once_for_itself_and_its_mirror_image(pictures, tmp_path, monkeypatch):
    config, tokenizer = pictures
    sources = open_sources(config)
    assert sources[0].flip
    loaded: list[int] = []
    original = type(sources[0]).load

    def load(self: Any, indices: Sequence[int]) -> ImageBatch:
        loaded.extend(indices if self is sources[0] else ())
        return original(self, indices)

    monkeypatch.setattr(type(sources[0]), "load", load)
    cached, _ = ensure_latent_cache(sources, tokenizer, tmp_path / "cache", data=config)
    assert sorted(loaded) == [0, *range(8)], "the first tells the sizes"
    with torch.no_grad():
        mirrored = tokenizer.posterior(sources[0].load_keys([Key(5, True)]).images).mean.texture
    kept = cached.load_keys([Key(5, True)]).latents.mean.texture
    torch.testing.assert_close(kept.float(), mirrored, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["../../victim.safetensors", "/etc/passwd", "other.safetensors"])
def test_an_index_names_no_file_but_its_shards(pictures, tmp_path, name):
    config, tokenizer = pictures
    ensure_latent_cache(open_sources(config), tokenizer, tmp_path / "cache", data=config)
    file = tmp_path / "cache" / "train" / "index.json"
    index = json.loads(file.read_text())
    index["shards"][0]["file"] = name
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="train is damaged"):
        shards.Shards(file.parent, "test")


def test_alone_an_error_is_what_it_was():
    for error in (UserError("a"), OSError(28, "b"), RuntimeError("c"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, processes.together():
            raise error
        assert caught.value is error
    with processes.together():
        assert processes.gather("x") == ["x"]
