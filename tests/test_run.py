"""What a person finds in a run folder, and what the loop promises on the way."""

import copy
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from semtok import Tokenizer, UserError
from semtok.commands.cli import run
from semtok.commands.train_dit import build_diffusion_objective
from semtok.commands.train_tokenizer import main, train_tokenizer
from semtok.data.images.kinds import open_sources
from semtok.data.source import ImageBatch
from semtok.errors import NonFiniteLoss
from semtok.objective import Batch
from semtok.recipe import load_recipe, parse_diffusion_recipe, parse_recipe, recipe_text
from semtok.sampler.draws import Draws
from semtok.speed import use_channels_last
from semtok.teachers import Teacher
from semtok.training import loop
from semtok.training.ema import ModelEMA
from semtok.training.log import MetricSums
from semtok.training.loop import Trainer
from semtok.training.process import make_accelerator
from semtok.training.train_config import TrainConfig

GAN = {"perceptual": "teacher", "adversarial": tiny.ADVERSARIAL}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawn_curves: None) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tiny.content(GAN, log_every=1)))
    assert main([str(folder / "recipe.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_folder_holds_what_the_design_promises(finished):
    names = {p.name for p in finished.iterdir()}
    assert names == {
        "recipe.yaml",
        "metrics.jsonl",
        "samples",
        "curves.png",
        "checkpoints",
        "export",
        "summary.json",
    }
    drawn = np.asarray(Image.open(finished / "curves.png").convert("RGB"))
    assert drawn.shape[1] == 4 * 396 and drawn.shape[0] >= 2 * 297, "four panels a row"
    assert len(np.unique(drawn[:297, :396].reshape(-1, 3), axis=0)) > 20
    summary = json.loads((finished / "summary.json").read_text())
    assert {"psnr", "ssim", "kl_per_dim", "alignment_cosine"} <= summary["validation"].keys()
    assert summary["steps"] == 6 and summary["images"] == 24
    assert summary["weights"] == "ema"


def test_the_recorded_recipe_is_complete_and_reads_back_to_the_same(finished):
    recorded = load_recipe(finished / "recipe.yaml", [])
    assert recorded == parse_recipe(tiny.content(GAN, log_every=1), "tiny")
    assert "projector_width" in (finished / "recipe.yaml").read_text()


def test_the_picture_shows_input_reconstruction_and_both_component_maps(finished):
    (picture,) = (finished / "samples").iterdir()
    width, height = Image.open(picture).size
    cell = 96 + 4  # 16 pixels six times enlarged, and the padding
    assert height == 4 * cell + 4 and 2 * cell + 4 < width < 4 * cell, "two columns beside labels"


def test_discriminator_logits_weights_and_gradient_norms_are_logged(finished):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    for name in (
        "metric/logits_real",
        "metric/logits_fake",
        "weight/adversarial",
        "grad_norm/autoencoder",
        "grad_norm/discriminator",
        "lr/discriminator",
        "images_per_second",
    ):
        assert all(math.isfinite(row[name]) for row in rows), name


def test_a_golden_loss_curve_does_not_move(finished):
    """Measured once; a refactor leaves it as it is, a change of the computation says so and renews it."""
    golden = json.loads((Path(__file__).parent / "golden_send_vae.json").read_text())
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").open()]
    for name, values in golden.items():
        assert [row[name] for row in rows] == pytest.approx(values, rel=2e-3), name


def test_training_lowers_every_loss_it_minimises(tmp_path):
    content = tiny.content(steps=60, log_every=10, schedule="constant")
    content["train"]["optimiser"] = {"learning_rate": 3e-3}
    train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    for name in ("loss/l1", "loss/alignment"):
        assert rows[-1][name] < 0.9 * rows[0][name], name


def test_a_loss_that_is_not_finite_stops_the_run_names_the_term_and_keeps_the_checkpoint(
    tmp_path, capsys
):
    class Spoiled(torch.nn.Module):
        def __init__(self, learner: torch.nn.Module) -> None:
            super().__init__()
            self.learner = learner

        def forward(self, inputs, draws, step, carry):
            output = self.learner(inputs, draws, step, carry)
            if step >= 4:
                output.terms["kl"].value.mul_(float("nan"))
            return output

    spoiled = tiny.trainer(
        tmp_path / "run", {"name": "vae"}, steps=20, checkpoint_every=2, log_every=4
    )
    spoiled.learners["autoencoder"] = Spoiled(spoiled.learners["autoencoder"])
    with pytest.raises(
        NonFiniteLoss,
        match="loss term 'kl' is not finite at step 5; the last good checkpoint is .*_00000004;",
    ) as e:
        spoiled.run()
    assert "\n" not in str(e.value)
    names = [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == ["step_00000002", "step_00000004"]

    def fail(_: object) -> int:
        raise e.value

    assert run(fail, []) == 1
    assert capsys.readouterr().err.startswith("error: loss term 'kl'")


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_trackers_write_their_files_offline(tracker, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    recipe = parse_recipe(tiny.content({"name": "vae"}, tracker=tracker, steps=2), "tiny")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train_tokenizer(recipe, tmp_path / "run")
    if tracker == "wandb":
        importlib.import_module(
            "wandb"
        ).teardown()  # its service would stay until this process ends
    pattern = "*.wandb" if tracker == "wandb" else "events.out.tfevents*"
    assert list(tmp_path.rglob(pattern))


def test_images_that_are_not_square_train(tmp_path):
    content = tiny.content()
    content["data"]["size"] = [16, 24]
    train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert config["trained"]["image_size"] == [16, 24]


def test_bf16_trains(tmp_path):
    content = tiny.content(GAN, precision="bf16", steps=3, log_every=1)
    train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert all(math.isfinite(row["loss/alignment"]) for row in rows)
    weights = tiny.final_tensors(tmp_path / "run")
    assert all(t.dtype != torch.bfloat16 for t in weights.values()), "weights stay float32"


def test_float32_is_exact_unless_tf32_is_asked_for(tmp_path):
    for precision, allowed in (("fp32", False), ("tf32", True), ("fp32", False)):
        made = tiny.trainer(tmp_path / precision, GAN, precision=precision)
        assert (torch.get_float32_matmul_precision() == "high") == allowed
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert made.accelerator.mixed_precision == "no"


def test_compiled_training_has_the_same_names_and_the_same_losses(tmp_path):
    for backend in ("none", "aot_eager"):
        content = tiny.content(GAN, compile=backend, steps=2, log_every=1)
        train_tokenizer(parse_recipe(content, "tiny"), tmp_path / backend)
    plain, compiled = (
        tiny.final_tensors(tmp_path / "none"),
        tiny.final_tensors(tmp_path / "aot_eager"),
    )
    assert plain.keys() == compiled.keys()
    rows = [
        [json.loads(line)["loss/l1"] for line in (tmp_path / b / "metrics.jsonl").open()]
        for b in ("none", "aot_eager")
    ]
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)


def test_compile_reaches_every_trained_network(tmp_path):
    compiled = tiny.trainer(tmp_path / "run", GAN, compile="aot_eager")
    learner = compiled.objective.learners["autoencoder"]
    networks = [learner.autoencoder.encoder, learner.autoencoder.decoder, learner.mapper]
    networks.append(compiled.objective.learners["discriminator"].discriminator)
    assert all(network._compiled_call_impl is not None for network in networks)


def test_compile_reaches_the_blocks_of_frozen_teachers(tmp_path):
    compiled = tiny.trainer(tmp_path / "vae", {"perceptual": "teacher"}, compile="aot_eager")
    blocks = list(compiled.objective.teacher.module.network.blocks)
    latents = dit_trainer(tmp_path / "dit", compile="aot_eager")
    blocks += latents.objective.tokenizer.teacher.network.blocks
    assert len(blocks) == 8 and all(block._compiled_call_impl is not None for block in blocks)


def dit_trainer(folder: Path, **settings: Any) -> Trainer:
    """Of a transformer in a composite's latents, which asks the tokenizer's teacher, and another for REPA."""
    content = tiny.content(warmup_steps=0, **settings)
    content |= {"tokenizer": "tiny", "teacher": {"name": "demo", "layers": [-2]}}
    content["diffusion"] = {"network": {"depth": 1, "width": 32, "heads": 2}}
    content["diffusion"]["repa"] = {"depth": 1, "projector_width": 16}
    del content["method"]
    recipe = parse_diffusion_recipe(content, "tiny")
    train, held_out = open_sources(recipe.data)
    # A copy, as its teacher is compiled and its weights are moved.
    tokenizer = copy.deepcopy(tiny.tokenizer("vae", "semvae", True))
    teacher = Teacher(recipe.teacher)
    objective = build_diffusion_objective(recipe, tokenizer, train, teacher, place="tiny")
    folder.mkdir()
    return Trainer(
        objective,
        recipe.train,
        accelerator=make_accelerator(recipe.train, folder),
        folder=folder,
        source=train,
        validation=held_out,
        num_workers=0,
        tracked={},
    )


def test_teachers_and_frozen_tokenizers_compute_alike_in_steps_validation_and_pictures(
    tmp_path, monkeypatch
):
    """With bf16 teachers compute in it; their features, frozen tokenizers and averages stay in float32."""
    made = dit_trainer(tmp_path / "run", precision="bf16", steps=1)
    objective = made.objective
    seen: dict[str, list[set[torch.dtype]]] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        def hook(_: object, args: tuple[Any, ...], output: Any) -> None:
            seen.setdefault(name, []).append({output.dtype})

        module.register_forward_hook(hook)

    prepare = objective.prepare

    def spy(batch: Batch) -> dict[str, Any]:
        inputs = prepare(batch)
        parts = [*inputs["posterior"].mean.values(), *inputs["posterior"].std.values()]
        seen.setdefault("posterior", []).append({part.dtype for part in parts})
        # As a teacher leaves them whose last layer is no norm.
        return inputs | {"features": inputs["features"].map(torch.Tensor.bfloat16)}

    monkeypatch.setattr(objective, "prepare", spy)
    total = made._prepared

    def prepared(images: ImageBatch) -> tuple[Batch, dict[str, Any]]:
        batch, inputs = total(images)
        features = inputs["features"]
        seen.setdefault("features", []).append({features.pooled.dtype, features.patches[-1].dtype})
        return batch, inputs

    monkeypatch.setattr(made, "_prepared", prepared)
    tokenizer = objective.tokenizer
    watch("tokenizer's teacher", tokenizer.teacher.network.blocks[0].mlp.fc1)
    watch("REPA's teacher", objective.target_teacher.network.blocks[0].mlp.fc1)
    watch("texture", tokenizer.texture.autoencoder.encoder.conv_in)
    watch("coder", tokenizer.coder.encoder[0])
    watch("averaged network", made.averaged.blocks[0].mlp)
    watch("trained network", objective.averaged_module().blocks[0].mlp)
    made.run()
    made.validate()
    bf16, fp32 = {torch.bfloat16}, {torch.float32}
    # Asked in one step, for one picture, and of one batch of held-out images.
    assert seen.pop("tokenizer's teacher") == seen.pop("REPA's teacher") == [bf16] * 3
    assert seen.pop("trained network") == [bf16]
    assert {"posterior", "features", "texture", "coder", "averaged network"} == seen.keys()
    assert all(dtypes == fp32 for each in seen.values() for dtypes in each), seen


def test_a_teacher_that_is_in_place_is_not_moved_again(monkeypatch):
    tokenizer = tiny.tokenizer("vae", "semvae", True)
    teacher = tokenizer.teacher
    monkeypatch.setattr(Teacher, "to", lambda *_: pytest.fail("moved to where it is"))
    assert tokenizer.teacher is teacher
    monkeypatch.undo()
    moved = copy.deepcopy(tokenizer).double()
    assert next(moved.teacher.network.parameters()).dtype == torch.float64


def test_channels_last_trains_to_the_same_losses_and_the_same_export(tmp_path):
    settings = {"steps": 3, "log_every": 1, "checkpoint_every": 2}
    for channels_last in (False, True):
        content = tiny.content(GAN, channels_last=channels_last, **settings)
        train_tokenizer(parse_recipe(content, "tiny"), tmp_path / str(channels_last))
    runs = [tmp_path / "False", tmp_path / "True"]
    rows = [[json.loads(line) for line in (r / "metrics.jsonl").open()] for r in runs]
    for plain, last in zip(*rows, strict=True):
        for name in (n for n in plain if n.startswith(("loss/", "grad_norm/"))):
            assert last[name] == pytest.approx(plain[name], rel=1e-4), name
    files = [sorted((run / "export").rglob("*.safetensors")) for run in runs]
    for plain, last in zip(*files, strict=True):
        a, b = safetensors.torch.load_file(plain), safetensors.torch.load_file(last)
        assert [(n, t.shape) for n, t in a.items()] == [(n, t.shape) for n, t in b.items()]
        assert all(tensor.is_contiguous() for tensor in b.values())
    tensors = [tiny.final_tensors(run) for run in runs]
    for name, tensor in tensors[0].items():
        torch.testing.assert_close(tensors[1][name], tensor, atol=1e-4, rtol=1e-3)


def test_a_run_in_channels_last_resumes_to_the_last_bit(tmp_path):
    settings = {"channels_last": True, "checkpoint_every": 3, "steps": 6}
    made = tiny.trainer(tmp_path / "run", GAN, **settings)
    made.run()
    whole = list(made.objective.learners.parameters())
    shutil.rmtree(made.keeper.folder / "step_00000006")
    made = tiny.trainer(tmp_path / "run", GAN, **settings)
    made.resume()
    assert made.step == 3
    made.run()
    resumed = made.objective.learners.parameters()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize(
    ("method", "networks"),
    [
        ("vae", lambda o: [o.averaged_module(), o.learners["discriminator"]]),
        ("reglue", lambda o: [o.averaged_module(), o.texture.module]),
    ],
)
def test_channels_last_reaches_trained_and_frozen_convolutions(method, networks, tmp_path):
    settings = {"adversarial": tiny.ADVERSARIAL} if method == "vae" else tiny.SEMANTICS[method]
    texture = tiny.measured({"name": "vae"}) if method == "reglue" else None
    made = tiny.trainer(
        tmp_path / "run", {"name": method} | settings, texture=texture, channels_last=True
    )
    for network in [*networks(made.objective), made.averaged]:
        kernels = [m.weight for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        assert kernels
        assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


def test_channels_last_without_a_convolution_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "use_channels_last", lambda networks: use_channels_last([]))
    with pytest.raises(UserError, match="train.channels_last: no network here has a convolution"):
        tiny.trainer(tmp_path / "run", {"name": "vae"}, channels_last=True)


def test_cudnn_times_its_algorithms_only_where_asked(tmp_path):
    for asked in (True, False):
        tiny.trainer(tmp_path / str(asked), {"name": "vae"}, cudnn_benchmark=asked)
        assert torch.backends.cudnn.benchmark == asked


REFUSED = {
    "ACCELERATE_USE_FSDP": ("true", "this recipe shares out no network.*torchrun"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "DeepSpeed is not supported"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "Megatron-LM is not supported"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "tensor, .*parallelism is not supported"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("4", "pass train.accumulate=4"),
    "ACCELERATE_DYNAMO_BACKEND": ("INDUCTOR", "pass train.compile=inductor"),
    "ACCELERATE_MIXED_PRECISION": ("bf16", "pass train.precision=bf16"),
}


@pytest.mark.parametrize("variable", REFUSED)
def test_what_the_launcher_asks_for_and_the_loop_does_not_do_is_refused(
    variable, tmp_path, monkeypatch
):
    value, words = REFUSED[variable]
    recipe = parse_recipe(tiny.content({"name": "vae"}), "tiny")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"^{variable}: .*{words}") as error:
        make_accelerator(recipe.train, tmp_path)
    assert "\n" not in str(error.value)


def test_the_launcher_s_defaults_are_not_refused(tmp_path, monkeypatch):
    for variable, value in {**dict.fromkeys(REFUSED, "false")}.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    make_accelerator(parse_recipe(tiny.content({"name": "vae"}), "tiny").train, tmp_path)


def test_metrics_cost_a_few_operations_a_step_however_many_they_are():
    class Count(TorchDispatchMode):
        num = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            self.num += function.overloadpacket.__name__ not in ("detach", "view", "unbind")
            return function(*arguments, **(options or {}))

    sums = MetricSums()
    values = {f"loss/{i}": torch.tensor(float(i)) for i in range(30)}
    sums.add(values, step=1)
    sums.add(values, step=2)  # takes in step 1
    with Count() as count:
        sums.add(values, step=3)
    assert 0 < count.num <= 20


def test_metrics_are_means_of_what_was_seen_whatever_comes_when():
    def pair(total: float, count: int) -> torch.Tensor:
        return torch.tensor([total, float(count)])

    sums = MetricSums()
    assert sums.read() == {} and sums.first_bad_steps() == {}
    sums.add({"a": torch.tensor(1.0), "p": pair(0, 0)}, step=1)
    sums.add({"a": torch.tensor(2.0), "p": pair(6, 3)}, step=1)  # another micro-batch
    sums.add({"b": torch.tensor(5.0), "q": pair(0, 0)}, step=1)
    sums.add({"a": torch.tensor(6.0)}, step=2)
    assert sums.read() == {"a": 3.0, "p": 2.0, "b": 5.0}
    again = MetricSums()
    again.load_state_dict(sums.state_dict(), torch.device("cpu"))
    for each in (sums, again):
        each.add({"late": torch.tensor(float("nan")), "a": torch.tensor(1.0)}, step=3)
        each.add({"late": torch.tensor(1.0), "b": torch.tensor(float("inf"))}, step=4)
        assert each.first_bad_steps() == {"late": 3, "b": 4}
        assert each.read()["a"] == 2.5
    sums.clear()
    assert sums.read() == {} and sums.first_bad_steps() == {}


def test_the_learning_rate_warms_up_and_follows_its_cosine():
    config = TrainConfig(
        steps=110,
        batch_size=1,
        optimiser={"learning_rate": 1.0},
        schedule="cosine",
        warmup_steps=10,
        final_lr_fraction=0.1,
    )
    factors = [config.learning_rate_factor(step) for step in range(110)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[60] == pytest.approx(0.55)
    assert factors[109] == pytest.approx(0.1, abs=1e-3)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))


def test_the_learning_rate_in_the_recipe_is_the_one_used(tmp_path):
    settings = {"schedule": "constant", "warmup_steps": 0, "batch_size": 8, "accumulate": 2}
    used = tiny.trainer(tmp_path / "run", {"name": "vae"}, **settings)
    assert used.optimisers["autoencoder"].param_groups[0]["lr"] == 1e-3
    own = {"optimiser": {"learning_rate": 5e-5, "betas": [0.5, 0.9]}}
    gan = tiny.trainer(tmp_path / "gan", {"adversarial": {**tiny.ADVERSARIAL, **own}}, **settings)
    group = gan.optimisers["discriminator"].param_groups[0]
    assert group["lr"] == 5e-5 and tuple(group["betas"]) == (0.5, 0.9)
    assert gan.optimisers["autoencoder"].param_groups[0]["lr"] == 1e-3


def test_clipping_bounds_the_gradient(tmp_path):
    clipped = tiny.trainer(tmp_path / "run", {"name": "vae"}, clip_norm=1e-3)
    seen = []
    optimiser = clipped.optimisers["autoencoder"]
    step = optimiser.step

    def spy() -> None:
        gradients = [p.grad.norm() for g in optimiser.param_groups for p in g["params"]]
        seen.append(torch.stack(gradients).norm().item())
        step()

    optimiser.step = spy
    clipped.run()
    assert len(seen) == 6 and max(seen) <= 1e-3 * 1.01


def test_the_ema_averages_parameters_copies_buffers_and_warms_up():
    module = torch.nn.BatchNorm1d(2)
    ema = ModelEMA(module, decay=0.9)
    with torch.no_grad():
        module.weight.fill_(3.0)
        module.running_mean.fill_(5.0)
    ema.update()
    torch.testing.assert_close(ema.module.weight, torch.full((2,), 1 + 2 * 0.9))  # decay 1/10
    assert torch.equal(ema.module.running_mean, module.running_mean)
    for _ in range(200):
        ema.update()
    before = ema.module.weight.clone()
    with torch.no_grad():
        module.weight.fill_(103.0)
    ema.update()
    torch.testing.assert_close(ema.module.weight - before, torch.full((2,), 10.0))  # decay 0.9
    assert not any(p.requires_grad for p in ema.module.parameters()) and not ema.module.training


def test_the_ema_of_a_run_is_the_recursion_of_its_own_weights(tmp_path):
    """Of BatchNorm's network, in float64: parameters are averaged, running statistics copied."""
    texture = tiny.measured({"name": "vae"})
    run = tiny.trainer(tmp_path / "run", tiny.SEMANTICS["reglue"], texture=texture, steps=5)
    network = run.objective.averaged_module()
    run.objective.learners.train()
    expected = {n: p.detach().double().clone() for n, p in network.named_parameters()}
    batches = run._batches()
    for n in range(5):
        run.train_step(batches)
        decay = min(0.9, (1 + n) / (10 + n))
        for name, parameter in network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach().double()
    averaged = run.averaged.state_dict()
    moved = 0
    for name, value in network.state_dict().items():
        wanted = expected[name].float() if name in expected else value
        torch.testing.assert_close(averaged[name], wanted, atol=1e-7, rtol=1e-5)
        moved += name in expected and not torch.allclose(wanted, value, atol=1e-5)
    assert moved, "the average differs from what it follows"


def test_the_vae_decodes_a_draw_of_the_posterior_that_each_step_makes_anew():
    objective = tiny.build({"name": "vae"})
    learner, decoded = objective.learners["autoencoder"], []
    learner.autoencoder.decoder.register_forward_pre_hook(lambda _, args: decoded.append(args[0]))
    inputs = tiny.batch(objective)
    with torch.no_grad():
        posterior = learner.autoencoder.encode(inputs["pixels"]).latent_dist
        for step in (0, 1):
            learner(inputs, tiny.draws(step), step, {})
            noise = tiny.draws(step).normal("posterior", tuple(posterior.mean.shape[1:]))
            z = learner.autoencoder.post_quant_conv(posterior.mean + posterior.std * noise)
            torch.testing.assert_close(decoded[-1], z)
    assert (decoded[0] - decoded[1]).std() > 0.1 * posterior.std.mean()


def test_without_ema_the_trained_weights_are_exported(tmp_path):
    train_tokenizer(
        parse_recipe(tiny.content({"name": "vae"}, ema_decay=None), "tiny"), tmp_path / "run"
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["weights"] == "trained"
    tensors = tiny.final_tensors(tmp_path / "run")
    exported = Tokenizer.from_pretrained(tmp_path / "run").autoencoder.state_dict()
    assert all(
        torch.equal(tensors[f"learners.autoencoder.autoencoder.{name}"], t)
        for name, t in exported.items()
    )


def test_with_ema_the_averaged_weights_are_exported(finished):
    tensors = tiny.final_tensors(finished)
    exported = Tokenizer.from_pretrained(finished).autoencoder.state_dict()
    assert all(torch.equal(tensors[f"ema.{name}"], t) for name, t in exported.items())


def test_training_starts_from_the_weights_of_another_run(finished):
    start = tiny.build({"name": "vae", "vae": str(finished)})
    exported = Tokenizer.from_pretrained(finished).autoencoder.state_dict()
    for name, tensor in start.averaged_module().state_dict().items():
        assert torch.equal(tensor, exported[name])
    bare = tiny.build({"name": "vae", "vae": str(finished / "export" / "vae")})
    assert bare.averaged_module().config.latent_channels == 4


def test_no_step_reads_from_the_device_between_logs(tmp_path, monkeypatch):
    """On the CPU a read is cheap; on a GPU each would make the host wait. So count the ways to read."""
    reads = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self, *args, _name=name, _original=original, **kwargs):
            reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, spy)
    quiet = tiny.trainer(tmp_path / "run", GAN, steps=8, log_every=8)
    batches = quiet._batches()
    ready = [next(batches) for _ in range(4)]  # the data's order is made on the host
    reads.clear()
    for batch in ready:
        quiet.train_step(iter([batch]))
    assert not reads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ten_steps_on_a_gpu_without_synchronisation(tmp_path):
    settings = {"steps": 12, "log_every": 12, "checkpoint_every": 12, "sample_every": 12}
    quiet = tiny.trainer(tmp_path / "run", GAN, **settings)
    tiny.ten_steps_without_synchronisation(quiet)


def test_draws_do_not_depend_on_how_the_batch_is_split():
    def draws(first: int, num: int, step: int = 3) -> Draws:
        return Draws(0, step, global_batch=8, first=first, num=num, device=torch.device("cpu"))

    whole = draws(0, 8).normal("noise", (2, 2))
    parts = torch.cat([draws(first, 2).normal("noise", (2, 2)) for first in (0, 2, 4, 6)])
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, draws(0, 8).normal("other", (2, 2)))
    assert not torch.equal(whole, draws(0, 8, step=4).normal("noise", (2, 2)))
    assert draws(0, 8).uniform("t").min() >= 0 and draws(0, 8).uniform("t").max() < 1


def test_unreadable_files_are_warned_of_once_and_counted(tmp_path, capsys):
    images = tmp_path / "images"
    for split, num in (("train", 6), ("val", 3)):
        (images / split / "a").mkdir(parents=True)
        for i in range(num):
            colour = (40 * i, 100, 200 - 20 * i)
            Image.new("RGB", (20, 18), colour).save(images / split / "a" / f"{i}.png")
    broken = images / "train" / "a" / "2.png"
    broken.write_bytes(broken.read_bytes()[:40])
    content = tiny.content({"name": "vae"}, steps=6)
    content["data"] = {"kind": "folder", "path": str(images), "size": 16}
    train_tokenizer(parse_recipe(content, "tiny"), tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["skipped_files"] == [str(broken)] and summary["num_skipped_files"] == 1
    output = capsys.readouterr().out
    assert len(re.findall(f"warning: {re.escape(str(broken))}", output)) == 1
    assert "unreadable files" in output


def test_a_recipe_name_is_trained_first_and_found_the_second_time(tmp_path, monkeypatch, capsys):
    from semtok import references
    from semtok.commands.train_tokenizer import tokenizer_from_reference

    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "small.yaml").write_text(yaml.safe_dump(tiny.content({"name": "vae"})))
    monkeypatch.setattr(references, "recipe_folder", lambda: recipes)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="'small' is not trained yet; train it by: semtok train_tokenizer small"
    ):
        Tokenizer.from_pretrained("small")
    tokenizer_from_reference("small")
    assert "tokenizer 'small' is not trained yet: training" in capsys.readouterr().out
    tokenizer_from_reference("small")
    assert "training" not in capsys.readouterr().out
    assert Tokenizer.from_pretrained("small").method == "vae"


