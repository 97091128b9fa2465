"""Code in README and the pages of docs/ runs as it stands."""

import re

import pytest
import torch
from PIL import Image

import tiny
from documented import ROOT, blocks
from semtok.commands import hub
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.recipe import parse_recipe


def block(page: str, heading: str) -> str:
    """The first Python block of a page under a heading."""
    text = (ROOT / page).read_text(encoding="utf-8")
    section = re.split(f"^#+ {heading}\n", text, flags=re.MULTILINE)[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.parametrize("method", ["demo", "semvae"])
def test_a_tokenizer_in_foreign_training_code(tmp_path, method):
    reference = method
    if method == "semvae":
        reference = str(tmp_path / "run")
        content = {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1}
        train_tokenizer(parse_recipe(tiny.content(content, steps=2), "tiny"), tmp_path / "run")
    code = block("docs/hub.md", "In your own training code")
    assert len([line for line in code.splitlines() if line]) == 3
    images = Shapes(ShapesConfig(size=16), train=False).load(range(4)).images
    names = {"images": images}
    exec(code.replace("org/name", reference).replace("cuda", "cpu"), names)
    latents, tokenizer = names["latents"], names["tokenizer"]
    assert latents.shape == (4, *tokenizer.spec.shape("texture", (16, 16)))
    # Somebody's own model learns on them, and the tokenizer stays as it is.
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(latents[0].numel(), 1))
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    optimiser = torch.optim.SGD([*model.parameters(), *tokenizer.parameters()], lr=0.1)
    model(latents).square().mean().backward()
    optimiser.step()
    assert all(torch.equal(v, before[n]) for n, v in tokenizer.state_dict().items())


def test_the_first_lines_of_python_work_on_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = Shapes(ShapesConfig(size=32), train=False).load([0]).images[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save("photo.png")
    names: dict = {}
    exec(block("README.md", "Start").replace("send_vae", "demo"), names)
    assert names["pixels"].shape == (1, 3, 32, 32)
    assert names["pixels"].sub(image / 127.5 - 1).square().mean() < 0.05


def test_a_generator_and_its_pipeline_draw_as_the_pages_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.runs(tmp_path, steps=2)
    assert hub.main(["export", "dit", "--output", "pipeline"]) == 0
    _, ours, of_diffusers = blocks(ROOT / "README.md", "python")
    in_words, from_an_image = blocks(ROOT / "docs" / "generate.md", "python")
    Image.new("RGB", (16, 16), "red").save("start.png")
    names: dict = {}
    for code in (ours, of_diffusers):
        exec(code.replace('"dit_send_vae"', '"dit"'), names)
        assert [image.size for image in names["images"]] == [(16, 16), (16, 16)]
    for code in (in_words, from_an_image):
        exec(code.replace('"dit_send_vae"', '"dit"'), names)
        assert [image.size for image in names["pictures"]] == [(16, 16)]
    assert names["pixels"].shape == (3, 3, 16, 16)
