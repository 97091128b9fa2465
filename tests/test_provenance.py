"""Recipes at the papers' settings say of each setting where it comes from; ``recipes`` tells."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from semtok import references
from semtok.commands import recipes as command
from semtok.commands import train_dit, train_tokenizer
from semtok.commands.cli import run
from semtok.errors import UserError
from semtok.provenance import Setting, read_provenance, read_title
from semtok.recipe import (
    PUBLISHED,
    embedded_recipes,
    load_diffusion_recipe,
    load_recipe,
    locate_recipe,
    run_name,
)
from semtok.references import recipe_folder

ROOT = Path(__file__).parents[1]
NAMES = [name for name in embedded_recipes() if name.startswith(f"{PUBLISHED}/")]

OF_THE_RUN = re.compile(
    r"data\.(kind|path|num_workers)|train\.(accumulate|memory\.\w+|export_at|log_every|checkpoint_every|sample_every"
    r"|num_validation_images)"
)
"""What may be told to change nothing that is learned."""

SMALL = """# A title. More of it.
#
# Commands:
#   python tools/train_dit.py \\
#       --recipe here
# Hardware:
#   - one GPU.
# Expected: nothing
# Sources:
#   - [P] a paper.
#   - [C] its code, of
#     two lines.
# Differs:
#   - order: [C] another.
# Unknown: nothing
one: 1        # [P] eq. 1
two: [a, b]   # ours: [C] [b, a]; faster
three:        # [P], [C]
  x: {y: 1.0, z: null}
  w: "a # b"  # closest choice: as [C]
  #   does
five: 5       # run: steps
"""


def small(tmp_path: Path, old: str = "", new: str = "") -> Path:
    assert old in SMALL
    (tmp_path / "r.yaml").write_text(SMALL.replace(old, new))
    return tmp_path / "r.yaml"


def test_comments_are_read_beside_their_settings(tmp_path):
    found = read_provenance(small(tmp_path))
    assert found.title == "A title" == read_title(tmp_path / "r.yaml")
    assert found.commands == ("python tools/train_dit.py \\", "    --recipe here")
    assert found.hardware == ("one GPU.",) and found.expected == () == found.unknown
    assert found.sources == {"P": "a paper.", "C": "its code, of two lines."}
    assert [(fact.about, fact.text) for fact in found.differs] == [("order", "[C] another.")]
    assert found.settings == (
        Setting("one", "1", "published", "", "[P] eq. 1"),
        Setting("two", "[a, b]", "ours", "[C] [b, a]", "faster"),
        Setting("three.x.y", "1.0", "published", "", "[P], [C]"),
        Setting("three.x.z", "null", "published", "", "[P], [C]"),
        Setting("three.w", '"a # b"', "closest choice", "", "as [C] does"),
        Setting("five", "5", "run", "", "steps"),
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("     # [P] eq. 1", "", "line 16: one: expected a comment"),
        ("# [P] eq. 1", "# eq. 1", "line 16: one: expected a comment .*got 'eq. 1'"),
        ("ours: [C] [b, a]; faster", "ours: faster", "two: expected a comment"),
        ("ours: [C] [b, a]; faster", "ours: [C] [b, a]", "two: expected a comment"),
        ("run: steps", "run:", "five: expected a comment"),
        ("[P] eq. 1", "[Q] eq. 1", r"\[Q\] is not among its Sources: P, C"),
        ("# Hardware:", "# Hardwear:", "no section 'Hardware:'"),
        ("- [P] a paper.", "- a paper.", r"Sources: expected '\[TAG\] source'"),
        ("- order: [C]", "- [C]", "Differs: expected what it is about"),
        ("Unknown: nothing", "Unknown:", "Unknown: is empty; say 'nothing'"),
        ("  - one GPU.", "  one GPU.", "Hardware: expected '- ' and one fact"),
    ],
)
def test_a_comment_that_is_not_as_it_should_be_is_named(old, new, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read_provenance(small(tmp_path, old, new))


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_at_a_papers_settings_says_where_each_comes_from(name):
    found = read_provenance(embedded_recipes()[name])
    whole = " ".join(found.expected + found.hardware + found.commands)
    whole += "".join(f"{s.official} {s.why}" for s in found.settings)
    whole += "".join(fact.text for fact in found.differs + found.unknown)
    assert [tag for tag in found.sources if f"[{tag}]" not in whole] == []
    free = [setting.name for setting in found.of_kind("run")]
    if "train.steps" in free or "train.batch_size" in free:  # a pass that trains nothing
        assert load_recipe(embedded_recipes()[name], []).train.steps == 0
        free.remove("train.batch_size")
    assert [setting for setting in free if not OF_THE_RUN.match(setting)] == []
    assert any("measured" in line for line in found.hardware), "how long it takes"


def options_of(module: str) -> set[str]:
    """Options that a command's file, and those that it takes options from, define."""
    folder = ROOT / "tokenizers/semtok/commands"
    files = {
        "train_tokenizer": ["train_tokenizer", "around_training"],
        "train_dit": ["train_dit", "around_training"],
        "sample": ["sample", "sampler_options"],
        "evaluate": [path.stem for path in folder.glob("evaluate*.py")],
        "hub": ["hub"],
    }[module]
    text = "".join((folder / f"{file}.py").read_text() for file in files)
    return set(re.findall(r'"(--[\w-]+)"', text))


