"""A VAE and a diffusion transformer trained together: who learns from whom, and what comes out."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from semtok import Generator, Tokenizer, UserError
from semtok.commands.export_checkpoint import kept_checkpoint
from semtok.commands.train_tokenizer import build_objective, train_tokenizer
from semtok.diffusion.training import DiffusionObjective
from semtok.methods.repae import REPAEObjective
from semtok.objective import StepOutput
from semtok.recipe import parse_recipe
from semtok.registry import load_plugins

NETWORK = {"depth": 2, "width": 24, "heads": 2, "patch_size": 2}
REPA = {"depth": 1, "projector_width": 16}
ADVERSARY = {**tiny.ADVERSARIAL, "adaptive": False, "weight": 0.1, "norm": "batch"}
VAES: dict[str, dict[str, Any]] = {
    "vae": {"name": "vae", "adversarial": ADVERSARY},
    "send_vae": {"name": "send_vae", "mapper": {"projector_width": 16, "heads": 2}},
    "va_vae": {"name": "va_vae", "adversarial": ADVERSARY},
    "transformed": {
        "name": "send_vae",
        "mapper": {"projector_width": 16, "heads": 2},
        "equivariance": {
            "probability": 1.0,
            "low_resolution_probability": 0.0,
            "scales": [0.3, 0.5, 0.75],
        },
        "decoder_noise": {"law": "mixed", "strength": 1.0},
        "adversarial": {**ADVERSARY, "fresh": True, "lecam_weight": 0.1},
    },
    "edge_vae": {"name": "edge_vae"},
}
PLUGIN = Path(__file__).parent / "examples" / "edge_vae.py"
CLASSES = ("a", "b", "c")


def recipe(vae: str = "vae", *, train: dict[str, Any] | None = None, **changes: Any):
    load_plugins([PLUGIN])
    tokenizer = {"vae": copy.deepcopy(tiny.AUTOENCODER)} | VAES[vae] | changes.pop("tokenizer", {})
    diffusion = {"network": NETWORK, "repa": REPA} | changes.pop("diffusion", {})
    method = {"name": "repae", "tokenizer": tokenizer, "diffusion": diffusion, **changes}
    method.setdefault("sampler", {"steps": 2})
    return parse_recipe(tiny.content() | {"method": method} | tiny_train(train or {}), "tiny")


def tiny_train(changes: dict[str, Any]) -> dict[str, Any]:
    return {"train": tiny.content(steps=4, **changes)["train"]}


def build(vae: str = "vae", **changes: Any) -> REPAEObjective:
    made = build_objective(recipe(vae, **changes), place="tiny", class_names=CLASSES)
    tiny.awake(made.averaged_module().network)
    return made


def inputs_of(objective: REPAEObjective) -> dict[str, Any]:
    inputs = tiny.batch(objective)
    return inputs | {"labels": inputs["labels"] % len(CLASSES)}


def play(objective: REPAEObjective, step: int = 0) -> dict[str, StepOutput]:
    """One step's outputs by learner, without any update of weights."""
    inputs, carry, outputs = inputs_of(objective), {}, {}
    for name in objective.active_learners(step):
        outputs[name] = objective.learners[name](inputs, tiny.draws(step), step, carry)
        carry = carry | outputs[name].carry
    return outputs


def touched(objective: REPAEObjective, output: StepOutput, *terms: str) -> set[str]:
    """Modules whose parameters get a gradient other than zero from these terms."""
    objective.learners.zero_grad()
    sum(output.terms[name].value.mean() for name in terms).backward(retain_graph=True)
    found = set()
    for name, parameter in objective.learners.named_parameters():
        if parameter.grad is not None and parameter.grad.any():
            found.add(".".join(name.split(".")[:4]))
    return found


