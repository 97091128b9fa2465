"""Cached latents: what they hold, that training on them is the same, and what happens to a bad one."""

import argparse
import contextlib
import functools
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError

import tiny
from file_server import file_server
from semtok import Tokenizer, UserError
from semtok.commands import cache_latents, train_dit
from semtok.commands.cli import run
from semtok.commands.when_to_cache import _digest, pays, warn_of_other_images
from semtok.data.caches import shards
from semtok.data.caches.latent_cache import (
    CachedLatents,
    ensure_latent_cache,
    is_latent_cache,
    open_latent_cache,
    settings_of_images,
)
from semtok.data.caches.remote_shards import RemoteShards
from semtok.data.caches.shards import Shards, open_shard, shard_checksum
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.images.tars import TarsConfig
from semtok.data.order import BLOCKS_AT_A_TIME, DataOrder
from semtok.data.source import Key
from semtok.images import to_pixels
from semtok.lock import InUse, only_one_in
from semtok.recipe import parse_data, parse_diffusion_recipe
from semtok.teachers import Teacher, TeacherConfig

REGLUE = {"name": "reglue", "compressor": {"hidden": [8], "channels": 4}}
NUM = 10  # images, in shards of 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes, mirrored in training, and a tokenizer with all parts."""
    root = tmp_path_factory.mktemp("latents")
    images = Shapes(ShapesConfig(size=16), train=True).load(range(NUM + 4)).images
    for i, image in enumerate(images):
        file = root / "images" / ("train" if i < NUM else "val") / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    tiny.measured(REGLUE, Tokenizer.from_pretrained("demo")).save_pretrained(root / "tokenizer")
    return root


def data(place: Path) -> dict[str, Any]:
    return {"kind": "folder", "path": str(place / "images"), "size": 16, "flip": True}


def words(place: Path) -> list[str]:
    return [f"{key}={value}" for key, value in data(place).items()]


def command(*words: object) -> int:
    return run(cache_latents.main, list(map(str, words)))


@pytest.fixture(scope="module")
def cache(place) -> Path:
    """Written by the command, with REPA's targets."""
    output = place / "cache"
    options = ["--output", output, "--shard-size", 4, "--batch-size", 3, "--targets"]
    assert command("--tokenizer", place / "tokenizer", "--data", *words(place), *options) == 0
    return output


def opened(place: Path, cache: Path | str) -> tuple[CachedLatents, CachedLatents]:
    tokenizer = Tokenizer.from_pretrained(place / "tokenizer")
    return open_latent_cache(cache, tokenizer, data=parse_data(words(place), place="test"))


def test_a_shard_of_other_columns_is_refused_whoever_signed_it(place, cache, tmp_path):
    folder = Path(shutil.copytree(cache, tmp_path / "cache")) / "train"
    index = json.loads((folder / "index.json").read_text())
    file = folder / index["shards"][1]["file"]
    tensors = safetensors.torch.load_file(file)
    for name in ("labels", "texture/mean"):
        safetensors.torch.save_file(tensors | {name: tensors[name].double()}, file)
        index["shards"][1] |= {"bytes": file.stat().st_size, "checksum": shard_checksum(file)}
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=f"{file.name} has (no labels|other (rows|columns))"):
            opened(place, folder.parent)


def test_an_index_of_a_false_number_of_images_is_refused_at_once(place, cache, tmp_path):
    folder = Path(shutil.copytree(cache, tmp_path / "cache")) / "train"
    index = json.loads((folder / "index.json").read_text())
    # Names of as many shards would fill the memory.
    (folder / "index.json").write_text(json.dumps(index | {"num_images": 10**15}))
    with pytest.raises(UserError, match="does not name the shards of 1000000000000000 images"):
        opened(place, folder.parent)


