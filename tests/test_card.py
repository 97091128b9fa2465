"""Model cards: what the Hub and readers find in every kind of export."""

import re
from pathlib import Path

import pytest
import safetensors
import yaml
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

import tiny
from semtok import Generator, Tokenizer
from semtok.card import bibtex, card_data, model_card
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
    results = {r.metric_type for r in data.eval_results or []}
    assert results == {"vae": {"psnr", "ssim"}, "semvae": {"feature_cosine"}, "dit": set()}[name]
    assert results == set(data.metrics or [])
    task = "unconditional-image-generation" if name == "dit" else "image-feature-extraction"
    assert data.pipeline_tag == task and ("class-conditional" in data.tags) == (name == "dit")
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
        entry = text.split(f"@misc{{arxiv:{paper},")[1].split("\n}")[0]
        assert f"eprint = {{{paper}}}" in entry and "title = {{" in entry and " and " in entry
    for picture in ("pictures/samples.png", "pictures/curves.png"):
        assert f"]({picture})" in text and (folder / picture).is_file()
    assert f'subfolder="{vae}"' in text
    assert isinstance(AutoencoderKL.from_pretrained(folder / vae), AutoencoderKL)


@pytest.mark.parametrize(
    ("name", "networks"),
    [
        ("vae", {"vae"}),
        ("semvae", {"coder", "texture/vae"}),
        ("dit", {"network", "tokenizer", "tokenizer/texture/vae"}),
    ],
)
def test_a_card_counts_the_parameters_of_each_network(exports, name, networks):
    text = (exports[name] / "README.md").read_text()
    counts = dict(re.findall(r"\| parameters of (\S+) \| ([\d,]+) \|", text))
    assert set(counts) == networks
    model = (Generator if name == "dit" else Tokenizer).from_pretrained(exports[name])
    modules = {
        "network": getattr(model, "network", None),
        "vae": getattr(model, "autoencoder", None),
    }
    for key, module in modules.items():
        if key in counts:
            state = module.state_dict().values()
            assert counts[key] == f"{sum(tensor.numel() for tensor in state):,}"


def test_a_card_says_what_a_short_run_is_not_and_how_samples_are_drawn(exports):
    vae, dit = ((exports[name] / "README.md").read_text() for name in ("vae", "dit"))
    for text in (vae, dit):
        assert "A run of 2 steps, which saw 8 images: a demonstration." in text
        assert "It has never seen a photograph." in text and "drawn by semtok itself" in text
    assert "| sampler | euler, 50 steps, no guidance |" in dit and "| sampler |" not in vae
    assert "velocity" not in dit and "kl_per_dim" not in vae, "they compare a training with itself"
    assert "semtok evaluate generation" in dit and "| held-out PSNR (dB) |" in vae


def test_the_licence_of_the_images_is_told_or_said_to_be_unknown(tmp_path):
    for i in range(12):
        image = Image.new("RGB", (16, 16), (20 * i, 0, 0))
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{i}.png")
    content = tiny.content({"name": "vae"}, steps=2)
    content["data"] = {"kind": "folder", "path": str(tmp_path / "images"), "size": 16}
    texts = []
    for licence in (None, "CC-BY-SA-4.0"):
        content["data"]["licence"] = licence
        train_tokenizer(parse_recipe(content, "tiny"), tmp_path / f"run-{licence}")
        texts.append((tmp_path / f"run-{licence}" / "export" / "README.md").read_text())
    assert "Licence of the images: unknown. State it before publishing" in texts[0]
    assert "Licence of the images: CC-BY-SA-4.0." in texts[1] and "unknown" not in texts[1]
    for text in texts:
        header = yaml.safe_load(text.split("---")[1])
        assert header["license"] == "other" and header["license_name"] == "not-stated"
        assert "Licence of these weights: not stated" in text


def test_a_paper_that_a_plugin_names_gets_an_entry_and_other_texts_none():
    entry = bibtex("A Method of Mine, arXiv 2101.00001")
    assert "title = {{A Method of Mine}}" in entry and "year = {2021}" in entry
    assert "author" not in entry and bibtex("a talk, 2020") == ""


def test_a_sampler_is_told_in_words():
    guided = {"scale": {"texture": 1.5, "semantic": 2.0}, "interval": [0.1, 1.0]}
    config = {"library_version": "1", "kind": "generator", "class_names": ["a", "b"]}
    config["sampler"] = {"method": "dopri5", "steps": 50, "guidance": guided}
    words = "dopri5, guidance scale 1.5 texture, 2 semantic in the interval [0.1, 1.0]"
    assert f"| sampler | {words} |" in model_card(config)


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
