"""A head of blocks behind an encoder: what it is given, what sampling may leave out, how checkpoints are read."""

import json
import re
from keyword import iskeyword
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny
from semtok import Generator
from semtok.commands import hub, sample
from semtok.commands.cli import run
from semtok.diffusion.diffusion_config import DiffusionConfig, resolve_defaults
from semtok.errors import UserError
from semtok.hub.diffusers.pipeline import SemtokPipeline
from semtok.hub.export_pipeline import _scheduler, _transformer
from semtok.hub.headed_dit import import_headed_dit
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.draws import SampleNoise
from semtok.sampler.embeddings import rotary_table
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.sampler.routing import DENSE, Route
from semtok.sampler.sampling import SamplerConfig, clock_readings, sample_latents
from semtok.sampler.transport import Schedule, TimeConfig

SPEC = LatentSpec(
    (PartSpec("texture", 4, 8), PartSpec("semantic", 2, 16), PartSpec("global", 6, None))
)
WIDE = {
    "depth": 2,
    "width": 32,
    "heads": 2,
    "rope": True,
    "head": {"depth": 2, "width": 48, "heads": 3},
}
GRID, LABELS = (4, 6), torch.tensor([0, 3, 1])
LEADING = Schedule({"texture": 0.3, "semantic": 0.0, "global": 0.0})
CPU = torch.device("cpu")


def built(**changes: Any) -> DiT:
    torch.manual_seed(0)
    shape = DiTArchitecture.model_validate(WIDE | changes)
    timed = ("semantic", "texture")
    return tiny.awake(DiT(shape, SPEC, num_classes=3, timed_parts=timed)).eval()