def test_the_cache_holds_the_posterior_the_labels_and_the_teachers_tokens(place, cache):
    cached, held_out = opened(place, cache)
    source, validation = open_sources(parse_data(words(place), place="test"))
    tokenizer = Tokenizer.from_pretrained(place / "tokenizer")
    keys = [Key(9), Key(0, True), Key(5, True), Key(5), Key(3)]
    chosen = validation.chosen(4)
    for batch, images in (
        (cached.load_keys(keys), source.load_keys(keys)),
        (held_out.load([1, 3]), validation.load([chosen[1], chosen[3]])),
    ):
        with torch.no_grad():
            features = tokenizer.features(to_pixels(images.images))
            posterior = tokenizer.posterior(images.images, features)
        assert batch.images is None and torch.equal(batch.labels, images.labels)
        assert list(batch.latents.mean) == ["texture", "semantic", "global"]
        for name, mean in posterior.mean.items():
            for kept, made in (
                (batch.latents.mean, mean),
                (batch.latents.std, posterior.std[name]),
            ):
                torch.testing.assert_close(kept[name].float(), made, atol=2e-3, rtol=2e-3)
        assert batch.features.patches[-1].dtype == torch.int8, "few bytes go to the device"
        kept, tokens = batch.features.restored(), features.patches[-1]
        cosine = F.cosine_similarity(kept.patches[-1], tokens, dim=1)
        assert cosine.min() > 0.9999, "eight bits and a scale for each token"
        torch.testing.assert_close(kept.patches[-1], tokens, atol=0.05, rtol=0)
        torch.testing.assert_close(kept.pooled, features.pooled)
    assert (len(cached), len(held_out)) == (NUM, 4) and cached.class_names == source.class_names
    assert (cached.labels_state, held_out.labels_state) == (
        source.labels_state,
        validation.labels_state,
    ), "a resumed run knows them by that"


def test_rows_in_any_order_across_shards_are_those_one_by_one(place, cache):
    cached, _ = opened(place, cache)
    assert len(list((cache / "train").glob("shard-*.safetensors"))) == 3
    keys = [Key(i, bool(m)) for i in range(NUM) for m in range(2)]
    order = np.random.default_rng(0).permutation(len(keys))
    together = cached.shards.rows([keys[i] for i in order])
    for place_, i in enumerate(order):
        alone = cached.shards.rows([keys[i]])
        assert all(torch.equal(rows[place_], alone[name][0]) for name, rows in together.items())