@pytest.mark.parametrize("reference", ["nothing-there", "./nothing/there"])
def test_a_reference_to_nothing_names_the_recipes(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder, run .* recipes: .*send_vae"):
        Tokenizer.from_pretrained(reference)


def test_a_hub_id_that_is_not_cached_is_one_line_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match="'org/name'.*Hub it can't be reached, nor is it in the local"
    ):
        Tokenizer.from_pretrained("org/name", local_files_only=True)


def test_print_recipe_shows_every_default_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(tiny.content()))
    assert main(["r.yaml", "train.steps=77", "--print-recipe"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["train"]["steps"] == 77 and shown["train"]["clip_norm"] == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]
    assert recipe_text(load_recipe(tmp_path / "r.yaml", [])).count("\n") > 40


@pytest.fixture(scope="module")
def fresh(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A process from nothing in the checkout, sockets blocked: it imports, then trains an embedded recipe.

    Returns:
        what became of the process; the run's folder.
    """
    script = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network in this test')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "import tokenizers, semtok, semtok.commands.train_dit\n"
        "early = {'diffusers', 'transformers', 'sklearn', 'matplotlib', 'datasets'} & {*sys.modules}\n"
        "assert 'site-packages' in tokenizers.__file__\n"
        "t = tokenizers.Tokenizer(tokenizers.models.BPE()); assert t.encode('a').ids == []\n"
        "try: import transformers\n"
        "except ImportError: pass\n"  # it takes seconds in each process, so tests install it not
        "else: transformers.PreTrainedTokenizerFast(tokenizer_object=t)\n"
        "assert semtok.Tokenizer.__module__ == 'semtok.tokenizer'\n"
        "print('side by side', early, sep='\\n', flush=True)\n"
        "from semtok.commands.train_tokenizer import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    folder = tmp_path_factory.mktemp("fresh") / "run"
    quick = [
        "train.steps=2",
        "train.batch_size=2",
        "train.warmup_steps=1",
        "train.num_validation_images=2",
        "train.num_statistics_images=4",
    ]
    words = ["recipes/send_vae.yaml", *quick, "--output", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    return done, folder


def test_semtok_and_hugging_face_packages_import_side_by_side_from_the_checkout(fresh):
    done, _ = fresh
    assert done.stdout.startswith("side by side\n"), done.stderr


def test_what_takes_seconds_is_imported_where_it_is_needed(fresh):
    done, _ = fresh
    assert done.stdout.splitlines()[1] == "set()"


def test_the_embedded_recipe_trains_with_sockets_blocked(fresh):
    done, folder = fresh
    assert done.returncode == 0, done.stderr
    assert (folder / "export" / "config.json").is_file()


def test_a_loss_scale_changes_no_gradient_of_any_learner(tmp_path):
    """fp16's gradient scaler, on the CPU: scaling by a power of two and back is exact."""
    weights = []
    for scaled in (False, True):
        trainer = tiny.trainer(
            tmp_path / str(scaled),
            {"adversarial": tiny.ADVERSARIAL},
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None,
            steps=3,
        )
        trainer.run()
        assert trainer.objective.learners.keys() == {"autoencoder", "discriminator"}
        weights.append(list(trainer.objective.learners.parameters()))
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
