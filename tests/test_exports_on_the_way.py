"""A run is exported in its middle, and so is what it has kept of an earlier step."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
from semtok import Generator, Tokenizer, UserError
from semtok.commands import hub, sample, train_dit
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.recipe import parse_recipe

SETTINGS = {"schedule": "constant", "checkpoint_every": 3, "keep_last": 9, "steps": 4}


def train(folder: Path, *, resume: bool = False, **settings: Any) -> Path:
    content = tiny.content({"name": "vae"}, **SETTINGS | settings)
    train_tokenizer(parse_recipe(content, "tiny"), folder, resume=resume)
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("exports") / "vae", export_at=[2, 4])


def same_latents(one: Path, other: Path) -> bool:
    """Whether two tokenizers encode alike to the last bit, their statistics included."""
    pixels = tiny.batch_of_shapes(3)
    with torch.no_grad():
        ours, theirs = (Tokenizer.from_pretrained(path).encode(pixels) for path in (one, other))
    return torch.equal(ours.texture, theirs.texture)


def test_what_is_exported_on_the_way_is_what_a_run_to_there_exports(vae, tmp_path):
    """Nor does training notice, where the exported network is the one that trains on."""
    exports = [vae / "exports" / name for name in ("0000002", "0000004")]
    assert sorted((vae / "exports").iterdir()) == exports
    assert same_latents(exports[0], train(tmp_path / "short", steps=2) / "export")
    assert same_latents(exports[1], vae / "export") and not same_latents(*exports)
    told = [
        json.loads((e / "config.json").read_text())["trained"] for e in (*exports, vae / "export")
    ]
    assert [each["steps"] for each in told] == [2, 4, 4]
    assert told[0]["metrics"] == {} and "psnr" in told[2]["metrics"]
    assert "| steps | 2 |" in (exports[0] / "README.md").read_text()
    train(tmp_path / "exported", ema_decay=None, export_at=[2])
    train(tmp_path / "plain", ema_decay=None)
    ours, theirs = (tiny.final_tensors(tmp_path / name) for name in ("exported", "plain"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_weights_that_were_gathered_for_an_export_are_not_copied_again(tmp_path):
    trainer = tiny.trainer(tmp_path, {"name": "vae"}, steps=2, export_at=[1])
    gathered, exported = copy.deepcopy(trainer.averaged), []
    trainer._export(lambda module, _: exported.append(module))
    trainer.sharding.whole = lambda _: gathered
    trainer._export(lambda module, _: exported.append(module))
    assert exported[0] is not trainer._followed and exported[1] is gathered


def test_random_numbers_that_an_export_draws_are_drawn_by_nobody_else(tmp_path):
    def state_after(name: str, **settings: Any) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = tiny.trainer(tmp_path / name, {"name": "vae"}, steps=2, **settings)
        trainer.run(lambda module, step: torch.rand(3))
        return torch.get_rng_state()

    assert torch.equal(state_after("exported", export_at=[1]), state_after("plain"))


def test_an_export_that_is_missing_is_made_again_and_one_that_is_there_stays(vae, tmp_path):
    folder = tmp_path / "vae"
    shutil.copytree(vae, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    shutil.rmtree(folder / "exports" / "0000004")
    kept = folder / "exports" / "0000002" / "config.json"
    kept.write_text(kept.read_text() + "\n")
    before = kept.stat().st_mtime_ns
    # Killed after the checkpoint of a step and before its export, then after the export.
    train(folder, resume=True, export_at=[2, 3])
    assert (folder / "exports" / "0000003" / "config.json").is_file()
    train(folder, resume=True, export_at=[2, 3, 6], steps=6)
    assert same_latents(folder / "exports" / "0000006", folder / "export")
    assert kept.stat().st_mtime_ns == before, "also by a run that is lengthened"
    with pytest.raises(UserError, match="export_at names step 5, which is past .* --step 5$"):
        train(folder, resume=True, export_at=[5], steps=6)


def test_a_kept_checkpoint_of_a_tokenizer_is_exported_as_the_run_would_have(vae, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(hub.main, ["checkpoint", str(vae), "--output", str(out)]) == 0
    assert "after step 4" in capsys.readouterr().out and same_latents(out, vae / "export")
    third = ["checkpoint", str(vae), "--step", "3", "--output"]
    assert run(hub.main, [*third, str(tmp_path / "third")]) == 0
    assert same_latents(tmp_path / "third", train(tmp_path / "short", steps=3) / "export")
    for words, message in (
        ([*third, str(out)], "exists already"),
        (
            ["checkpoint", str(vae), "--step", "2", "--output", "x"],
            "keeps no checkpoint of it, but of 3, 4;",
        ),
        (["checkpoint", str(out), "--output", "x"], "out: is no run (no recipe.yaml)"),
        (["checkpoint", "nothing", "--output", "x"], "nothing: is no run"),
    ):
        if "out: is no run" in message:
            (out / "recipe.yaml").unlink()
        assert run(hub.main, words) == 2
        assert message in capsys.readouterr().err
    weights = vae.parent / "damaged" / "checkpoints" / "step_00000004" / "model.safetensors"
    shutil.copytree(vae, vae.parent / "damaged")
    weights.write_bytes(weights.read_bytes()[:100])
    words = ["checkpoint", str(vae.parent / "damaged"), "--output", str(tmp_path / "x")]
    assert run(hub.main, words) == 2
    error = capsys.readouterr().err
    assert "cut short or damaged" in error and "take another --step" in error
    assert not (tmp_path / "x").exists()


def test_a_generators_exports_draw_and_guide(vae, tmp_path, capsys):
    content = tiny.content(**SETTINGS, export_at=[3], ema_warmup=False)
    content = {key: content[key] for key in ("data", "train")}
    content["diffusion"] = {"network": {"depth": 1, "width": 32, "heads": 2}}
    content |= {"tokenizer": str(vae / "exports" / "0000002"), "sampler": {"steps": 2}}
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(content))
    folder = tmp_path / "dit"
    assert (
        run(train_dit.main, ["--recipe", str(tmp_path / "dit.yaml"), "--output", str(folder)]) == 0
    )
    early, output = folder / "exports" / "0000003", tmp_path / "out"
    words = ["checkpoint", str(folder), "--step", "3", "--output", str(output)]
    assert run(hub.main, words) == 0
    one, other, last = (Generator.from_pretrained(path) for path in (early, output, folder))
    assert one.training_info == other.training_info and one.training_info["steps"] == 3
    weights = [generator.network.state_dict() for generator in (one, other, last)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])
    words = [str(folder), "--weak", str(early), "--guidance", "2", "--num", "2", "--output"]
    assert run(sample.main, [*words, str(tmp_path / "guided.npz")]) == 0
    assert (
        run(sample.main, [str(early), "--num", "2", "--output", str(tmp_path / "early.npz")]) == 0
    )