def test_bfloat16_comes_back_as_it_was_written(place, tmp_path):
    options = ["--output", tmp_path / "cache", "--dtype", "bf16"]
    assert command("--tokenizer", place / "tokenizer", "--data", *words(place), *options) == 0
    cached, _ = opened(place, tmp_path / "cache")
    file = tmp_path / "cache/train/shard-000000.safetensors"
    stored = safetensors.torch.load_file(file)["texture/mean"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(cached.load([7, 2]).latents.mean.texture, stored[[7, 2]])


def recipe(place: Path, **changes: Any) -> Any:
    content = tiny.content(steps=4, **changes.pop("train", {}))
    del content["method"], content["teacher"]
    shape = {"depth": 2, "width": 24, "heads": 2, "patch_size": 2}
    content["diffusion"] = {"network": shape} | changes.pop("diffusion", {})
    if "teacher" in changes:
        content["teacher"] = changes.pop("teacher")
    content["data"] = data(place) | changes
    content["tokenizer"], content["sampler"] = str(place / "tokenizer"), {"steps": 2}
    return parse_diffusion_recipe(content, "tiny")


def losses(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").open()]


def test_training_from_the_cache_alone_is_training_on_the_images(
    place, cache, tmp_path, monkeypatch
):
    train_dit.train_dit(recipe(place, cache="none"), tmp_path / "online")
    moved = tmp_path / "gone"
    shutil.move(place / "images", moved)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Teacher, "__init__", lambda *_: pytest.fail("no teacher is needed"))
            train_dit.train_dit(recipe(place, cache=str(cache)), tmp_path / "cached")
    finally:
        shutil.move(moved, place / "images")
    for name in ("loss/velocity/texture", "loss/velocity/semantic", "loss/alignment"):
        ours, theirs = losses(tmp_path / "cached", name), losses(tmp_path / "online", name)
        assert ours == pytest.approx(theirs, rel=2e-3), "they differ by the rounding on disk"
    summaries = [
        json.loads((tmp_path / run / "summary.json").read_text())["validation"]
        for run in ("cached", "online")
    ]
    assert summaries[0] == pytest.approx(summaries[1], rel=2e-3)
    assert (tmp_path / "cached/samples/step_00000004.png").is_file()


def test_targets_decoded_from_the_latents_need_neither_images_nor_teacher(
    place, cache, tmp_path, monkeypatch
):
    decoded = {"repa": {"targets": "decoded", "with_global": True}}
    monkeypatch.setattr(Teacher, "__init__", lambda *_: pytest.fail("no teacher is needed"))
    settings = recipe(place, cache=str(cache), diffusion=decoded)
    tokenizer = Tokenizer.from_pretrained(place / "tokenizer")
    cached, _ = opened(place, cache)
    objective = train_dit.build_diffusion_objective(settings, tokenizer, cached, None, place="t")
    from semtok.training.inputs import on_device

    batch = on_device(cached.load([3, 1]), torch.device("cpu"))
    inputs = objective.prepare(batch)
    expected = tokenizer.decode_features(batch.latents.mean)[:, -128:]
    assert torch.equal(inputs["features"].patches[-1], expected)
    # The global part is the pooled token itself, so its target is exact.
    torch.testing.assert_close(
        inputs["features"].pooled, cached.load([3, 1]).features.pooled, atol=5e-3, rtol=5e-3
    )
    train_dit.train_dit(settings, tmp_path / "run")
    assert len(losses(tmp_path / "run", "loss/alignment")) == 2


def test_an_interrupted_writer_computes_only_what_is_missing(place, cache, tmp_path, monkeypatch):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    before = {p.name: p.read_bytes() for p in (copy / "train").glob("shard-*")}
    for name in (
        "index.json",
        "shard-000001.json",
    ):  # as a writer leaves it that is killed between both
        (copy / "train" / name).unlink()
    (copy / "latents.json").unlink()
    computed: list[int] = []
    original = Tokenizer.posterior

    def posterior(self: Tokenizer, images: Any, features: Any = None) -> Any:
        computed.append(len(images))
        return original(self, images, features)

    monkeypatch.setattr(Tokenizer, "posterior", posterior)
    options = ["--output", copy, "--shard-size", 4, "--batch-size", 3, "--targets"]
    assert command("--tokenizer", place / "tokenizer", "--data", *words(place), *options) == 0
    assert sum(computed) == 1 + 2 * 4, "one image to know the sizes, then one shard and its mirror"
    after = {p.name: p.read_bytes() for p in (copy / "train").glob("shard-*")}
    assert after == before
    computed.clear()
    assert command("--tokenizer", place / "tokenizer", "--data", *words(place), *options) == 0
    assert not computed, "a finished cache is opened"


def refused(place: Path, cache: Path, words: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=words) as error:
        train_dit.train_dit(recipe(place, cache=str(cache), **changes), cache.parent / "refused")
    assert "\n" not in str(error.value)


def test_caches_of_something_else_are_refused(place, cache, tmp_path):
    other = Tokenizer.from_pretrained(place / "tokenizer")
    other.texture_mean += 1
    other.save_pretrained(tmp_path / "tokenizer")
    settings = recipe(place, cache=str(cache)).model_copy(
        update={"tokenizer": str(tmp_path / "tokenizer")}
    )
    with pytest.raises(
        UserError, match="holds latents of another tokenizer; choose another folder"
    ):
        train_dit.train_dit(settings, tmp_path / "run")
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    refused(place, copy, r"latents of other images \(data.size: 16, here 24\)", size=24)
    bare = tmp_path / "bare"
    options = ["--output", bare, "--shard-size", 4]
    assert command("--tokenizer", place / "tokenizer", "--data", *words(place), *options) == 0
    refused(
        place, bare, "keeps REPA's targets of a teacher: none; pass diffusion.repa.targets=decoded"
    )
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "train").mkdir()
    (taken / "train" / "thesis.txt").write_text("mine")
    refused(place, taken, "data.cache: .*train holds other files; choose another folder")


