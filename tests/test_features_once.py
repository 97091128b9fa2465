"""A teacher's features of one set of images, computed once for all that need them."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import einsum
from torch import Tensor
from torchvision.io import write_png

import tiny
from semtok import UserError
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.caches.feature_cache import automatic_folder
from semtok.data.caches.latent_cache import CachedLatents, ensure_latent_cache
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.source import ImageSource, Key
from semtok.images import to_pixels
from semtok.methods.composite import CompositeTokenizer
from semtok.methods.redi import PrincipalComponents
from semtok.recipe import parse_recipe
from semtok.sampler.latents import Latents
from semtok.teachers import Teacher, TeacherConfig

ROUNDING = 2.0**-11
"""Of float16, relative."""
COMPRESSOR = {"name": "reglue", "compressor": {"hidden": [8], "channels": 4}}
COMPONENTS = {"name": "redi", "channels": 4, "global_token": True}


@pytest.fixture(autouse=True)
def _runs_of_the_test(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("semtok.commands.when_to_cache._SAVED", 0)
    images = Shapes(ShapesConfig(size=16), train=True).load(range(12)).images
    for number, image in enumerate(images):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        write_png(image, str(folder / f"{number}.png"))


def recipe(method: dict[str, Any], cache: str | None = "auto", *, steps: int = 10, **data: Any):
    if method["name"] != "vae":
        method = method | {"feature_cache": cache, "min_texture_psnr": None}
    warmup = min(steps, 2)
    content = tiny.content(method, steps=steps, warmup_steps=warmup)
    content["teacher"]["layers"] = [-2, -1]
    content["data"] = {"kind": "folder", "path": "images", "size": 16} | data
    content["data"].setdefault("validation_fraction", 0.25)
    return parse_recipe(content, "tiny")


def seen_by_teachers(monkeypatch) -> Counter[bytes]:
    """How often each image, by its pixels, goes through a teacher from now on."""
    original, seen = Teacher.features, Counter()

    def features(self: Teacher, pixels: Tensor, **settings: Any) -> Any:
        seen.update(map(named, pixels))
        return original(self, pixels, **settings)

    monkeypatch.setattr(Teacher, "features", features)
    return seen


def named(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.contiguous().numpy().tobytes()).digest()


def latents(
    tokenizer: CompositeTokenizer, sources: tuple[ImageSource, ImageSource], name: str
) -> CachedLatents:
    data = recipe(COMPRESSOR).data
    settings = {"data": data, "targets": tokenizer.teacher}
    return ensure_latent_cache(sources, tokenizer.eval(), Path(name), **settings)[0]


def test_each_image_goes_through_the_teacher_once_for_all_that_need_it(monkeypatch, capsys):
    train_tokenizer(recipe({"name": "vae"}, steps=2), "vae")
    sources = open_sources(recipe(COMPRESSOR).data)
    train = sources[0]
    seen = seen_by_teachers(monkeypatch)
    coded = train_tokenizer(recipe(COMPRESSOR), "coded")
    assert "computing the teacher's features once" in capsys.readouterr().out
    fitted = train_tokenizer(recipe(COMPONENTS | {"texture": "vae"}, steps=0), "fitted")
    caches = [latents(each, sources, f"{each.method}_latents") for each in (coded, fitted)]
    assert capsys.readouterr().out.count("reading the teacher's features of images") == 2

    keys = [Key(i, mirrored) for mirrored in (False, True) for i in range(len(train))]
    pixels = to_pixels(train.load_keys(keys).images)
    # The first is looked at before caches are written, and after exports.
    counts = [seen[named(image)] for image, key in zip(pixels, keys, strict=True) if key.index]
    assert counts == [1] * len(counts)

    with torch.no_grad():
        for tokenizer, cache in zip((coded, fitted), caches, strict=True):
            batch = cache.load_keys(keys)
            check_rounding(tokenizer, pixels, batch.latents.mean)
            targets, pooled = batch.features.restored(), tokenizer.features(pixels).pooled
            torch.testing.assert_close(targets.pooled, pooled, rtol=2 * ROUNDING, atol=1e-4)


def check_rounding(tokenizer: CompositeTokenizer, pixels: Tensor, read: Latents) -> None:
    """Latents that were read are those of features in float16, rounded to float16 themselves."""
    features = tokenizer.features(pixels)
    rounded = tokenizer.posterior(pixels, features.map(lambda part: part.half().float())).mean
    for name, part in read.items():
        torch.testing.assert_close(part.float(), rounded[name], rtol=2 * ROUNDING, atol=1e-4)
    if not isinstance(tokenizer.coder, PrincipalComponents):
        return
    # Where the coder is linear, what rounding can do to what is computed is known.
    exact = tokenizer.posterior(pixels, features).mean["semantic"]
    scaled = features.joined.abs() / tokenizer.coder.feature_std[:, None, None]
    bound = einsum(tokenizer.coder.components.abs(), scaled, "c d, b d h w -> b c h w")
    bound = bound / tokenizer.semantic_std[:, None, None] + exact.abs()
    apart = (read["semantic"].float() - exact).abs()
    assert apart.max() > 0 and (apart <= 1.01 * ROUNDING * bound + 1e-5).all()


def test_statistics_from_stored_features_are_those_of_the_images():
    read, computed = (
        train_tokenizer(recipe(COMPRESSOR, cache, seed=1), f"with_{cache}")
        for cache in ("auto", "none")
    )
    for kind in ("mean", "std"):
        ours, theirs = (getattr(each, f"global_{kind}") for each in (read, computed))
        torch.testing.assert_close(ours, theirs, rtol=2 * ROUNDING, atol=2 * ROUNDING)


def test_no_cache_is_made_where_it_does_not_pay_or_can_not_be(capsys):
    train_tokenizer(recipe(COMPRESSOR, steps=4), "short")
    train_tokenizer(recipe(COMPONENTS, steps=0), "fitted")
    train_tokenizer(recipe(COMPRESSOR, None), "off")
    assert "features once" not in capsys.readouterr().out
    train_tokenizer(recipe(COMPRESSOR, crop="random"), "crops")
    told = "note: the teacher's features are computed in each step (data.crop=random"
    assert told in capsys.readouterr().out
    assert not list(Path("runs").glob("cache/*"))
    folder = automatic_folder(open_sources(recipe(COMPRESSOR).data)[0], teacher(), (8, 8))
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("")
    train_tokenizer(recipe(COMPRESSOR), "foreign")
    assert "computed in each step (method.feature_cache: " in capsys.readouterr().out
    with pytest.raises(UserError, match="nothing is read twice here; leave it out, or pass auto"):
        recipe(COMPONENTS, "folder", steps=0)


def teacher(**settings: Any) -> Teacher:
    return Teacher(TeacherConfig(**{"layers": (-2, -1)} | settings))


def test_other_features_and_other_images_lie_elsewhere():
    def folder(grid: int = 8, layers: tuple[int, ...] = (-2, -1), **data: Any) -> Path:
        source, _ = open_sources(recipe(COMPRESSOR, **data).data)
        return automatic_folder(source, teacher(layers=layers), (grid, grid))

    folders = [
        folder(),
        folder(grid=4),
        folder(layers=(-1,)),
        folder(size=32),
        folder(flip=False),
        folder(num_images=5),
    ]
    assert len(set(folders)) == len(folders) and folder() == folders[0]
