"""Scores while a diffusion transformer trains: what is told, when, by whom, and that training does not notice."""

import contextlib
import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tiny
from semtok import Generator, Tokenizer
from semtok.commands.train_dit import build_diffusion_objective, train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.kinds import open_sources
from semtok.errors import Interrupted, UserError
from semtok.evaluation.classes import accuracy, features_and_labels
from semtok.evaluation.frechet import frechet_distance
from semtok.evaluation.generation import see, see_reference
from semtok.evaluation.image_sets import images_of_generator, images_of_source, labels_for
from semtok.evaluation.judge import trained_judge
from semtok.evaluation.on_the_way import plan_scores, scoring
from semtok.processes import gather, num_processes, process_index
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from semtok.training import loop
from semtok.training.process import join_processes
from semtok.training.scoring import Scores

SCORE = {"every": 2, "num": 40, "judge_steps": 2, "num_real": 24, "fd_at": [1e9, 1e-9]}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scoring") / "tok"
    train_tokenizer(parse_recipe(tiny.content({"name": "vae"}, steps=2), "tiny"), folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of this file's tests alone; judges and references are made once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEMTOK_CACHE", str(folder))
        yield folder


def content(tokenizer: Path, score: dict[str, Any] | None, **train: Any) -> dict[str, Any]:
    recipe = tiny.content(**{"schedule": "constant", "warmup_steps": 0} | train)
    del recipe["method"], recipe["teacher"]
    shape = {"depth": 1, "width": 24, "heads": 2, "patch_size": 2}
    recipe |= {"tokenizer": str(tokenizer), "diffusion": {"network": shape}}
    return recipe | {"sampler": {"steps": 2}, "score": score}


def trained(tokenizer: Path, folder: Path, score: dict[str, Any] | None, **train: Any) -> Generator:
    resume = train.pop("resume", False)
    recipe = parse_diffusion_recipe(content(tokenizer, score, **train), "tiny")
    return train_dit(recipe, folder, resume=resume)


def scores_of(run: Path) -> list[dict[str, float]]:
    """The lines of scores, without the seconds, which differ from run to run."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if "score/fd" in row]


def told_of(run: Path) -> dict[str, Any]:
    """What the summary says of scores, without seconds."""
    told = json.loads((run / "summary.json").read_text())["scores"]
    for row in told["first_reached"]:
        assert (row.pop("seconds") is None) == (row["step"] is None)
    return told


@pytest.fixture(scope="module")
def whole(tokenizer: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, with what it printed beside it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trained(tokenizer, folder, SCORE, steps=5)
    (folder.parent / "printed.txt").write_text(printed.getvalue())
    return folder


def test_scores_change_no_weight(tokenizer, whole, tmp_path):
    trained(tokenizer, tmp_path / "without", None, steps=5)
    ours, others = (tiny.final_tensors(folder) for folder in (whole, tmp_path / "without"))
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def test_scores_are_told_on_the_way_and_at_the_end(whole):
    printed = (whole.parent / "printed.txt").read_text()
    rows = scores_of(whole)
    assert [row["step"] for row in rows] == [2, 4, 5], "every second step, and the last"
    assert all(0 <= row["score/classes"] <= 1 and row["score/fd"] > 0 for row in rows)
    told = told_of(whole)
    assert told["last"] == {"classes": rows[-1]["score/classes"], "fd": rows[-1]["score/fd"]}
    reached = {(row["score"], row["at"]): row for row in told["first_reached"]}
    assert reached.keys() == {("classes", 0.5), ("classes", 0.8), ("fd", 1e9), ("fd", 1e-9)}
    first = reached["fd", 1e9]
    assert (first["step"], first["images"], first["value"]) == (2, 8, rows[0]["score/fd"])
    assert reached["fd", 1e-9]["step"] is None
    assert told["judge"] == "trained" and told["reference"] == "24 of shapes (seed 0, training)"
    assert told["held_out"].keys() == {"num", "classes", "fd"} and told["held_out"]["num"] == 8
    assert told["network"]["model"] == "judge trained on 24 images, seed 0, 2 steps"
    for line in (
        "judge trained, 40 images of seed 0",
        "reached at step 2, 8 images",
        "not reached",
    ):
        assert line in printed
    assert (whole / "curves.png").is_file()


def test_a_score_is_what_the_judge_gives_the_export(tokenizer, whole, cache):
    row = scores_of(whole)[-1]
    generator = Generator.from_pretrained(str(whole))
    recipe = parse_diffusion_recipe(content(tokenizer, SCORE), "tiny")
    train, _ = open_sources(recipe.data)
    judge = trained_judge(
        train, num_images=24, cache=cache / "judges", device=torch.device("cpu"), steps=2
    )
    labels = labels_for(40, 36, balanced=True, seed=0)
    drawn = images_of_generator(generator, labels, seed=0)
    seen = see(drawn, [judge.network])["trained"]
    real = see_reference(images_of_source(train, 24), judge.network, cache / "references")
    assert row["score/fd"] == pytest.approx(frechet_distance(seen.pooled, real.pooled), rel=1e-6)
    pairs = zip(drawn.open(), torch.tensor(labels).split(32), strict=True)
    features, numbers = features_and_labels(judge.network, pairs)
    assert row["score/classes"] == accuracy(judge.read(features), numbers)[0]


def test_a_resumed_run_tells_what_an_uninterrupted_one_tells(tokenizer, whole, tmp_path):
    trained(tokenizer, tmp_path / "parts", SCORE, steps=2)
    trained(tokenizer, tmp_path / "parts", SCORE, steps=5, resume=True)
    assert scores_of(tmp_path / "parts") == scores_of(whole)
    assert told_of(tmp_path / "parts") == told_of(whole)
    assert told_of(tmp_path / "parts")["first_reached"][2]["step"] == 2, "not when it went on"


def measure_into(tokenizer: str, file: str) -> None:
    """Writes the scores of an untrained model, as the first process has them."""
    join_processes()
    recipe = parse_diffusion_recipe(content(Path(tokenizer), SCORE | {"num": 100}), "tiny")
    images = open_sources(recipe.data)
    made = Tokenizer.from_pretrained(tokenizer)
    objective = build_diffusion_objective(recipe, made, images[0], None, place="tiny")
    scores = scoring(plan_scores(recipe.score, objective, images), objective, torch.device("cpu"))
    values = scores.measure(tiny.awake(objective.averaged_module()))
    assert len(gather(values)) == num_processes() and gather(values)[-1] == values
    if not process_index():
        Path(file).write_text(json.dumps([values, scores.about]))


def test_scores_are_the_same_by_any_number_of_processes(tokenizer, tmp_path, ranks):
    measure_into(str(tokenizer), str(tmp_path / "one.json"))
    ranks.run("test_scoring:measure_into", str(tokenizer), str(tmp_path / "two.json"))
    one, two = ((tmp_path / f"{name}.json").read_text() for name in ("one", "two"))
    assert json.loads(one) == json.loads(two)


def test_a_score_that_a_signal_prevented_is_taken_when_the_run_goes_on(
    tokenizer, whole, tmp_path, monkeypatch
):
    def stopped(trainer: loop.Trainer) -> None:
        raise Interrupted(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "_score", stopped)
        with pytest.raises(Interrupted):
            trained(tokenizer, tmp_path / "run", SCORE, steps=5)
    trained(tokenizer, tmp_path / "run", SCORE, steps=5, resume=True)
    assert scores_of(tmp_path / "run") == scores_of(whole)


def test_seconds_of_scores_are_none_of_training(tokenizer, tmp_path, monkeypatch):
    clock = {"ahead": 0.0}
    real, measure = loop.time.perf_counter, loop.Trainer._score

    def slow(trainer: loop.Trainer) -> None:
        clock["ahead"] += 10_000
        measure(trainer)
        clock["ahead"] += 10_000

    monkeypatch.setattr(loop.time, "perf_counter", lambda: real() + clock["ahead"])
    monkeypatch.setattr(loop.Trainer, "_score", slow)
    trained(tokenizer, tmp_path / "run", SCORE | {"every": 1}, steps=2)
    assert clock["ahead"] == 40_000
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["training_seconds"] < 10_000
    rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert all(row["seconds"] < 20_000 for row in rows)


def test_a_teacher_may_judge_and_a_model_without_classes_has_distances_alone(tokenizer, tmp_path):
    score = {"every": 2, "num": 4, "judge": "demo", "num_real": 24}
    recipe = content(tokenizer, score, steps=2)
    recipe["diffusion"]["unconditional"] = True
    train_dit(parse_diffusion_recipe(recipe, "tiny"), tmp_path / "run")
    (row,) = scores_of(tmp_path / "run")
    assert row.keys() == {"step", "score/fd"}
    told = told_of(tmp_path / "run")
    assert told["judge"] == told["network"]["model"] == "demo" and not told["first_reached"]


ROUTED_IN_VAIN = {
    "network": {"depth": 5, "width": 16, "heads": 1},
    "routing": {"drop": 0, "path_drop": 0},
}


@pytest.mark.parametrize(
    ("score", "more", "message"),
    [
        ({"judge": "demo", "judge_steps": 5}, {}, "score.judge_steps: goes with score.judge=trained"),
        ({"judge": "dinov9"}, {}, "^recipe: score.judge: no judge is called 'dinov9'; expected trained, demo, or a"),
        ({"judge": "traind"}, {}, "'traind'; did you mean 'trained'.* expected trained, demo, or a model"),
        ({"sampler": {"guidance": {"num_channels": 3}}}, {}, "score.sampler.guidance.num_channels: nothing is g"),
        ({}, ROUTED_IN_VAIN, "^recipe: diffusion.routing: drop and path_drop are 0"),
        ({"classes_at": [0.5]}, {"unconditional": True}, "score.classes_at: the model has no classes"),
        ({"classes_at": [1.5]}, {}, "score.classes_at"),
        ({"sampler": {"guidance": {"scale": 2}}}, {"class_dropout": 0}, "class_dropout"),
    ],
)  # fmt: skip
def test_what_can_t_take_effect_is_refused_by_name(tokenizer, tmp_path, score, more, message):
    recipe = content(tokenizer, score)
    recipe["diffusion"] |= more
    with pytest.raises(UserError, match=message):
        train_dit(parse_diffusion_recipe(recipe, "tiny"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_later_scores_change_nothing_of_what_was_reached():
    scores = Scores()
    scores.begin({"classes": (0.5, 0.9), "fd": (10.0,)})
    for step, (share, distance) in enumerate([(0.4, 12.0), (0.6, 9.0), (0.55, 8.0)], start=1):
        scores.note({"classes": share, "fd": distance}, step=step, images=10 * step, seconds=step)
    half, most, near = scores.first_reached
    assert (half["step"], half["images"], half["seconds"], half["value"]) == (2, 20, 2, 0.6)
    assert most["step"] is None and (near["step"], near["value"]) == (2, 9.0)
    again = Scores()
    again.load_state_dict(scores.state_dict())
    again.begin({"classes": (0.5, 0.9), "fd": (10.0,)})
    assert again.state_dict() == scores.state_dict()


def test_cached_latents_need_the_images_beside_them(tokenizer, tmp_path):
    """Drawn scenes are always there; files that are gone are told of before anything begins."""
    pictures = tmp_path / "pictures"
    for number, name in enumerate("ab" * 12):
        (pictures / name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 10, 0, 99)).save(pictures / name / f"{number}.png")
    recipe = content(tokenizer, SCORE, steps=2)
    recipe["data"] = {"kind": "folder", "path": str(pictures), "size": 16}
    recipe["data"]["cache"] = str(tmp_path / "latents")
    trained_first = parse_diffusion_recipe(recipe | {"score": None}, "tiny")
    train_dit(trained_first, tmp_path / "first")
    train_dit(parse_diffusion_recipe(recipe, "tiny"), tmp_path / "with_images")
    assert [row["step"] for row in scores_of(tmp_path / "with_images")] == [2]
    pictures.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="score: compares with real images, and data.cache"):
        train_dit(parse_diffusion_recipe(recipe, "tiny"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
