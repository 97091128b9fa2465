"""F1 of linear probes, its bootstrap intervals, and the command."""

import json
import warnings
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import f1_score

from semtok.commands import cli, evaluate
from semtok.evaluation.probe import (
    AttributeScore,
    LatentTable,
    _f1_scores,
    mean_score,
    probe,
)
from semtok.privacy import fit_to_show


def labels(rng: np.random.Generator, num: int, num_categories: int, right: float = 0.7):
    """True categories, and predictions of which a share is right."""
    true = rng.integers(num_categories, size=num)
    return true, np.where(rng.random(num) < right, true, rng.integers(num_categories, size=num))


def score(true: np.ndarray, predicted: np.ndarray, num_categories: int) -> tuple[float, np.ndarray]:
    f1, resampled = _f1_scores({"a": true}, {"a": predicted}, {"a": num_categories})
    return f1["a"], resampled["a"]


def sklearns(true: np.ndarray, predicted: np.ndarray, num_categories: int) -> float:
    average = "binary" if num_categories == 2 else "macro"
    return f1_score(true, predicted, average=average, zero_division=0)


# F1 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_categories", [2, 3, 9])
def test_f1_is_sklearns(num_categories):
    rng = np.random.default_rng(num_categories)
    for num in (1, 7, 200):
        true, predicted = labels(rng, num, num_categories)
        found = score(true, predicted, num_categories)[0]
        assert found == pytest.approx(sklearns(true, predicted, num_categories), abs=1e-12)


@pytest.mark.parametrize(
    ("true", "predicted", "num_categories"),
    [
        ([0, 0, 0], [0, 0, 0], 2),  # the second category neither there nor predicted
        ([1, 1, 1], [1, 1, 1], 2),
        ([0, 0, 1], [0, 1, 0], 2),
        ([0, 0, 2], [0, 0, 2], 3),  # a category that does not occur is no part of the mean
        ([0, 0, 0], [1, 2, 0], 4),
    ],
)
def test_f1_is_sklearns_where_categories_are_missing(true, predicted, num_categories):
    true, predicted = np.array(true), np.array(predicted)
    expected = sklearns(true, predicted, num_categories)
    assert score(true, predicted, num_categories)[0] == pytest.approx(expected, abs=1e-12)


def test_three_categories_of_which_two_occur_are_not_taken_for_two():
    true, predicted = np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1])
    assert score(true, predicted, 3)[0] == pytest.approx(f1_score(true, predicted, average="macro"))
    assert score(true, predicted, 2)[0] == pytest.approx(f1_score(true, predicted))


# Intervals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_categories", [2, 4])
def test_resamples_score_as_a_plain_bootstrap_does(num_categories):
    true, predicted = labels(np.random.default_rng(1), 30, num_categories)
    drawn = np.random.default_rng(0).integers(30, size=(1000, 30))
    found = score(true, predicted, num_categories)[1]
    plain = [sklearns(true[rows], predicted[rows], num_categories) for rows in drawn[:80]]
    np.testing.assert_allclose(found[:80], plain, atol=1e-12)


def test_resamples_are_the_same_in_parts_as_at_once():
    true, predicted = labels(np.random.default_rng(2), 9001, 3)
    drawn = np.random.default_rng(0).integers(9001, size=(1000, 9001))
    found = score(true, predicted, 3)[1]  # 444 at once, 444, and 112
    assert found.shape == (1000,)
    for row in (0, 443, 444, 999):
        rows = drawn[row]
        assert found[row] == pytest.approx(sklearns(true[rows], predicted[rows], 3), abs=1e-12)


def interval(true: np.ndarray, predicted: np.ndarray, num_categories: int) -> tuple[float, float]:
    low, high = np.percentile(score(true, predicted, num_categories)[1], (2.5, 97.5))
    return low, high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(3)
    # Half of the images are of the second category; 70 % + 15 % are told rightly: F1 is 0.85.
    intervals = [interval(*labels(rng, 400, 2), 2) for _ in range(100)]
    assert 88 <= sum(low <= 0.85 <= high for low, high in intervals) <= 100


