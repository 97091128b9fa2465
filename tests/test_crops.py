"""Which part of an image training sees: mirrored or not, cropped at the centre or at random."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import stored
import tiny
from semtok import UserError
from semtok.commands import cache_latents, evaluate_options
from semtok.commands.run_folder import check_run_folder
from semtok.commands.tokenizer_export import statistics_batches
from semtok.commands.train_dit import train_dit
from semtok.data.caches.latent_cache import ensure_latent_cache, open_latent_cache
from semtok.data.images.decoding import adm_center_crop, decode, random_crop
from semtok.data.images.folder import Folder, FolderConfig
from semtok.data.images.kinds import open_sources
from semtok.data.order import BatchSlice, DataOrder, training_batches
from semtok.data.source import ImageSource, Key
from semtok.images import to_pixels
from semtok.recipe import parse_data, parse_diffusion_recipe, parse_recipe
from semtok.storage import read_json


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise, wide and high, no two alike."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(10):
        shape = (24, 60, 3) if i % 2 else (60, 24, 3)
        file = root / ("train" if i < 8 else "val") / "a" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(file)
    return root


def settings(photos: Path, **changes: Any) -> dict[str, Any]:
    return {"kind": "folder", "path": str(photos), "size": 16} | changes


def folder(photos: Path, **changes: Any) -> tuple[Folder, Folder]:
    return Folder.open(FolderConfig(**settings(photos, **changes)))


# What is measured --------------------------------------------------------------------------------


def test_statistics_are_measured_on_unmirrored_images(photos):
    content = tiny.content({"name": "vae"}, num_statistics_images=8)
    content["data"] = settings(photos, flip=True)
    source, _ = folder(photos, flip=True)
    seen = {}
    for places, batch in statistics_batches(
        source, parse_recipe(content, "tiny"), torch.device("cpu")
    ):
        seen |= dict(zip(places, batch.pixels, strict=True))
    plain = to_pixels(source.load(range(8)).images)
    assert all(any(torch.equal(image, other) for other in plain) for image in seen.values())
    assert len(seen) == 8


# A random crop -----------------------------------------------------------------------------------


def noise(height: int, width: int) -> Image.Image:
    random = np.random.default_rng(height * width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("shape", [(40, 100), (100, 40), (33, 33), (10, 14), (16, 30)])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.4, 0.7), (0.999, 0.999)])
def test_a_random_crop_is_a_part_of_the_image_whose_smaller_side_was_resized(shape, place):
    """Resized as OpenCV does: bilinear, without a filter against aliasing."""
    image = noise(*shape)
    scale = 16 / min(shape)
    size = [round(side * scale) for side in shape]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    whole = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False)
    top, left = (int((side - 16 + 1) * u) for side, u in zip(size, place, strict=True))
    expected = whole[0, :, top : top + 16, left : left + 16].permute(1, 2, 0)
    ours = torch.from_numpy(random_crop(image, (16, 16), place)).float()
    assert ours.shape == (16, 16, 3) and (ours - expected).abs().max() <= 0.501


def test_a_crop_of_another_shape_covers_it_and_an_image_of_that_size_is_untouched():
    image = noise(40, 100)
    assert random_crop(image, (16, 24), (0.5, 0.5)).shape == (16, 24, 3)
    places = [(0.0, 0.0), (0.5, 0.5), (0.999, 0.999)]
    crops = [random_crop(image, (40, 100), place) for place in places]
    assert all(np.array_equal(crop, np.array(image)) for crop in crops)


def test_every_place_of_a_crop_is_equally_likely():
    columns = np.tile(np.arange(20, dtype=np.uint8)[None, :, None], (16, 1, 3))
    image, counts = Image.fromarray(columns), np.zeros(5)
    for index in DataOrder(2000, 2000, seed=0, flip=False, crop="random").keys(0):
        counts[random_crop(image, (16, 16), index.crop)[0, 0, 0]] += 1
    assert counts.min() > 320 and counts.max() < 480, "400 each"


# In training -------------------------------------------------------------------------------------


def test_random_crops_change_by_epoch_and_leave_the_order_and_the_mirroring_as_they_are():
    plain = DataOrder(50, 50, seed=3, flip=True)
    cropped = DataOrder(50, 50, seed=3, flip=True, crop="random")
    for epoch in range(2):
        pairs = list(zip(plain.keys(epoch), cropped.keys(epoch), strict=True))
        assert all(a[:2] == b[:2] and a.crop is None for a, b in pairs)
        assert len({b.crop for _, b in pairs}) == 50
    first, second = ({key.index: key.crop for key in cropped.keys(step)} for step in range(2))
    assert all(first[index] != second[index] for index in range(50))
    assert DataOrder(50, 50, seed=4, flip=True, crop="random").keys(0) != cropped.keys(0)


def seen_in_training(
    source: ImageSource, num_processes: int, accumulate: int, num_workers: int, first_step: int = 0
) -> torch.Tensor:
    """Images of five steps of 8, in the order of the global batches."""
    order = DataOrder(len(source), 8, 1, source.flip, source.block_size, source.crop)
    parts = [
        training_batches(
            source,
            order,
            BatchSlice(8, accumulate, process, num_processes),
            first_step=first_step,
            last_step=5,
            num_workers=num_workers,
            pin_memory=False,
        )
        for process in range(num_processes)
    ]
    micro_batches = [batch for step in zip(*parts, strict=True) for batch in step]
    return torch.cat([batch.images for batch in micro_batches])


def test_random_crops_do_not_depend_on_processes_micro_batches_workers_or_where_a_run_resumes(
    photos,
):
    source, _ = folder(photos, crop="random")
    whole = seen_in_training(source, 1, 1, 0)
    assert torch.equal(whole, seen_in_training(source, 2, 1, 0)), "two processes"
    assert torch.equal(whole, seen_in_training(source, 2, 2, 0)), "and micro-batches"
    assert torch.equal(whole, seen_in_training(source, 1, 2, 2)), "and loader processes"
    assert torch.equal(whole[3 * 8 :], seen_in_training(source, 1, 1, 0, first_step=3))
    assert not torch.equal(whole, seen_in_training(folder(photos)[0], 1, 1, 0))


def test_what_a_key_says_is_what_is_loaded(photos):
    source, _ = folder(photos, crop="random")
    keys = [Key(3, False, (0.2, 0.9)), Key(3, True, (0.2, 0.9)), Key(3), Key(4, True)]
    images = source.load_keys(keys).images
    content = source.file(3).read_bytes()
    cropped = torch.from_numpy(decode(content, (16, 16), (0.2, 0.9))).permute(2, 0, 1)
    assert torch.equal(images[0], cropped) and torch.equal(images[1], cropped.flip(-1))
    assert torch.equal(images[2], source.load([3]).images[0])
    assert torch.equal(images[3], source.load([4]).images[0].flip(-1))


def test_all_but_training_sees_the_centre(photos):
    plain, cropped = folder(photos), folder(photos, crop="random")
    assert [source.crop for source in cropped] == ["random", "center"]
    for one, other in zip(plain, cropped, strict=True):
        assert torch.equal(one.load(range(2)).images, other.load(range(2)).images)
    content = tiny.content({"name": "vae"}, num_statistics_images=8)
    content["data"] = settings(photos, crop="random")
    recipe, cpu = parse_recipe(content, "tiny"), torch.device("cpu")
    for (places, one), (others, other) in zip(
        *(statistics_batches(source, recipe, cpu) for source in (plain[0], cropped[0])), strict=True
    ):
        assert places == others and torch.equal(one.pixels, other.pixels)
    image = Image.open(plain[0].file(0))
    expected = torch.from_numpy(np.array(adm_center_crop(image, (16, 16)))).permute(2, 0, 1)
    assert torch.equal(cropped[0].load([0]).images[0], expected)


@pytest.mark.parametrize("kind", ["tars", "parquet", "streaming"])
def test_tars_and_parquet_draw_crops_too(kind, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    files = {part: sorted((photos / part / "a").iterdir()) for part in ("train", "val")}
    contents = {part: [file.read_bytes() for file in names] for part, names in files.items()}
    if kind == "tars":
        pytest.importorskip("webdataset")
        for part, images in contents.items():
            members = [(f"{i:04}.png", image) for i, image in enumerate(images)]
            stored.write_tar(tmp_path / f"{part}.tar", members)
    else:
        pytest.importorskip("datasets")
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        for part, images in contents.items():
            table = arrow.table({"image": [{"bytes": image, "path": None} for image in images]})
            parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=4)
    ending = "tar" if kind == "tars" else "parquet"
    words = [f"path={tmp_path}/train.{ending}", f"validation={tmp_path}/val.{ending}", "size=16"]
    words += ["kind=tars"] if kind == "tars" else ["kind=parquet", "image_column=image"]
    words += ["streaming=true"] if kind == "streaming" else []
    source, held_out = open_sources(parse_data([*words, "crop=random"], place="test"))
    assert (source.crop, held_out.crop) == ("random", "center")
    images = source.load_keys([Key(i, False, (0.1, 0.8)) for i in range(8)]).images
    for image, content in zip(images, contents["train"], strict=True):
        expected = decode(content, (16, 16), (0.1, 0.8))
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1))


# Where random crops can not be --------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["crop=random", "crop=center", "flip=true", "flip=false"])
def test_drawn_scenes_refuse_settings_that_have_no_meaning_for_them(setting):
    key = setting.partition("=")[0]
    with pytest.raises(
        UserError, match=f"--data: {key}: .*; leave it out, or choose another"
    ) as told:
        parse_data(["kind=shapes", "size=16", setting], place="--data")
    assert "\n" not in str(told.value)


def test_a_crop_of_another_name_is_refused():
    with pytest.raises(UserError, match="crop: input should be 'center' or 'random', got 'middle'"):
        parse_data(["kind=folder", "path=x", "size=16", "crop=middle"], place="--data")


def dit(photos: Path, root: Path, **data: Any) -> dict[str, Any]:
    tiny.tokenizer("vae", "none", False).save_pretrained(root / "tokenizer")
    train = {k: v for k, v in tiny.content()["train"].items() if k != "num_statistics_images"}
    return {
        "tokenizer": str(root / "tokenizer"),
        "data": settings(photos, crop="random", flip=False) | data,
        "diffusion": {"network": {"depth": 1, "width": 16, "heads": 2, "patch_size": 1}},
        "sampler": {"steps": 2},
        "train": train | {"steps": 2, "warmup_steps": 0},
    }


def test_latents_of_random_crops_are_computed_in_each_step(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("semtok.commands.when_to_cache._SAVED", 0)
    monkeypatch.setattr("semtok.commands.when_to_cache._TIMES", 0)
    monkeypatch.setattr("semtok.commands.when_to_cache.RUNS", tmp_path / "runs")
    train_dit(parse_diffusion_recipe(dit(photos, tmp_path), "dit"), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "note: latents are computed in each step (data.crop=random" in printed
    assert not (tmp_path / "runs").exists()
    train_dit(parse_diffusion_recipe(dit(photos, tmp_path, crop="center"), "dit"), tmp_path / "two")
    assert (tmp_path / "runs").exists(), "a cache would have been made"


def test_caches_refuse_random_crops_by_name(photos, tmp_path):
    with pytest.raises(UserError, match=r"data.cache: .*latents .*pass data.cache=none or data.cr"):
        parse_diffusion_recipe(dit(photos, tmp_path, cache=str(tmp_path / "latents")), "dit")
    content = tiny.content(tiny.SEMANTICS["reglue"] | {"feature_cache": str(tmp_path / "features")})
    content["data"] = settings(photos, crop="random")
    with pytest.raises(UserError, match=r"method.feature_cache: .*leave it out, or pass data.crop"):
        parse_recipe(content, "tiny")
    del content["method"]["feature_cache"]
    parse_recipe(content, "tiny")
    words = [f"{key}={value}" for key, value in settings(photos, crop="random").items()]
    output = tmp_path / "out"
    with pytest.raises(UserError, match="--data: crop=random: a cache holds one crop"):
        cache_latents.main(["--tokenizer", "demo", "--output", str(output), "--data", *words])
    data = parse_data(words, place="test")
    with pytest.raises(UserError, match="data.crop=random sees another in each epoch"):
        ensure_latent_cache(
            open_sources(data), tiny.tokenizer("vae", "none", False), output, data=data
        )
    assert not output.exists()


def test_scores_refuse_random_crops_that_are_asked_for_and_take_those_of_a_trained_model(photos):
    words = [f"{key}={value}" for key, value in settings(photos, crop="random").items()]
    with pytest.raises(UserError, match="--data: crop=random: only training sees random crops"):
        evaluate_options.data_of(words, None, place="--data")
    trained_on = parse_data(words, place="test").model_dump(mode="json")
    train, _ = evaluate_options.data_of(None, trained_on, place="--data")
    assert torch.equal(train.load([0]).images, folder(photos)[0].load([0]).images)


# What was there before this setting --------------------------------------------------------------


def test_a_cache_that_was_written_before_there_was_a_choice_is_the_same_cache(photos, tmp_path):
    tokenizer = tiny.tokenizer("vae", "none", False)
    words = [f"{key}={value}" for key, value in settings(photos).items()]
    data = parse_data(words, place="test")
    ensure_latent_cache(open_sources(data), tokenizer, tmp_path / "cache", data=data)
    assert "crop" not in read_json(tmp_path / "cache" / "latents.json")["data"]
    assert len(open_latent_cache(tmp_path / "cache", tokenizer, data=data)[0]) == 8


def test_a_run_of_before_resumes(photos, tmp_path):
    content = tiny.content({"name": "vae", "adversarial": tiny.ADVERSARIAL})
    content["data"] = settings(photos)
    recipe = parse_recipe(content, "tiny")
    recorded = recipe.model_dump(mode="json")
    del recorded["data"]["crop"]
    (tmp_path / "recipe.yaml").write_text(json.dumps(recorded))
    check_run_folder(tmp_path, recipe, resume=True)
    content["data"]["crop"] = "random"
    with pytest.raises(UserError, match="data.crop was 'center' and is now 'random'"):
        check_run_folder(tmp_path, parse_recipe(content, "tiny"), resume=True)
