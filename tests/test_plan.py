"""Commands check everything, then run: what can't work is told before anything is written or trained."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

import tiny
from semtok import Tokenizer, UserError, references
from semtok.commands import train_dit, train_tokenizer
from semtok.commands.train_dit import check_dit
from semtok.commands.train_tokenizer import TokenizerPlan, check_tokenizer, run_tokenizer
from semtok.recipe import parse_diffusion_recipe, parse_recipe


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, and two embedded recipes of which the second is built on the first."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "base.yaml").write_text(yaml.safe_dump(tiny.content({"name": "vae"})))
    joint = tiny.content(tiny.SEMANTICS["semvae"] | {"texture": "base", "min_texture_psnr": 0})
    (recipes / "joint.yaml").write_text(yaml.safe_dump(joint))
    monkeypatch.setattr(references, "recipe_folder", lambda: recipes)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


def dit(tokenizer: str, **settings: Any) -> dict[str, Any]:
    network = {"depth": 2, "width": 16, "heads": 2, "patch_size": 1}
    train = {k: v for k, v in tiny.content()["train"].items() if k != "num_statistics_images"}
    return {
        "tokenizer": tokenizer,
        "data": tiny.content()["data"],
        "diffusion": {"network": network} | settings,
        "sampler": {"steps": 2},
        "train": train,
    }


def refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_dit.train_dit(parse_diffusion_recipe(content, "dit"), Path("runs/dit"))


def test_a_plan_writes_nothing_joins_nothing_and_trains_nothing(embedded):
    plan = check_tokenizer(parse_recipe(tiny.content({"name": "vae"}), "tiny"), Path("runs/x"))
    generator = check_dit(parse_diffusion_recipe(dit("joint"), "dit"), Path("runs/dit"))
    assert isinstance(generator.tokenizer, TokenizerPlan)
    assert isinstance(generator.tokenizer.texture, TokenizerPlan), "and the one that it is built on"
    assert not list(embedded.iterdir()) and not dist.is_initialized()
    assert isinstance(run_tokenizer(plan), Tokenizer)
    assert (embedded / "runs" / "x" / "export").is_dir()


def test_a_generators_mistakes_are_told_before_its_tokenizer_is_trained(embedded):
    refused(dit("base", leads={"semantic": 0.3}), r"diffusion.leads: no part \['semantic'\]")
    refused(dit("joint", repa={"depth": 7}), "diffusion.repa.depth: 7 is more than the network's 2")
    refused(
        dit("joint", network={"depth": 2, "width": 16, "heads": 2, "patch_size": 3}),
        "patch size 3 does not divide the latent grid",
    )
    assert not list(embedded.iterdir()), "nothing was trained"


def test_a_stored_cache_of_a_tokenizer_that_is_not_trained_is_refused(embedded, tmp_path):
    cache = tmp_path / "cache"
    for file in ("latents.json", "train/index.json", "validation/index.json"):
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        (cache / file).write_text("{}")
    content = dit("base")
    content["data"] = content["data"] | {"cache": str(cache)}
    refused(content, "holds latents of a trained tokenizer, and 'base' is not trained yet")


def test_processes_that_do_not_divide_the_batch_are_told_before_they_meet(embedded, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    recipe = parse_recipe(tiny.content({"name": "vae"}), "tiny")
    with pytest.raises(UserError, match="train.batch_size: 4 is not divisible by 3 processes"):
        train_tokenizer.train_tokenizer(recipe, Path("runs/x"))
    assert not list(embedded.iterdir())


def test_a_plan_runs_what_comes_before_it_first(embedded, capsys):
    train_dit.train_dit(parse_diffusion_recipe(dit("joint"), "dit"), Path("runs/dit"))
    told = capsys.readouterr().out
    assert told.index("'joint' is not trained yet") < told.index("'base' is not trained yet")
    for run in ("base", "joint", "dit"):
        assert (embedded / "runs" / run / "export" / "config.json").is_file()
