"""Rehearsals: what is run of a recipe is the command at its head, one step of it, from images and weights made here."""

import importlib
import json
import time
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from benchmarks.random_inputs import random_teacher
from rehearsal import command, rehearsal
from rehearsal.children import Outcome, command_line, run_command
from rehearsal.headers import Sampling, read_header
from rehearsal.inputs import autoencoder_preset, draw_images, lay_autoencoder
from rehearsal.plan import (
    all_recipes,
    depth_settings,
    find_recipes,
    least_depth,
    maker,
    plan_run,
    same_output,
    small_settings,
    transformer_of,
)
from rehearsal.sizes import Size
from semtok import teachers
from semtok.commands.cli import run
from semtok.errors import UserError
from semtok.recipe import DiffusionRecipe, load_diffusion_recipe, load_recipe
from semtok.sampler.architecture import architecture
from semtok.settings import apply_overrides, read_yaml
from semtok.teachers import Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer

RECIPES = all_recipes()


def rehearse(*words: object) -> int:
    return run(command.main, list(map(str, words)))


def toy_recipe(name: str, **changes: object) -> str:
    """An embedded recipe with its head, at a size that a test has time for."""
    file = find_recipes([name])[0]
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    content = apply_overrides(read_yaml(file), [f"{k}={json.dumps(v)}" for k, v in changes.items()])
    return "\n".join(head) + "\n" + yaml.safe_dump(content)


# One of each, as a user runs it -------------------------------------------------------------------


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SiT-B/2 with REGLUE and the compressor that it is built on, at toy size."""
    recipes = tmp_path_factory.mktemp("imagenet256")
    toy = {"data.size": 32, "teacher.name": "demo", "teacher.input_size": 32}
    compressor = {"method.texture": "org/vae-tiny", "method.compressor.hidden": [8]}
    transformer = {"diffusion.network": tiny_network(), "diffusion.repa.projector_width": 16}
    (recipes / "reglue.yaml").write_text(toy_recipe("reglue", **toy, **compressor))
    (recipes / "sit_b2_reglue.yaml").write_text(
        toy_recipe("sit_b2_reglue", **{"data.size": 32}, **transformer)
    )
    words = [recipes / "sit_b2_reglue.yaml", "--depth", 1, "--output", recipes / "kept"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "run_command", mostly_here)
        assert rehearse(*words, "--json", recipes / "table.json") == 0
    return recipes


def mostly_here(command: str, words: list[str], environment: dict[str, str], log: Path) -> Outcome:
    """The tokenizer's command is a process, as ever; the others run in this one, as to start each takes seconds."""
    if command == "train_tokenizer":
        return run_command(command, words, environment, log)
    start = time.perf_counter()
    code = run(importlib.import_module(f"semtok.commands.{command}").main, words)
    shown = command_line(command, words, environment)
    return Outcome(shown, code, time.perf_counter() - start, psutil.Process().memory_info().rss, ())


def tiny_network() -> dict[str, object]:
    shape = architecture("SiT-B/2").model_dump(mode="json")
    return shape | {"depth": 5, "width": 32, "heads": 2, "patch_size": 1}


def test_a_recipe_is_run_by_its_own_command_after_what_it_is_built_on(rehearsed):
    tokenizer, generator = json.loads((rehearsed / "table.json").read_text())
    assert tokenizer["name"].endswith("/reglue") and tokenizer["ran"] == ["train_tokenizer"]
    assert generator["ran"][:2] == ["train_dit", "sample"]
    assert tokenizer["losses"].keys() == {"mse"}
    assert {"velocity/texture", "velocity/semantic", "velocity/global", "alignment"} == (
        generator["losses"].keys()
    )
    kept = rehearsed / "kept"
    written = yaml.safe_load((kept / generator["output"] / "recipe.yaml").read_text())
    assert written["tokenizer"] == "runs/imagenet256/reglue" == tokenizer["output"]
    assert written["train"]["steps"] == 1 and written["diffusion"]["network"]["depth"] == 1
    assert written["train"]["clip_norm"] == 1.0, "what costs nothing stays the recipe's"
    for result in (tokenizer, generator):
        for outcome in result["outcomes"]:
            assert outcome["code"] == 0 and outcome["seconds"] > 0 and outcome["peak_bytes"] > 1e8
            assert "python" in outcome["shown"]
    assert len(list((kept / generator["output"]).glob("samples_*.npz"))) == (
        generator["ran"].count("sample")
    )


