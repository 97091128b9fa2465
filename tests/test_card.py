"""Model cards: what the Hub and readers find in every kind of export."""

from pathlib import Path

import pytest
import safetensors
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData

import tiny
from semtok import Generator, Tokenizer
from semtok.card import card_data, model_card
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.recipe import load_diffusion_recipe, load_recipe, parse_diffusion_recipe, parse_recipe


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports of a plain tokenizer, of one with parts, and of a generator on that."""
    root = tmp_path_factory.mktemp("cards")
    train_tokenizer(parse_recipe(tiny.content({"name": "vae"}, steps=2), "tiny"), root / "vae")
    method = {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1}
    train_tokenizer(parse_recipe(tiny.content(method, steps=2), "tiny"), root / "semvae")
    content = tiny.content(steps=2)
    del content["method"]
    shape = {"depth": 2, "width": 24, "heads": 2, "patch_size": 2}
    content |= {"tokenizer": str(root / "semvae"), "diffusion": {"network": shape}}
    train_dit(parse_diffusion_recipe(content, "tiny"), root / "dit")
    return {name: root / name / "export" for name in ("vae", "semvae", "dit")}


@pytest.mark.parametrize("name", ["vae", "semvae", "dit"])
def test_the_header_is_the_hubs_and_comes_back_as_it_was(exports, name):
    card = ModelCard.load(exports[name] / "README.md")
    data = card.data
    assert data.library_name == "semtok" and data.license == "apache-2.0" and "semtok" in data.tags
    assert data.datasets == ["shapes"]
    assert {r.metric_type for r in data.eval_results} == set(data.metrics) != set()
    again = ModelCardData(**yaml.safe_load(data.to_yaml()))
    assert again.to_dict() == data.to_dict()


@pytest.mark.parametrize(
    ("name", "loader", "papers", "vae"),
    [
        ("vae", "Tokenizer", ["2112.10752"], "vae"),
        ("semvae", "Tokenizer", ["2512.04926"], "texture/vae"),
        ("dit", "Generator", ["2401.08740", "2410.06940", "2512.04926"], "tokenizer/texture/vae"),
    ],
)
def test_a_reader_finds_how_to_load_it_what_made_it_and_whom_to_cite(
    exports, name, loader, papers, vae
):
    folder = exports[name]
    text = (folder / "README.md").read_text()
    assert f"{loader}.from_pretrained(" in text and "| images per step | 4 |" in text
    for paper in papers:
        assert f"arXiv {paper}" in text
    for picture in ("pictures/samples.png", "pictures/curves.png"):
        assert f"]({picture})" in text and (folder / picture).is_file()
    assert f'subfolder="{vae}"' in text
    assert isinstance(AutoencoderKL.from_pretrained(folder / vae), AutoencoderKL)


def test_the_recipe_is_whole_and_the_tensors_know_it(exports):
    vae, dit = exports["vae"], exports["dit"]
    recipe = load_recipe(vae / "recipe.yaml", [])
    assert recipe.train.steps == 2 and recipe.method.name == "vae"
    assert load_diffusion_recipe(dit / "recipe.yaml", []).train.batch_size == 4
    with safetensors.safe_open(vae / "tokenizer.safetensors", "pt") as file:
        about = file.metadata()
    assert about["library"] == "semtok" and about["method"] == "vae" and len(about["recipe"]) == 32
    with safetensors.safe_open(dit / "network.safetensors", "pt") as file:
        assert file.metadata()["recipe"] != about["recipe"]


def test_what_is_loaded_and_saved_again_keeps_its_card_but_for_the_pictures(exports, tmp_path):
    for name, kind in (("semvae", Tokenizer), ("dit", Generator)):
        kind.from_pretrained(exports[name]).save_pretrained(tmp_path / name)
        first = (exports[name] / "README.md").read_text().splitlines()
        again = (tmp_path / name / "README.md").read_text().splitlines()
        assert [line for line in first if not line.startswith("![") and line] == [
            line for line in again if line
        ]


def test_an_export_is_the_same_byte_for_byte_each_time(exports, tmp_path):
    model = Generator.from_pretrained(exports["dit"])
    names = [str(number) for number in range(4)]
    for name in names:
        model.save_pretrained(tmp_path / name)
    first, *others = (contents(tmp_path / name) for name in names)
    assert len(first) > 8 and all(other == first for other in others)


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_other_peoples_images_are_not_ours_to_license():
    config = {
        "library_version": "1",
        "method": "vae",
        "latents": [{"name": "texture", "channels": 4, "stride": 8}],
        "trained": {
            "data": "imagenet (1281167 images)",
            "recipe": {"method": {"vae": "stabilityai/sd-vae-ft-mse", "texture": "runs/x"}},
        },
    }
    data = card_data(config)
    assert data.license == "other" and data.base_model == ["stabilityai/sd-vae-ft-mse"]
    assert data.datasets == ["imagenet"] and data.eval_results is None
    assert "texture 4 channels (stride 8)" in model_card(config)
    assert card_data({**config, "trained": {}}).datasets is None
