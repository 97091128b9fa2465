"""Comparisons: what they plan, how they run and go on, what they conclude, and the report."""

import base64
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import semtok_cli
import tiny
from comparison import command as compare
from comparison import plan, scores
from comparison.asked import BUDGETS, ComparisonSettings, Row
from comparison.estimate import expected_seconds, is_measured, measure_steps
from comparison.finished import take_finished_runs, with_whole_runs
from comparison.jobs import Job, Stopped, only_one_in, run_jobs
from comparison.plan import Comparison
from comparison.recipes import is_composite, recipe_of
from comparison.report import generation_table
from comparison.results import CLASS_SHARE, RowScores, Spread, compared, steps_to_reach
from comparison.rows import read_rows
from comparison.time_left import TimeLeft
from comparison.work import jobs_of, measuring_job
from semtok import Generator, Tokenizer, UserError
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.evaluation.judge import trained_judge
from semtok.recipe import (
    load_diffusion_recipe,
    load_recipe,
    locate_recipe,
    parse_recipe,
    write_recipe,
)
from semtok.references import recipe_names
from semtok.storage import write_json
from semtok.training.loop import Trainer
from semtok.training.precision import Gains

TINY = ComparisonSettings(
    recipe_share=0.001,
    steps=4,
    num_checkpoints=2,
    settings=("diffusion.network=SiT-T/4", "sampler.steps=1", "train.batch_size=4"),
    num_images=10,
    num_held_out=30,
    num_train=60,
    num_reference=40,
    data=("kind=shapes", "size=16", "num_images=60", "num_validation_images=30"),
)


def comparison(folder: Path, *rows: Row, seeds: int = 1, **settings: object) -> Comparison:
    return Comparison(folder, TINY.model_copy(update=settings), rows, seeds)


VAE, REGLUE = Row(name="vae", tokenizer="vae"), Row(name="reglue", tokenizer="reglue")


# The plan ----------------------------------------------------------------------------------------


def test_composites_are_built_on_the_vae_of_their_seed(tmp_path):
    planned = comparison(tmp_path, REGLUE, Row(name="demo", tokenizer="demo"))
    assert planned.tokenizers == ["vae", "reglue", "demo"], "what others need comes first"
    words = planned.tokenizer_overrides("reglue", 2)
    assert f"method.texture={tmp_path}/tokenizers/vae-2" in words and "train.seed=2" in words
    assert not any("texture" in word for word in planned.tokenizer_overrides("vae", 0))
    assert planned.tokenizer_reference("demo", 2) == "demo", (
        "trained before: the same for each seed"
    )


def test_a_recipe_that_starts_from_a_vae_starts_from_that_of_its_seed(tmp_path):
    tuned = Row(name="eq", tokenizer="eq_vae")
    planned = comparison(tmp_path, tuned)
    planned.check()
    assert planned.tokenizers == ["vae", "eq_vae"]
    words = planned.tokenizer_overrides("eq_vae", 2)
    assert f"method.vae={tmp_path}/tokenizers/vae-2" in words
    assert not any("texture" in word for word in words)
    jobs = {job.name: job for job in jobs_of(planned)}
    assert jobs["tokenizer eq_vae, seed 0"].after == ("tokenizer vae, seed 0",)
    assert not jobs["tokenizer vae, seed 0"].after


def test_a_recipe_is_built_on_the_base_that_its_reference_names(tmp_path):
    on_send = Row(name="reglue+send_vae", tokenizer="reglue@send_vae")
    planned = comparison(tmp_path, REGLUE, on_send)
    planned.check()
    assert planned.tokenizers == ["send_vae", "vae", "reglue", "reglue@send_vae"]
    base = tmp_path / "tokenizers" / "send_vae-1"
    assert f"method.texture={base}" in planned.tokenizer_overrides("reglue@send_vae", 1)
    jobs = {job.name: job for job in jobs_of(planned)}
    assert jobs["tokenizer reglue@send_vae, seed 0"].after == ("tokenizer send_vae, seed 0",)
    trained = comparison(tmp_path, Row(name="on_demo", tokenizer="reglue@demo"))
    assert trained.tokenizers == ["demo", "reglue@demo"]
    assert "method.texture=demo" in trained.tokenizer_overrides("reglue@demo", 1)
    jobs = {job.name: job for job in jobs_of(trained)}
    assert not jobs["tokenizer reglue@demo, seed 0"].after, "it was trained before"
    files = {planned.tokenizer_scores(name, 0) for name in planned.tokenizers}
    assert len(files) == 4 and {file.parent for file in files} == {tmp_path / "scores"}
    with pytest.raises(UserError, match="'vae@demo': the recipe vae is built on no other; leave"):
        comparison(tmp_path, Row(name="x", tokenizer="vae@demo")).check()
    [named] = read_rows("reglue@send_vae", (), None)
    assert named == on_send


def test_transformers_learn_from_cached_latents_where_images_are_stored(tmp_path, monkeypatch):
    """Encoding would be most of a step then; a comparison goes on as it began."""
    begun = compare._with_cache(comparison(tmp_path / "scenes", VAE))
    assert "data.cache=none" in begun.generator_overrides(VAE, 0)
    begun.claim()
    colours = np.random.default_rng(0).integers(0, 256, (6, 3), dtype=np.uint8)
    for number, colour in enumerate(colours):
        file = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), tuple(map(int, colour))).save(file)
    data = ("kind=folder", f"path={tmp_path / 'images'}", "size=16")
    stored = compare._with_cache(comparison(tmp_path / "stored", VAE, data=data))
    assert "data.cache=auto" in stored.generator_overrides(VAE, 0)
    assert "computed once, before, and not in them" in " ".join(compare._about(stored, 1))
    again = compare._with_cache(comparison(tmp_path / "scenes", VAE, data=data))
    assert again.settings.cache == "none"


