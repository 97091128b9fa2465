"""From a recipe to a generator: the objective's terms, training, resuming, sampling, files."""

import copy
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tiny
from semtok import Generator, Tokenizer, UserError
from semtok.commands import evaluate, sample, train_dit
from semtok.commands.cli import run
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.diffusion.diffusion_config import DiffusionConfig, REPAConfig
from semtok.diffusion.learner import cosine_loss, squared_error
from semtok.diffusion.training import DiffusionObjective
from semtok.objective import Batch
from semtok.recipe import parse_recipe
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.sampling import Method, SamplerConfig
from semtok.teachers import Teacher, TeacherConfig

NETWORK = {"depth": 2, "width": 32, "heads": 2, "rope": True, "swiglu": True}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a trained tokenizer as the run ``tok`` and a recipe for a generator."""
    root = tmp_path_factory.mktemp("diffusion")
    recipe = parse_recipe(tiny.content({"name": "vae"}, steps=2), "tiny")
    train_tokenizer(recipe, root / "runs" / "tok")
    (root / "dit.yaml").write_text(yaml.safe_dump(content()))
    return root


def content(**train: Any) -> dict[str, Any]:
    recipe = tiny.content(**train)
    del recipe["method"], recipe["teacher"]
    return recipe | {
        "diffusion": {"network": NETWORK},
        "sampler": {"method": "heun", "steps": 2, "guidance": {"scale": 1.5}},
    }


def train(root: Path, name: str, *arguments: str) -> Path:
    """Runs the command in ``root``; gives the run's folder."""
    recipe, output = str(root / "dit.yaml"), str(root / "runs" / name)
    code = run(
        train_dit.main,
        ["--recipe", recipe, "--tokenizer", str(root / "runs/tok"), "--output", output, *arguments],
    )
    assert code == 0
    return root / "runs" / name


@pytest.fixture(scope="module")
def model(trained: Path) -> Path:
    return train(trained, "model")


def objective(
    tokenizer: Tokenizer, teacher: Teacher | None = None, **settings: Any
) -> DiffusionObjective:
    torch.manual_seed(0)
    guidance = GuidanceConfig(scale=settings.pop("scale", 1.0))
    config = DiffusionConfig(network=DiTArchitecture(**NETWORK), **settings)
    return DiffusionObjective(
        config,
        tokenizer,
        class_names=["a", "b", "c"],
        image_size=(16, 16),
        sampler=SamplerConfig(steps=1, guidance=guidance),
        teacher=teacher,
    )


# The objective -----------------------------------------------------------------------------------


def test_losses_by_hand():
    a, b = torch.randn(2, 3, 4, 2, 5)
    torch.testing.assert_close(squared_error(a, b)[1], ((a[1] - b[1]) ** 2).mean())
    cosine = torch.nn.functional.cosine_similarity(a[2, :, 1, 3], b[2, :, 1, 3], dim=0)
    torch.testing.assert_close(cosine_loss(a[2:, :, 1:2, 3:4], b[2:, :, 1:2, 3:4])[0], 1 - cosine)
    assert cosine_loss(a[:, :, 0, 0], b[:, :, 0, 0]).shape == (3,)


def test_each_term_trains_what_it_should_and_the_tokenizer_stays_as_it_is(trained):
    tokenizer = Tokenizer.from_pretrained(trained / "runs/tok")
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    teacher = Teacher(TeacherConfig(input_size=16))
    stage = objective(
        tokenizer, teacher, cosine_weight=1.0, repa=REPAConfig(depth=1, projector_width=16)
    )
    learner, network = stage.learners["dit"], stage.averaged_module()
    for parameter in network.parameters():  # zero-initialised layers let no gradient through
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    inputs = stage.prepare(Batch(torch.rand(4, 3, 16, 16) * 2 - 1, torch.tensor([0, 1, 2, 0])))
    output = learner(inputs, tiny.draws(), 0, {})
    assert output.terms.keys() == {"velocity/texture", "cosine", "alignment"}
    reached = {}
    for name, term in output.terms.items():
        grads = torch.autograd.grad(
            term.value.mean(), list(learner.parameters()), retain_graph=True, allow_unused=True
        )
        names = [n for n, _ in learner.named_parameters()]
        reached[name] = {n for n, g in zip(names, grads, strict=True) if g is not None and g.any()}
    everything = {n for n, _ in learner.named_parameters()}
    projector = {n for n in everything if n.startswith("projector.")}
    for name in ("velocity/texture", "cosine"):
        assert reached[name] == everything - projector
    late = {n for n in everything if n.startswith(("network.blocks.1.", "network.final."))}
    assert reached["alignment"] == everything - late, "REPA after block 1 trains no later block"
    assert not any(p.requires_grad for p in tokenizer.parameters())
    assert all(torch.equal(before[n], v) for n, v in tokenizer.state_dict().items())


