"""Training that goes on from weights that are there: what it must keep, and what it tells."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

import tiny
from semtok import Generator, Tokenizer, UserError
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.images import to_pixels
from semtok.methods.vae import load_autoencoder
from semtok.recipe import parse_recipe
from semtok.storage import read_json, write_json

PIXELS = to_pixels(Shapes(ShapesConfig(size=16), train=False).load(range(4)).images)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE in ``tok``, a generator on its latents in ``dit``, and the VAE with another decoder in ``decoder``."""
    root = tmp_path_factory.mktemp("finetune")
    tiny.runs(root)
    train_tokenizer(decoder_alone(root / "tok"), root / "decoder")
    return root


def decoder_alone(vae: object, **train: Any) -> Any:
    method = {"name": "vae", "vae": str(vae), "train": "decoder"}
    return parse_recipe(tiny.content(method, **train), "tiny")


def test_with_the_decoder_alone_latents_stay_bit_for_bit_and_images_change(root):
    old, new = Tokenizer.from_pretrained(root / "tok"), Tokenizer.from_pretrained(root / "decoder")
    with torch.no_grad():
        before, after = old.posterior(PIXELS), new.posterior(PIXELS)
        assert torch.equal(before.mean.texture, after.mean.texture)
        assert torch.equal(before.std.texture, after.std.texture)
        assert torch.equal(
            old.posterior_raw(PIXELS).mean.texture, new.posterior_raw(PIXELS).mean.texture
        )
        assert not torch.equal(old.decode(before.mean), new.decode(before.mean))
    assert torch.equal(old.texture_mean, new.texture_mean)
    assert torch.equal(old.texture_std, new.texture_std)
    assert new.has_latents_of(old) and old.has_latents_of(new)


def test_its_vae_loads_in_diffusers_and_states_the_statistics_that_were_kept(root):
    old, new = Tokenizer.from_pretrained(root / "tok"), Tokenizer.from_pretrained(root / "decoder")
    vae = AutoencoderKL.from_pretrained(root / "decoder" / "export" / "vae")
    assert vae.config.latents_mean == old.texture_mean.tolist()
    with torch.no_grad():
        raw = old.posterior_raw(PIXELS).mean.texture
        assert torch.equal(vae.encode(PIXELS).latent_dist.mean, raw)
        assert torch.equal(vae.decode(raw).sample, new.autoencoder.decode(raw).sample)


def test_a_generator_of_the_old_latents_draws_through_the_new_decoder(root, tmp_path):
    generator = Generator.from_pretrained(root / "dit")
    before = generator.sample([0, 1], seed=3)
    generator.use_decoder(Tokenizer.from_pretrained(root / "decoder"))
    after = generator.sample([0, 1], seed=3)
    assert not torch.equal(before, after)
    generator.save_pretrained(tmp_path / "new")
    assert torch.equal(Generator.from_pretrained(tmp_path / "new").sample([0, 1], seed=3), after)
    with pytest.raises(UserError, match="made for other latents"):
        generator.use_decoder(tiny.measured({"name": "vae"}))


def test_a_composite_takes_a_new_decoder_of_its_texture(root):
    ours = tiny.measured(tiny.SEMANTICS["redi"], Tokenizer.from_pretrained(root / "tok"))
    latents = ours.encode(PIXELS)
    new = ours.with_decoder_of(Tokenizer.from_pretrained(root / "decoder"))
    with torch.no_grad():
        again = new.encode(PIXELS)
        expected = Tokenizer.from_pretrained(root / "decoder").decode_raw(
            new.destandardise(latents)
        )
        assert all(torch.equal(latents[name], again[name]) for name in latents)
        assert torch.equal(new.decode_raw(new.destandardise(latents)), expected)