@pytest.mark.parametrize("vae", list(VAES))
def test_each_player_learns_from_its_own_losses_alone(vae):
    objective = build(vae)
    outputs = play(objective)
    own = "autoencoder.vae.autoencoder"
    encoder = {f"{own}.encoder", f"{own}.quant_conv"}
    first = outputs["autoencoder"]
    assert touched(objective, first, "transformer_alignment") == encoder
    rest = [name for name in first.terms if name != "transformer_alignment"]
    learnt = touched(objective, first, *rest)
    assert encoder | {f"{own}.decoder", f"{own}.post_quant_conv"} <= learnt
    assert all(name.startswith("autoencoder.") for name in learnt)
    transformer = touched(objective, outputs["dit"], *outputs["dit"].terms)
    assert transformer and all(name.startswith("dit.dit.") for name in transformer)
    assert any("projector" in name for name in transformer)
    assert outputs["autoencoder"].carry["latents"].shape == (4, 4, 4, 4)  # as the encoder gave them
    if "adversarial" in VAES[vae]:
        judged = touched(objective, outputs["discriminator"], "discriminator")
        assert judged and all(name.startswith("discriminator.") for name in judged)
    assert all(not t.requires_grad for o in outputs.values() for t in o.carry.values())
    assert all(p.requires_grad for p in objective.learners["dit"].parameters())


def test_activations_of_the_frozen_pass_are_kept_where_the_other_recomputes_them():
    """What was frozen would be recomputed as it is in the backward pass, trained."""
    objective = build(diffusion={"checkpointing": True})
    outputs = play(objective)
    learnt = touched(objective, outputs["autoencoder"], "transformer_alignment")
    assert learnt == {f"autoencoder.vae.autoencoder.{n}" for n in ("encoder", "quant_conv")}
    assert touched(objective, outputs["dit"], *outputs["dit"].terms)
    assert objective.learners["dit"].dit.network.checkpointing


def test_the_method_of_the_vae_learns_as_it_does_alone():
    objective = build("send_vae")
    alone = objective.learners["autoencoder"].vae
    ours = play(objective)["autoencoder"].terms
    objective.learners["autoencoder"].vae.standardiser.num_updates.zero_()
    theirs = alone(inputs_of(objective), tiny.draws(), 0, {}).terms
    assert set(ours) - set(theirs) == {"transformer_alignment"}
    assert all(torch.equal(ours[name].value, theirs[name].value) for name in theirs)


def test_both_passes_through_the_transformer_see_the_same_noise_by_other_statistics():
    """The frozen one by the running statistics, which stay; the other by the batch's, which they follow."""
    objective = build()
    statistics = objective.learners["dit"].standardiser
    statistics.start(torch.full((4,), 0.5), torch.full((4,), 2.0))
    seen = []
    dit = objective.learners["dit"].dit
    noised = dit.noised
    dit.noised = lambda posterior, draws: seen.append(noised(posterior, draws)) or seen[-1]
    inputs, draws = inputs_of(objective), tiny.draws()
    output = objective.learners["autoencoder"](inputs, draws, 0, {})
    assert statistics.mean.eq(0.5).all() and statistics.var.eq(4).all()
    z = output.carry["latents"]
    objective.learners["dit"](inputs, draws, 0, output.carry)
    frozen, trained = seen
    assert torch.equal(frozen.t, trained.t)
    torch.testing.assert_close(frozen.data["texture"], (z - 0.5) * (4 + 1e-4) ** -0.5)
    norm = nn.BatchNorm2d(4, eps=1e-4, affine=False)
    norm.running_mean.fill_(0.5), norm.running_var.fill_(4)
    torch.testing.assert_close(trained.data["texture"], norm(z))
    torch.testing.assert_close(statistics.mean, norm.running_mean)
    torch.testing.assert_close(statistics.var, norm.running_var)
    for name in ("texture",):
        noise = [n.x[name] - n.t.view(-1, 1, 1, 1) * n.data[name] for n in seen]
        torch.testing.assert_close(*noise)