def inputs(batch: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    noise = SampleNoise(1, range(batch), CPU)
    x = {name: noise(shape) for name, shape in SPEC.shapes_on(GRID).items()}
    return x, {name: torch.linspace(0.1, 0.8, batch) * (1 + 0.1 * i) for i, name in enumerate(x)}


# The network --------------------------------------------------------------------------------------


@torch.no_grad()
def test_each_token_of_the_head_is_modulated_by_the_encoders_token_at_its_place():
    """Without attention between tokens, a changed token of the state changes its own cell alone."""
    network, (x, times) = built(), inputs()
    for block in network.head.blocks:
        block.attn.proj.weight.zero_()
    whole = network(x, times, LABELS)
    changed = whole.state.clone()
    place = 1 + 2 * GRID[1] + 4  # after the vector's token
    changed[:, place] += 1
    moved = network(x, times, LABELS, state=changed).velocity
    differs = (moved["texture"] - whole.velocity["texture"]).abs().amax(dim=(0, 1)) > 1e-4
    assert differs.nonzero().tolist() == [[2, 4]]
    assert torch.equal(moved["global"], whole.velocity["global"])
    changed = whole.state.clone()
    changed[:, 0] += 1
    moved = network(x, times, LABELS, state=changed).velocity
    assert torch.equal(moved["texture"], whole.velocity["texture"])
    assert not torch.allclose(moved["global"], whole.velocity["global"], atol=1e-4)


@torch.no_grad()
def test_the_head_alone_gives_the_same_bits_on_a_state_and_reads_the_latents_anew():
    network, (x, times) = built(), inputs()
    whole = network(x, times, LABELS)
    again = network(x, times, LABELS, state=whole.state).velocity
    assert all(torch.equal(again[name], whole.velocity[name]) for name in again)
    later = {name: t * 0.5 for name, t in times.items()}
    other = network(x, later, 0 * LABELS, state=whole.state).velocity
    assert torch.equal(other["texture"], again["texture"]), "time and class are in the state"
    moved = network({n: p + 1 for n, p in x.items()}, times, LABELS, state=whole.state).velocity
    assert not torch.allclose(moved["texture"], again["texture"], atol=1e-3)


def test_recomputed_activations_have_the_same_gradients_in_the_head_too():
    gradients = []
    for recompute in (False, True):
        network, (x, times) = built(learned_positions=(2, 3), time_embedding="fourier"), inputs()
        network.checkpointing = recompute
        velocity = network.train()(x, times, LABELS).velocity
        sum(part.square().mean() for part in velocity.values()).backward()
        gradients.append([p.grad for p in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert all(gradient.any() for gradient in gradients[0][:-1])


@torch.no_grad()
def test_blocks_of_the_head_are_compiled_and_spelt_for_export_as_the_others():
    network, (x, times) = built(), inputs()
    assert network.every_block == [*network.blocks, *network.head.blocks]
    exported = network.for_export()
    names = {part for name in exported.state_dict() for part in name.split(".")}
    assert not any(iskeyword(name) for name in names)
    ours, theirs = network(x, times, LABELS), exported(x, times, LABELS)
    assert torch.equal(ours.velocity["texture"], theirs.velocity["texture"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": {"depth": 1, "width": 40, "heads": 3}}, "head: width 40 must be a multiple"),
        ({"head": {"depth": 1, "heads": 16}}, "head: rope needs a head width divisible by 4"),
        ({"head": {"depth": 0}}, "greater than or equal to 1"),
        ({"rope": False, "rope_span": 16.0}, "rope_span takes effect with rope only"),
        ({"position_codes": False, "learned_positions": (2, 2)}, "learned_positions takes effect"),
        ({"time_embedding": "fourier", "time_period": 10.0}, "time_period takes effect with"),
        ({"final_norm": "layer"}, "final_norm: LayerNorm is that of the blocks too"),
    ],
)
def test_a_shape_that_can_not_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        DiTArchitecture.model_validate(WIDE | changes)


# Steps that run the head alone --------------------------------------------------------------------


def sampled(network: DiT, config: SamplerConfig, **more: Any) -> dict[str, Tensor]:
    noise = SampleNoise(3, range(3), CPU)
    return dict(sample_latents(network, noise, LABELS, GRID, config, schedule=LEADING, **more))


def counted(network: DiT) -> list[int]:
    """Images in each call of the encoder's first and of the head's first block."""
    calls: list[list[int]] = [[], []]
    for own, block in zip(calls, (network.blocks[0], network.head.blocks[0]), strict=True):
        block.register_forward_pre_hook(lambda _, words, own=own: own.append(len(words[0])))
    return calls


GUIDED = {
    "scale": 2.0,
    "interval": {"texture": (0.3, 0.8), "semantic": (0.3, 0.8), "global": (0.3, 0.8)},
}


@torch.no_grad()
@pytest.mark.parametrize("base", ["null_label", "dropped_path", "weak"])
def test_a_kept_state_is_that_of_the_step_that_made_it_for_every_branch_of_guidance(base):
    """As if all branches were run in every step, also where guidance begins in a step that runs the head alone."""
    routed = {"depth": 3, "split": (1, 1)} if base == "dropped_path" else {}
    network, weak = built(**routed), built(head=None) if base == "weak" else None
    guidance = {**GUIDED, "base": "null_label" if base == "weak" else base}
    config = SamplerConfig.model_validate(
        {"steps": 6, "state_refresh_rate": 3, "guidance": guidance}
    )
    calls = counted(network)
    ours = sampled(network, config, weak=weak)
    clock = clock_readings(config, LEADING, 1.0)
    num_steps = len(clock) - 1
    refreshed = sum(3 if n % 3 == 0 else 0 for n in range(num_steps))
    assert sum(calls[0]) < sum(calls[1]) and sum(calls[0]) <= 2 * refreshed
    noise = SampleNoise(3, range(3), CPU)
    state = {name: noise(shape) for name, shape in SPEC.shapes_on(GRID).items()}
    branches = {
        "own": LABELS,
        "null": torch.full_like(LABELS, 3),
    }
    for n, (begin, end) in enumerate(zip(clock, clock[1:], strict=False)):
        times = {k: torch.full((3,), t) for k, t in LEADING.times_at(begin).items()}
        if n % 3 == 0:
            made = {}
            for name, labels in branches.items():
                route = route_of(name, base)
                made[name] = network(state, times, labels, route=route).state
        own = network(state, times, LABELS, state=made["own"]).velocity
        away = (
            weak(state, times, LABELS).velocity
            if weak is not None
            else network(state, times, branches["null"], state=made["null"]).velocity
        )
        moved = LEADING.moved(begin, end)
        active = config.guidance.active(LEADING.times_at(begin))
        for name, part in state.items():
            speed = own[name]
            if name in active:
                speed = torch.lerp(away[name], speed, active[name])
            state[name] = part + (end - begin) * speed if moved[name] else part
    for name, part in state.items():
        torch.testing.assert_close(ours[name], part, atol=1e-4, rtol=1e-4)


def route_of(branch: str, base: str) -> Route:
    return Route(num_skipped=3) if branch == "null" and base == "dropped_path" else DENSE


@torch.no_grad()
def test_a_rate_of_one_draws_the_same_bits_and_more_others():
    network, guidance = built(), GuidanceConfig(scale=1.5)
    plain, one, two = (
        sampled(network, SamplerConfig(steps=4, guidance=guidance, **more))
        for more in ({}, {"state_refresh_rate": 1}, {"state_refresh_rate": 2})
    )
    assert all(torch.equal(plain[name], one[name]) for name in plain)
    assert not torch.allclose(plain["texture"], two["texture"], atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "heun"}, "state_refresh_rate goes with euler and sde"),
        ({"method": "dopri5"}, "state_refresh_rate goes with euler and sde"),
        ({"guidance": {"base": "inner_head"}}, "inner_head is read off the blocks that it leaves"),
    ],
)
def test_a_rate_that_can_take_no_effect_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig.model_validate({"state_refresh_rate": 2, **settings})


