"""The probe, and the commands around it."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import semtok_cli
import tiny
from demo_models import train_teacher, train_vae
from semtok.commands import cli, evaluate
from semtok.commands.run_folder import flatten
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import ATTRIBUTES, Shapes, ShapesConfig
from semtok.evaluation.probe import LatentTable, latent_table, probe
from semtok.recipe import parse_recipe
from semtok.teachers import DEMO_FILE, Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer


def table(rng: np.random.Generator, num: int, signal: float) -> LatentTable:
    labels = rng.integers(0, 4, num)
    codes = np.eye(4)[labels] * signal
    features = np.concatenate([codes, np.zeros((num, 8))], axis=1) + rng.normal(size=(num, 12))
    return LatentTable(features.astype(np.float32), {"kind": labels}, {"kind": 4})


def test_the_probe_reads_what_is_linear_and_nothing_from_noise():
    rng = np.random.default_rng(0)
    read = probe(table(rng, 800, 10), table(rng, 400, 10))["kind"]
    assert min(read.f1, read.balanced_accuracy) > 0.99
    read = probe(table(rng, 800, 0), table(rng, 400, 0))["kind"]
    assert read.balanced_accuracy == pytest.approx(0.25, abs=0.08)


def test_balanced_accuracy_does_not_reward_the_frequent_class():
    rng = np.random.default_rng(0)
    rare = (rng.random(2000) < 0.05).astype(np.int64)
    features = rng.normal(size=(2000, 4)).astype(np.float32)
    noise = LatentTable(features, {"kind": rare}, {"kind": 2})
    assert probe(noise, noise)["kind"].balanced_accuracy == pytest.approx(0.5, abs=0.05)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "run"
    train_tokenizer(parse_recipe(tiny.content({"name": "vae"}), "tiny"), folder)
    return folder


def test_latents_of_a_table_are_the_tokenizers(run):
    tokenizer = Tokenizer.from_pretrained(run)
    source = Shapes(ShapesConfig(size=16), train=False)
    made = latent_table(tokenizer, source, num_images=5, batch_size=2)
    batch = source.load(range(5))
    with torch.no_grad():
        expected = tokenizer.encode(batch.images).texture.flatten(1)
    np.testing.assert_allclose(made.features, expected.numpy(), atol=1e-5)
    assert np.array_equal(made.attributes["hue"], batch.attributes["hue"].numpy())


def test_the_probe_command_prints_a_table_and_writes_its_protocol(run, tmp_path, capsys):
    output = tmp_path / "scores.json"
    sizes = ["--num-train", "120", "--num-held-out", "60", "--data", "kind=shapes", "size=16"]
    arguments = ["probe", "--tokenizer", str(run), str(run), *sizes, "--output", str(output)]
    assert cli.run(evaluate.main, arguments) == 0
    scores = json.loads(output.read_text())
    assert "balanced accuracy" in scores["protocol"]["measures"] and scores["num_train"] == 120
    values = scores["scores"]["…/run"]  # no folders of this machine
    assert list(values["attributes"]) == list(ATTRIBUTES)
    shown = capsys.readouterr().out
    for value in (values["mean"], *values["attributes"].values()):
        low, high = value["f1_interval"]
        assert 0 <= low <= high <= 1 and 0 <= value["balanced_accuracy"] <= 1
        assert f"{100 * value['f1']:.1f}" in shown and f"{100 * low:.1f}" in shown
        assert f"{100 * value['balanced_accuracy']:.1f}" in shown


def test_probing_images_without_attributes_is_an_error(run, tmp_path, capsys):
    from PIL import Image

    for i in range(4):
        Image.new("RGB", (16, 16), (i, i, i)).save(tmp_path / f"{i}.png")
    data = ["kind=folder", f"path={tmp_path}", "size=16"]
    arguments = ["probe", "--tokenizer", str(run), "--data", *data]
    assert cli.run(evaluate.main, arguments) == 2
    assert "has no attributes to probe for" in capsys.readouterr().err


def test_the_embedded_teacher_is_trained_again_and_may_take_its_place(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(train_teacher, "ASSETS", tmp_path)
    arguments = ["--steps", "2", "--output", str(tmp_path / "teacher"), "--to-assets"]
    assert cli.run(train_teacher.main, arguments) == 0
    assert "accuracy/shape" in capsys.readouterr().out
    weights = tmp_path / "teacher" / DEMO_FILE
    assert Teacher(TeacherConfig(checkpoint=str(weights))).widths == (128,)
    assert weights.read_bytes() == (tmp_path / DEMO_FILE).read_bytes()


def test_the_embedded_vae_is_trained_again_and_may_take_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "ASSETS", tmp_path)
    embedded = tmp_path / "demo_tokenizer"
    embedded.mkdir()
    (embedded / "old").touch()
    small = [f"train.{name}=2" for name in ("steps", "warmup_steps", "num_validation_images")]
    small += ["data.size=16", "data.num_images=8", "train.num_statistics_images=8"]
    folder = tmp_path / "vae"
    assert cli.run(train_vae.main, ["--output", str(folder), "--to-assets", *small]) == 0
    made, exported = Tokenizer.from_pretrained(embedded), Tokenizer.from_pretrained(folder)
    files = {path.relative_to(embedded).as_posix() for path in embedded.rglob("*.*")}
    wanted = Path(str(train_vae.__file__)).parents[2] / "tokenizers/semtok/assets/demo_tokenizer"
    assert files == {path.relative_to(wanted).as_posix() for path in wanted.rglob("*.*")}
    state = exported.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


def test_the_embedded_vae_was_trained_with_the_settings_that_train_it_again():
    recorded = Tokenizer.from_pretrained("demo").training_info["recipe"]
    now = flatten(train_vae.demo_recipe().model_dump(mode="json"))
    shared = {key: value for key, value in flatten(recorded).items() if key in now}
    assert shared["train.steps"] == 6000 and len(shared) > 30
    assert {key: now[key] for key in shared} == shared


def test_the_commands_list_themselves(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["semtok", "help"])
    assert semtok_cli.main() == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in semtok_cli.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["semtok", "nothing"])
    assert semtok_cli.main() == 2


def test_a_pipe_that_nobody_reads_ends_a_command_in_one_line(monkeypatch, capsys):
    unread, end = os.pipe()
    os.close(unread)
    output = os.fdopen(end, "w")
    monkeypatch.setattr(sys, "stdout", output)
    assert cli.run(lambda _: print("step 1", flush=True), []) == 141
    said = capsys.readouterr().err
    assert said.startswith("stopped: nobody reads what is printed") and said.count("\n") == 1
    with contextlib.suppress(BrokenPipeError):  # by what could not be printed
        output.close()


def test_another_connection_that_breaks_is_told_of_in_full():
    def fail(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        cli.run(fail, [])


def test_every_launcher_says_what_it_does_and_does_nothing_else(tmp_path):
    """From any working directory, one process for all; and processes that theirs start may import them."""
    launchers = sorted((Path(__file__).parents[1] / "tools").glob("*.py"))
    named = {*semtok_cli.COMMANDS, "benchmark", "compare", "train_teacher", "train_demo_vae"}
    assert named <= {path.stem for path in launchers}
    script = """
import runpy, sys
for launcher in sys.argv[1:]:
    runpy.run_path(launcher, run_name="__mp_main__")
    sys.argv = [launcher, "--help"]
    try:
        runpy.run_path(launcher, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, launcher
"""
    paths = [launchers[0].parent, *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", script, *launchers],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = re.findall(r"^usage: (\w+)", done.stdout, re.MULTILINE)
    assert set(said) >= named
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("word", ["--help", "--version", "trian_dit"])
def test_help_and_slips_need_no_torch(word):
    script = (
        f"import sys; sys.argv = ['semtok', '{word}']; import semtok_cli; semtok_cli.main(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'semtok')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "semtok" in done.stdout or "did you mean 'train_dit'?" in done.stderr