def test_intervals_shrink_with_the_square_root_of_the_images():
    rng = np.random.default_rng(4)
    widths = [np.diff(interval(*labels(rng, num, 4), 4))[0] for num in (200, 800, 3200)]
    assert widths[0] / widths[1] == pytest.approx(2, rel=0.25)
    assert widths[1] / widths[2] == pytest.approx(2, rel=0.25)


# The probe ---------------------------------------------------------------------------------------


def latents(num: int, seed: int = 0, **rows: list[int]) -> LatentTable:
    """Features that show two attributes clearly; ``rows`` adds attributes, given by their first values."""
    rng = np.random.default_rng(seed)
    two, three = rng.integers(2, size=num), rng.integers(3, size=num)
    features = np.concatenate([np.eye(2)[two], np.eye(3)[three]], axis=1) * 2
    attributes = {"two": two, "three": three}
    for name, values in rows.items():
        attributes[name] = np.resize([*values, *([0] * num)], num)
    counts = {name: 3 if name == "three" else 2 for name in attributes}
    noise = rng.normal(size=features.shape)
    return LatentTable((features + noise).astype(np.float32), attributes, counts)


def test_scores_hold_what_they_say():
    scores = probe(latents(200), latents(100, seed=1))
    assert set(scores) == {"two", "three"}
    for found in scores.values():
        low, high = found.f1_interval
        assert 0.6 < low < found.f1 < high <= 1 and 0.6 < found.balanced_accuracy <= 1
        assert found.f1_interval == tuple(np.percentile(found.resampled_f1, (2.5, 97.5)))
    assert probe(latents(200), latents(100, seed=1)) == scores, "seeded"


def test_the_means_interval_is_that_of_the_same_images_in_all_attributes():
    scores = probe(latents(200), latents(100, seed=1))
    mean = mean_score(scores)
    assert mean.f1 == pytest.approx((scores["two"].f1 + scores["three"].f1) / 2)
    both = (scores["two"].resampled_f1 + scores["three"].resampled_f1) / 2
    assert mean.f1_interval == pytest.approx(np.percentile(both, (2.5, 97.5)))
    # An attribute that is read twice says nothing new: its mean is no surer than itself.
    assert mean_score({"a": scores["two"], "b": scores["two"]}) == scores["two"]
    assert isinstance(mean, AttributeScore)


def test_only_some_attributes_are_scored_as_among_all():
    tables = latents(200), latents(100, seed=1)
    assert probe(*tables, only=["three"]) == {"three": probe(*tables)["three"]}


def test_an_attribute_of_one_category_in_training_is_left_out():
    train, held_out = latents(40, one=[0]), latents(40, seed=1, one=[1, 1])
    assert set(probe(train, held_out)) == {"two", "three"}
    assert probe(train, held_out, only=["one"]) == {}


@pytest.mark.parametrize(
    "values",
    [[1, 1], [0] * 38 + [1, 1]],
    ids=["missing where strength is chosen", "only there"],
)
def test_a_rare_category_may_miss_in_either_part_of_the_training_images(values):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = probe(latents(40, rare=values), latents(40, seed=1, rare=[0, 1]))
    assert 0 <= scores["rare"].f1 <= 1