def test_only_the_decoder_has_gradients_and_an_optimiser(root, tmp_path):
    method = {"name": "vae", "vae": str(root / "tok"), "train": "decoder"}
    trainer = tiny.trainer(tmp_path / "run", method | {"adversarial": tiny.ADVERSARIAL})
    learner = trainer.objective.learners["autoencoder"]
    decoder = {n for n, _ in learner.named_parameters() if "encoder.decoder." in n or "post_" in n}
    assert {n for n, p in learner.named_parameters() if p.requires_grad} == decoder
    inputs = tiny.batch(trainer.objective)
    output = learner(inputs, tiny.draws(), 0, {})
    assert set(output.terms) == {"l1", "adversarial"}, "the KL does not depend on the decoder"
    sum(term.value.mean() for term in output.terms.values()).backward()
    moved = {n for n, p in learner.named_parameters() if p.grad is not None}
    assert moved == decoder
    held = {id(p) for g in trainer.optimisers["autoencoder"].param_groups for p in g["params"]}
    assert held == {id(p) for n, p in learner.named_parameters() if n in decoder}


def test_a_resumed_run_keeps_the_statistics_that_it_began_with(root, tmp_path):
    vae = root / "decoder" / "export" / "vae"
    load_autoencoder(str(vae)).save_pretrained(tmp_path / "vae")
    train_tokenizer(decoder_alone(tmp_path / "vae"), tmp_path / "run")
    expected = Tokenizer.from_pretrained(tmp_path / "run").texture_mean
    config = read_json(tmp_path / "vae" / "config.json")
    write_json(tmp_path / "vae" / "config.json", config | {"latents_mean": [9.0] * 4})
    train_tokenizer(decoder_alone(tmp_path / "vae"), tmp_path / "run", resume=True)
    assert torch.equal(Tokenizer.from_pretrained(tmp_path / "run").texture_mean, expected)


def test_a_run_tells_what_its_weights_could_before(root, capsys, tmp_path):
    summary = json.loads((root / "decoder" / "summary.json").read_text())
    before, after = summary["validation_before"], summary["validation"]
    first = json.loads((root / "tok" / "summary.json").read_text())
    assert before == pytest.approx(first["validation"], abs=1e-4)
    assert after["psnr"] != before["psnr"]
    assert "validation_before" not in first, "it began from scratch"
    quick = {"learning_rate": 0.5}
    train_tokenizer(decoder_alone(root / "tok", optimiser=quick), tmp_path / "run")
    printed = capsys.readouterr().out
    assert f"before training: PSNR {before['psnr']:.2f} dB" in printed
    assert "warning: train.optimiser.learning_rate 0.5 is one for networks from scratch" in printed
    fell = re.search(r"warning: PSNR fell from (.*) to (.*) dB; a smaller train.optimiser", printed)
    assert fell is not None and float(fell[1]) == round(before["psnr"], 2)
    assert re.search(rf"PSNR +{fell[2]} dB, before {fell[1]} dB", printed)


@pytest.mark.parametrize(("rate", "warned"), [(1e-4, 0), (1.1e-4, 1)])
def test_rates_up_to_that_of_the_recipe_are_not_warned_of(root, rate, warned):
    recipe = decoder_alone(root / "tok")
    assert len(recipe.method.warnings(rate)) == warned
    scratch = parse_recipe(tiny.content({"name": "vae"}), "tiny")
    assert scratch.method.warnings(rate) == []


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"vae": "tiny", "train": "decoder"}, "method.train: decoder needs weights to start from"),
        (
            {"vae": "demo", "train": "decoder", "kl_weight": 1e-6},
            "method.kl_weight takes no effect with method.train=decoder; pass method.kl_weight=null",
        ),
        (
            {"name": "send_vae", "vae": "demo", "train": "decoder"},
            "method.train: the alignment is of latents, which method.train=decoder keeps",
        ),
        (
            {"name": "va_vae", "vae": "demo", "train": "decoder", "kl_weight": 1e-6},
            "method.train: the alignment is of latents, which method.train=decoder keeps",
        ),
    ],
)
def test_what_the_decoder_alone_does_not_go_with_is_refused(method, words):
    with pytest.raises(UserError, match=words):
        parse_recipe(tiny.content({"name": "vae"} | method), "tiny")


def test_the_embedded_vae_and_runs_by_name_are_weights_to_start_from(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(root / "tok")
    ours, demo = load_autoencoder("mine"), load_autoencoder("demo")
    old = Tokenizer.from_pretrained(root / "tok").autoencoder.state_dict()
    assert all(torch.equal(value, old[name]) for name, value in ours.state_dict().items())
    assert demo.config.latent_channels == 8
