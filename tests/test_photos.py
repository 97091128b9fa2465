"""The recipes of recipes/photos: each trains as it stands, but for images, teacher and length, and is generated in."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from benchmarks.random_inputs import random_teacher
from semtok import Tokenizer
from semtok.commands import sample, train_dit, train_tokenizer
from semtok.commands.run_data import note_licence
from semtok.recipe import embedded_recipes, load_recipe
from semtok.settings import read_yaml
from semtok.teachers import TeacherConfig

datasets = pytest.importorskip("datasets")

NAMES = [
    name.removeprefix("photos/")
    for name, file in embedded_recipes().items()
    if name.startswith("photos/") and "method" in read_yaml(file)
]
SHORT = ["train.batch_size=4", "train.log_every=1"]
SHORT += [f"train.num_{what}_images=4" for what in ("validation", "statistics", "sample")]


def write_images(file: Path, num_images: int, column: str = "image") -> None:
    """Grey noise in Parquet, as Fashion-MNIST is stored, of three classes in turn."""
    random = np.random.default_rng(0)
    arrays = random.integers(0, 256, (num_images, 28, 28), dtype=np.uint8)
    label = datasets.ClassLabel(names=["Bag", "Coat", "Dress"])
    features = datasets.Features({column: datasets.Image(), "label": label})
    labels = [number % 3 for number in range(num_images)]
    content = {column: [Image.fromarray(array) for array in arrays], "label": labels}
    datasets.Dataset.from_dict(content, features=features).to_parquet(file)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Settings that name tiny images, in a folder where runs go that the tests of this module share."""
    folder = tmp_path_factory.mktemp("photos")
    for name, num_images in (("train", 12), ("test", 4)):
        write_images(folder / f"{name}.parquet", num_images)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "hf")
        patch.chdir(folder)
        yield ["data.path=train.parquet", "data.validation=test.parquet"]


@pytest.fixture(scope="module")
def teacher(images) -> list[str]:
    """Settings of a network as the recipes' teacher, of a tenth of its size and with random weights."""
    config = random_teacher(TeacherConfig(name="test_efficientnet"), Path("teacher"))
    return [f"teacher.name={config.name}", f"teacher.checkpoint={config.checkpoint}"]


def train(name: str, *words: str) -> None:
    method = load_recipe(embedded_recipes()[f"photos/{name}"], []).method
    steps = ["train.steps=2", "train.sample_every=2"] if method.has_steps() else []
    texture = ["method.min_texture_psnr=0"] if method.texture_reference() else []
    assert train_tokenizer.main([f"photos/{name}", *words, *SHORT, *steps, *texture]) == 0


@pytest.fixture(scope="module")
def vae(images) -> None:
    """The run that others are built on."""
    train("vae", *images)


@pytest.mark.parametrize("name", NAMES)
def test_each_trains_and_a_transformer_on_it_draws(name, images, teacher, vae):
    if name != "vae":
        own = load_recipe(embedded_recipes()[f"photos/{name}"], []).teacher
        train(name, *images, *(teacher if own is not None else []))
    assert Tokenizer.from_pretrained(f"photos/{name}").training_info["licence"] == "MIT"
    words = ["--recipe", "photos/dit", "--tokenizer", f"photos/{name}", *images, *SHORT]
    words += ["train.steps=2", "train.sample_every=2", "sampler.steps=2"]
    assert train_dit.main(words) == 0
    drawn = Path(f"{name}.png")
    assert sample.main([f"photos/dit_{name}", "--num", "3", "--output", str(drawn)]) == 0
    assert Image.open(drawn).size >= (3 * 32, 32)


def test_what_a_recipe_is_built_on_is_trained_once_for_all_of_the_same_images(
    images, tmp_path, monkeypatch
):
    own = read_yaml(embedded_recipes()["photos/vae"])
    own["data"] |= dict(word.removeprefix("data.").split("=") for word in images)
    (tmp_path / "vae.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr(train_tokenizer, "find_recipe", {"photos/first": tmp_path / "vae.yaml"}.get)
    data = load_recipe(tmp_path / "vae.yaml", ["data.cache=none"]).data
    built_on_it = Path("runs/photos/second")
    plan = train_tokenizer.check_reference("photos/first", data, run=built_on_it)
    assert plan.folder == Path("runs/photos/first")
    other = load_recipe(tmp_path / "vae.yaml", ["data.flip=true"]).data
    plan = train_tokenizer.check_reference("photos/first", other, run=built_on_it)
    assert plan.folder == Path("runs/photos/second_photos_first") and plan.sources[0].flip


def test_columns_as_those_of_cifar_are_found(images, tmp_path):
    write_images(tmp_path / "train.parquet", 12, column="img")
    words = [f"data.path={tmp_path / 'train.parquet'}", "data.flip=true", "data.licence=null"]
    recipe = load_recipe(embedded_recipes()["photos/vae"], words)
    train_set, held_out = train_tokenizer.open_sources(recipe.data)
    assert train_set.class_names == ("Bag", "Coat", "Dress") and len(held_out)
    assert recipe.data.licence is None
    assert train_set.name == f"train.parquet ({len(train_set)} images)"
    assert held_out.name == f"train.parquet ({len(held_out)} held-out images)", "not of training"


def test_whose_licence_an_export_states_is_told_where_others_images_are_named(images, capsys):
    data = load_recipe(embedded_recipes()["photos/vae"], images).data
    for words, is_told in ((images, True), ([*images, "data.licence=MIT"], False), ([], False)):
        note_licence(data, words)
        out = capsys.readouterr().out
        assert ("note: the export will state MIT" in out and "data.licence=" in out) == is_told