def test_statistics_begin_from_those_of_the_weights_or_are_measured(tmp_path):
    known = tiny.measured({"name": "vae"})
    known.save_pretrained(tmp_path / "vae")
    started = build(tokenizer={"vae": str(tmp_path / "vae")}).learners["dit"].standardiser
    torch.testing.assert_close(started.mean, known.texture_mean)
    torch.testing.assert_close(started.var, known.texture_std.square())

    scratch = build()
    pixels = tiny.batch_of_shapes(24)
    batches = [tiny_batch(pixels[:16]), tiny_batch(pixels[16:])]
    scratch.measure(batches)
    tokenizer = scratch._vae.module.tokenizer(scratch._vae.module.averaged_module())
    tokenizer.measure_statistics([pixels] * 20)  # of draws, each time new ones
    measured = scratch.learners["dit"].standardiser
    torch.testing.assert_close(measured.mean, tokenizer.texture_mean, atol=0.06, rtol=0)
    torch.testing.assert_close(measured.var.sqrt(), tokenizer.texture_std, atol=0, rtol=0.04)


def tiny_batch(pixels: torch.Tensor):
    from semtok.objective import Batch

    return Batch(pixels, torch.zeros(len(pixels), dtype=torch.int64))


# Runs --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint") / "run"
    train_tokenizer(recipe(train={"checkpoint_every": 2, "export_at": [2]}), folder)
    return folder


def test_a_run_leaves_a_tokenizer_and_a_generator_of_its_latents(run):
    tokenizer = Tokenizer.from_pretrained(run)
    generator = Generator.from_pretrained(str(run))
    assert tokenizer.method == "repae" and tokenizer.means_the_same(generator.tokenizer)
    images = generator.sample([0, 1], seed=0)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()
    saved = tiny.final_tensors(run)
    torch.testing.assert_close(tokenizer.texture_mean, saved["ema.standardiser.mean"])
    torch.testing.assert_close(tokenizer.texture_std, (saved["ema.standardiser.var"] + 1e-4).sqrt())
    weight = "encoder.conv_in.weight"
    assert torch.equal(tokenizer.autoencoder.get_parameter(weight), saved[f"ema.vae.{weight}"])
    assert (run / "exports" / "0000002_generator" / "network.safetensors").is_file()
    summary = json.loads((run / "summary.json").read_text())["validation"]
    assert {"psnr", "velocity"} <= summary.keys()


def test_a_checkpoint_gives_both_again(run, tmp_path):
    kept_checkpoint(str(run), None).export("trained", tmp_path / "trained")
    generator = Generator.from_pretrained(str(tmp_path / "trained_generator"))
    own = tiny.final_tensors(run)["learners.dit.dit.network.final.linear.weight"]
    assert torch.equal(generator.network.final.linear.weight, own)
    assert generator.tokenizer.means_the_same(Tokenizer.from_pretrained(tmp_path / "trained"))


def test_a_generator_is_trained_on_its_latents_afterwards(run):
    tokenizer = Tokenizer.from_pretrained(run)
    stage = DiffusionObjective(
        recipe().method.diffusion.model_copy(update={"repa": False}),
        tokenizer,
        class_names=CLASSES,
        image_size=(16, 16),
        sampler=recipe().method.sampler,
    )
    assert stage.tokenizer.measured_parts == ("texture",) and stage.tokenizer.is_measured


