"""Code in README runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

import tiny
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.recipe import parse_recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(heading: str) -> str:
    """The first Python block under a heading."""
    section = README.split(f"### {heading}\n")[1]
    return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]


@pytest.mark.parametrize("method", ["demo", "semvae"])
def test_a_tokenizer_in_foreign_training_code(tmp_path, method):
    reference = method
    if method == "semvae":
        reference = str(tmp_path / "run")
        content = {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1}
        train_tokenizer(parse_recipe(tiny.content(content, steps=2), "tiny"), tmp_path / "run")
    code = block("In your own training code")
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
