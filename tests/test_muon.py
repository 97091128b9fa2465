"""Muon steps the hidden matrices of transformers, each as a matrix of its own, and AdamW steps all else."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tiny
from semtok import UserError
from semtok.commands import train_tokenizer
from semtok.optimiser import OptimiserConfig
from semtok.recipe import parse_recipe
from semtok.sampler.architecture import PRESETS, DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.sampler.roles import find_hidden_matrices, hidden_matrix
from semtok.training.muon import MuonWithAdamW

MUON = {"name": "muon", "learning_rate": 1e-3, "weight_decay": 0.1}
SHAPE = DiTArchitecture(depth=1, width=24, heads=2, swiglu=True, rms_norm=True, rope=False)


def network(config: DiTArchitecture = SHAPE) -> DiT:
    torch.manual_seed(0)
    spec = LatentSpec((PartSpec("texture", 4, 4),))
    return tiny.awake(DiT(config, spec, num_classes=3))


def optimiser_of(module: nn.Module, **settings: Any) -> MuonWithAdamW:
    matrices = list(find_hidden_matrices(module))
    taken = {id(matrix.parameter) for matrix in matrices}
    others = [p for p in module.parameters() if id(p) not in taken]
    return MuonWithAdamW(others, matrices, OptimiserConfig(**MUON | settings))


@pytest.mark.parametrize("name", ["SiT-T/2", "LightningDiT-T/1"])
def test_of_a_transformer_the_matrices_of_blocks_are_hidden_and_nothing_else(name):
    shape = PRESETS[name].model_copy(update={"depth": 3, "width": 24, "split": (1, 1)})
    made = copy.deepcopy(network(shape))
    names = {id(p): n for n, p in made.named_parameters()}
    found = {names[id(m.parameter)]: (m.slices, m.axis) for m in find_hidden_matrices(made)}
    mlp = {"mlp.w12": (2, 0), "mlp.w3": (1, 0)}
    if not shape.swiglu:
        mlp = {"mlp.fc1": (1, 0), "mlp.fc2": (1, 0)}
    block = {"attn.qkv": (3, 0), "attn.proj": (1, 0), "modulation": (6, 0)} | mlp
    expected = {f"blocks.{i}.{n}.weight": told for i in range(3) for n, told in block.items()}
    expected["fusion.linear.weight"] = (2, 1)
    assert found == expected


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = hidden_matrix(nn.Linear(8, 24), slices=3)
        self.fuse = hidden_matrix(nn.Linear(16, 8), slices=2, along="inputs")
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.head(self.fuse(torch.cat([q * k, v], dim=-1)))


def test_each_slice_steps_as_torchs_muon_does_on_it_alone_and_the_rest_as_adamw():
    torch.manual_seed(0)
    ours = Fused()
    theirs = copy.deepcopy(ours)
    optimiser = optimiser_of(ours, matrix_learning_rate=2e-3)
    parts = [p.clone() for p in theirs.qkv.weight.detach().chunk(3)]
    parts += [p.clone() for p in theirs.fuse.weight.detach().chunk(2, dim=1)]
    slices = [nn.Parameter(p) for p in parts]
    muon = torch.optim.Muon(slices, lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    rest = [theirs.qkv.bias, theirs.fuse.bias, *theirs.head.parameters()]
    adamw = torch.optim.AdamW(rest, lr=1e-3, weight_decay=0.1, fused=True)
    for _ in range(4):
        x = torch.randn(5, 8)
        for module in (ours, theirs):
            module.zero_grad()
            module(x).square().sum().backward()
        gradients = [*theirs.qkv.weight.grad.chunk(3), *theirs.fuse.weight.grad.chunk(2, dim=1)]
        for own, gradient in zip(slices, gradients, strict=True):
            own.grad = gradient
        for each in (optimiser, muon, adamw):
            each.step()
        with torch.no_grad():
            theirs.qkv.weight.copy_(torch.cat(slices[:3]))
            theirs.fuse.weight.copy_(torch.cat(slices[3:], dim=1))
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_a_step_on_fused_matrices_is_none_on_the_whole():
    """Else queries, keys and values would share one spectrum: what the slices are for."""
    ours, whole = Fused(), Fused()
    whole.load_state_dict(ours.state_dict())
    whole.qkv.hidden_matrices = {"weight": (1, 0)}
    x = torch.randn(5, 8)
    for module in (ours, whole):
        module(x).square().sum().backward()
        optimiser_of(module).step()
    assert not torch.allclose(ours.qkv.weight, whole.qkv.weight, atol=1e-5)
    assert torch.equal(ours.fuse.weight, whole.fuse.weight)


def test_three_steps_and_three_more_are_six_steps(tmp_path):
    whole, first = (tiny.trainer(tmp_path / n, optimiser=MUON, steps=6) for n in ("whole", "parts"))
    for trainer, steps in ((whole, 6), (first, 3)):
        trainer.objective.learners.train()
        batches = trainer._batches()
        for _ in range(steps):
            trainer.train_step(batches)
    first.save()
    second = tiny.trainer(tmp_path / "parts", optimiser=MUON, steps=6)
    second.resume()
    second.objective.learners.train()
    batches = second._batches()
    for _ in range(3):
        second.train_step(batches)
    whole.save(), second.save()
    ours, theirs = (tiny.final_tensors(tmp_path / name) for name in ("parts", "whole"))
    assert {"autoencoder.muon0.momentum_buffer", "autoencoder.adamw0.exp_avg"} <= ours.keys()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_the_rate_rises_and_is_logged_for_matrices_of_their_own_rate(tmp_path):
    trainer = tiny.trainer(tmp_path, optimiser=MUON | {"matrix_learning_rate": 4e-3})
    assert trainer.optimisers.learning_rates() == {
        "autoencoder": pytest.approx(5e-4),
        "autoencoder_matrices": pytest.approx(2e-3),
    }
    assert tiny.trainer(tmp_path, optimiser=MUON).optimisers.learning_rates().keys() == {
        "autoencoder"
    }


class Overflowing(torch.amp.GradScaler):
    """Finds an overflow in the first step, as fp16 would, in a parameter that AdamW steps."""

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        if self.get_scale() == 1024.0:
            next(p for p in optimizer.param_groups[0]["params"] if p.grad is not None).grad.fill_(
                float("nan")
            )
        super().unscale_(optimizer)


@pytest.mark.filterwarnings("error")
def test_where_a_gradient_overflows_neither_of_both_steps(tmp_path):
    scaler = Overflowing("cpu", init_scale=1024.0)
    trainer = tiny.trainer(tmp_path / "scaled", scaler=scaler, optimiser=MUON, steps=3)
    before = copy.deepcopy(trainer.objective.learners.state_dict())
    batches = trainer._batches()
    trainer.train_step(batches)
    names = [n for n, _ in trainer.objective.learners.named_parameters()]
    after = trainer.objective.learners.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert scaler.get_scale() == 512.0
    trainer.train_step(batches)
    after = trainer.objective.learners.state_dict()
    moved = [name for name in names if not torch.equal(before[name], after[name])]
    assert any("mapper.blocks.0.attn.qkv.weight" in name for name in moved)
    assert all(after[name].isfinite().all() for name in names)


def test_a_scale_of_losses_changes_nothing(tmp_path):
    def weights(name: str, scaler: torch.amp.GradScaler | None) -> dict[str, torch.Tensor]:
        trainer = tiny.trainer(
            tmp_path / name, scaler=scaler, optimiser=MUON, steps=3, precision="bf16"
        )
        batches = trainer._batches()
        for _ in range(3):
            trainer.train_step(batches)
        return trainer.objective.learners.state_dict()

    plain = weights("plain", None)
    scaled = weights("scaled", torch.amp.GradScaler("cpu", init_scale=1024.0))
    for key, value in plain.items():
        torch.testing.assert_close(scaled[key], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "optimiser", "message"),
    [
        ({"name": "vae"}, MUON, "train.optimiser.name: muon is for the matrices of transformers"),
        ({}, {"learning_rate": 1e-3, "momentum": 0.9}, "momentum takes effect with name=muon only"),
        (
            {"adversarial": tiny.ADVERSARIAL | {"optimiser": MUON}},
            {"learning_rate": 1e-3},
            "method.adversarial.optimiser: name: a discriminator has no matrix for muon",
        ),
    ],
)
def test_what_muon_can_not_do_is_refused_by_name(method, optimiser, message, tmp_path):
    with pytest.raises(UserError, match=message):
        recipe = parse_recipe(tiny.content(method, optimiser=optimiser), "tiny")
        train_tokenizer.check_tokenizer(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_discriminator_beside_matrices_has_adamw(tmp_path):
    trainer = tiny.trainer(tmp_path, {"adversarial": tiny.ADVERSARIAL}, optimiser=MUON)
    kinds = {n: type(trainer.optimisers[n].optimizer) for n in trainer.objective.learners}
    assert kinds == {"autoencoder": MuonWithAdamW, "discriminator": torch.optim.AdamW}


def test_a_torch_without_muon_is_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("semtok.training.process._HAS_MUON", False)
    recipe = parse_recipe(tiny.content(optimiser=MUON), "tiny")
    with pytest.raises(UserError, match="muon needs torch 2.9, and .* is installed"):
        train_tokenizer.check_tokenizer(recipe, tmp_path / "run")


def test_a_weight_that_can_not_be_cut_so_is_refused():
    with pytest.raises(ValueError, match="is not 5 matrices along outputs"):
        hidden_matrix(nn.Linear(4, 12), slices=5)
    with pytest.raises(ValueError, match="is not 1 matrices"):
        hidden_matrix(nn.Conv2d(4, 4, 3))