def test_data_and_teacher_reach_every_recipe_that_has_one(tmp_path):
    data, teacher = ("kind=shapes", "size=16"), ("name=demo", "input_size=16")
    aligned = Row(name="repa", tokenizer="vae", settings=("diffusion.repa={weight: 0.5}",))
    planned = comparison(tmp_path, VAE, REGLUE, aligned, data=data, teacher=teacher)
    planned.check()
    assert "data.size=16" in planned.tokenizer_overrides("vae", 0)
    assert not any(w.startswith("teacher") for w in planned.tokenizer_overrides("vae", 0))
    assert "teacher.input_size=16" in planned.tokenizer_overrides("reglue", 0)
    assert "teacher.input_size=16" in planned.generator_overrides(aligned, 0)
    assert not any(w.startswith("teacher") for w in planned.generator_overrides(REGLUE, 0))


def test_the_teacher_is_that_of_the_recipes_where_none_is_given(tmp_path):
    aligned = Row(name="repa", tokenizer="vae", settings=("diffusion.repa={weight: 0.5}",))
    scenes = comparison(tmp_path, VAE, aligned, REGLUE)
    assert scenes.teacher_words == ("name=demo",)
    photos = comparison(tmp_path, aligned, Row(name="reglue", tokenizer="photos/reglue"))
    assert photos.teacher_words == ("name=tf_efficientnet_lite0", "input_size=128")
    assert "teacher.input_size=128" in photos.generator_overrides(aligned, 0)
    told = " ".join(compare._about(photos, 1))
    assert "Teacher: name=tf_efficientnet_lite0 input_size=128." in told
    given = comparison(tmp_path, Row(name="r", tokenizer="photos/reglue"), teacher=("name=demo",))
    assert given.teacher_config().name == "demo"


def test_checkpoints_are_evenly_spaced_and_logged(tmp_path):
    planned = comparison(tmp_path, VAE, steps=600, num_checkpoints=4)
    assert planned.steps == [150, 300, 450, 600]
    (every,) = [w for w in planned.generator_overrides(VAE, 0) if "log_every" in w]
    assert 150 % int(every.split("=")[1]) == 0


def test_words_for_all_rows_need_the_teacher_too(tmp_path):
    planned = comparison(
        tmp_path, VAE, settings=("diffusion.repa={weight: 0.5}",), teacher=("input_size=16",)
    )
    assert "teacher.input_size=16" in planned.generator_overrides(VAE, 0)


def test_one_file_holds_the_scores_of_a_tokenizer_that_was_trained_before(tmp_path):
    planned = comparison(tmp_path, VAE)
    assert planned.tokenizer_scores("demo", 0) == planned.tokenizer_scores("demo", 1)
    assert planned.tokenizer_scores("vae", 0) != planned.tokenizer_scores("vae", 1)
    assert planned.tokenizer_scores("a/b", 0) != planned.tokenizer_scores("c/b", 0)


def test_every_budget_and_the_default_rows_are_valid(tmp_path):
    for settings in BUDGETS.values():
        rows = tuple(Row(name=n, tokenizer=n) for n in compare._DEFAULT.split(","))
        Comparison(tmp_path, settings, rows, 1).check()


@pytest.mark.parametrize("tokenizers", [["mine=some/folder,vae"], ["mine=some/folder", "vae"]])
def test_a_variant_may_name_a_row(monkeypatch, capsys, tokenizers):
    def refuse(folder: Path, settings: object, rows: tuple[Row, ...], seeds: int) -> None:
        raise UserError(" ".join(row.tokenizer for row in rows))

    monkeypatch.setattr(compare, "Comparison", refuse)
    words = ["--tokenizers", *tokenizers, "--variant", "a", "mine", "--variant", "b"]
    assert run(compare.main, [*words, "reglue"]) == 2
    assert "some/folder vae some/folder reglue" in capsys.readouterr().err


VARIANTS = """
plain: {tokenizer: mine}
fast:
  tokenizer: vae
  settings: ["diffusion.repa={weight: 0.5}", train.optimiser.learning_rate=1e-3]
"""


