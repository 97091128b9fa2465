"""Code in README and the pages of docs/ runs as it stands."""

import json
import re
from pathlib import Path

import pytest
import torch

import tiny
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.recipe import parse_recipe

ROOT = Path(__file__).parents[1]


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


def test_a_method_of_ones_own_trains_as_it_stands_there(tmp_path):
    example = (Path(__file__).parent / "examples" / "edge_vae.py").read_text()
    imports = [line for line in example.splitlines() if line.startswith(("from ", "import "))]
    names = {"__name__": "readme"}
    exec("\n".join(imports) + "\n" + block("docs/plugins.md", "A method of your own"), names)
    content = tiny.content({"name": "edge_vae"}, steps=2, log_every=1)
    train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(row["loss/edges"] > 0 for row in rows)