def test_labels_are_dropped_as_often_as_asked(trained, monkeypatch):
    stage = objective(Tokenizer.from_pretrained(trained / "runs/tok"), class_dropout=0.25)
    seen = []
    network = stage.averaged_module()
    original = network.forward
    monkeypatch.setattr(
        network, "forward", lambda x, t, y, **k: seen.append(y) or original(x, t, y, **k)
    )
    inputs = stage.prepare(Batch(torch.zeros(256, 3, 16, 16), torch.ones(256, dtype=torch.int64)))
    for step in range(4):
        stage.learners["dit"](inputs, tiny.draws(step, 256), step, {})
    labels = torch.cat(seen)
    assert set(labels.tolist()) == {1, 3}
    assert (labels == 3).float().mean().item() == pytest.approx(0.25, abs=0.05)


def test_metrics_tell_the_loss_of_each_quarter_of_time(trained):
    stage = objective(Tokenizer.from_pretrained(trained / "runs/tok"))
    inputs = stage.prepare(Batch(torch.rand(64, 3, 16, 16), torch.zeros(64, dtype=torch.int64)))
    output = stage.learners["dit"](inputs, tiny.draws(0, 64), 0, {})
    pairs = torch.stack(list(output.metrics.values()))
    assert list(output.metrics) == [
        f"velocity_at_{t}" for t in ("0.125", "0.375", "0.625", "0.875")
    ]
    assert pairs[:, 1].sum() == 64
    torch.testing.assert_close(
        pairs[:, 0].sum(), output.terms["velocity/texture"].value.sum().detach()
    )


def test_settings_that_fit_no_tokenizer_are_refused(trained):
    tokenizer = Tokenizer.from_pretrained(trained / "runs/tok")
    for settings, words in (
        ({"leads": {"semantic": 0.3}}, r"diffusion.leads: no part \['semantic'\].*: texture"),
        ({"loss_weights": {"texure": 1.0}}, "diffusion.loss_weights"),
        ({"repa": REPAConfig(depth=9)}, "diffusion.repa.depth: 9 is more than the network's 2"),
        ({"scale": 2.0, "class_dropout": 0.0}, "diffusion.class_dropout=0 never trains"),
        ({"scale": 2.0, "unconditional": True}, "no classes to guide by"),
        ({"scale": {"textur": 2.0}}, r"no part \['textur'\]; the parts are texture"),
    ):
        with pytest.raises(ValueError, match=words):
            objective(tokenizer, **settings)
    with pytest.raises(ValueError, match="patch size 3 does not divide the latent grid 4x4"):
        DiffusionObjective(
            DiffusionConfig(network=DiTArchitecture(**NETWORK, patch_size=3)),
            tokenizer,
            class_names=["a"],
            image_size=(16, 16),
            sampler=SamplerConfig(),
        )


# Training ----------------------------------------------------------------------------------------


def test_a_run_leaves_what_people_look_for(model):
    rows = [json.loads(line) for line in (model / "metrics.jsonl").open()]
    assert {"loss/velocity/texture", "grad_norm/dit"} <= rows[0].keys()
    assert any(key.startswith("metric/velocity_at_") for key in rows[0])
    assert (model / "curves.png").is_file() and list((model / "samples").glob("*.png"))
    summary = json.loads((model / "summary.json").read_text())
    assert {"velocity", "velocity_at_0.125"} <= summary["validation"].keys()
    recipe = yaml.safe_load((model / "recipe.yaml").read_text())
    assert recipe["tokenizer"].endswith("tok") and recipe["diffusion"]["class_dropout"] == 0.1