def test_a_network_without_a_head_is_refused_before_it_is_asked():
    with pytest.raises(ValueError, match="state_refresh_rate: the network has no head"):
        SamplerConfig(state_refresh_rate=2).check_network(built(head=None).config)


# Times and grids ----------------------------------------------------------------------------------


def test_times_are_cut_off_near_noise_and_else_follow_their_law():
    shape, draws = {"texture": (4, 4, 4)}, tiny.draws(0, 4000)
    for law in ("uniform", "logit_normal"):
        whole, cut = (
            TimeConfig(law=law, mean=-0.5, least=least).draw(draws, shape) for least in (0.0, 0.3)
        )
        assert cut.min() >= 0.3 and cut.max() <= 1
        expected = whole[whole >= 0.3].quantile(torch.linspace(0.05, 0.95, 10))
        torch.testing.assert_close(
            cut.quantile(torch.linspace(0.05, 0.95, 10)), expected, atol=0.03, rtol=0
        )


ALONE = Schedule({"texture": 0.0})


def test_steps_end_before_data_and_the_last_of_euler_has_its_own_length():
    def readings(shift: float, **settings: Any) -> list[float]:
        return clock_readings(SamplerConfig(steps=4, **settings), ALONE, shift)

    def shifted(t: float) -> float:
        return t / (2 - t)

    assert readings(2.0, end=0.999) == pytest.approx([shifted(0.999 * i / 4) for i in range(5)])
    assert readings(2.0, method="dopri5", end=0.999) == pytest.approx([0.0, shifted(0.999)])
    expected = [0.0, 0.96 / 3, 0.64, 0.96, 1.0]
    assert readings(1.0, euler_last_step=0.04) == pytest.approx(expected)
    split = {"split_at_borders": False}
    assert readings(1.0, euler_last_step=0.04, **split) == pytest.approx(expected, abs=1e-6)
    assert readings(1.0, end=0.5, **split) == pytest.approx([0, 0.125, 0.25, 0.375, 0.5])
    leading = clock_readings(SamplerConfig(steps=2, end=0.5), LEADING, 1.0)
    assert leading == pytest.approx([0.0, 0.3, 0.325, 0.65]), "no border after the end"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sde", "end": 0.9}, "sampler.end: sde ends by a step without noise"),
        ({"method": "heun", "euler_last_step": 0.1}, "euler_last_step goes with method: euler"),
        ({"end": 0.9, "euler_last_step": 0.1}, "euler_last_step goes with method: euler and"),
    ],
)
def test_an_end_that_can_take_no_effect_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig.model_validate(settings)


# Generators ---------------------------------------------------------------------------------------