def test_an_attribute_of_one_category_among_held_out_images_is_left_out_without_warnings():
    train, held_out = latents(200), latents(60, seed=1)
    alone = probe(train, held_out)["three"]
    held_out.attributes["two"][:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert probe(train, held_out) == {"three": alone}, "a constant guess would be right"


def test_a_constant_guess_scores_its_chance_where_a_category_is_missing():
    rng = np.random.default_rng(0)
    blind = LatentTable(
        np.zeros((300, 1), np.float32), {"three": rng.integers(3, size=300)}, {"three": 3}
    )
    held_out = LatentTable(
        blind.features[:60], {"three": blind.attributes["three"][:60] % 2}, {"three": 3}
    )
    assert held_out.num_shown("three") == 2
    accuracy = probe(blind, held_out)["three"].balanced_accuracy
    assert accuracy in (0, 1 / held_out.num_shown("three"))


# The command -------------------------------------------------------------------------------------

DEMO = str(files("semtok") / "assets" / "demo_tokenizer")
SIZES = ["--num-train", "60", "--num-held-out", "30"]


def run(*arguments: str) -> int:
    return cli.run(evaluate.main, ["probe", "--tokenizer", *arguments])


def folder_of_colours(root: Path, num: int = 60) -> Path:
    """Images in two classes, and a table that says which are red and how dark they are."""
    rows = ["file,red,dark,same"]
    for i in range(num):
        red, dark = i % 2, (i // 2) % 3
        colour = [0, 0, 0]
        colour[0 if red else 2] = 255 - 90 * dark
        path = root / f"images/{'ab'[i % 4 // 2]}/{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), tuple(colour)).save(path)
        rows.append(f"{i:03},{red},{['no', 'some', 'very'][dark]},1")
    (root / "table é.csv").write_text("\n".join(rows), encoding="utf-8")
    return root / "table é.csv"


def test_the_command_on_the_embedded_data(tmp_path, capsys):
    output = tmp_path / "scores.json"
    assert run("demo", DEMO, *SIZES, "--only", "hue", "size", "--output", str(output)) == 0
    written = json.loads(output.read_text())
    values = written["scores"]["demo"]
    assert list(values["attributes"]) == ["hue", "size"] and written["not_probed"] == []
    assert written["chance_balanced_accuracy"]["attributes"] == {"hue": 1 / 6, "size": 1 / 3}
    assert written["categories"]["size"] == ["small", "medium", "large"]
    assert set(values["mean"]) == {"f1", "f1_interval", "balanced_accuracy"}
    attributes = values["attributes"].values()
    for key in ("f1", "balanced_accuracy"):
        assert values["mean"][key] == pytest.approx(np.mean([a[key] for a in attributes]))
    shown = capsys.readouterr().out
    low, high = values["mean"]["f1_interval"]
    assert f"{100 * low:.1f} to {100 * high:.1f}" in shown
    assert "mean over attributes" in shown and "rotation" not in shown
    assert written["scores"][str(fit_to_show(DEMO))] == values


def test_the_command_on_a_folder_with_a_table(tmp_path, capsys):
    table, output = folder_of_colours(tmp_path), tmp_path / "scores.json"
    data = ["--data", f"path={tmp_path / 'images'}", "size=32", "validation_fraction=0.3"]
    arguments = ["demo", *SIZES, *data, "--output", str(output), "--attributes", str(table)]
    assert run(*arguments) == 0
    written = json.loads(output.read_text())
    values = written["scores"]["demo"]["attributes"]
    assert written["categories"] == {"red": ["0", "1"], "dark": ["no", "some", "very"]}
    assert values["red"]["f1"] > 0.9 and values["dark"]["f1"] > 0.9
    assert (written["num_train"], written["num_held_out"]) == (42, 18)
    # The option is short for the setting.
    again = ["demo", *SIZES, *data, f"attributes={table}", "--only", "red", "--output", str(output)]
    assert run(*again) == 0
    again = json.loads(output.read_text())["scores"]["demo"]["attributes"]
    assert again == {"red": values["red"]}
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    assert "42 training images, 18 held-out images" in shown


def test_attributes_that_can_not_be_probed_are_said(tmp_path, capsys):
    table = folder_of_colours(tmp_path)
    rows = table.read_text(encoding="utf-8").splitlines()
    images = tmp_path / "images"
    (images / "train").mkdir()
    for name in "ab":
        (images / name).rename(images / "train" / name)
    (images / "val" / "a").mkdir(parents=True)
    for path in sorted((images / "train" / "a").iterdir())[:5]:
        path.rename(images / "val" / "a" / path.name)
    held_out = {path.stem for path in (images / "val" / "a").iterdir()}
    rows = [rows[0]] + [f"{row[:-1]}{int(row[:3] in held_out)}" for row in rows[1:]]
    table.write_text("\n".join(rows), encoding="utf-8")
    arguments = ["demo", "--data", f"path={images}", "size=32", "--attributes", str(table)]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "not probed, as the training images show one category: same" in shown
    assert run(*arguments, "--only", "same") == 2
    assert "--num-train 55: these images show one category" in capsys.readouterr().err


RARE = "file,smile\n" + "".join(f"img{i}.png,{'x' if i == 3 else 'y'}\n" for i in range(40))


def pictures(root: Path, text: str) -> list[str]:
    """Options for 40 images and a table of them, of which two are held out."""
    (root / "flat").mkdir()
    for i in range(40):
        Image.new("RGB", (32, 32), (6 * i, 0, 0)).save(root / "flat" / f"img{i}.png")
    (root / "t.csv").write_text(text)
    return [
        "demo",
        "--data",
        f"path={root / 'flat'}",
        "size=32",
        "--attributes",
        str(root / "t.csv"),
    ]


def test_a_category_that_no_held_out_image_shows_is_no_success(tmp_path, capsys):
    arguments = pictures(tmp_path, RARE)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "--num-held-out 2: these images show one category of each attribute" in error
    assert "validation_fraction" in error and error.count("\n") == 1
    rows = RARE.splitlines()
    many = [f"{row},{i % 2},{'abc'[i % 3]}" for i, row in enumerate(rows[1:])]
    (tmp_path / "t.csv").write_text("\n".join([rows[0] + ",odd,three", *many]))
    output = tmp_path / "scores.json"
    arguments = [*arguments, "--num-held-out", "4", "--output", str(output)]
    assert run(*arguments, "--data", *arguments[2:4], "validation_fraction=0.1") == 0
    shown, written = capsys.readouterr().out, json.loads(output.read_text())
    assert "not probed, as the held-out images show one category: smile" in shown
    assert written["not_probed"] == ["smile"] and "smile" not in written["categories"]
    there = written["categories_held_out"]["three"]
    chance = written["chance_balanced_accuracy"]
    assert chance["attributes"] == {"odd": 1 / 2, "three": 1 / there}
    assert chance["mean"] == pytest.approx((1 / 2 + 1 / there) / 2)
    assert there == 3 or f"{there} of 3" in shown


def test_free_text_is_not_probed_unless_it_is_named(tmp_path, capsys):
    rows = [f"img{i}.png,picture {i // 1.5:.0f},{i % 2}" for i in range(40)]
    arguments = pictures(tmp_path, "\n".join(["file,caption,odd", *rows]))
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "not probed, as they have nearly as many values as there are images" in shown
    assert ": caption\n" in shown and "caption  " not in shown
    assert run(*arguments, "--only", "caption") == 0
    assert "of 27" in capsys.readouterr().out
    rows = [row.rpartition(",")[0] for row in rows]
    (tmp_path / "t.csv").write_text("\n".join(["file,caption", *rows]))
    assert run(*arguments) == 2
    assert (
        "each attribute has nearly as many values as there are images (caption)"
        in capsys.readouterr().err
    )


def test_options_that_can_not_be_are_one_line_errors(tmp_path, capsys):
    table = folder_of_colours(tmp_path, 8)
    data = ["--data", f"path={tmp_path / 'images'}", "size=32"]
    for arguments, message in [
        (["--only", "hu"], "--only: no attribute 'hu'; did you mean 'hue'?"),
        (["--attributes", "x.csv"], "--attributes: kind=shapes has its own"),
        (
            ["--attributes", "x.csv", *data, f"attributes={table}"],
            "--attributes: --data gives attributes=… already",
        ),
        (["--attributes", "x.csv", *data], "data.attributes: x.csv: No such file"),
        (data, "has no attributes to probe for; give --attributes FILE"),
        ([*data, "--attributes", str(table), "--only", "reed"], "did you mean 'red'?"),
    ]:
        assert run("demo", *arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_the_help_shows_the_protocol(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "95 % percentile intervals" in " ".join(capsys.readouterr().out.split())