def test_a_run_goes_on_to_the_last_bit(run, tmp_path):
    settings = {"checkpoint_every": 2, "export_at": [2]}
    train_tokenizer(recipe(train=settings), tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train_tokenizer(recipe(train=settings), tmp_path / "run", resume=True)
    ours, theirs = tiny.final_tensors(tmp_path / "run"), tiny.final_tensors(run)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_a_vae_that_no_average_follows_is_exported_as_it_was_trained(tmp_path):
    train_tokenizer(recipe("send_vae", average_vae=False), tmp_path / "run")
    saved, weight = tiny.final_tensors(tmp_path / "run"), "encoder.conv_in.weight"
    tokenizer = Tokenizer.from_pretrained(tmp_path / "run")
    own = saved[f"learners.autoencoder.vae.autoencoder.{weight}"]
    assert torch.equal(tokenizer.autoencoder.get_parameter(weight), own)
    assert f"ema.vae.{weight}" not in saved and "ema.standardiser.mean" in saved


def test_the_transformer_has_an_optimiser_of_its_own():
    made = build(diffusion_optimiser={"learning_rate": 0.5})
    default = recipe().train.optimiser
    assert made.optimiser_config("dit", default).learning_rate == 0.5
    assert made.optimiser_config("autoencoder", default) is default
    assert build().optimiser_config("dit", default) is default


def test_what_the_methods_of_the_vae_say_before_the_first_step_names_its_settings_here():
    made = build("transformed")
    (line,) = made.notes()
    assert line.startswith("method.tokenizer.equivariance.scales: ")
    assert made.steps_in_turn() and not build().steps_in_turn()


# Settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"diffusion": {"repa": False}}, "method.diffusion.repa: false leaves the VAE nothing"),
        ({"diffusion": {"contrastive_weight": 0.1}}, "method.diffusion.contrastive_weight: "),
        ({"tokenizer": {"train": "decoder", "vae": "demo"}}, "method.tokenizer.train: decoder"),
        (
            {"tokenizer": {"train": "decoder", "vae": "demo", "kl_weight": 1e-6}},
            "tiny: method.tokenizer.train: decoder keeps the latents",
        ),
        (
            {"tokenizer": {"name": "va_vae", "alignment": {"weight": 0}}},
            "tiny: method.tokenizer.alignment.weight: 0 aligns nothing",
        ),
        (
            {"tokenizer": {"equivariance": {}}},
            "method.tokenizer.equivariance.low_resolution_probability: the transformer would learn",
        ),
        (
            {"tokenizer": {"equivariance": {"scales": [0.3], "low_resolution_probability": 0.0}}},
            "method.tokenizer.equivariance.scales: none leaves images of 16x16 whole",
        ),
        ({"tokenizer": {"reconstructoin": "l1"}}, "'method.tokenizer.reconstructoin'; did you"),
        ({"tokenizer": {"name": "reglue"}}, "method.tokenizer.name: 'reglue' trains no VAE"),
        ({"tokenizer": {"name": "repae"}}, "method.tokenizer.name: 'repae' trains no VAE"),
        ({"tokenizer": {"name": "veae"}}, "method.tokenizer.name: unknown method 'veae'"),
        ({"diffusion": {"repa": {"depth": 3}}}, "method.diffusion.repa.depth: 3 is more than"),
        (
            {"diffusion": {"network": {**NETWORK, "patch_size": 3}}},
            "method.diffusion.network: patch size 3 does not divide",
        ),
        (
            {"diffusion": {"repa": {"targets": "decoded"}}},
            "method.diffusion.repa.targets: this tokenizer's latents have no semantic part",
        ),
        (
            {"diffusion": {"class_dropout": 0.0}, "sampler": {"guidance": {"scale": 2.0}}},
            "method.sampler.guidance.scale: guidance needs the null label",
        ),
        (
            {"sampler": {"guidance": {"num_channels": 2}}},
            "method.sampler.guidance.num_channels: nothing is guided, as method.sampler.guidance.scale",
        ),
        (
            {"tokenizer": {"adversarial": {**ADVERSARY, "num_layers": 9}}},
            "method.tokenizer.adversarial.num_layers: too many for images of 16x16",
        ),
    ],
)
def test_settings_that_can_not_be_are_refused_by_name(changes, message):
    with pytest.raises(UserError) as error:
        build(**copy.deepcopy(changes))
    assert message in str(error.value) and "\n" not in str(error.value)
