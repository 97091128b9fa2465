"""Wrong input is one line, exit code 2, and leaves nothing behind."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml

import semtok_cli
import tiny
from semtok import Tokenizer, UserError
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import main

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny.content(steps=2, checkpoint_every=1)))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of that recipe, which tests damage copies of."""
    root = tmp_path_factory.mktemp("errors")
    (root / "recipe.yaml").write_text(yaml.safe_dump(tiny.content(steps=2, checkpoint_every=1)))
    assert run(main, [str(root / "recipe.yaml"), "--output", str(root / "run")]) == 0
    return root / "run"


@pytest.fixture
def ran(recipe, finished) -> Path:
    """The recipe, and beside it the folder ``run`` of its finished run."""
    shutil.copytree(finished, recipe.parent / "run")
    return recipe


def complain(capsys, *arguments: str) -> str:
    """The one line that the command ends with."""
    assert run(main, list(arguments)) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


FOLDER = ["data={kind: folder, path: images, size: 16}"]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.stepz=3"], ["recipe.yaml", "train.stepz", "did you mean 'steps'"]),
        (["method.mapper.dept=2"], ["method.mapper.dept", "did you mean 'depth'"]),
        (["methd.name=vae"], ["'methd'", "did you mean 'method'"]),
        (["method.vae.Width=3"], ["'method.vae.Width'", "known here: attention, block_channels"]),
        (
            ["train.optimiser.lr=1"],
            ["train.optimiser.lr", "known here: adjust_lr_fn, betas, learning_rate"],
        ),
        (["train.steps=abc"], ["train.steps", "integer", "'abc'"]),
        (["train.steps=0"], ["train.steps", "expected at least 1, got 0"]),
        (["data.size=big"], ["data.size", "'big'"]),
        (["data.classes=[colour]"], ["data.classes", "colour", "hue"]),
        (["train.batch_size"], ["train.batch_size", "key=value"]),
        (["method.name=send_vea"], ["method.name", "unknown method", "did you mean 'send_vae'"]),
        (["data.kind=shape"], ["data.kind", "did you mean 'shapes'"]),
        (["data.size=18"], ["data.size", "18x18 is not divisible", "stride 4", "16x16"]),
        (["teacher=null"], ["needs a teacher", "teacher.name"]),
        (
            ["teacher.name=vit_tiny_patch16_22"],
            ["teacher.name", "did you mean 'vit_tiny_patch16_2"],
        ),
        (["teacher.layers=[7]"], ["teacher.layers", "out of range", "4 layers"]),
        (
            ["teacher.name=resnet18", "teacher.checkpoint=weights.safetensors"],
            [
                "teacher.checkpoint",
                "no such file 'weights.safetensors'",
                "pass teacher.checkpoint=",
            ],
        ),
        (["method.vae=nothing"], ["'nothing'", "neither a preset (tiny, f8d4, f16d32)"]),
        (
            ["method.vae=."],
            ["recipe.yaml: method.vae: .: holds no diffusers VAE", "; pass a folder"],
        ),
        (["data.flip=true"], ["recipe.yaml: data.flip: drawn scenes are never"]),
        # Said before the teacher is looked for.
        (["method.vae=nothing", "teacher.name=none"], ["'nothing'", "semtok hub import"]),
        (["method.vae=recipe.yaml"], ["recipe.yaml: a file", "semtok hub import auto recipe.yaml"]),
        (["method.alignment.noise_level=0.5"], ["noise_level", "'fixed'"]),
        (["train.accumulate=3"], ["train.batch_size: 4", "accumulate 3"]),
        (["train.accumulate=0"], ["train.accumulate", "greater than or equal to 1", "got 0"]),
        (["train.accumulate=some"], ["train.accumulate", "expected auto or a", "got 'some'"]),
        (["train.accumulate=auto"], ["train.accumulate", "train.memory", "or give a number"]),
        (
            ["train.accumulate=auto", "train.memory={gpu: 8, fixed: 8, per_image: 1}"],
            ["train.accumulate", "even one image at once needs 9 GB"],
        ),
        (["train.memory.gpu=8"], ["'train.memory.fixed' is missing"]),
        (["train.memory={gpu: 8, fixed: -1, per_image: 1}"], ["train.memory.fixed"]),
        (["train.export_at=[1, 3]"], ["train.export_at", "3 is more than train.steps 2"]),
        (["train.export_at=[0]"], ["train.export_at", "greater than or equal to 1, got 0"]),
        (["train.export_at=[1, 1]"], ["train.export_at", "twice"]),
        (["train.ema_warmup=false", "train.ema_decay=null"], ["ema_warmup", "train.ema_decay"]),
        (["train.warmup_steps=9"], ["warmup_steps 9", "steps 2"]),
        (
            ["train.schedule=constant", "train.final_lr_fraction=0.1"],
            ["final_lr_fraction", "cosine"],
        ),
        (["method.vae.block_channels=[6, 8]"], ["method.vae: block_channels", "norm_groups"]),
        (["method.vae.norm_groups=0"], ["method.vae.norm_groups", "greater than or equal to 1"]),
        (["method.vae={}"], ["'method.vae.block_channels' is missing"]),
        (["method.name=[vae]"], ["method.name: expected a name, got ['vae']"]),
        (["data.kind.x=1"], ["data.kind: expected a name"]),
        (["data.size=[16]"], ["data.size: too few values, got [16]"]),
        (["train.optimiser.learning_rate=-1"], ["train.optimiser.learning_rate", "greater than 0"]),
        (["train.optimiser.betas=[0.9, 1.5]"], ["train.optimiser.betas", "less than 1"]),
        (["train.clip_norm=-1"], ["train.clip_norm", "greater than 0"]),
        (["train.ema_decay=1.5"], ["train.ema_decay", "less than 1"]),
        (["train.seed=-1"], ["train.seed"]),
        (["method.mapper.width=130"], ["method.mapper.width", "multiple of 4"]),
        (["method.mapper.heads=5"], ["method.mapper: width", "multiple of 4 and of heads 5"]),
        (["method.alignment.weight=-1"], ["method.alignment.weight"]),
        (
            ["method.adversarial={start_step: 20, width: 8, num_layers: 5}"],
            ["method.adversarial.num_layers: too many for images of 16x16"],
        ),
        (["data.size=4"], ["too small to measure SSIM"]),
        (["data.size=0"], ["data.size", "at least 1, got 0"]),
        (["data.classes=[hue, hue]"], ["data.classes", "twice"]),
        (["train.seed=2020-01-01"], ["recipe.yaml", "a kind that recipes can't hold"]),
        (["train.seed=2020-13-45"], ["train.seed=2020-13-45", "not valid YAML"]),
        (["train.seed=" + "[" * 3000], ["not valid YAML"]),
        (["train.seed=&a [*a]"], ["not valid YAML"]),
        (['method.name="vae\\n\\e[31m"'], [r"unknown method 'vae\n\x1b[31m'"]),
        (["plugins=[recipe.yaml]"], ["plugins", "'recipe.yaml' is not a Python file"]),
        (FOLDER, ["data.path", "no such folder 'images'", "pass data.path="]),
        (["plugins=[mine.py]"], ["plugins", "no such file 'mine.py'"]),
    ],
)
def test_a_setting_that_cannot_work_is_named_with_a_way_out(recipe, capsys, overrides, words):
    message = complain(capsys, str(recipe), *overrides)
    for word in words:
        assert word in message
    assert not (recipe.parent / "runs").exists()