@pytest.mark.parametrize(
    ("change", "told"), [({"layers": (-2,)}, "layer=-2"), ({"input_size": 64}, "input_size=64")]
)
def test_targets_of_a_teacher_that_was_asked_otherwise_are_others(place, cache, change, told):
    asked = {"name": "demo"} | change
    written = {k: list(v) if isinstance(v, tuple) else v for k, v in asked.items()}
    refused(place, cache, f"those of 'demo' with default settings, here {told}; ", teacher=written)
    tokenizer, settings = (
        Tokenizer.from_pretrained(place / "tokenizer"),
        parse_data(words(place), place="test"),
    )
    images = open_sources(settings)
    teachers = [Teacher(TeacherConfig(**each)) for each in ({"name": "demo"}, asked)]
    with pytest.raises(UserError, match="of something else .*choose another folder"):
        ensure_latent_cache(
            images, tokenizer, cache, data=settings, targets=teachers[1], shard_size=4
        )
    ensure_latent_cache(images, tokenizer, cache, data=settings, targets=teachers[0], shard_size=4)
    names = [
        _digest(recipe(place), images[0], SimpleNamespace(tokenizer=tokenizer, target_teacher=each))
        for each in teachers
    ]
    assert names[0] != names[1], "folders of their own"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "bytes instead of"),
        (lambda file: flip_a_bit(file), "has another checksum"),
        (lambda file: file.unlink(), "No such file"),
        (lambda file: (file.parent / "index.json").write_text("{"), "not readable as JSON"),
    ],
    ids=["truncated", "one bit", "missing", "index"],
)
def test_damage_is_found_on_opening(place, cache, tmp_path, capsys, damage, words):
    copy = tmp_path / "cache"
    shutil.copytree(cache, copy)
    damage(copy / "train" / "shard-000001.safetensors")
    with pytest.raises(UserError, match=f"cache.train is damaged .*{words}.*remove it, and it is"):
        opened(place, copy)
    assert command("--verify", copy) == 2
    assert "is damaged" in capsys.readouterr().err
    assert command("--verify", cache) == 0


def without(*path: str) -> Callable[[dict[str, Any]], object]:
    """Takes an entry out of nested settings."""
    *parents, last = path
    return lambda content: functools.reduce(dict.__getitem__, parents, content).pop(last)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("train/index.json", without("about", "flip"), "about: 'flip' is missing"),
        ("train/index.json", without("about", "parts"), "about: 'parts' is missing"),
        ("train/index.json", lambda c: c["about"].update(parts=["texture", "x"]), "no latents of"),
        ("train/index.json", lambda c: c["shards"].reverse(), "does not name the shards"),
        ("train/index.json", lambda c: c.update(num_images=c["num_images"] - 1), "other rows than"),
        ("train/index.json", lambda c: c["skipped"].update({"-5": "x"}), "greater than or equal"),
        ("train/index.json", without("format_version"), "'format_version' is missing"),
        ("train/index.json", lambda c: c.update(format_version=99), "newer format; upgrade"),
        ("latents.json", without("image_size"), "'image_size' is missing"),
        ("latents.json", lambda c: c.update(class_names=3), "class_names"),
    ],
)
def test_what_a_cache_says_of_itself_is_checked(place, cache, tmp_path, file, change, words):
    copy = shutil.copytree(cache, tmp_path / "cache")
    content = json.loads((copy / file).read_text())
    change(content)
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"^data.cache: .*{words}") as error:
        opened(place, copy)
    assert "\n" not in str(error.value)


