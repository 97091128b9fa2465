"""Tokenizers on several sets of images, in one table."""

import json
import weakref

import numpy as np
import pytest
from PIL import Image

from results_page.tables import TABLES
from semtok import Tokenizer
from semtok.commands import evaluate, evaluate_options
from semtok.commands.cli import run

SCENES = ["scenes", "kind=shapes", "size=32", "num_images=60", "num_validation_images=40"]


@pytest.fixture
def colours(tmp_path):
    """Images of two classes, which their colour tells; no attributes."""
    generator = np.random.default_rng(0)
    for number in range(40):
        pixels = generator.integers(0, 60, (16, 16, 3), dtype=np.uint8)
        pixels[..., number % 2] += 150
        file = tmp_path / "images" / ("red", "green")[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return [
        "colours",
        "kind=folder",
        f"path={tmp_path / 'images'}",
        "size=16",
        "validation_fraction=0.4",
    ]


def test_every_set_is_scored_as_it_would_be_alone(tmp_path, colours, capsys):
    words = ["--tokenizer", "demo", "--num-train", "60", "--num-held-out", "30"]
    out = tmp_path / "transfer.json"
    both = ["--on", *SCENES, "--on", *colours]
    assert run(evaluate.main, ["transfer", *words, *both, "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "scenes: PSNR, dB" in printed and "colours: class probe, %" in printed
    seen = [line for line in printed.splitlines() if line.startswith("images: ")]
    assert len(seen) == 2, "the images of each set"
    sets = json.loads(out.read_text())["sets"]
    alone = tmp_path / "alone.json"
    same = [
        "--tokenizer",
        "demo",
        "--num-held-out",
        "30",
        "--data",
        *SCENES[1:],
        "--output",
        str(alone),
    ]
    assert run(evaluate.main, ["reconstruction", *same]) == 0
    expected = json.loads(alone.read_text())["scores"]["demo"]
    assert sets["scenes"]["demo"]["psnr"] == expected["psnr"]
    assert sets["colours"]["demo"]["class_probe"] > 0.9, "red or green"
    assert "attribute_probe" not in sets["colours"]["demo"]
    assert 0.3 < sets["scenes"]["demo"]["attribute_probe"] < 1
    header, rows = TABLES["transfer"](out)
    assert [row[:2] for row in rows] == [["scenes", "demo"], ["colours", "demo"]]
    assert rows[0][header.index("PSNR, dB")] == f"{expected['psnr']:.4g}"
    attributes = header.index("attribute probe, %")
    assert rows[0][attributes] != "-" and rows[1][attributes] == "-", "colours have none"


def test_one_tokenizer_is_in_memory_at_a_time(tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    Tokenizer.from_pretrained("demo").save_pretrained(copy)
    alive, most = weakref.WeakSet(), []
    load = evaluate_options.load_tokenizer

    def noted(*args, **kwargs):
        most.append(len(alive))
        tokenizer = load(*args, **kwargs)
        alive.add(tokenizer)
        return tokenizer

    monkeypatch.setattr(evaluate_options, "load_tokenizer", noted)
    words = ["--tokenizer", "demo", str(copy), "--num-train", "20", "--num-held-out", "4"]
    assert run(evaluate.main, ["transfer", *words, "--on", *SCENES]) == 0
    assert most == [0, 0, 0], "of the two, each was loaded first to see that it can be"


def test_sets_are_checked_before_anything_is_computed(colours, capsys):
    call = ["transfer", "--tokenizer", "demo"]
    for words, told in (
        (["--on", "kind=shapes"], "--on kind=shapes: expected NAME key=value …"),
        (["--on", *SCENES, "--on", *SCENES], "--on scenes: two sets are called so"),
        (["--on", "far", "kind=folder", "path=/nowhere"], "--on far"),
        (["--on", *SCENES, "--num-train", "1"], "--num-train must be at least 20"),
    ):
        assert run(evaluate.main, [*call, *words]) == 2
        assert told in capsys.readouterr().err