def test_a_file_of_variants_is_read_as_options_would_be_and_stands_alone(
    tmp_path, monkeypatch, capsys
):
    file = tmp_path / "variants.yaml"
    file.write_text(VARIANTS)
    fast = Row(
        name="fast",
        tokenizer="vae",
        settings=("diffusion.repa={weight: 0.5}", "train.optimiser.learning_rate=1e-3"),
    )
    words = ["extra", "mine", "sampler.steps=2"]
    rows = read_rows("mine=demo", [words], file)
    assert [row.name for row in rows] == ["mine", "plain", "fast", "extra"]
    assert [row.tokenizer for row in rows] == ["demo", "demo", "vae", "demo"]
    assert rows[2] == fast
    comparison(tmp_path / "c", *rows[:3]).check()
    told: list[tuple[Row, ...]] = []

    def refuse(folder: Path, settings: object, rows: tuple[Row, ...], seeds: int) -> None:
        told.append(rows)
        raise UserError("enough")

    monkeypatch.setattr(compare, "Comparison", refuse)
    assert run(compare.main, ["--variants", str(file)]) == 2
    assert [row.name for row in told[0]] == ["plain", "fast"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "names no variant; expected NAME: {tokenizer: REF"),
        ("plain: vae", "plain: expected NAME: {tokenizer: REF"),
        ("plain: {settings: []}", "plain: 'tokenizer' is missing"),
        ("plain: {tokenizer: vae, setings: []}", "plain: unknown key 'setings'"),
        ("plain: {tokenizer: vae, settings: [diffusion]}", "plain: settings: expected words key="),
        ("a/b: {tokenizer: vae}", "a/b: name"),
    ],
)
def test_what_a_file_of_variants_can_t_hold_is_named(text, message, tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        read_rows("", [], file)
    assert str(error.value).startswith(str(file)) and message in str(error.value)


def test_another_recipe_of_the_transformer_is_trained_scored_and_remembered(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        locate_recipe("dit").read_text().replace("precision: auto", "precision: fp32")
    )
    other = comparison(tmp_path / "c", VAE, recipe=str(recipe), precision="bf16")
    [job] = [job for job in jobs_of(other) if job.kind == "generator"]
    words = job.command()
    assert words[words.index("--recipe") + 1] == str(recipe)
    assert "train.precision=bf16" not in words, "the recipe says its own"
    other.claim()
    recipe.write_text(recipe.read_text() + "# changed")
    with pytest.raises(UserError, match=r"mine\.yaml has changed since; choose another --output"):
        other.claim()


def test_every_row_computes_in_the_precision_that_the_comparison_began_with(
    tmp_path, monkeypatch, capsys
):
    machine = Gains(3.0, 2.0)
    monkeypatch.setattr(compare, "found_here", lambda: machine)
    begun = compare._with_precision(comparison(tmp_path, VAE))
    assert "precision: bf16 for matrix products (3.0x" in capsys.readouterr().out
    assert "train.precision=bf16" in begun.generator_overrides(VAE, 0)
    begun.claim()
    machine = Gains(0.5, 0.5)
    again = compare._with_precision(comparison(tmp_path, VAE))
    assert again == begun and capsys.readouterr().out == ""


def test_a_setting_of_ones_own_goes_before_the_budgets(monkeypatch, capsys):
    def refuse(folder: Path, settings: ComparisonSettings, *_: object) -> None:
        raise UserError(" ".join(settings.settings))

    monkeypatch.setattr(compare, "Comparison", refuse)
    words = ["--budget", "quick", "--set", "diffusion.network=SiT-T/4", "sampler.steps=1"]
    assert run(compare.main, words) == 2
    assert capsys.readouterr().err.split() == ["error:", *words[3:]]
    assert run(compare.main, words[:-1]) == 2
    assert "sampler.steps=15 diffusion.network=SiT-T/4" in capsys.readouterr().err


def test_rows_and_seeds_may_be_added_but_nothing_else_changed(tmp_path):
    folder = tmp_path / "c"
    comparison(folder, VAE).claim()
    comparison(folder, REGLUE, seeds=3).claim()
    assert [row.name for row in plan.read_comparison(folder, 1).rows] == ["vae", "reglue"]
    with pytest.raises(ValueError, match="begun with steps=4, now 6; choose another --output"):
        comparison(folder, VAE, steps=6).claim()
    other = Row(name="vae", tokenizer="demo")
    with pytest.raises(ValueError, match="row 'vae' meant something else"):
        comparison(folder, other).claim()
    Tokenizer.from_pretrained("demo").save_pretrained(tmp_path / "tok")
    mine = Row(name="mine", tokenizer=str(tmp_path / "tok"))
    comparison(folder, mine).claim()
    comparison(folder, mine).claim()
    (tmp_path / "tok" / "README.md").write_text("another one")
    with pytest.raises(ValueError, match="tokenizer .*tok' has changed since"):
        comparison(folder, mine).claim()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is not empty and no comparison"):
        comparison(tmp_path / "foreign", VAE).check_folder()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--score", "tokenizer", "vae", "0"], "comparison.yaml: no such file"),
        (["--tokenizers", "nobody"], "tokenizer 'nobody': no such folder, run"),
        (["--tokenizers", "vae,vae"], "two rows are called 'vae'"),
        (["--tokenizers", ","], "at least one tokenizer"),
        (["--seeds", "0"], "at least one tokenizer, one seed"),
        (["--variant", "x"], "--variant x: expected NAME REF key=value"),
        (["--variant", "x", "vae", "diffusion.netwrok=a"], "unknown key 'diffusion.netwrok'"),
        (["--variant", "a/b", "vae"], "--variant: name"),
        (["--variants", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--baseline", "sfd"], "--baseline: no row 'sfd'; rows: vae, send_vae"),
        (["--recipe", "dti"], "dti: no such file or recipe; did you mean 'dit'"),
        (["--redraw"], "no results.json, nothing was reported there yet"),
        (["--redraw", "--seeds", "3"], "--seeds takes no effect, leave it out"),
        (["--redraw", "--variant", "x", "vae"], "--variant takes no effect, leave it out"),
        (["--tokenizers", "sp ace/my vae"], "--tokenizers sp ace/my vae (or NAME=REF): name"),
        (["--variant", "x", "vae", "train.batch_size=8"], "train.batch_size is the same for every"),
        (["--set", "train.keep_last=1"], "--set: train.keep_last is the same for every row"),
        (["--set", "data.seed=5"], "--set: data.seed is the same for every row"),
        (["--data", "kind=folder", "path=/nope"], "no such folder '/nope'"),
        (["--data", "size=30", "--tokenizers", "demo"], "--data with demo: data.size: image size"),
        (["--teacher", "name=nope"], "timm knows no model 'nope'"),
        (["--teacher", "nope=1"], "--teacher: unknown key 'nope'"),
        (["--teacher", "layers=[-9]"], "teacher.layers: [-9] out of range"),
        (
            ["--data", "size=30", "--tokenizers", "send_vae"],
            "recipes/send_vae.yaml: data.size: image",
        ),
        (["--steps", "7"], "steps: 7 is not a multiple of num_checkpoints 3"),
        (["--set", "diffusion.leads=3"], "diffusion.leads"),
        (["--steps", "-3"], "steps"),
        (["--data", "kind=fodler"], "unknown kind 'fodler'"),
        (["--judge", "demo", "--judge", "teacher"], "--judge: two judges are called 'demo'"),
        (["--judge", "layers=[-9]"], "--judge demo: teacher.layers: [-9] out of range"),
    ],
)
def test_what_can_t_be_is_said_before_anything_is_trained(tmp_path, capsys, words, message):
    assert run(compare.main, [*words, "--output", str(tmp_path / "c")]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
    assert not (tmp_path / "c").exists()


def test_a_judge_of_classes_is_refused_where_images_have_none(tmp_path, capsys):
    for number in range(8):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = ["--data", "kind=folder", f"path={tmp_path}", "size=16"]
    words = ["--tokenizers", "demo", *data, "--judge", "trained", "--output", str(tmp_path / "c")]
    assert run(compare.main, words) == 2
    assert "--judge trained: learns to tell classes apart" in capsys.readouterr().err


def test_a_comparison_of_an_earlier_version_keeps_its_judge(tmp_path):
    folder = tmp_path / "c"
    comparison(folder, VAE).claim()
    written = (folder / "comparison.yaml").read_text()
    settings = yaml.safe_load(written)
    assert settings["settings"]["judge"] == [["teacher"]]
    settings["settings"]["judge"] = "teacher"
    (folder / "comparison.yaml").write_text(yaml.safe_dump(settings))
    comparison(folder, VAE).claim()
    assert (folder / "comparison.yaml").read_text() == written
    told = compare._about(comparison(folder, VAE), 1)[2]
    assert "the network of --teacher" in told and "An earlier version scored" in told


def test_a_comparison_that_began_with_another_budget_says_which(tmp_path):
    comparison(tmp_path / "c", VAE, recipe_share=1.0).claim()
    with pytest.raises(
        ValueError, match="100% of their .* steps, now 33%; go on with --budget full"
    ):
        comparison(tmp_path / "c", VAE, recipe_share=1 / 3).claim()


def test_a_comparison_is_quick_where_nobody_asks_for_more():
    args = compare._parser().parse_args([])
    assert args.budget == "quick" and compare._counted(1, "seed") == "1 seed"


# Finished runs -----------------------------------------------------------------------------------


def finished_run(planned: Comparison, name: str, *changes: str, texture: str = "demo") -> Path:
    """A run of a recipe as the comparison would train it, but for some settings; its tokenizer is the demo's."""
    folder = Path("runs") / name
    words = [*planned.tokenizer_overrides(name, 0), *changes]
    recipe = load_recipe(recipe_of(name), words)
    Tokenizer.from_pretrained("demo").save_pretrained(folder / "export")
    if is_composite(name):
        Tokenizer.from_pretrained(texture).save_pretrained(folder / "texture")
    write_recipe(recipe, folder / "recipe.yaml")
    write_json(folder / "summary.json", {"training_seconds": 12.5})
    return folder


def taken(planned: Comparison) -> list[str]:
    said: list[str] = []
    take_finished_runs(planned, said.append)
    return said


def test_a_finished_run_of_the_same_recipe_is_taken_and_what_becomes_of_it_then_changes_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    planned = comparison(tmp_path / "c", VAE, REGLUE)
    run_of_vae = finished_run(planned, "vae", "train.log_every=7", "data.licence=CC0-1.0")
    finished_run(planned, "reglue")
    assert taken(planned) == [
        "tokenizer vae, seed 0: the finished run runs/vae is taken",
        "tokenizer reglue, seed 0: the finished run runs/reglue is taken",
    ]
    todo = [one.name for one in jobs_of(planned) if not one.is_done()]
    assert not any(name.startswith("tokenizer ") for name in todo)
    shutil.rmtree(run_of_vae)
    assert taken(planned) == []
    copy = planned.tokenizer_folder("vae", 0)
    assert json.loads((copy / "summary.json").read_text()) == {"training_seconds": 12.5}
    assert Tokenizer.from_pretrained(planned.tokenizer_reference("vae", 0)).is_measured


def test_a_finished_run_that_is_another_is_left_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    planned = comparison(tmp_path / "c", VAE, REGLUE)
    finished_run(planned, "vae", "train.batch_size=16")
    finished_run(planned, "reglue")
    of_vae, of_reglue = taken(planned)
    assert of_vae == (
        "tokenizer vae: trained anew, as runs/vae is another: train.batch_size is 16 there and 8 here; "
        "to compare that run, name it in --tokenizers: runs/vae"
    )
    assert "what it is built on, are no longer there" in of_reglue, "its VAE is to be trained yet"
    shutil.rmtree("runs/vae")
    finished_run(planned, "vae")
    other = Tokenizer.from_pretrained("demo")
    other.texture_mean += 1
    other.save_pretrained(tmp_path / "other")
    finished_run(planned, "reglue", texture=str(tmp_path / "other"))
    (_, of_reglue) = taken(planned)
    assert "it is built on another image tokenizer than the 'vae' here" in of_reglue
    assert not planned.tokenizer_folder("reglue", 0).exists()


def test_a_quick_comparison_takes_whole_runs_where_there_is_one_of_each_recipe(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    planned = comparison(tmp_path / "c", VAE, REGLUE)
    whole = comparison(tmp_path / "c", VAE, REGLUE, recipe_share=1.0)
    finished_run(whole, "vae")
    assert with_whole_runs(planned) == planned, "rows are trained equally long"
    finished_run(whole, "reglue")
    assert with_whole_runs(planned) == whole
    assert with_whole_runs(replace(planned, num_seeds=2)).settings == TINY, "one run is of one seed"
    whole.claim()
    shutil.rmtree("runs")
    assert with_whole_runs(planned) == whole, "it goes on as it began"


# Time --------------------------------------------------------------------------------------------


def test_what_is_left_is_told_by_what_was_expected_and_by_how_long_others_took():
    now = [0.0]
    left = TimeLeft({"a": 100.0, "b": 50.0, "c": 30.0}, at_once=2, clock=lambda: now[0])
    assert left.seconds() == 100, "the longest"
    left.begin("a")
    left.begin("b")
    now[0] = 25.0
    assert left.seconds() == 75
    now[0] = 100.0
    assert left.end("b") == 100, "twice as long as expected"
    left.begin("c")
    assert left.num_left == 2 and left.seconds() == 100, "twice 100, half of it over"
    now[0] = 500.0
    left.end("a")
    left.end("c")
    assert left.num_left == 0 and left.seconds() == 0


def test_each_job_that_ends_says_how_long_the_others_will_take(tmp_path):
    said: list[str] = []
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", "a")]
    with only_one_in(tmp_path) as held:
        run_jobs(jobs, held=held, environments=[{}], say=said.append, expected=lambda job: 60.0)
    assert [re.sub(r"\d\d:\d\d", "…", line).strip() for line in said] == [
        "[1/2] a",
        "a: done in …; 1 job left, about …",
        "[2/2] b",
        "b: done in …",
    ]


def test_the_first_that_can_begin_is_next_so_that_seeds_end_one_by_one(tmp_path):
    said: list[str] = []
    jobs = [
        job(tmp_path, "a"),
        job(tmp_path, "b", "a"),
        job(tmp_path, "c", "b"),
        job(tmp_path, "d"),
    ]
    with only_one_in(tmp_path) as held:
        run_jobs(jobs, held=held, environments=[{}], say=said.append)
    assert [line.split()[1] for line in said if line.startswith("[")] == ["a", "b", "c", "d"]


def test_every_job_has_an_expected_time_once_steps_were_measured(finished):
    planned = plan.read_comparison(finished, 1)
    jobs = jobs_of(planned)
    assert len({one.kind for one in jobs}) == 4
    assert all(expected_seconds(planned, one.kind, one.of) > 1 for one in jobs)


def test_each_training_that_was_measured_is_kept_where_a_signal_stops(tmp_path, monkeypatch):
    measured: list[object] = []

    def stopping_after(number: int) -> None:
        def seconds(objective: object, *_: object) -> float:
            if len(measured) == number:
                raise KeyboardInterrupt
            measured.append(objective)
            return 1.0

        monkeypatch.setattr("comparison.estimate._seconds_a_step", seconds)

    row = Row(name="repa", tokenizer="demo", settings=("diffusion.repa={weight: 0.5}",))
    planned = comparison(tmp_path, VAE, row)
    assert not measuring_job(planned).saves, "so it ends at once"
    for stop, known in ((1, 1), (2, 2)):
        stopping_after(stop)
        with pytest.raises(KeyboardInterrupt):
            measure_steps(planned)
        kept = json.loads((tmp_path / "seconds_a_step.json").read_text())
        assert len(kept["tokenizer"]) + len(kept["generator"]) == known
        assert not is_measured(planned)
    stopping_after(4)
    measure_steps(planned)
    assert is_measured(planned) and len(measured) == 3
    more = comparison(tmp_path, VAE, row, Row(name="plain", tokenizer="demo"))
    assert not is_measured(more)
    measure_steps(more)
    assert is_measured(more) and len(measured) == 4, "the new row alone"


# Jobs --------------------------------------------------------------------------------------------


def job(folder: Path, name: str, *after: str, code: str = "") -> Job:
    file = folder / f"{name}.done"
    write = f"import pathlib; {code or 'pass'}; pathlib.Path({str(file)!r}).touch()"
    return Job(
        name,
        lambda: [sys.executable, "-c", write],
        file.exists,
        folder / "logs" / f"{name}.log",
        after,
    )


def run_all(jobs: Sequence[Job], at_once: int = 2) -> list[str]:
    said: list[str] = []
    with only_one_in(jobs[0].log.parents[1]) as held:
        run_jobs(jobs, held=held, environments=[{}] * at_once, say=said.append)
    return [line.split("] ")[1] for line in said if line.startswith("[")]


def test_jobs_wait_for_what_they_need_and_done_ones_are_left_alone(tmp_path):
    jobs = [job(tmp_path, "c", "a", "b"), job(tmp_path, "a"), job(tmp_path, "b", "a")]
    assert run_all(jobs) == ["a", "b", "c"]
    assert run_all(jobs) == []
    (tmp_path / "b.done").unlink()
    assert run_all(jobs) == ["b"]


def test_a_failed_job_ends_it_with_the_last_line_of_its_log(tmp_path):
    bad = job(tmp_path, "bad", code="print('error: no luck'); raise SystemExit(2)")
    slow = job(tmp_path, "slow", code="import time; time.sleep(60)")
    with pytest.raises(ValueError, match=r"bad failed: error: no luck \(see .*bad\.log\)"):
        run_all([bad, slow, job(tmp_path, "after", "bad")])
    assert [file.name for file in tmp_path.glob("*.done")] == [], "what ran beside it was stopped"
    with pytest.raises(ValueError, match="quiet failed: it said nothing"):
        run_all([job(tmp_path, "quiet", code="raise SystemExit(0)")])


def test_a_signal_stops_the_running_jobs(tmp_path):
    """The first asks them to, but for those that save nothing; the second does not ask. One that is ignored, as SIGHUP
    under nohup, stays so."""
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    for name, beginning, sent in (
        ("polite", "", [signal.SIGHUP, signal.SIGTERM]),
        ("deaf", deaf, [signal.SIGINT, signal.SIGTERM]),
        ("saves nothing", deaf, [signal.SIGINT]),
    ):
        pid = tmp_path / f"{name}.pid"
        code = f"{beginning}import os, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(30)"

        def interrupt(pid: Path = pid, sent: list[signal.Signals] = sent) -> None:
            for _ in range(600):
                if pid.exists() and pid.read_text():
                    break
                time.sleep(0.05)
            for number in sent:
                os.kill(os.getpid(), number)  # not raise_signal, which is of this thread alone
                time.sleep(1)

        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # Ignored where the tests run in a shell's background.
        interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(Stopped, match="SIGTERM" if name == "polite" else "SIGINT"):
                first = replace(job(tmp_path, name, code=code), saves=name != "saves nothing")
                run_all([first, job(tmp_path, "after", name)])
        finally:
            thread.join()
            signal.signal(signal.SIGHUP, before)
            signal.signal(signal.SIGINT, interrupted)
        assert is_gone(int(pid.read_text())) and not list(tmp_path.glob("*.done"))


def is_gone(process: int) -> bool:
    """Within ten seconds."""
    for _ in range(200):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_a_folder_is_held_as_long_as_a_job_of_a_killed_comparison_lives(tmp_path):
    orphan = tmp_path / "orphan.pid"
    code = f"""
import os, sys
from pathlib import Path
from comparison.jobs import Job, only_one_in, run_jobs
sleep = "import os, time; open({str(orphan)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
folder = Path({str(tmp_path)!r})
job = Job("long", lambda: [sys.executable, "-c", sleep], lambda: False, folder / "logs" / "long.log")
with only_one_in(folder) as held:
    run_jobs([job], held=held, environments=[{{}}])
"""
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    try:
        while parent.poll() is None and not (orphan.exists() and orphan.read_text()):
            time.sleep(0.05)
        with pytest.raises(ValueError, match="another comparison"), only_one_in(tmp_path):
            pass
    finally:
        parent.kill()
        parent.wait()
    with pytest.raises(ValueError, match="or a job of it, still runs here"), only_one_in(tmp_path):
        pass
    os.kill(int(orphan.read_text()), signal.SIGKILL)
    assert is_gone(int(orphan.read_text()))
    with only_one_in(tmp_path):
        pass


def test_jobs_find_their_programs_from_any_working_directory(tmp_path):
    """And beside other modules of their names."""
    elsewhere = tmp_path / "elsewhere"
    for name in ("comparison", "semtok"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise SystemExit('another one')")
    planned = comparison(tmp_path / "c", Row(name="demo", tokenizer="demo"))
    commands = [one.command() for one in jobs_of(planned)]
    programs = [Path(program) for _, program, *_ in commands]
    assert [program.name for program in programs] == ["train_dit.py", "compare.py", "compare.py"]
    assert all(program.is_absolute() and program.is_file() for program in programs)
    done = subprocess.run(commands[-1], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "comparison.yaml: no such file" in done.stderr, "nothing was begun"


# Conclusions -------------------------------------------------------------------------------------


def test_steps_to_reach_a_score_are_interpolated():
    steps, falling = [10, 20, 30], [100.0, 60.0, 50.0]
    assert steps_to_reach(steps, falling, 80.0) == 15
    assert steps_to_reach(steps, falling, 50.0) == 30
    assert steps_to_reach(steps, falling, 200.0) == 10
    assert steps_to_reach(steps, falling, 40.0) == math.inf


def rows_of(*scores: tuple[str, list[list[float]], list[list[float]]]) -> list[RowScores]:
    """Args: scores: of each row its name, FD and seconds, of each checkpoint those of each seed."""
    return [
        RowScores(
            Row(name=name, tokenizer="vae"),
            {},
            [10, 20],
            {"FD-demo": [Spread(tuple(at)) for at in distances]},
            [Spread(tuple(at)) for at in seconds],
        )
        for name, distances, seconds in scores
    ]


def test_rows_are_compared_seed_by_seed_in_steps_seconds_and_by_how_much():
    rows = rows_of(
        ("plain", [[100.0, 80.0], [50.0, 40.0]], [[5.0, 5.0], [10.0, 10.0]]),
        ("fast", [[70.0, 30.0], [30.0, 50.0]], [[4.0, 6.0], [8.0, 12.0]]),
    )
    plain, fast = compared(rows, "plain")
    assert fast.steps_to_baseline == {"FD-demo": (15.0, 10.0)}
    assert fast.seconds_to_baseline == {"FD-demo": (6.0, 6.0)}
    assert fast.differences["FD-demo"].values == (-20.0, 10.0)
    header, [first, second] = generation_table([plain, fast])
    told = dict(zip(header, second, strict=True))
    assert told["steps to plain's FD-demo"] == "≤ 12.5 ± 3.5"
    assert told["seconds to plain's FD-demo"] == "≤ 6 ± 0"
    assert told["FD-demo less plain's"] == "-5 [-196, +186]"
    assert first[header.index("FD-demo less plain's")] == "-"
    others = {row.baseline for row in compared(rows, "fast")}
    assert others == {"fast"} and compared(rows, "fast")[0].steps_to_baseline == {
        "FD-demo": (17.5,)
    }


def test_a_spread_is_the_sample_standard_deviation():
    spread = Spread((1.0, 2.0, 3.0))
    assert (spread.mean, spread.std, str(spread)) == (2.0, 1.0, "2 ± 1")
    low, high = spread.interval()
    assert (round(low, 3), round(high, 3)) == (-0.484, 4.484), (
        "2 ± 4.303 / √3, Student's t of two degrees"
    )
    assert str(Spread((2.0,))) == "2"


# The whole of it ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_this_process() -> Iterator[list[str]]:
    """Jobs as function calls, one after the other: a process of its own takes seconds to begin."""
    names: list[str] = []

    def run_here(jobs: Sequence[Job], **_: object) -> None:
        for one in jobs:
            if one.is_done():
                continue
            names.append(one.name)
            _, launcher, *words = one.command()
            if Path(launcher).name == "compare.py":
                assert run(compare.main, words) == 0
            else:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["semtok", Path(launcher).stem, *words])
                    assert semtok_cli.main() == 0
            assert one.is_done()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "run_jobs", run_here)
        patch.setattr(compare, "BUDGETS", {"full": TINY, "quick": TINY})
        patch.setattr("semtok.evaluation.predictors.NUM_MAPS", 1)
        yield names


WORDS = ["--tokenizers", "vae,demo", "--seeds", "1"]
WORDS += ["--variant", "repa", "vae", "diffusion.repa={weight: 0.5}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, in_this_process: list[str]) -> Path:
    """The folder of a comparison that ran from nothing."""
    folder = tmp_path_factory.mktemp("compare") / "c"
    assert run(compare.main, [*WORDS, "--output", str(folder)]) == 0
    assert in_this_process == [
        "a few steps of each training",
        "tokenizer vae, seed 0",
        "transformer on vae, seed 0",
        "scores of generator vae, seed 0",
        "transformer on demo, seed 0",
        "scores of generator demo, seed 0",
        "transformer on repa, seed 0",
        "scores of generator repa, seed 0",
        "scores of tokenizer vae, seed 0",
        "scores of tokenizer demo, seed 0",
    ]
    in_this_process.clear()
    return folder


def test_the_report_is_one_file_with_everything_in_it(finished):
    results = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in results["rows"]] == ["vae", "demo", "repa"]
    by_name = {row["name"]: row for row in results["rows"]}
    psnr = {name: row["tokenizer_scores"]["psnr"][0] for name, row in by_name.items()}
    assert psnr["demo"] > psnr["vae"] == psnr["repa"], "one of them is trained"
    assert by_name["vae"]["steps"] == [2, 4] and len(by_name["vae"]["generation"]["FD-demo"]) == 2
    page = (finished / "report.html").read_text()
    # The letters of a picture may spell such a word themselves.
    without_pictures = re.sub(r"(data:image/png;base64,)[^']+", r"\1", page)
    links = re.findall(r"(?:src|href|url|@import)\W+(\w+)", without_pictures)
    assert set(links) == {"data"}, "nothing outside the file"
    assert "//" not in without_pictures, "nor an address"
    assert Image.open(finished / "report.png").size[0] == 13 * 110


class Page(HTMLParser):
    """Tables as lists of rows of texts, and pictures by what stands beside them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.pictures: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attributes))
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in the order of their opening"

    def handle_data(self, text: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += text + " "


def test_rows_columns_and_pictures_of_the_report_are_labelled(finished):
    page = Page((finished / "report.html").read_text())
    assert not page.open
    generation, samples, tokenizers, reconstructions, rows = page.tables
    names = ["vae", "demo", "repa"]
    for table in (generation, samples, rows):
        assert [row[0].strip() for row in table][-3:] == names
    assert generation[0][:3] == ["row ", "FD-demo less is better ", "shown class more is better "]
    assert [cell.strip() for cell in generation[1]] == [f"{n}\xa0steps" for n in (2, 4, 2, 4)]
    assert [cell.strip() for cell in tokenizers[0]] == ["score", "vae", "demo"]
    labels = [row[0].strip() for row in tokenizers]
    assert "attribute probe, mean F1 more is better" in labels
    assert "CKNNA with the teacher more is better" in labels
    columns = samples[0][1].split("  ")
    assert len(samples[0][1].split()) >= scores.NUM_SHOWN and columns[0].startswith("red")
    rows = ["held-out image", "vae", "vae: texture", "demo", "demo: texture"]
    assert [row[0].strip() for row in reconstructions] == rows
    assert all(picture["alt"] for picture in page.pictures) and len(page.pictures) == 1 + 3 + 5


def test_the_report_shows_each_part_of_the_latents_and_how_the_semantics_lead(
    tmp_path, in_this_process, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    train_tokenizer(parse_recipe(tiny.content(tiny.SEMANTICS["semvae"]), "tiny"), Path("codes"))
    words = ["--tokenizers", "codes", "--seeds", "1", "--output", "c"]
    assert run(compare.main, words) == 0
    in_this_process.clear()
    page = Page(Path("c/report.html").read_text())
    shown = [row[0].strip() for row in page.tables[3]]
    assert shown == ["held-out image", "codes", "codes: texture", "codes: semantic"]
    assert "sampling of codes over time" in [picture["alt"] for picture in page.pictures]


def test_a_report_is_drawn_again_from_its_results_with_another_baseline(
    finished, in_this_process, monkeypatch, capsys
):
    before = json.loads((finished / "results.json").read_text())
    page = (finished / "report.html").read_text()
    assert "vae is the baseline" in page and before["baseline"] == "vae"
    monkeypatch.setattr("comparison.report.open_sources", None)  # nothing is opened
    (finished / "report.html").unlink()
    words = ["--redraw", "--output", str(finished)]
    assert run(compare.main, words) == 0 and not in_this_process
    assert (finished / "report.html").read_text() == page
    assert json.loads((finished / "results.json").read_text()) == before
    assert run(compare.main, [*words, "--baseline", "repa"]) == 0
    now = json.loads((finished / "results.json").read_text())
    assert now["baseline"] == "repa" and "repa is the baseline" in (
        finished / "report.html"
    ).read_text(encoding="utf-8")
    assert [row["generation"] for row in now["rows"]] == [r["generation"] for r in before["rows"]]
    capsys.readouterr()
    assert run(compare.main, [*words, "--baseline", "nobody"]) == 2
    assert "no row 'nobody'; rows: vae, demo, repa" in capsys.readouterr().err
    assert run(compare.main, [*words, "--baseline", "vae"]) == 0
    write_json(finished / "results.json", {"rows": []})
    assert run(compare.main, words) == 2
    assert "an earlier version wrote it" in capsys.readouterr().err
    write_json(finished / "results.json", before)


def test_images_of_the_report_are_enlarged_by_a_whole_number(finished):
    page = (finished / "report.html").read_text()
    assert ".strips img { image-rendering: pixelated" in page
    for picture in Page(page).pictures[1:]:
        with Image.open(BytesIO(base64.b64decode(picture["src"].partition(",")[2]))) as image:
            assert image.size == (16 * scores.NUM_SHOWN, 16)
            assert (int(picture["width"]), int(picture["height"])) == (3 * image.width, 3 * 16)


def test_the_scored_weights_are_those_of_the_export_and_the_rest_is_removed(finished):
    run_folder = finished / "generators" / "demo-0"
    exported = Generator.from_pretrained(run_folder).network.state_dict()
    weights = scores.averaged_weights(run_folder, 4)
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
    assert [c.name for c in (run_folder / "checkpoints").iterdir()] == ["step_00000004"]


def test_an_interrupted_comparison_goes_on_where_it_stopped(finished, in_this_process, capsys):
    tokenizer = finished / "scores" / "tokenizer_vae-0.json"
    generator = finished / "scores" / "generator_demo-0.json"
    lost, whole = json.loads(tokenizer.read_text()), json.loads(generator.read_text())
    tokenizer.unlink()
    write_json(generator, whole[:1])  # stopped after the first checkpoint's scores
    generator.with_suffix(".png").unlink()
    assert run(compare.main, [*WORDS, "--output", str(finished)]) == 0
    assert in_this_process == [
        "scores of generator demo, seed 0",
        "scores of tokenizer vae, seed 0",
    ]
    assert json.loads(tokenizer.read_text()) == pytest.approx(lost, rel=1e-5)
    again = json.loads(generator.read_text())
    assert again[0] == whole[0] and again[1] == pytest.approx(whole[1], rel=1e-5)
    assert "FD-demo at 4" in capsys.readouterr().out


def test_a_judge_that_nothing_was_aligned_to_sees_all_that_rows_are_scored_by(
    finished, tmp_path, monkeypatch
):
    quickly = lambda *given, **named: trained_judge(*given, **named | {"steps": 2})  # noqa: E731
    monkeypatch.setattr("semtok.evaluation.judges.trained_judge", quickly)
    monkeypatch.setenv("SEMTOK_CACHE", str(tmp_path))
    before = plan.read_comparison(finished, 1)
    words = ["--judge", "trained", "--judge", "name=demo", "layers=[-2]"]
    words += ["--output", str(tmp_path)]
    judge = compare._asked(compare._parser().parse_args(words)).settings.judge
    settings = before.settings.model_copy(update={"judge": judge})
    planned = replace(before, folder=tmp_path, settings=settings)
    shutil.copytree(finished / "generators" / "demo-0", tmp_path / "generators" / "demo-0")
    row = next(row for row in planned.rows if row.name == "demo")
    file = planned.generator_scores(row, 0)
    write_json(file, json.loads(before.generator_scores(row, 0).read_text())[:1])
    scores.score_generator(planned, row, 0)
    by_teacher, judged = json.loads(file.read_text())
    own = {name.replace("demo", "trained") for name in by_teacher}
    others = {name for name in by_teacher if name.endswith("-demo")} | {f"{CLASS_SHARE} (demo)"}
    assert CLASS_SHARE in own and "FDr" not in by_teacher
    assert judged.keys() == own | others | {"FDr", "FDr-trained", "FDr-demo"}
    held_out = {
        name: told["held_out"]
        for name, told in json.loads((tmp_path / "scores" / "judges.json").read_text()).items()
    }
    ratios = [judged[f"FD-{name}"] / held_out[name]["distance"] for name in held_out]
    assert judged["FDr"] == pytest.approx(sum(ratios) / 2) and len(ratios) == 2
    curves = {name: [Spread((judged[name],))] for name in judged if name not in ("step", "seconds")}
    scored = RowScores(row, {}, [4], curves, [Spread((1.0,))])
    header, _ = generation_table(compared([scored], "demo"))
    assert {"FD-trained at 4", f"{CLASS_SHARE} at 4", "FD-demo", "FDr"} <= set(header)
    assert "FD-demo less demo's" not in header, "rows are followed by the first judge"
    scores.score_tokenizer(planned, "demo", 0)
    judged = json.loads(planned.tokenizer_scores("demo", 0).read_text())
    assert "FD-trained" in judged and "FD-demo" not in judged
    assert len(list((tmp_path / "judges").iterdir())) == 1, "trained once"
    first, second, relative = compare._about(planned, 1)[2:-1]
    assert "Judge trained, by which rows are followed: a network that was trained on" in first
    assert "learned the classes from 60 real training images" in first
    assert "Judge demo: the network of --teacher" in second and "layer -2" in second
    for told, name in ((first, "trained"), (second, "demo")):
        right = 100 * held_out[name]["read_right"]
        assert f"Of 10 held-out real images it reads {right:.1f} % right" in told
    assert "FDr is the mean over the judges" in relative and "10 held-out images." in relative
    with pytest.raises(UserError, match="begun with judge=teacher, now trained --judge name=demo"):
        replace(planned, folder=finished).claim()


def test_trainings_that_were_interrupted_keep_every_checkpoint_to_be_scored(
    tmp_path, in_this_process, monkeypatch
):
    """Each interruption writes a checkpoint more; none may push out one that is still to be scored."""
    step_of = Trainer.train_step
    at = [1, 3]

    def step_and_stop(trainer: Trainer, batches: object) -> None:
        step_of(trainer, batches)
        if at and trainer.step == at[0] and trainer.log is not None:  # not where steps are measured
            del at[0]
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "train_step", step_and_stop)
    words = ["--tokenizers", "demo", "--seeds", "1", "--output", str(tmp_path / "c")]
    for _ in range(2):
        with pytest.raises(AssertionError):  # the job's exit code
            run(compare.main, words)
    assert run(compare.main, words) == 0 and not at
    written = json.loads((tmp_path / "c" / "scores" / "generator_demo-0.json").read_text())
    assert [entry["step"] for entry in written] == [2, 4]
    in_this_process.clear()


def test_the_file_of_switches_names_rows_that_a_transformers_recipe_takes():
    file = Path(__file__).parents[1] / "tools/comparison/switches.yaml"
    rows = {row.name: row for row in read_rows("", [], file)}
    assert {"plain", "routing", "contrastive", "muon", "together"} <= rows.keys()
    recipes = {
        name: load_diffusion_recipe(locate_recipe("dit"), ["tokenizer=vae", *row.settings])
        for name, row in rows.items()
    }
    plain = recipes["plain"]
    assert plain.diffusion.routing is None and plain.train.optimiser.name == "adamw"
    # Each differs from the plain one by what it is called, and in nothing that would make it another training.
    others = [recipe for name, recipe in recipes.items() if name != "plain"]
    assert all((r.diffusion, r.train) != (plain.diffusion, plain.train) for r in others)
    assert {(r.train.steps, r.train.batch_size) for r in others} == {
        (plain.train.steps, plain.train.batch_size)
    }


def test_the_file_of_latents_names_every_way_to_a_texture_beside_the_plain_vae(tmp_path):
    file = Path(__file__).parents[1] / "tools/comparison/latents.yaml"
    rows = read_rows("", [], file)
    recipes = {name for name in recipe_names() if not is_composite(name)}
    assert {row.tokenizer for row in rows} == recipes and rows[0] == VAE
    planned = comparison(tmp_path, *rows)
    planned.check()
    words = {name: planned.tokenizer_overrides(name, 0) for name in ("eq_vae", "vae_finetune")}
    steps = [load_recipe(recipe_of(name), w).train.steps for name, w in words.items()]
    assert steps[0] == steps[1], "fine-tuned for as long, with and without equivariance"
    aligned = Row(name="repa", tokenizer="rae", settings=("diffusion.repa={weight: 0.5}",))
    assert not any(w.startswith("teacher") for w in planned.generator_overrides(aligned, 0))


def test_threads_that_the_user_has_set_stay(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    shared = compare._environments(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert compare._environments(2) == [{"OMP_NUM_THREADS": "3"}] * 2
    assert int(shared[0]["OMP_NUM_THREADS"]) == len(os.sched_getaffinity(0))