@pytest.mark.parametrize("name", NAMES)
def test_the_commands_of_a_recipe_have_the_options_and_settings_that_there_are(name):
    """And write each run to a folder of its own."""
    found = read_provenance(embedded_recipes()[name])
    text = "\n".join(found.commands).replace("\\\n", "")
    outputs = []
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        tool, words = re.search(r"tools/(\w+)\.py (.*)", line).groups()
        assert set(re.findall(r"(?<= )--[\w-]+", f" {words}")) <= options_of(tool), line
        overrides = re.findall(r"[a-z_.]+=\S+", words) if tool.startswith("train") else []
        if tool == "evaluate" and words.startswith("reconstruction"):
            assert " --data " in words, "without, it is of the embedded images"
        path = re.search(r"recipes/(\S+)\.yaml", words)
        if path:
            load = load_recipe if tool == "train_tokenizer" else load_diffusion_recipe
            load(embedded_recipes()[path[1]], overrides)
        outputs += re.findall(r"--output (\S+)", words)
    own = f"runs/{name}"
    assert own in outputs and len(set(outputs)) == len(outputs)
    assert all(o.startswith(f"runs/{PUBLISHED}/") or o.endswith(".npz") for o in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_is_built_on_comes_out_of_one_of_the_commands(name):
    recipe = embedded_recipes()[name]
    made = " ".join(
        re.findall(
            r"--output (\S+)", "".join(path.read_text() for path in embedded_recipes().values())
        )
    )
    values = {setting.name: setting.value for setting in read_provenance(recipe).settings}
    for setting in ("tokenizer", "method.texture", "method.vae"):
        if values.get(setting, "").startswith("runs/"):
            assert values[setting] in made.split()


# Names of recipes --------------------------------------------------------------------------------


def test_a_recipe_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = recipe_folder()
    assert locate_recipe("send_vae") == folder / "send_vae.yaml"
    assert locate_recipe("send_vae", first=PUBLISHED) == folder / "imagenet256/send_vae.yaml"
    for word in ("sit_b2", "imagenet256/sit_b2", "recipes/imagenet256/sit_b2.yaml", "sit_b2.yaml"):
        assert locate_recipe(word) == folder / "imagenet256/sit_b2.yaml"
    (tmp_path / "sit_b2").write_text("mine")
    assert locate_recipe("sit_b2") == Path("sit_b2"), "a file that is there goes before names"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sendvae", "sendvae: no such file or recipe; did you mean 'send_vae'"),
        ("imagenet256/sit_b2_regleu", "did you mean 'imagenet256/sit_b2_reglue'"),
        ("sit_xl2_rega", "did you mean 'imagenet256/sit_xl2_re"),
        (
            "recipes/semvea.yaml",
            "recipes/semvea.yaml: no such file or recipe; did you mean 'semvae'",
        ),
        ("/nowhere/at/all.yaml", "^/nowhere/at/all.yaml: no such file$"),
        ("zzz", "^zzz: no such file or recipe; semtok recipes lists those there are$"),
    ],
)
def test_a_recipe_that_is_not_there_is_told_with_those_near(word, message):
    with pytest.raises(UserError, match=message):
        locate_recipe(word)


def test_training_commands_take_names_of_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_tokenizer.main(["imagenet256/vae_f8d4", "--print-recipe"]) == 0
    assert "vae: f8d4" in capsys.readouterr().out
    assert train_dit.main(["--recipe", "sit_b2", "--print-recipe"]) == 0
    assert "network: SiT-B/2" in capsys.readouterr().out
    for main, words in (
        (train_tokenizer.main, ["sit_b3"]),
        (train_dit.main, ["--recipe", "sit_b3"]),
    ):
        assert run(main, words) == 2
        assert "sit_b3: no such file or recipe; did you mean" in capsys.readouterr().err