def test_full_size_and_what_was_run_of_it_are_told_apart(rehearsed):
    _, generator = json.loads((rehearsed / "table.json").read_text())
    assert (generator["depth"], generator["depth_here"]) == (5, 1)
    in_block = (generator["parameters"] - generator["parameters_here"]) / 4
    width, mlp = 32, 4 * 32
    weights = 3 * width * width + width * width + 2 * width * mlp + 6 * width * width
    assert weights < in_block < 1.1 * weights + 50 * width


# Every recipe, planned ----------------------------------------------------------------------------


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipes_rehearsal_has_settings_that_parse_and_names_what_it_needs(file):
    planned = plan_run(file)
    settings = small_settings(planned)
    if planned.is_generator:
        settings += depth_settings(*transformer_of(planned.recipe), 1)
        small = load_diffusion_recipe(file, settings)
        shape = architecture(small.diffusion.network)
        assert shape.depth == least_depth(planned.recipe.diffusion)
        assert (small.diffusion.routing is None) == (planned.recipe.diffusion.routing is None)
        full = architecture(planned.recipe.diffusion.network)
        assert shape.model_copy(update={"depth": full.depth}) == full
        assert small.sampler.method == planned.recipe.sampler.method
    else:
        small = load_recipe(file, settings)
        assert small.method.name == planned.recipe.method.name
    assert small.train.steps == min(1, planned.recipe.train.steps)
    assert small.train.precision == "fp32" and small.train.warmup_steps == 0
    assert small.train.accumulate == 1
    head = file.read_text().partition("\n\n")[0]
    for reference in planned.references:  # a run of a recipe, an import of its head, or fetched
        is_made = maker(reference, file) is not None or f"--output {reference}\n" in head
        assert is_made != (not reference.startswith("runs/"))
    for sampling in planned.samplings:
        assert sampling.weak is None or maker(sampling.weak, file) is not None
    assert file not in same_output(planned)


def test_a_generators_tokenizer_is_found_by_the_folder_that_its_command_writes():
    by_name = {file.stem: file for file in RECIPES}
    semvae, sfd = by_name["semvae"], by_name["lightningdit_b1_sfd"]
    assert maker("runs/imagenet256/semvae", sfd) == semvae
    assert maker("runs/imagenet256/semvae/exports/0000010", sfd) == semvae
    assert maker("imagenet256/semvae", sfd) == semvae
    assert maker("runs/imagenet256/semvae2", sfd) is None
    assert maker("stabilityai/sd-vae-ft-ema", sfd) is None


def test_the_guide_is_trained_first_and_named_by_its_run_folder(tmp_path, monkeypatch):
    commands: list[tuple[str, list[str]]] = []

    def pretended(command: str, words: list[str], environment: object, log: Path) -> Outcome:
        commands.append((command, words))
        return Outcome("", 0, 1.0, 1, ())

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "run_command", pretended)
    monkeypatch.setattr(rehearsal, "lay_autoencoder", lambda _: None)
    monkeypatch.setattr(rehearsal, "check_at_full_size", lambda _: (Size(100, 10, 6), []))
    done = rehearsal.Rehearsal(memory=1e12, depth=3)
    assert done.run(find_recipes(["lightningdit_xl1_sfd"])[0]).error is None
    names = [result.name.partition("/")[2] for result in done.results.values()]
    assert names.index("semvae") < names.index("lightningdit_b1_sfd_guide") < len(names) - 1
    guide, strong = list(done.results.values())[-2:]
    guided = [words for command, words in commands if command == "sample" and "--weak" in words]
    assert guided and all(words[0] == strong.output for words in guided)
    assert all(words[words.index("--weak") + 1] == guide.output for words in guided)
    assert guide.parameters_here == 70, "3 blocks of 6"
    done.run(find_recipes(["lightningdit_b1_sfd_guide"])[0])
    assert len(commands) == sum(len(r.outcomes) for r in done.results.values()), "once each"