def test_a_folder_of_other_things_is_no_place_for_a_cache(place, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.txt").write_text("mine")
    refused(place, taken, "data.cache: .*taken holds other files .thesis.txt.; choose another")
    assert [p.name for p in taken.iterdir()] == ["thesis.txt"]


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def test_a_cache_is_made_by_default_where_it_pays(place, tmp_path, monkeypatch, capsys):
    source, _ = open_sources(parse_data(words(place), place="test"))
    assert not pays(recipe(place), source), "few images are seen at all"
    often = recipe(place, train={"batch_size": 4000})
    assert pays(often, source)
    assert not pays(often, Shapes(ShapesConfig(size=16, num_images=50_000), train=True))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("semtok.commands.when_to_cache._SAVED", 0)
    settings = recipe(place, train={"batch_size": 16}, diffusion={"repa": False})
    train_dit.train_dit(settings, tmp_path / "run")
    assert "computing latents of the training images once" in capsys.readouterr().out
    (made,) = (tmp_path / "runs/cache").iterdir()
    assert Shards(made / "train", "test").num_images == NUM
    train_dit.train_dit(settings, tmp_path / "again")
    assert "computing" not in capsys.readouterr().out


def test_a_cache_behind_a_url_is_fetched_shard_by_shard(place, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    files = {f"/c/{p.relative_to(cache)}": p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    with file_server(files) as server:
        url = f"{server.address}/c"
        remote, held_out = opened(place, url)
        local, _ = opened(place, cache)
        assert remote.block_size == 4 and local.block_size is None
        before = server.num_bytes
        keys = [Key(1), Key(3, True)]
        for ours, theirs in zip(
            remote.shards.rows(keys).items(), local.shards.rows(keys).items(), strict=True
        ):
            assert torch.equal(ours[1], theirs[1])
        size = len(files["/c/train/shard-000000.safetensors"])
        assert server.num_bytes - before == size, "one shard, once, and no other"
        settings = recipe(place, cache=url)
        train_dit.train_dit(settings, tmp_path / "run")
        train_dit.train_dit(settings, tmp_path / "again")
        assert losses(tmp_path / "run", "loss/alignment") == losses(
            tmp_path / "again", "loss/alignment"
        )
        # Few are kept, and one that comes changed is refused.
        few = RemoteShards(f"{url}/train", "test", kept=1)
        assert torch.equal(few.labels([Key(0), Key(9), Key(5)]), local.load([0, 9, 5]).labels)
        assert [file.name for file in few.local.iterdir()] == [few.local_file(1).name]
        content = bytearray(files["/c/train/shard-000001.safetensors"])
        content[-1] ^= 1
        files["/c/train/shard-000001.safetensors"] = bytes(content)
        shutil.rmtree(few.local)
        with pytest.raises(UserError, match="shard-000001.safetensors came with another checksum"):
            RemoteShards(f"{url}/train", "test").labels([Key(5)])
        with pytest.raises(UserError, match=r"data.cache: http://.*latents.json: no such file"):
            opened(place, f"{url}/nothing")


def test_a_url_of_a_cache_may_hold_a_query_that_opens_it(place, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    files = {
        f"/c/{path.relative_to(cache)}?key={key}": path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file()
        for key in ("secret", "other")
    }
    local, _ = opened(place, cache)
    with file_server(files) as server:
        for key, fetched in (("secret", True), ("other", False)):
            remote, _ = opened(place, f"{server.address}/c/?key={key}")
            before = server.num_bytes
            assert torch.equal(remote.load([1]).labels, local.load([1]).labels)
            assert (server.num_bytes > before) == fetched, "another key opens the same"
        with pytest.raises(UserError, match="latents.json") as raised:
            opened(place, f"{server.address}/c?key=wrong")
        assert "wrong" not in str(raised.value)


def test_local_copies_are_those_of_the_store_as_it_is(place, cache, tmp_path, monkeypatch):
    """The store is written again, a copy is damaged, and earlier runs left copies."""
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("semtok.data.remote._WAITS", (0.0,))
    other = tmp_path / "other"
    shutil.copytree(cache, other)
    shard = other / "train" / "shard-000000.safetensors"
    flip_a_bit(shard)
    index = json.loads((other / "train" / "index.json").read_text())
    index["shards"][0]["checksum"] = shard_checksum(shard)
    (other / "train" / "index.json").write_text(json.dumps(index))

    def files(folder: Path) -> dict[str, bytes]:
        inside = (p for p in folder.rglob("*") if p.is_file())
        return {f"/c/{p.relative_to(folder)}": p.read_bytes() for p in inside}

    with file_server(files(cache)) as server:
        url = f"{server.address}/c/train"
        server.fails = 1
        first = RemoteShards(url, "test")
        before = first.rows([Key(0), Key(4)])
        assert server.fails == 0, "it asked again"
        server.files.update(files(other))
        again = RemoteShards(url, "test")
        again.rows([Key(0), Key(4)])
        assert again.local_file(0).read_bytes() == shard.read_bytes()
        flip_a_bit(again.local_file(1))
        mended = RemoteShards(url, "test").rows([Key(4)])
        assert all(torch.equal(mended[name], before[name][1:]) for name in mended)
        RemoteShards(url, "test", kept=1).rows([Key(8)])
        assert list(first.local.iterdir()) == [first.local_file(2)]


@pytest.mark.parametrize("error", [FileNotFoundError, RuntimeError])
def test_a_shard_that_another_process_removes_is_fetched_again(
    place, cache, tmp_path, monkeypatch, error
):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    inside = (p for p in (cache / "train").rglob("*") if p.is_file())
    with file_server({f"/c/{p.name}": p.read_bytes() for p in inside}) as server:
        shards = RemoteShards(f"{server.address}/c", "test")
        removed = []

        def open_removed(file: Path, num_rows: int) -> Any:
            if len(removed) < 5:
                file.unlink()
                removed.append(file)
                raise error(f"unable to open file <{file}>")
            return open_shard(file, num_rows)

        monkeypatch.setattr("semtok.data.caches.remote_shards.open_shard", open_removed)
        expected = Shards(cache / "train", "test").rows([Key(0)])
        rows = shards.rows([Key(0)])
        assert all(torch.equal(rows[name], expected[name]) for name in rows)
        monkeypatch.setattr(
            "semtok.data.caches.remote_shards.open_shard",
            lambda f, num_rows: f.unlink() or open_shard(f, num_rows),
        )
        with pytest.raises(UserError, match="set another SEMTOK_CACHE"):
            shards.rows([Key(4)])


@pytest.mark.parametrize(
    "name", ["../../../victim.safetensors", "ABSOLUTE", "http://127.0.0.1:9/x", "..", "", "a/b", 3]
)
def test_an_index_that_names_other_files_is_refused(place, cache, tmp_path, monkeypatch, name):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "deep" / "cache"))
    victim = tmp_path / "victim.safetensors"
    victim.write_text("mine")
    name = str(victim) if name == "ABSOLUTE" else name
    index = json.loads((cache / "train" / "index.json").read_text())
    index["shards"][0]["file"] = name
    content = (cache / "train" / "shard-000000.safetensors").read_bytes()
    files = {f"/c/train/{file['file']}": content for file in index["shards"]}
    files |= {"/c/train/index.json": json.dumps(index).encode(), "/victim.safetensors": content}
    files |= {f"/c/train/{'../' * n}victim.safetensors": content for n in range(4)}
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "index.json").write_text(json.dumps(index))
    with file_server(files) as server:
        for opened_ in (
            lambda: RemoteShards(f"{server.address}/c/train", "test", kept=1),
            lambda: Shards(tmp_path / "local", "test"),
        ):
            with pytest.raises(UserError, match="is damaged") as refused_:
                opened_().rows([Key(0), Key(4)])
            assert "\n" not in str(refused_.value)
    assert victim.read_text() == "mine"
    assert not list((tmp_path / "deep").rglob("*.safetensors"))


def test_a_cache_is_of_the_images_that_are_at_hand(place, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    relative = [word.replace(str(place) + "/", "") for word in words(place)]
    tokenizer = Tokenizer.from_pretrained(place / "tokenizer")
    open_latent_cache(cache, tokenizer, data=parse_data(relative, place="test"))
    images = [tmp_path / f"{n}.tar" for n in ("a-000", "b-000")]
    for image in images:
        image.touch()
    written = str(tmp_path / "a-{000..001}.tar")
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    about = json.loads((copied / "latents.json").read_text())

    def open_tars(pattern: str) -> None:
        made = parse_data(["kind=tars", "size=16", f"path={tmp_path / pattern}"], place="test")
        about["data"] = made.model_dump(mode="json", exclude={"cache", "num_workers", "streaming"})
        about["data"]["path"] = written
        (copied / "latents.json").write_text(json.dumps(about))
        open_latent_cache(copied, tokenizer, data=made)

    for pattern in ("b-{000..001}.tar", "b-*.tar"):
        with pytest.raises(UserError, match="holds latents of other images"):
            open_tars(pattern)
    images[1].unlink()
    open_tars("b-*.tar")  # none is there to be other

    cached, _ = opened(place, cache)
    settings = parse_data(words(place), place="test")
    warn_of_other_images(cached, settings)
    assert not capsys.readouterr().out
    changed = next((place / "images/train").rglob("*.png"))
    state = changed.stat()
    os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    try:
        warn_of_other_images(cached, settings)
    finally:
        os.utime(changed, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "were changed, or copied" in capsys.readouterr().out


def test_a_part_of_a_cache_that_is_removed_is_computed_again(place, cache, tmp_path, capsys):
    """As the message of a damaged one says."""
    copied = tmp_path / "cache"
    shutil.copytree(cache, copied)
    index = json.loads((copied / "train/index.json").read_text())
    lost = index["shards"].pop()
    (copied / "train/index.json").write_text(json.dumps(index))
    assert command("--verify", copied) == 2
    error = capsys.readouterr().err
    assert (
        "does not name the shards of 10 images" in error
        and "remove it, and it is computed" in error
    )
    shutil.rmtree(copied / "train")
    assert command("--verify", copied) == 2 and "goes on" in capsys.readouterr().err
    train_dit.train_dit(recipe(place, cache=str(copied)), tmp_path / "run")
    index = json.loads((copied / "train/index.json").read_text())
    assert command("--verify", copied) == 0 and sum(e["bytes"] for e in index["shards"])
    assert lost["file"] == "shard-000002.safetensors"


@pytest.mark.parametrize(("num_images", "block"), [(100, 4), (1000, 7), (5, 8), (130, 1)])
def test_an_epoch_in_blocks_shows_every_image_once_from_few_blocks_at_a_time(num_images, block):
    order = DataOrder(num_images, num_images, seed=3, flip=False, block_size=block)
    indices = [index for index, _, _ in order.keys(0)]
    assert sorted(indices) == list(range(num_images))
    window = BLOCKS_AT_A_TIME * block
    for first in range(0, num_images, window):
        assert len({i // block for i in indices[first : first + window]}) <= BLOCKS_AT_A_TIME + 1
    assert indices != [index for index, _, _ in order.keys(1)]


def test_a_cache_that_is_being_written_is_left_alone_and_one_that_was_stopped_goes_on(
    place, cache, tmp_path, monkeypatch, capsys
):
    output = tmp_path / "cache"
    options = ["--shard-size", 4, "--batch-size", 3, "--targets", "--output", output]
    call = ["--tokenizer", place / "tokenizer", "--data", *words(place), *options]
    stopped = functools.partial(signal.raise_signal, signal.SIGTERM)
    with only_one_in(output / "train", "another"), monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: stopped())  # while it waits
        assert command(*call) == 143
    assert f"{output}/train: a command that writes a cache is at work" in capsys.readouterr().out

    write = shards.write_tensors

    def stop(*args: Any) -> None:
        write(*args)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_tensors", stop)
        assert command(*call) == 143
    assert capsys.readouterr().err == "stopped by SIGTERM; the same command goes on\n"
    assert command(*call) == 0
    for file in (cache / "train").glob("*.safetensors"):
        assert file.read_bytes() == (output / "train" / file.name).read_bytes()

    def full(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space (os error 28)")

    monkeypatch.setattr(shards, "write_tensors", full)
    assert command(*call[:-1], tmp_path / "other") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_training_waits_for_the_cache_that_another_is_writing(
    place, tmp_path, monkeypatch, capsys
):
    """Latents that are computed in each step differ from cached ones by rounding, and a run would not repeat. Of
    several processes all but the first would wait in vain."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("semtok.commands.when_to_cache.pays", lambda *_: True)
    monkeypatch.setattr("semtok.commands.when_to_cache._digest", lambda *_: "name")
    folder = tmp_path / "runs" / "cache" / "name" / "train"
    told = pytest.raises(
        InUse, match="a command that writes a cache is at work there .*; wait, or stop it"
    )
    with only_one_in(folder, "a command"), monkeypatch.context() as several, told:
        several.setattr(shards, "num_processes", lambda: 2)
        train_dit.train_dit(recipe(place), tmp_path / "run")
    other = contextlib.ExitStack()
    other.enter_context(only_one_in(folder, "a command"))
    monkeypatch.setattr(time, "sleep", lambda seconds: other.close())
    train_dit.train_dit(recipe(place), tmp_path / "run")
    assert "a command that writes a cache is at work there" in capsys.readouterr().out
    assert is_latent_cache(str(folder.parent))


def test_what_writes_a_cache_ends_with_the_command_that_trains_on_it(tmp_path, monkeypatch, capsys):
    """With its images, and with its targets where it has some."""
    monkeypatch.chdir(tmp_path)
    data = ["kind=shapes", "size=16", "num_images=8", "num_validation_images=4"]
    for name, targets in (("plain", []), ("aligned", ["--targets", "name=demo"])):
        words = ["--tokenizer", "demo", "--data", *data, "--output", name, *targets]
        assert run(cache_latents.main, words) == 0
        told = capsys.readouterr().out.rpartition("train on it by: semtok train_dit ")[2]
        given = shlex.split(told)
        assert ("teacher.name=demo" in given) == bool(targets)
        tiny_run = ["train.steps=1", "train.warmup_steps=0", "train.batch_size=2"]
        tiny_run += ["diffusion.network=SiT-T/4", "--output", f"run_{name}"]
        assert run(train_dit.main, [*given, *tiny_run]) == 0
        capsys.readouterr()


def test_the_command_that_trains_on_a_cache_shows_no_secret():
    words = argparse.Namespace(
        tokenizer="demo", data=["path=https://h/a.tar?key=secret"], output="c", targets=None
    )
    told = cache_latents._training_command(words, Tokenizer.from_pretrained("demo"))
    assert "data.path=https://h/a.tar…" in told and "secret" not in told


def test_a_cache_keeps_no_secrets_of_urls_and_is_the_same_for_another_signature():
    first, second = (
        settings_of_images(
            TarsConfig(path=("s3://b/b.tar", f"https://h.org/a.tar?sign={i}"), size=8)
        )
        for i in range(2)
    )
    assert first == second and first["path"] == ["s3://b/b.tar", "https://h.org/a.tar…"]