def test_runs_of_recipes_of_one_name_go_into_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert run_name(Path("recipes/send_vae.yaml")) == "send_vae"
    assert run_name(Path("recipes/imagenet256/send_vae.yaml")) == "imagenet256/send_vae"
    assert run_name(tmp_path / "send_vae.yaml") == "send_vae"


@pytest.mark.parametrize("data", ["", "site"])
def test_recipes_of_an_installation_are_found(data, tmp_path, monkeypatch):
    """As ``pip install --user`` leaves them, where the list of files says; and as ``--target`` does, beside the package
    and with a list that is no longer right. A stranger's folder of recipes lies near."""
    site, lies = tmp_path / "lib/site", tmp_path / "lib" / data / "share/semtok/recipes"
    (tmp_path / "lib/recipes").mkdir(parents=True)
    lies.mkdir(parents=True)
    (lies / "dit.yaml").touch()
    (site / "semtok-9.0.dist-info").mkdir(parents=True)
    (site / "semtok-9.0.dist-info/METADATA").write_text("Name: semtok\nVersion: 9.0\n")
    record = "semtok/references.py,,\n../share/semtok/recipes/dit.yaml,,\n"
    (site / "semtok-9.0.dist-info/RECORD").write_text(record)
    monkeypatch.setattr(references, "__file__", str(site / "semtok/references.py"))
    monkeypatch.syspath_prepend(site)
    assert recipe_folder().resolve() == lies.resolve()


# The command -------------------------------------------------------------------------------------