def test_an_interrupted_run_ends_with_the_same_weights_and_samples(trained, model):
    again = train(trained, "again", "train.checkpoint_every=3")
    newest = sorted((again / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(trained, "again", "train.checkpoint_every=3", "--resume")
    ours, theirs = tiny.final_tensors(again), tiny.final_tensors(model)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    images = [Generator.from_pretrained(run).sample([0, 5], seed=3) for run in (again, model)]
    assert torch.equal(*images)


def test_a_resumed_run_keeps_its_tokenizer_though_the_reference_changed(trained, tmp_path):
    import shutil

    reference = tmp_path / "reference"
    shutil.copytree(trained / "runs/tok/export", reference)
    base = ["--recipe", str(trained / "dit.yaml"), "--tokenizer", str(reference)]
    base += ["--output", str(tmp_path / "run"), "train.schedule=constant"]
    assert run(train_dit.main, [*base, "train.steps=3"]) == 0
    first = Tokenizer.from_pretrained(tmp_path / "run/export/tokenizer").state_dict()
    other = Tokenizer.from_pretrained(reference)
    with torch.no_grad():
        other.autoencoder.encoder.conv_out.bias.add_(1)
    other.save_pretrained(reference)
    assert run(train_dit.main, [*base, "train.steps=4", "--resume"]) == 0
    then = Tokenizer.from_pretrained(tmp_path / "run/export/tokenizer").state_dict()
    assert all(torch.equal(first[name], then[name]) for name in first)


def test_embedded_scenes_in_place_of_the_tokenizers_own_images_are_told(trained, tmp_path, capsys):
    for i, drawn in enumerate(Shapes(ShapesConfig(size=16), train=True).load(range(12)).images):
        (tmp_path / "mine" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(drawn.permute(1, 2, 0).numpy())
        image.save(tmp_path / "mine" / "ab"[i % 2] / f"{i}.png")
    own = {"kind": "folder", "path": str(tmp_path / "mine"), "size": 16, "validation_fraction": 0.4}
    recipe = tiny.content({"name": "vae"}, steps=2) | {"data": own}
    train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "runs" / "tok")
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(content(steps=2)))
    capsys.readouterr()
    train(tmp_path, "scenes")
    told = capsys.readouterr().out
    assert "was trained on mine (" in told and "these are the embedded scenes" in told
    assert "data.kind=folder" in told
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(content(steps=2) | {"data": own}))
    train(tmp_path, "own")
    assert "warning" not in capsys.readouterr().out