def made(network: dict[str, Any], sampler: SamplerConfig) -> Generator:
    tokenizer = tiny.tokenizer("vae", "none", False)
    config = DiffusionConfig.model_validate({"network": network, "repa": False})
    config = resolve_defaults(config, tokenizer)
    torch.manual_seed(0)
    dit = tiny.awake(DiT(config.architecture, tokenizer.spec, num_classes=3))
    size = (16, 16)
    return Generator(dit, tokenizer, config, sampler, class_names="abc", image_size=size).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator with a head that reuses its encoder's state."""
    shape = {"depth": 2, "width": 32, "heads": 2, "head": {"depth": 1, "width": 48, "heads": 3}}
    guidance = GuidanceConfig(scale=2.0)
    settings = SamplerConfig(steps=4, state_refresh_rate=2, guidance=guidance)
    generator = made(shape | {"learned_positions": [2, 2]}, settings)
    place = tmp_path_factory.mktemp("head") / "model"
    generator.save_pretrained(place)
    again = Generator.from_pretrained(place)
    assert torch.equal(generator.sample([0, 2], seed=1), again.sample([0, 2], seed=1))
    return place


def test_a_pipeline_draws_the_same_images_with_the_head_alone_in_every_second_step(folder):
    generator = Generator.from_pretrained(folder)
    inner = generator.tokenizer.autoencoder
    inner.register_to_config(
        latents_mean=generator.tokenizer.texture_mean.tolist(),
        latents_std=generator.tokenizer.texture_std.tolist(),
    )
    pipeline = SemtokPipeline(
        _transformer(generator),
        _scheduler(generator),
        inner,
        id2label=dict(enumerate("abc")),
        height=16,
        width=16,
    )
    pipeline.set_progress_bar_config(disable=True)
    calls = counted(pipeline.transformer.dit)
    images = pipeline([0, 2], seed=1, output_type="pt").images * 2 - 1
    torch.testing.assert_close(images, generator.sample([0, 2], seed=1), atol=1e-4, rtol=0)
    assert [len(own) for own in calls] == [2, 4]


def test_the_rate_is_an_option_of_sampling_and_refused_where_it_can_take_no_effect(
    folder, tmp_path, capsys
):
    words = [str(folder), "--num", "1", "--output", str(tmp_path / "a.png")]
    assert run(sample.main, [*words, "--state-refresh-rate", "3"]) == 0
    words[-1] = str(tmp_path / "b.png")
    assert run(sample.main, [*words, "--state-refresh-rate", "2", "--method", "heun"]) == 2
    error = capsys.readouterr().err
    assert error == "error: --state-refresh-rate: goes with --method euler and sde, not heun\n"
    both = ["--state-refresh-rate", "0", "--steps", "2"]
    assert run(sample.main, [*words, *both]) == 2
    assert "error: --steps, --state-refresh-rate: state_refresh_rate: " in capsys.readouterr().err
    assert run(sample.main, [*words, "--method", "heun"]) == 0, "the model's own rate is 2"
    told = "note: sampler.state_refresh_rate of this model does not go with heun"
    assert told in capsys.readouterr().err
    words[-1] = str(tmp_path / "c.png")
    assert run(sample.main, [*words, "--method", "heun", "--state-refresh-rate", "1"]) == 0
    plain = made({"depth": 1, "width": 16, "heads": 1}, SamplerConfig(steps=2))
    plain.save_pretrained(tmp_path / "plain")
    words[0], words[-1] = str(tmp_path / "plain"), str(tmp_path / "d.png")
    assert run(sample.main, [*words, "--state-refresh-rate", "2"]) == 2
    assert "--state-refresh-rate: this model has no head" in capsys.readouterr().err


# Checkpoints --------------------------------------------------------------------------------------