def test_aliases_that_stand_for_more_than_a_machine_holds_are_refused(recipe, capsys):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    recipe.write_text("\n".join(lines))
    assert "not valid YAML (too many values" in complain(capsys, str(recipe))


def test_a_precision_that_only_gpus_have(recipe, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = complain(capsys, str(recipe), "train.precision=fp16")
    assert "train.precision" in message and "needs a GPU" in message and "bf16" in message
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{a: [", "not valid YAML"),
        ("- a\n- b\n", "expected 'key: value' lines"),
        ("just text", "expected 'key: value' lines"),
        ("", "expected 'key: value' lines"),
        ("\x00\x01", "not valid YAML"),
        ("method: {name: vae}\ntrain: {steps: 1}\n", "'data.kind' is missing"),
        ("seed: 2020-01-01\nmethod: {name: vae}\ndata: {kind: shapes}\n", "can't hold"),
    ],
)
def test_a_file_that_is_no_recipe(recipe, capsys, content, words):
    recipe.write_text(content)
    message = complain(capsys, str(recipe))
    assert "recipe.yaml" in message and words in message
    assert not (recipe.parent / "runs").exists()


def test_a_missing_recipe_and_a_folder_instead_of_one(recipe, capsys):
    assert complain(capsys, "nowhere.yaml") == "error: nowhere.yaml: no such file"
    assert "can't be read as text" in complain(capsys, str(recipe.parent))
    assert not (recipe.parent / "runs").exists()


def test_a_plugin_that_is_not_python_is_no_better_the_second_time(recipe, capsys):
    (recipe.parent / "mine.py").write_text("x = (\n")
    for _ in range(2):
        message = complain(capsys, str(recipe), "plugins=[mine.py]")
        assert "plugins: 'mine.py', line 1: not valid Python" in message


def test_a_missing_recipe_and_no_traceback_in_a_real_process(tmp_path):
    command = [sys.executable, "tools/train_tokenizer.py", "nowhere.yaml"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 2
    assert done.stderr == "error: nowhere.yaml: no such file\n"


def test_an_empty_folder_and_one_without_readable_images(recipe, capsys):
    images = recipe.parent / "images"
    images.mkdir()
    assert "no images in 'images'" in complain(capsys, str(recipe), *FOLDER)
    for i in range(3):
        (images / f"{i}.jpg").write_text("not an image")
    message = complain(capsys, str(recipe), *FOLDER)
    assert "data.path" in message and "can be read" in message
    assert not (recipe.parent / "runs").exists()


def test_folders_that_are_taken(ran, capsys):
    assert "holds a run already; go on with --resume" in complain(
        capsys, str(ran), "--output", "run"
    )
    other = ran.parent / "photos"
    other.mkdir()
    (other / "me.jpg").write_text("precious")
    assert "not empty and not a run" in complain(capsys, str(ran), "--output", "photos")
    assert (other / "me.jpg").read_text() == "precious"
    assert "no run to resume" in complain(capsys, str(ran), "--output", "new", "--resume")
    assert not (ran.parent / "new").exists()
    for output in ("photos/me.jpg", "photos/me.jpg/run"):
        message = complain(capsys, str(ran), "--output", output)
        assert f"--output {output}" in message and "is a file; choose a folder" in message
    message = complain(capsys, str(ran), "train.batch_size=2", "--output", "run", "--resume")
    assert "train.batch_size was 4 and is now 2" in message


@pytest.mark.parametrize("file", ["model.safetensors", "state.pt"])
def test_a_checkpoint_cut_short_is_refused_and_says_what_to_do(ran, capsys, file):
    newest = sorted((ran.parent / "run" / "checkpoints").iterdir())[-1]
    whole = (newest / file).read_bytes()
    (newest / file).write_bytes(whole[: len(whole) // 2])
    message = complain(capsys, str(ran), "--output", "run", "--resume")
    assert file in message and "cut short or damaged" in message
    assert f"delete run/checkpoints/{newest.name}" in message


def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(ran, capsys):
    import pickle

    victim = ran.parent / "created"

    class Evil:
        def __reduce__(self):
            return Path.touch, (victim,)

    newest = sorted((ran.parent / "run" / "checkpoints").iterdir())[-1]
    (newest / "state.pt").write_bytes(pickle.dumps(Evil()))
    complain(capsys, str(ran), "--output", "run", "--resume")
    assert not victim.exists()


def test_damaged_and_newer_exports_are_refused_in_one_line(ran):
    export = ran.parent / "run" / "export"
    for name in ("tokenizer.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        whole = (export / name).read_bytes()
        (export / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError) as error:
            Tokenizer.from_pretrained("run")
        assert "\n" not in str(error.value)
        (export / name).write_bytes(whole)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99 is newer .*upgrade semtok"):
        Tokenizer.from_pretrained("run")
    for broken, words in (
        ([], "not a semtok tokenizer"),
        ({"library": "semtok"}, "'format_version' is missing; export again"),
        ({k: v for k, v in config.items() if k != "method"}, "method missing; export again"),
    ):
        (export / "config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=words):
            Tokenizer.from_pretrained("run")
    (export / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json: not readable as JSON"):
        Tokenizer.from_pretrained("run")


def test_unknown_options_and_commands_are_one_line(recipe, capsys, monkeypatch):
    assert "unrecognized arguments: --foo; see train_tokenizer --help" in complain(
        capsys, str(recipe), "--foo"
    )
    monkeypatch.setattr(sys, "argv", ["semtok", "trian"])
    assert semtok_cli.main() == 2
    assert capsys.readouterr().err.strip() == "error: no command 'trian'; see semtok --help"


def test_an_output_that_cannot_be_written_is_refused_at_once(recipe, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "can't be written to" in complain(capsys, str(recipe), "--output", "here/run")


def test_a_vae_with_missing_or_other_tensors_is_refused(ran):
    file = Path("run/export/vae/diffusion_pytorch_model.safetensors")
    state = safetensors.torch.load_file(file)
    for broken in (
        {n: t for n, t in state.items() if n != "decoder.conv_out.weight"},
        state | {"extra": torch.zeros(1)},
    ):
        safetensors.torch.save_file(broken, file)
        with pytest.raises(UserError, match="do not fit its config.json"):
            Tokenizer.from_pretrained("run")
    for file in Path("run/export/vae").iterdir():
        file.unlink()
    Path("run/export/vae").rmdir()
    with pytest.raises(UserError, match="its folder vae/ is missing; export again"):
        Tokenizer.from_pretrained("run")


def test_a_log_and_a_state_that_were_cut_short(ran, capsys):
    log = Path("run/metrics.jsonl")
    log.write_text(log.read_text() + '{"step": 3, "loss')
    assert run(main, [str(ran), "--output", "run", "--resume"]) == 0
    assert len(log.read_text().splitlines()) == 1
    newest = sorted(Path("run/checkpoints").iterdir())[-1]
    torch.save([1, 2], newest / "state.pt")
    message = complain(capsys, str(ran), "--output", "run", "--resume")
    assert "state.pt: damaged, or of another version; delete" in message
