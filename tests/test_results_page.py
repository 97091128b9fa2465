"""Results that are kept in docs/results/, and the pages that are drawn from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from results_page import command
from semtok.commands.cli import run

PAGE = (
    "Before.\n\n<!-- table: small {kind} -->\nold\n<!-- end of table -->\n\n"
    "![](images/results_small.png)\n\nAfter.\n"
)


def row(name: str, distances: list[list[float]], shares: list[list[float]]) -> dict[str, Any]:
    """Scores of two steps, of two seeds each."""
    return {
        "name": name,
        "tokenizer": "vae",
        "settings": [],
        "tokenizer_scores": {},
        "steps": [10, 20],
        "generation": {"FD-trained": distances, "shown class": shares},
        "training_seconds": [[1.0, 1.0], [2.0, 2.0]],
    }


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with a page, and beside it a comparison's folder."""
    content = {
        "command": "python tools/compare.py --data path=/home/me/secret/train.parquet size=32 --output runs/c",
        "about": ["Data: path=/home/me/secret/train.parquet, kind=parquet."],
        "classes": [],
        "settings": {"data": ["path=/home/me/secret/train.parquet"]},
        "num_seeds": 2,
        "baseline": "plain",
        "rows": [
            row("plain", [[9.0, 9.0], [4.0, 6.0]], [[0.1, 0.1], [0.5, 0.5]]),
            row("better", [[5.0, 5.0], [3.0, 4.0]], [[0.2, 0.3], [0.75, 0.65]]),
        ],
    }
    folder = tmp_path / "comparison"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    (tmp_path / "checkout" / "docs").mkdir(parents=True)
    return tmp_path / "checkout"


def drawn(checkout: Path, kind: str, *words: str) -> str:
    page = checkout / "docs" / "results.md"
    page.write_text(PAGE.format(kind=kind))
    assert run(command.main, ["--root", str(checkout), *words]) == 0
    return page.read_text()


def test_a_page_shows_what_a_comparison_found(checkout):
    take = ["--take", str(checkout.parent / "comparison"), "small"]
    text = drawn(checkout, "scores", *take)
    assert text.startswith("Before.\n") and text.endswith("After.\n") and "old" not in text
    assert "| better | 3.5 ± 0.71 | 70.0 ± 7.1 % | 2 ± 0 |" in text
    differences = drawn(checkout, "differences")
    # -1 and -2 by seed; Student's t of one degree of freedom: 12.7.
    assert "| better | -1.5 [-7.85, +4.85] |" in differences
    assert "| +20 [-43.5, +83.5] points |" in differences
    with Image.open(checkout / "docs" / "images" / "results_small.png") as picture:
        assert picture.width > 500
    assert run(command.main, ["--root", str(checkout), "--check"]) == 0
    other = checkout / "docs" / "results" / "other.json"  # of which a page shows no curves
    other.write_bytes((checkout / "docs" / "results" / "small.json").read_bytes())
    assert run(command.main, ["--root", str(checkout)]) == 0
    assert [p.name for p in (checkout / "docs" / "images").iterdir()] == ["results_small.png"]
    (checkout / "docs" / "results.md").write_text(differences.replace("-1.5", "-9.5"))
    assert run(command.main, ["--root", str(checkout), "--check"]) == 1


def test_seconds_of_unlike_machines_are_left_out(checkout):
    take = ["--take", str(checkout.parent / "comparison"), "small"]
    text = drawn(checkout, "scores_alone", *take)
    assert "| better | 3.5 ± 0.71 | 70.0 ± 7.1 % |\n" in text and "training, s" not in text
    assert "| steps to plain's FD-trained |" in drawn(checkout, "differences")
    differences = drawn(checkout, "differences_by_steps")
    assert "seconds" not in differences and "| steps to plain's FD-trained |" in differences


def test_what_is_kept_names_no_place_of_a_machine(checkout):
    drawn(checkout, "short", "--take", str(checkout.parent / "comparison"), "small")
    kept = (checkout / "docs" / "results" / "small.json").read_text(encoding="utf-8")
    assert "secret" not in kept and "/home" not in kept
    assert "path=…/train.parquet size=32 --output runs/c" in json.loads(kept)["command"]


def test_a_table_of_nothing_is_refused_by_name(checkout, capsys):
    (checkout / "docs" / "results.md").write_text(PAGE.format(kind="scores"))
    assert run(command.main, ["--root", str(checkout)]) == 2
    assert "<!-- table: small scores -->: no results of that name" in capsys.readouterr().err
    assert run(command.main, ["--take", str(checkout), "../x"]) == 2
    assert "is no name for a file of results" in capsys.readouterr().err


def test_a_page_shows_what_was_found_on_a_gpu_or_that_none_was_measured(checkout, capsys):
    page, results = checkout / "docs" / "performance.md", checkout / "docs" / "results"
    page.write_text(PAGE.format(kind="gpu").replace("small", "gpu"))
    assert run(command.main, ["--root", str(checkout)]) == 0
    assert "-->\nNothing was measured on a GPU yet.\n<!--" in page.read_text()
    parts = [
        {"name": "nccl", "state": "held", "found": "4 steps | through nccl", "seconds": 3.4},
        {"name": "dit", "state": "measured", "found": "900 images/s", "seconds": 30.1},
        {"name": "cache", "state": "left out", "found": "", "seconds": 0.0},
    ]
    content = {"device": "NVIDIA H200", "torch": "2.11", "date": "2026-01-02", "parts": parts}
    results.mkdir()
    file = results / "gpu_h200.json"
    file.write_text(json.dumps(content | {"is_rehearsal": False}))
    assert run(command.main, ["--root", str(checkout)]) == 0
    text = page.read_text()
    assert "NVIDIA H200, torch 2.11, 2026-01-02; left out, as the time was over: cache:" in text
    assert (
        "| nccl | held | 4 steps \\| through nccl | 3 |\n| dit | measured | 900 images/s | 30 |"
        in text
    )
    assert "Nothing was measured" not in text and "old" not in text
    file.write_text(json.dumps(content | {"is_rehearsal": True}))
    assert run(command.main, ["--root", str(checkout)]) == 2
    assert "gpu_h200.json: is of a rehearsal, not of a GPU" in capsys.readouterr().err


def test_the_pages_here_are_what_the_results_say():
    assert run(command.main, ["--check"]) == 0