def ddt_state(blocks: int = 3, width: int = 16, heads: int = 2) -> dict[str, Tensor]:
    """Random weights by DDT's names, for 4 channels and patches of 2."""
    hidden = int(2 / 3 * 4 * width)
    shapes: dict[str, tuple[int, ...]] = {
        "y_embedder.embedding_table.weight": (4, width),
        "t_embedder.mlp.0.weight": (width, 256),
        "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width),
        "t_embedder.mlp.2.bias": (width,),
        "final_layer.adaLN_modulation.0.weight": (2 * width, width),
        "final_layer.adaLN_modulation.0.bias": (2 * width,),
        "final_layer.linear.weight": (16, width),
        "final_layer.linear.bias": (16,),
    }
    for name in ("s_embedder", "x_embedder"):
        shapes |= {f"{name}.proj.weight": (width, 16), f"{name}.proj.bias": (width,)}
    for i in range(blocks):
        shapes |= {
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.q_norm.weight": (width // heads,),
            f"blocks.{i}.attn.k_norm.weight": (width // heads,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.mlp.w1.weight": (hidden, width),
            f"blocks.{i}.mlp.w3.weight": (hidden, width),
            f"blocks.{i}.mlp.w2.weight": (width, hidden),
            f"blocks.{i}.adaLN_modulation.0.weight": (6 * width, width),
            f"blocks.{i}.adaLN_modulation.0.bias": (6 * width,),
        }
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def lightning(folder: Path) -> Path:
    """A file as DDT's training module writes it; the averaged weights are twice the others."""
    own = ddt_state()
    state = {f"denoiser.{n}": v for n, v in own.items()}
    state |= {f"ema_denoiser.{n}": 2 * v for n, v in own.items()}
    for layer, shape in (("0", (5, 16)), ("2", (5, 5)), ("4", (7, 5))):
        state[f"diffusion_trainer.proj.0.{layer}.weight"] = torch.zeros(shape)
        state[f"diffusion_trainer.proj.0.{layer}.bias"] = torch.zeros(shape[0])
    file = folder / "last.ckpt"
    torch.save({"state_dict": state, "epoch": 1}, file)
    return file


@torch.no_grad()
def test_ddts_tokens_are_put_into_our_order():
    """Without blocks in its way, the latents pass the last layer as its fold puts them together."""
    state = ddt_state()
    network = import_headed_dit(state, place="file", encoder_blocks=2).network
    x = torch.randn(2, 4, 6, 8)
    tokens = F.unfold(x, 2, stride=2).transpose(1, 2)
    embedded = F.linear(tokens, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"])
    for block in network.head.blocks:
        block.modulation.weight.zero_()
        block.modulation.bias.zero_()
    for layer in (network.final.modulation.weight, network.final.modulation.bias):
        layer.zero_()
    outputs = F.layer_norm(embedded, embedded.shape[-1:], eps=1e-6)
    outputs = F.linear(
        outputs, state["final_layer.linear.weight"], state["final_layer.linear.bias"]
    )
    expected = F.fold(outputs.transpose(1, 2), (6, 8), 2, stride=2)
    ours = network({"texture": x}, {"texture": torch.rand(2)}, torch.tensor([0, 1]))
    torch.testing.assert_close(ours.velocity.texture, expected, atol=1e-5, rtol=1e-5)


def test_a_published_ddt_is_imported_by_its_names_and_becomes_a_generator(tmp_path, capsys):
    file = lightning(tmp_path)
    output = tmp_path / "network"
    words = ["import", "auto", str(file), "--output", str(output)]
    assert run(hub.main, words) == 2
    assert "how many of its 3 blocks are the encoder is not known; give --encoder-blocks" in (
        capsys.readouterr().err
    )
    assert run(hub.main, [*words, "--encoder-blocks", "2"]) == 0
    told = capsys.readouterr().out
    assert "ddt" in told and "left out, only REPA's training reads it" in told
    shape = json.loads((output / "config.json").read_text())["architecture"]
    assert (shape["depth"], shape["head"]["depth"], shape["heads"]) == (2, 1, 2)
    tokenizer = tiny.tokenizer("vae", "none", False)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    words[-1] = str(tmp_path / "model")
    more = ["--encoder-blocks", "2", "--tokenizer", str(tmp_path / "tokenizer")]
    assert run(hub.main, [*words, *more, "--image-size", "18"]) == 2
    assert "--image-size 18: expected a multiple of" in capsys.readouterr().err
    assert run(hub.main, [*words, *more, "--image-size", "16", "--weights", "model"]) == 0
    generator = Generator.from_pretrained(tmp_path / "model")
    assert generator.image_size == (16, 16)
    assert generator.config.time.law == "logit_normal"
    assert generator.sampler.euler_last_step == 0.04
    assert "DDT, arXiv 2504.05741" in generator.papers()
    weight = generator.network.label_embed.weight
    assert torch.equal(weight, ddt_state()["y_embedder.embedding_table.weight"])
    assert generator.sample([0], seed=0, num_inference_steps=2).isfinite().all()


@torch.no_grad()
def test_a_ditdhs_time_and_velocity_run_the_other_way():
    """A network of ours by its names: at the noise's time, with the opposite velocity."""
    shape = {"depth": 2, "width": 32, "heads": 2, "swiglu": True, "rope": True, "rms_norm": True}
    shape |= {"learned_positions": (3, 3), "time_embedding": "fourier"}
    shape |= {"condition_activations": 2, "head": {"depth": 1, "width": 48, "heads": 3}}
    spec = LatentSpec((PartSpec("texture", 5, 16),))
    torch.manual_seed(0)
    network = tiny.awake(DiT(DiTArchitecture.model_validate(shape), spec, num_classes=3)).eval()
    network.positions.normal_()
    state = {ditdh_name(name): value.clone() for name, value in network.state_dict().items()}
    state["pos_embed"] = state["pos_embed"][None]
    for part, width in (("enc", 16), ("dec", 16)):
        table = (one.clone() for one in rotary_table((3, 3), width, 0, CPU))
        names = (f"{part}_feat_rope.freqs_{name}" for name in ("cos", "sin"))
        state |= dict(zip(names, table, strict=True))
    imported = import_headed_dit(state, place="file")
    assert imported.network.config == network.config and imported.grid == (3, 3)
    x, t, labels = {"texture": torch.randn(2, 5, 3, 3)}, torch.tensor([0.2, 0.9]), LABELS[:2]
    ours = imported.network(x, {"texture": t}, labels).velocity.texture
    assert torch.equal(ours, -network(x, {"texture": t}, labels).velocity.texture)
    noise = (2 * torch.pi) * (1 - t[:, None]) * state["t_embedder.W"]
    features = torch.cat([noise.sin(), noise.cos()], dim=1)
    first = imported.network.time_embed["all"].mlp
    torch.testing.assert_close(imported.network.time_embed["all"](t), first(features))
    state["enc_feat_rope.freqs_sin"][1] += 1
    with pytest.raises(UserError, match="enc_feat_rope.freqs_sin is not the fixed code of a 3x3"):
        import_headed_dit(state, place="file")


def ditdh_name(name: str) -> str:
    for ours, theirs in (
        (r"^head\.patch_embed\.", "x_embedder.proj."),
        (r"^patch_embed\.", "s_embedder.proj."),
        (r"^head\.project\.", "s_projector."),
        (r"^head\.blocks\.0\.", "blocks.2."),
        (r"^positions$", "pos_embed"),
        (r"^time_embed\.all\.frequencies$", "t_embedder.W"),
        (r"^time_embed\.all\.", "t_embedder."),
        (r"^label_embed\.", "y_embedder.embedding_table."),
        (r"^final\.norm\.", "final_layer.norm_final."),
        (r"^final\.", "final_layer."),
        (r"\.modulation\.", ".adaLN_modulation.1."),
    ):
        name = re.sub(ours, theirs, name)
    return name


def test_a_file_of_another_network_is_refused_by_what_it_lacks():
    with pytest.raises(
        UserError, match=r"x: not a checkpoint of DDT or DiT\^DH \(blocks\.: expected"
    ):
        import_headed_dit({"s_embedder.proj.weight": torch.zeros(2, 16)}, place="x")
    state = ddt_state()
    del state["blocks.1.mlp.w3.weight"]
    with pytest.raises(UserError, match="blocks.1.mlp.w3.weight is missing"):
        import_headed_dit(state, place="x", encoder_blocks=2)


def test_encoder_blocks_say_nothing_to_a_network_without_a_head(tmp_path, capsys):
    words = ["import", "sit", str(tmp_path / "sit.pt"), "--output", str(tmp_path / "x")]
    state = {"x_embedder.proj.weight": torch.zeros(4, 4, 2, 2)}
    state["final_layer.linear.weight"] = torch.zeros(32, 4)
    torch.save(state, tmp_path / "sit.pt")
    assert run(hub.main, [*words, "--encoder-blocks", "2"]) == 2
    assert "--encoder-blocks says nothing to a checkpoint of sit" in capsys.readouterr().err