def test_training_first_needs_a_finite_tokenizer(trained, capsys):
    tokenizer = Tokenizer.from_pretrained(trained / "runs/tok")
    with torch.no_grad():
        # Weights are finite, and what they make of an image is too large.
        tokenizer.autoencoder.encoder.conv_out.weight.mul_(1e38)
        tokenizer.autoencoder.encoder.conv_out.bias.fill_(3e38)
    tokenizer.save_pretrained(trained / "broken")
    arguments = [
        "--recipe",
        str(trained / "dit.yaml"),
        "--tokenizer",
        str(trained / "broken"),
        "--output",
        str(trained / "runs/never"),
    ]
    assert run(train_dit.main, arguments) == 2
    error = capsys.readouterr().err
    assert "texture latents of the first training image are not finite" in error
    assert not (trained / "runs/never").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["diffusion.network=SiT-B/3"], "no preset 'SiT-B/3'; presets: SiT-T/1"),
        (["diffusion.netwrk=SiT-B/2"], "unknown key 'diffusion.netwrk'; did you mean 'network'?"),
        (["diffusion.network={depth: 1, width: 30, heads: 4}"], "width 30 must be a multiple of 4"),
        (["diffusion.repa={}"], "diffusion.repa needs a teacher"),
        (["sampler.steps=0"], "sampler.steps"),
        (["sampler.guidance.interval=[0.9, 0.1]"], "expected 0 <= begin <= end <= 1"),
        (["data.size=18"], "image size 18x18 is not divisible"),
        (
            ["tokenizer=nowhere", "--tokenizer", "nowhere"],
            "tokenizer 'nowhere': no such folder, run",
        ),
        (
            ["tokenizer=somewhere", "--tokenizer", "nowhere"],
            "name two tokenizers; give one",
        ),
    ],
)
def test_wrong_settings_are_one_line_before_any_work(trained, capsys, arguments, words):
    output = trained / "runs" / "wrong"
    base = [
        "--recipe",
        str(trained / "dit.yaml"),
        "--output",
        str(output),
        "--tokenizer",
        str(trained / "runs/tok"),
    ]
    assert run(train_dit.main, base + arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not output.exists()


# Sampling ----------------------------------------------------------------------------------------


def draw(model: Path, output: Path, *arguments: str) -> int:
    return run(sample.main, [str(model), "--output", str(output), *arguments])


def test_a_set_is_the_same_whatever_the_batch(model, tmp_path):
    base = ["--num", "7", "--seed", "5"]
    assert draw(model, tmp_path / "a.npz", *base, "--batch-size", "7") == 0
    assert draw(model, tmp_path / "b.npz", *base, "--batch-size", "2") == 0
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert a["arr_0"].shape == (7, 16, 16, 3) and a["arr_0"].dtype == np.uint8
    assert np.array_equal(a["arr_1"], b["arr_1"])
    # Batches of other sizes round differently in the last bit.
    assert np.abs(a["arr_0"].astype(int) - b["arr_0"]).max() <= 1
    assert draw(model, tmp_path / "c.npz", "--num", "7", "--seed", "6") == 0
    assert not np.array_equal(a["arr_0"], np.load(tmp_path / "c.npz")["arr_0"])


@pytest.mark.parametrize("method", get_args(Method))
def test_every_sampler_does_so(model, method):
    generator = Generator.from_pretrained(model)
    config = generator.sampler.model_copy(update={"method": method, "steps": 3})
    whole = generator.sample_latents([0, 1, 2], seed=1, sampler=config).texture
    last = generator.sample_latents([2], seed=1, first=2, sampler=config).texture
    torch.testing.assert_close(whole[2:], last, atol=1e-4, rtol=0)
    assert torch.equal(whole, generator.sample_latents([0, 1, 2], seed=1, sampler=config).texture)


@pytest.mark.parametrize(
    ("words", "settings", "guidance"),
    [
        (["--guidance", "4", "--num-channels", "3"], {}, {"scale": 4.0, "num_channels": 3}),
        (["--method", "midpoint"], {"method": "midpoint"}, {}),
        (
            ["--method", "sde", "--diffusion", "increasing-decreasing", "--steps", "9"],
            {"method": "sde", "diffusion": "increasing-decreasing", "steps": 9},
            {},
        ),
        (
            ["--method", "dopri5", "--error-over", "batch"],
            {"method": "dopri5", "error_over": "batch"},
            {},
        ),
    ],
)
def test_the_options_are_the_settings_of_those_names(
    model, tmp_path, words, settings, guidance, monkeypatch
):
    own = Generator.from_pretrained(model).sampler
    wanted = own.model_copy(update={"guidance": own.guidance.model_copy(update=guidance)})
    wanted = wanted.model_copy(update=settings)
    used: list[SamplerConfig] = []
    original = Generator.sample

    def noting(self: Generator, *labels: Any, sampler: SamplerConfig, **others: Any) -> Any:
        used.append(sampler)
        return original(self, *labels, sampler=sampler, **others)

    monkeypatch.setattr(Generator, "sample", noting)
    assert draw(model, tmp_path / "x.npz", "--num", "2", *words) == 0
    assert used == [wanted] and wanted != own


def test_compiled_sampling_draws_the_same_images(model):
    """With guidance in half of the time, so that the compiled blocks see both batch sizes."""
    guidance = GuidanceConfig(scale=2.0, interval=(0.5, 1.0))
    config = SamplerConfig(method="euler", steps=4, guidance=guidance)
    plain = Generator.from_pretrained(model)
    tiny.awake(plain.network)
    fast = copy.deepcopy(plain).speed_up(compile="aot_eager")
    assert fast.network.state_dict().keys() == plain.network.state_dict().keys()
    assert all(block._compiled_call_impl is not None for block in fast.network.blocks)
    expected = plain.sample([0, 1], seed=4, sampler=config)
    torch.testing.assert_close(fast.sample([0, 1], seed=4, sampler=config), expected)


def test_half_precision_is_the_transformers_alone(model):
    plain = Generator.from_pretrained(model)
    tiny.awake(plain.network)
    config = plain.sampler.model_copy(update={"steps": 8})
    expected = plain.sample_latents([0, 1], seed=4, sampler=config).texture
    seen: list[torch.dtype] = []
    fast = copy.deepcopy(plain).speed_up(precision="bf16")
    fast.network.blocks[0].attn.qkv.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    latents = fast.sample_latents([0, 1], seed=4, sampler=config).texture
    assert set(seen) == {torch.bfloat16} and latents.dtype == torch.float32
    difference = (latents - expected).square().mean() / expected.square().mean()
    assert 0 < difference < 0.02**2
    assert torch.equal(
        fast.speed_up().sample_latents([0, 1], seed=4, sampler=config).texture, expected
    )


def test_how_images_are_computed_is_asked_for_by_options(model, tmp_path):
    assert draw(model, tmp_path / "plain", "--num", "3") == 0
    options = ["--precision", "bf16", "--compile", "aot_eager"]
    assert draw(model, tmp_path / "fast", "--num", "3", *options) == 0
    plain, fast = (
        np.stack(
            [np.asarray(Image.open(f), dtype=float) for f in sorted((tmp_path / n).glob("*.png"))]
        )
        for n in ("plain", "fast")
    )
    assert plain.shape == fast.shape and np.abs(plain - fast).mean() < 3


def test_every_command_that_draws_hands_these_options_on(model, tmp_path, monkeypatch, capsys):
    def refuse(generator: Generator, *, precision: str, compile: str) -> Generator:
        raise UserError(f"asked for {precision} and {compile}")

    monkeypatch.setattr(Generator, "speed_up", refuse)
    options = ["--precision", "bf16", "--compile", "aot_eager"]
    assert draw(model, tmp_path / "x.png", *options) == 2
    assert run(evaluate.main, ["classes", "--model", str(model), *options]) == 2
    assert run(evaluate.main, ["generation", "--model", str(model), *options]) == 2
    assert capsys.readouterr().err.count("asked for bf16 and aot_eager") == 3


def test_a_grid_a_folder_and_an_archive_hold_the_same_images(model, tmp_path):
    names = ["ellipse red", "7"]
    for output in ("grid.png", "folder", "set.npz"):
        assert draw(model, tmp_path / output, "--classes", *names, "--num", "4") == 0
    archive = np.load(tmp_path / "set.npz")
    assert archive["arr_1"].tolist() == [0, 7, 0, 7], "classes take turns"
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [f.name for f in files] == [f"{i:06d}.png" for i in range(4)]
    for file, image in zip(files, archive["arr_0"], strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    line = (grid.shape[0] - 4) // 2 - 100  # the name of a class above each row
    assert line > 10 and grid.shape == (4 + 2 * (100 + line), 4 + 2 * 100, 3)
    for place, number in enumerate((0, 2, 1, 3)):  # a class a row
        row, column = divmod(place, 2)
        top, left = 4 + (100 + line) * row + line, 4 + 100 * column
        cell = grid[top : top + 96, left : left + 96]
        for corner in (0, 5):  # each pixel is six pixels high and wide
            assert np.array_equal(cell[corner::6, corner::6], archive["arr_0"][number])


def test_a_model_is_the_same_after_saving_and_its_weak_self_guides_nothing(model, tmp_path):
    generator = Generator.from_pretrained(model)
    generator.save_pretrained(tmp_path / "copy")
    again = Generator.from_pretrained(tmp_path / "copy")
    assert torch.equal(generator.sample([1, 2], seed=9), again.sample([1, 2], seed=9))
    # Guided away from itself a model goes nowhere else.
    unguided = generator.sampler.model_copy(
        update={"guidance": generator.sampler.guidance.model_copy(update={"scale": 1.0})}
    )
    torch.testing.assert_close(
        generator.sample([1, 2], seed=0, weak=again),
        generator.sample([1, 2], seed=0, sampler=unguided),
        atol=1e-4,
        rtol=0,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--classes", "36"], "no class '36'; this model has 0 to 35, or by name ellipse red"),
        (["--classes", "-1"], "no class '-1'"),
        (["--steps", "0"], "--steps: expected at least 1"),
        (["--guidance", "strong"], "--guidance: expected a number"),
        (["--guidance", "nan"], "--guidance: expected a number"),
        (["--seed", "abc"], "invalid int value: 'abc'; see sample --help"),
        (["--classes", "²"], "no class '²'"),
        (["--guidance", "semantic=2"], "no part ['semantic']; this model's: texture"),
        (["--interval", "0.5", "0.1"], "--interval: expected 0 <= BEGIN <= END <= 1"),
        (["--guidance", "1", "--interval", "0", "0.5"], "--interval: nothing is guided"),
        (
            ["--guidance-base", "dropped_path"],
            "--guidance-base: this model was trained without the dropped path and the null label; pass null_label",
        ),
        (
            ["--guidance-base", "null_label", "--guidance", "1"],
            "--guidance-base: nothing is guided",
        ),
        (["--guidance", "1", "--num-channels", "3"], "--num-channels: the texture is not guided"),
        (["--num-channels", "5"], "--num-channels: expected 1 to 4, the texture's channels, got 5"),
        (["--method", "dopri5", "--steps", "3"], "--steps: dopri5 chooses its steps; leave it out"),
        (["--diffusion", "linear"], "--diffusion: goes with --method sde, not heun"),
        (["--error-over", "batch"], "--error-over: goes with --method dopri5, not heun"),
        (["--num", "0"], "--num and --batch-size must be at least 1"),
    ],
)
def test_wrong_requests_are_one_line(model, tmp_path, capsys, arguments, words):
    arguments = [a for a in arguments]
    if arguments == ["--classes", "-1"]:
        arguments = ["--classes=-1"]
    assert draw(model, tmp_path / "x.png", *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "x.png").exists()


def test_outputs_are_never_written_over_and_labels_out_of_range_are_refused(
    model, tmp_path, capsys
):
    (tmp_path / "mine.png").write_text("precious")
    assert draw(model, tmp_path / "mine.png") == 2
    assert draw(model, tmp_path / "film.mp4") == 2
    assert draw("nowhere", tmp_path / "x.png") == 2
    errors = capsys.readouterr().err
    assert "exists already" in errors and "expected FILE.png" in errors
    assert "model 'nowhere': no such folder or run" in errors
    assert (tmp_path / "mine.png").read_text() == "precious"
    with pytest.raises(
        ValueError, match="class_labels: no class 37; this model has 0 to 35, or by name"
    ):
        Generator.from_pretrained(model).sample([37])


def test_a_tokenizer_of_other_latents_is_told_with_both_specs(model, tmp_path, trained):
    import shutil

    shutil.copytree(model / "export", tmp_path / "mixed")
    other = tiny.build({"name": "vae", "vae": {**tiny.AUTOENCODER, "latent_channels": 6}})
    tokenizer = other.tokenizer(other.averaged_module())
    tokenizer.measure_statistics([torch.rand(8, 3, 16, 16)])
    tokenizer.save_pretrained(tmp_path / "mixed" / "tokenizer")
    with pytest.raises(
        UserError, match="generates texture 4 channels, stride 4, its tokenizer has texture 6"
    ):
        Generator.from_pretrained(tmp_path / "mixed")
    with pytest.raises(UserError, match=r"is a generator, not a tokenizer; its tokenizer is"):
        Tokenizer.from_pretrained(model)
    with pytest.raises(UserError, match="not a semtok generator"):
        Generator.from_pretrained(trained / "runs/tok")


def test_a_weak_model_must_mean_the_same(trained, model, tmp_path, capsys):
    main, weak = Generator.from_pretrained(model), Generator.from_pretrained(model)
    weak.class_names = weak.class_names[:-1] + ("other",)
    with pytest.raises(ValueError, match="the weak model has other classes"):
        main.sample([0], weak=weak)
    weak = Generator.from_pretrained(model)
    weak.tokenizer.texture_mean += 1
    with pytest.raises(ValueError, match="another tokenizer's latents"):
        main.sample([0], weak=weak)
    arguments = ["--weak", str(model), "--guidance", "1"]
    assert draw(model, tmp_path / "x.png", *arguments) == 2
    assert "--weak needs a guidance scale other than 1" in capsys.readouterr().err


def test_damaged_exports_are_told_in_one_line(model, tmp_path):
    import shutil

    export = shutil.copytree(model / "export", tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    for key in ("format_version", "latents", "class_names", "sampler", "trained"):
        broken = {k: v for k, v in config.items() if k != key}
        (export / "config.json").write_text(json.dumps(broken))
        with pytest.raises(UserError, match=f"{key} missing; export again"):
            Generator.from_pretrained(export)
    for change in ({"latents": [{"name": "texture"}]}, {"image_size": [33, 33]}):
        (export / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=r"config.json: "):
            Generator.from_pretrained(export)
    (export / "config.json").write_text(json.dumps(config))
    (export / "network.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="network.safetensors: cut short or damaged"):
        Generator.from_pretrained(export)


def test_saving_never_replaces_anything_but_an_export(model, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("precious")
    generator = Generator.from_pretrained(model)
    for saved in (generator, generator.tokenizer):
        with pytest.raises(UserError, match="home: holds other files"):
            saved.save_pretrained(tmp_path / "home")
        with pytest.raises(UserError, match="holds other files"):
            saved.save_pretrained(tmp_path / "home/thesis.txt")
        saved.save_pretrained(tmp_path / "again")
    assert (tmp_path / "home/thesis.txt").read_text() == "precious"


def test_an_unconditional_model_needs_no_class(trained, tmp_path):
    settings = ["diffusion.unconditional=true", "train.steps=2", "sampler.guidance.scale=1"]
    run_folder = train(trained, "unconditional", *settings)
    generator = Generator.from_pretrained(run_folder)
    assert generator.class_names == () and generator.sample([0]).shape == (1, 3, 16, 16)
    assert draw(run_folder, tmp_path / "any.png", "--num", "2", "--guidance", "1") == 0
    with pytest.raises(ValueError, match="no class 1; this model has none, give None"):
        generator.sample([1])


# Reading the classes off generated images --------------------------------------------------------


def test_the_class_reader_knows_real_images_and_finds_wrong_ones(trained, tmp_path, capsys):
    from semtok.data.images.shapes import Shapes, ShapesConfig
    from semtok.evaluation.classes import (
        accuracy,
        class_reader,
        features_and_labels,
        real_batches,
    )
    from semtok.evaluation.generation import teacher_network

    config = ShapesConfig(size=32, classes=("hue",), num_images=400, num_validation_images=100)
    train_source, held_out = Shapes(config, train=True), Shapes(config, train=False)
    teacher = teacher_network(Teacher(TeacherConfig()))
    reader = class_reader(*features_and_labels(teacher, real_batches(train_source, 400)))
    features, labels = features_and_labels(teacher, real_batches(held_out, 100))
    share, by_label = accuracy(reader(features), labels)
    assert share > 0.95 and set(by_label) == set(range(6))
    assert accuracy(reader(features), (labels + 1) % 6)[0] < 0.05


def test_evaluate_classes_writes_what_it_found(model, tmp_path, capsys):
    from semtok.commands.evaluate import main

    common = ["--num-train", "300", "--num-held-out", "100", "--num", "40"]
    common += ["--data", "kind=shapes", "size=16", "classes=[shape, hue]"]
    code = run(
        main, ["classes", "--model", str(model), "--output", str(tmp_path / "c.json"), *common]
    )
    assert code == 0 and "40 generated images" in capsys.readouterr().out
    scores = json.loads((tmp_path / "c.json").read_text())
    assert scores["real"] > 3 * scores["generated"], "six steps teach nobody 36 classes"
    assert len(scores["by_class"]) == 36
    # Without --data it is what the model was trained on: here 24 images.
    output = tmp_path / "own.json"
    assert run(main, ["classes", "--model", str(model), "--num", "1", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["data"] == "shapes (seed 0, training)"
    other = ["classes", "--model", str(model), "--data", "kind=shapes", "size=16", "classes=[hue]"]
    assert run(main, other) == 2
    assert "has 6 classes (red, yellow, green …), the model 36" in capsys.readouterr().err