# The head of a recipe -----------------------------------------------------------------------------

HEAD = """\
# A recipe. Commands:
#   accelerate launch --num_processes 8 tools/train_dit.py --recipe recipes/imagenet256/other.yaml data.path=/data
#   accelerate launch tools/train_dit.py --recipe recipes/imagenet256/own.yaml \\
#       data.path=/data/imagenet --tokenizer runs/t diffusion.cosine_weight=0 --output runs/o
#   semtok train_dit --recipe recipes/imagenet256/own.yaml --resume train.steps=9
#   python tools/sample.py runs/o --num 50000 --guidance 1 --output a.npz
#   python tools/sample.py runs/o --guidance=1.5 --steps 100 --batch-size 8 --output b.npz
#   python tools/sample.py runs/o --guidance 1.6 --num 50000 --output c.npz
#   python tools/sample.py runs/o --guidance 2.6 --num 50000 --output d.npz
#   python tools/sample.py runs/o --weak runs/w/exports/0000070 --guidance 1.6 --output e.npz
# Expected: by tools/sample.py, it's good.
tokenizer: x
# python tools/sample.py runs/o --later --output f.npz
"""


def test_the_head_says_what_is_run_and_how_it_is_sampled(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(HEAD)
    header = read_header(file)
    assert header.words == ("--tokenizer", "runs/t", "diffusion.cosine_weight=0")
    assert header.output == "runs/o"
    assert header.samplings == (
        Sampling(("--guidance", "1")),
        Sampling(("--guidance=1.5", "--steps", "2")),
        Sampling(("--guidance", "1.6")),
        Sampling(("--guidance", "1.6"), weak="runs/w/exports/0000070"),
    )


def test_a_command_that_a_shell_could_not_read_is_told(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("# python tools/train_dit.py --recipe own.yaml 'data.path=x\nmethod: {}\n")
    with pytest.raises(UserError, match="can't be read"):
        read_header(file)


# What it reads -------------------------------------------------------------------------------------


def test_images_are_drawn_the_same_each_time_in_sides_as_those_of_photographs(tmp_path):
    for folder in ("a", "b"):
        draw_images(tmp_path / folder)
    files = sorted((tmp_path / "a").rglob("*.jpg"))
    assert {file.parts[-3] for file in files} == {"train", "val"}
    assert all(256 <= side <= 400 for file in files for side in Image.open(file).size)
    for file in files:
        twin = tmp_path / "b" / file.relative_to(tmp_path / "a")
        assert twin.read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("reference", "preset"),
    [
        ("stabilityai/sd-vae-ft-ema", "f8d4"),
        ("data/va-vae-f16d32", "f16d32"),
        ("runs/imagenet256/va_vae", "f16d32"),
    ],
)
def test_fetched_autoencoders_are_of_the_shape_that_their_name_tells(reference, preset):
    assert autoencoder_preset(reference) == preset


def test_random_weights_are_found_by_the_recipes_own_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lay_autoencoder("org/vae-tiny")
    before = (tmp_path / "org/vae-tiny/config.json").stat().st_mtime_ns
    lay_autoencoder("org/vae-tiny")
    assert (tmp_path / "org/vae-tiny/config.json").stat().st_mtime_ns == before
    assert Tokenizer.from_pretrained("org/vae-tiny").spec.names == ("texture",)


def test_a_teacher_has_random_weights_by_its_short_name_too(tmp_path, monkeypatch):
    monkeypatch.setitem(teachers._SHORT_NAMES, "short", "test_vit")
    config = random_teacher(TeacherConfig(name="short", input_size=160), tmp_path)
    assert Path(config.checkpoint).is_file()
    assert Teacher(config).timm_name == "test_vit"


@pytest.mark.parametrize("reference", ["../vae-tiny", "/somewhere/vae-tiny"])
def test_weights_are_never_written_outside_of_the_rehearsals_folder(
    reference, tmp_path, monkeypatch
):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    with pytest.raises(UserError, match="outside"):
        lay_autoencoder(reference)
    assert not (tmp_path / "vae-tiny").exists()


# What memory allows, and what fails ---------------------------------------------------------------


def test_depth_is_what_memory_allows():
    size = Size(parameters=1_000_000_000, in_block=90_000_000, depth=10)
    assert size.depth_within(100e9) == 10
    assert size.depth_within(5e9 + 20 * 560e6) == 5
    assert size.depth_within(1e9) == 1
    assert size.parameters_at(5) == 550_000_000


def test_repa_moves_to_the_last_block_of_a_shallow_transformer():
    recipe = plan_run(next(f for f in RECIPES if f.stem == "sit_xl2_repa")).recipe
    assert isinstance(recipe, DiffusionRecipe)
    assert depth_settings(*transformer_of(recipe), 28) == []
    assert "diffusion.repa.depth=3" in depth_settings(*transformer_of(recipe), 3)
    assert len(depth_settings(*transformer_of(recipe), 8)) == 1


def test_a_joint_training_is_made_small_in_both_its_parts():
    planned = plan_run(next(f for f in RECIPES if f.stem == "repae"))
    settings = small_settings(planned)
    assert {"method.sampler.steps=2"} <= set(settings)
    shallow = depth_settings(*transformer_of(planned.recipe), 1)
    assert shallow == ["method.diffusion.network.depth=1", "method.diffusion.repa.depth=1"]
    assert "runs/imagenet256/va_vae" in planned.references and planned.samplings
    load_recipe(planned.file, [*settings, *shallow])


def test_a_shallow_transformer_still_routes_its_tokens():
    recipe = plan_run(next(f for f in RECIPES if f.stem == "srdit_b1")).recipe
    assert isinstance(recipe, DiffusionRecipe)
    settings = depth_settings(*transformer_of(recipe), 1)
    assert settings[0] == "diffusion.network.depth=3"
    assert {"diffusion.routing.first=1", "diffusion.routing.last=1"} <= set(settings)
    assert depth_settings(*transformer_of(recipe), 5) == ["diffusion.network.depth=5"]
    assert depth_settings(*transformer_of(recipe), 12) == []


def test_what_fails_is_told_with_its_last_lines_and_fails_what_is_built_on_it(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text(
        toy_recipe("reg", **{"data.size": 32, "teacher.name": "no_such_network"})
    )
    file = tmp_path / "user.yaml"
    file.write_text(toy_recipe("sit_b2", tokenizer="runs/broken"))
    broken = (tmp_path / "broken.yaml").read_text().replace("runs/imagenet256/reg", "runs/broken")
    (tmp_path / "broken.yaml").write_text(broken)
    assert rehearse(file) == 1
    told = capsys.readouterr()
    assert "no_such_network" in told.err
    assert "/user failed: needs" in told.err and told.out.count("failed") >= 2


def test_a_failed_command_leaves_its_code_and_its_last_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = run_command("no_such_tool", ["--x"], {"A": "b c"}, Path("logs/x.log"))
    assert outcome.code == 2 and "No such file" in outcome.last_lines[-1]
    assert outcome.shown.startswith("A='b c' python ") and outcome.shown.endswith(".py --x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--all"),
        (["sit_b2", "--all"], "--all"),
        (["no_such_recipe"], "sit_b2_reglue"),
        (["sit_b2", "--memory", "0"], "more than 0"),
        (["sit_b2", "--output", "."], "choose a new folder"),
    ],
)
def test_a_slip_is_told_before_anything_is_made(words, message, capsys):
    assert rehearse(*words) == 2
    assert message in capsys.readouterr().err