def test_the_list_names_every_recipe_in_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(embedded_recipes())
    assert all(len(line.split()) > 3 for line in lines)
    assert command.main(["--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(embedded_recipes())


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert command.main(["diff", *words]) == 0
    return capsys.readouterr().out


def test_diff_tells_settings_official_values_and_reasons(capsys):
    shown = told(capsys, "send_vae")
    assert shown.startswith(str(recipe_folder() / "imagenet256/send_vae.yaml"))
    assert "method.reconstruction = l1   official: [P] MSE" in shown
    assert "train.clip_norm = 1.0" in shown and "train.batch_size" not in shown
    assert "normalisation\n" in shown and "[P] arXiv 2601.05823" in shown
    assert "train.batch_size = 1024" in told(capsys, "imagenet256/send_vae", "--all")
    content = json.loads(told(capsys, "send_vae", "--json"))
    kinds = {setting["kind"] for setting in content["settings"]}
    assert kinds == {"ours", "closest choice"}
    assert {"name": "method.reconstruction", "value": "l1"}.items() <= content["settings"][
        0
    ].items()


def test_what_is_read_no_further_ends_quietly(monkeypatch):
    """As under ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert command.main(["diff", "send_vae"]) == 141
        closed.flush()


def test_diff_of_a_laptops_recipe_says_which_have_one(capsys):
    assert run(command.main, ["diff", "dit"]) == 2
    assert "dit.yaml: does not say what differs" in capsys.readouterr().err


def test_a_recipe_is_shown_and_copied_as_it_stands(tmp_path, capsys):
    original = (recipe_folder() / "imagenet256/reg.yaml").read_text()
    assert command.main(["show", "reg"]) == 0
    assert capsys.readouterr().out == original
    assert command.main(["copy", "reg", str(tmp_path / "mine")]) == 0
    assert (tmp_path / "mine/reg.yaml").read_text() == original
    assert run(command.main, ["copy", "reg", str(tmp_path / "mine")]) == 2
    assert "reg.yaml: exists already" in capsys.readouterr().err


# What differs ------------------------------------------------------------------------------------

_REPA = {"data.cache", "sampler's state", "images", "seed"}
_SFD = {
    "data.cache",
    "latents",
    "sampler.error_over",
    "sampler.split_at_borders",
    "solver",
    "images",
    "seed",
}
_VAE = {"optimiser", "batch norm", "images", "seed"}
_RAE = {
    "data.crop",
    "data.flip",
    "method.lpips_net",
    "train.precision",
    "train.num_statistics_images",
    "statistics",
    "discriminator's rate",
    "crops, flips and precision",
    "images",
    "seed",
}
DIFFERENCES = {
    "sit_b2": {"data.cache", "images", "seed"},
    "sit_xl2": {"data.cache", "images", "seed"},
    "sit_xl2_repa": _REPA,
    "sit_xl2_reg": _REPA,
    "sit_b2_reglue": _REPA | {"frozen networks"},
    "sit_xl2_reglue": _REPA | {"frozen networks"},
    "sit_b2_redi": {"data.cache", "images", "seed"},
    "reglue": {"train.schedule", "train.num_statistics_images", "batch norm", "validation"},
    "reg": {"images"},
    "redi": {"train.num_statistics_images", "signs"},
    "semvae": {"data.crop", "warm-up", "train.batch_size", "batch"},
    "lightningdit_b1_sfd": _SFD,
    "lightningdit_b1_sfd_guide": _SFD | {"train.steps"},
    "lightningdit_xl1_sfd": _SFD,
    "lightningdit_1p0b1_sfd": _SFD,
    "lightningdit_xl1": {"data.cache", "latents", "images", "seed"},
    "vae_f16d32": _VAE,
    "va_vae_f16d32": _VAE | {"before the start"},
    "vae_f8d4": _VAE | {"data.crop", "train.steps", "train.batch_size", "length", "counter"},
    "eq_vae": {"draws", "discriminator", "batch norm", "optimiser", "train.batch_size", "GPUs"},
    "send_vae": {
        "method.reconstruction",
        "method.adversarial.weights",
        "method.adversarial.optimiser.learning_rate",
        "train.optimiser.betas",
        "train.optimiser.weight_decay",
        "train.clip_norm",
        "train.schedule",
        "train.precision",
        "normalisation",
        "mapper",
        "batch norm",
    },
    "repae": {"batch norm", "statistics", "sampler's state", "images", "seed"},
    "rae": _RAE,
    "raev2": _RAE,
    "reg_invae": {"data.crop", "data.flip", "teacher.input_size", "images", "flips and crops"},
    "srdit_b1": {"latents", "draws", "sampler's state", "train.ema_warmup", "decoding", "images"},
    "srdit_b1_send_vae": {"draws", "class token", "sampler.guidance.scale.texture", "images"},
    "srdit_b1_reglue": {
        "draws",
        "patches",
        "diffusion.network.preset",
        "diffusion.contrastive_weight.semantic",
        "sampler.guidance.scale.global",
    },
    "srdit_b1_semvae": {"draws", "class token", "diffusion.contrastive_weight", "sampler.method"},
    "ddt_xl2": {"initialisation", "sampler.guidance.interval", "images", "seed", "guidance"},
    "rae_ditdh_xl": {"accumulation", "images", "seed", "train.precision", "data.flip"},
    "sit_xl1_send_vae": {"sampler.guidance.interval", "labels", "train.clip_norm", "teacher.name"},
    "sit_b1_send_vae": {"diffusion.repa.depth", "labels", "train.clip_norm", "teacher.name"},
}
"""Of each recipe what is known to differ from the official code, or not to be known of it, and can't be mended by a
setting: found by comparing both line by line."""


def test_the_list_of_differences_has_every_recipe():
    assert sorted(f"{PUBLISHED}/{name}" for name in DIFFERENCES) == sorted(NAMES)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_what_is_known_to_differ_is_told(name, capsys):
    shown = told(capsys, name)
    names = set(
        re.findall(r"^  (\S.*?)(?: = .*|   .*)?$", shown.split("\nsources")[0], re.MULTILINE)
    )
    assert names >= DIFFERENCES[name]


# Sums over 256x256x3 numbers there, means here.
_SUMS = {
    "method.kl_weight": 1e-6 / (256 * 256 * 3),
    "method.adversarial.max_adaptive": 1e4 / (256 * 256 * 3),
}


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        *(
            (name, *one)
            for name in ("vae_f16d32", "vae_f8d4", "va_vae_f16d32")
            for one in _SUMS.items()
        ),
        ("va_vae_f16d32", "method.alignment.max_adaptive", 1e8 / (256 * 256 * 3)),
    ],
)
def test_weights_beside_sums_are_divided_beside_means(name, setting, value):
    recipe = load_recipe(embedded_recipes()[f"{PUBLISHED}/{name}"], [])
    found = recipe
    for part in setting.split("."):
        found = getattr(found, part)
    assert found == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("name", ["vae_f16d32", "va_vae_f16d32"])
def test_the_discriminator_starts_where_a_counter_of_two_optimisers_reaches_5001(name):
    adversarial = load_recipe(embedded_recipes()[f"{PUBLISHED}/{name}"], []).method.adversarial
    # As counted there: 2 n before the autoencoder's step of batch n, 2 n + 1 before the discriminator's.
    assert adversarial.start_step == next(n for n in range(3000) if 2 * n >= 5001)
    assert adversarial.first_step == next(n for n in range(3000) if 2 * n + 1 >= 5001)
