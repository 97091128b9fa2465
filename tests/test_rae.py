"""RAE: a frozen encoder's tokens as latents, its decoder's training, what is built on it, and its files elsewhere."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import tiny
from semtok import Tokenizer, UserError
from semtok.commands import cache_latents, cli, evaluate, hub, train_dit
from semtok.commands.train_tokenizer import (
    build_objective,
    check_tokenizer,
    plan_tokenizer,
    train_tokenizer,
)
from semtok.data.caches.latent_cache import fingerprint
from semtok.hub.export_rae import _decoder, export_autoencoder
from semtok.hub.import_rae import ENCODERS
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.images import to_pixels
from semtok.methods.augment import AugmentConfig, augment
from semtok.methods.feature_discriminator import FeatureDiscriminator, FeaturesConfig
from semtok.methods.rae import RAETokenizer, encoder_tokens
from semtok.methods.vae import load_autoencoder
from semtok.recipe import parse_recipe
from semtok.sampler.draws import Draws
from semtok.sampler.vit_decoder import DecoderShape, ViTDecoder
from semtok.teachers import Teacher, TeacherConfig, TeacherFeatures, TransformerShape

FEATURES = {"name": "demo", "input_size": 16, "layers": [0, 1], "gelu": "exact"}
ADVERSARIAL = {
    "start_step": 2,
    "discriminator_start_step": 1,
    "fresh": True,
    "features": FEATURES,
    "augment": {"cutout": 0.3},
}


def content(method: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    recipe = tiny.content({"name": "rae"} | (method or {}), **train)
    recipe["teacher"] = {"name": "demo", "final_norm": "plain"}
    return recipe


def whole(**train: Any) -> dict[str, Any]:
    noise = {"law": "additive", "strength": 0.8}
    return content({"adversarial": dict(ADVERSARIAL), "decoder_noise": noise}, **train)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run with all of the losses."""
    folder = tmp_path_factory.mktemp("rae") / "run"
    train_tokenizer(parse_recipe(whole(steps=3), "tiny"), folder)
    return folder


@pytest.fixture
def tokenizer(run) -> RAETokenizer:
    return Tokenizer.from_pretrained(run)


def pixels(num: int, size: int = 16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num, 3, size, size, generator=generator) * 2 - 1


# Latents -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_latents_are_the_encoders_tokens_standardised_at_each_position(tokenizer):
    assert tokenizer.texture_mean.shape == (128, 4, 4)
    latents, images = tokenizer.encode(pixels(3)).texture, pixels(3)
    tokens = tokenizer.teacher.features(images, grid=(4, 4)).patches[-1]
    assert tokens.mean(dim=1).abs().max() < 1e-5  # a layer norm without scale and shift
    expected = (tokens - tokenizer.texture_mean) / tokenizer.texture_std
    torch.testing.assert_close(latents, expected)
    tokenizer.measure_statistics([images])
    latents = tokenizer.encode(images).texture
    assert latents.mean(dim=0).abs().max() < 1e-4
    torch.testing.assert_close(latents.std(dim=0, correction=0), torch.ones(128, 4, 4))


@torch.no_grad()
def test_images_of_another_size_need_statistics_per_channel(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="image size 32x32 is not 16x16, .*statistics=channel"):
        tokenizer.encode(pixels(1, 32))
    with pytest.raises(ValueError, match="are of 4x4 positions, and these latents have 8x8"):
        tokenizer.decode({"texture": torch.zeros(1, 128, 8, 8)})
    teacher, decoder = tokenizer.teacher, tokenizer.decoder
    other = RAETokenizer(decoder, teacher, statistics="channel")
    other.measure_statistics([pixels(4)])
    latents = other.encode(pixels(2, 32))
    assert latents.texture.shape == (2, 128, 8, 8)
    assert other.decode(latents).shape == (2, 3, 32, 32)
    other.save_pretrained(tmp_path / "export")
    again = Tokenizer.from_pretrained(tmp_path / "export")
    assert torch.equal(again.encode(pixels(2, 32)).texture, latents.texture)


@pytest.mark.parametrize(
    "arguments",
    [
        [train_dit.main, "data.size=32"],
        [train_dit.main, "data.size=32", "data.cache=none"],
        [cache_latents.main, "--data", "kind=shapes", "size=32"],
        [evaluate.main, "latents", "--data", "kind=shapes", "size=32", "--tokenizer", "demo"],
        [
            evaluate.main,
            "reconstruction",
            "--data",
            "kind=shapes",
            "size=32",
            "--tokenizer",
            "demo",
        ],
    ],
)
def test_commands_refuse_images_of_another_size_before_any_work(run, tmp_path, capsys, arguments):
    main, *words = arguments
    words += [str(run)] if main is evaluate.main else ["--tokenizer", str(run)]
    output = [] if main is evaluate.main else ["--output", str(tmp_path / "made")]
    assert cli.run(main, [*words, *output]) == 2
    told, error = capsys.readouterr()
    assert not told and error.strip().count("\n") == 0
    assert "data.size: image size 32x32 is not 16x16" in error and "pass data.size=16" in error
    assert not (tmp_path / "made").exists()


def test_several_layers_are_averaged_and_the_last_ones_mean_token_is_added():
    first, last = torch.randn(2, 5, 3, 3), torch.randn(2, 5, 3, 3)
    features = TeacherFeatures((first, last), last.mean(dim=(2, 3)))
    mean = (first + last) / 2
    torch.testing.assert_close(encoder_tokens(features, spatial_mean=False), mean)
    spatial = last.flatten(2).mean(dim=2)[:, :, None, None]
    torch.testing.assert_close(encoder_tokens(features, spatial_mean=True), mean + spatial)


def test_a_run_of_several_layers_keeps_them(tmp_path):
    recipe = content({"spatial_mean": True, "statistics": "channel"}, steps=1, warmup_steps=1)
    recipe["teacher"]["layers"] = [1, 3]
    ours = train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "run")
    images = pixels(2)
    with torch.no_grad():
        layers = ours.teacher.features(images, grid=(4, 4)).patches
        tokens = (layers[0] + layers[1]) / 2 + layers[1].mean(dim=(2, 3), keepdim=True)
        again = Tokenizer.from_pretrained(tmp_path / "run")
        torch.testing.assert_close(again.posterior_raw(images).mean.texture, tokens)


# The decoder -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_token_is_decoded_to_its_own_square_and_by_the_encoders_scale():
    torch.manual_seed(0)
    shape = DecoderShape(**tiny.DECODER)
    decoder = ViTDecoder(shape, channels=8, grid=(2, 3))
    decoder.head.weight.zero_()
    decoder.head.bias.copy_(torch.arange(48.0))  # row, column, channel
    decoder.take_image_scale(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 3.0]))
    images = decoder(torch.randn(1, 8, 2, 3))
    assert images.shape == (1, 3, 8, 12)
    value = 3 * (4 * 1 + 2) + 1  # row 1, column 2 of each square, green
    expected = torch.full((2, 3), (value * 2.0 + 0.2) * 2 - 1)
    torch.testing.assert_close(images[0, 1, 1::4, 2::4], expected)


def test_a_run_is_no_vae_to_start_from(run):
    words = (
        "run: is a tokenizer of the method 'rae', holds no diffusers VAE .*; pass a folder, a run"
    )
    with pytest.raises(UserError, match=words):
        load_autoencoder(str(run))


def test_positions_are_trained(run, tokenizer):
    fresh = ViTDecoder(tokenizer.decoder.shape, channels=128, grid=(4, 4)).positions
    assert (tokenizer.decoder.positions - fresh).abs().max() > 1e-4


def test_another_runs_decoder_decodes_the_same_latents(run, tokenizer, tmp_path):
    other = train_tokenizer(
        parse_recipe(content(steps=1, warmup_steps=1), "tiny"), tmp_path / "other"
    )
    images = pixels(2)
    latents, theirs = tokenizer.encode(images), other.decode(other.encode(images))
    joined = tokenizer.with_decoder_of(other)
    torch.testing.assert_close(joined.decode(latents), theirs)
    changed = copy.deepcopy(other)
    changed.texture_mean.add_(1)
    with pytest.raises(UserError, match="made for other latents"):
        tokenizer.with_decoder_of(changed)


# Training ----------------------------------------------------------------------------------------


def test_a_run_goes_on_exactly_after_a_stop(tmp_path):
    trainer = stepped(tmp_path / "a", whole(), 3)
    trainer.save()
    again = tiny_trainer(tmp_path / "a", whole())
    again.resume()
    batches = again._batches()
    for _ in range(3):
        again.train_step(batches)
    straight = stepped(tmp_path / "b", whole(), 6)
    for ours, theirs in zip(state(again), state(straight), strict=True):
        assert torch.equal(ours, theirs)


def tiny_trainer(folder: Path, recipe: dict[str, Any]) -> Any:
    return tiny.trainer(folder, recipe["method"], **recipe["train"])


def stepped(folder: Path, recipe: dict[str, Any], num: int) -> Any:
    trainer = tiny_trainer(folder, recipe)
    batches = trainer._batches()
    for _ in range(num):
        trainer.train_step(batches)
    return trainer


def state(trainer: Any) -> list[Tensor]:
    return [value for _, value in sorted(trainer.objective.learners.state_dict().items())]


def test_micro_batches_give_the_losses_of_the_whole_batch(tmp_path):
    recipes = [whole(), whole(accumulate=2)]
    for recipe in recipes:
        recipe["method"]["adversarial"] |= {"start_step": 0, "discriminator_start_step": 0}
    one, two = (
        stepped(tmp_path / str(i), recipe, 1).metrics.read(lambda sums: sums)
        for i, recipe in enumerate(recipes)
    )
    for name in ("loss/l1", "loss/adversarial", "loss/discriminator", "metric/logits_real"):
        assert one[name] == pytest.approx(two[name], rel=1e-3), name


def test_the_discriminator_judges_what_the_updated_decoder_makes_in_eight_bits(tmp_path):
    recipe = whole()
    recipe["method"]["adversarial"] = ADVERSARIAL | {
        "start_step": 0,
        "discriminator_start_step": 0,
        "augment": None,
    }
    trainer = tiny_trainer(tmp_path / "run", recipe)
    objective, judged = trainer.objective, []
    learner = objective.learners["discriminator"]
    objective_learner = objective.learner
    made: list[Tensor] = []
    original = objective_learner.fresh_reconstruction

    def seen(inputs: Any) -> Tensor:
        made.append(objective.averaged_module().head.bias.detach().clone())
        return original(inputs)

    learner.reconstruct = seen
    learner.discriminator.register_forward_pre_hook(lambda _, given: judged.append(given[0]))
    before = objective.averaged_module().head.bias.detach().clone()
    trainer.train_step(trainer._batches())
    after = objective.averaged_module().head.bias.detach()
    assert torch.equal(made[0], after) and not torch.equal(before, after)
    fake = judged[1]  # the first is the generator's own
    levels = (fake + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3 and fake.abs().max() <= 1


def test_a_vae_can_be_judged_by_features_of_changed_images(tmp_path):
    adversarial = ADVERSARIAL | {"start_step": 1}
    trainer = tiny.trainer(tmp_path / "run", {"name": "vae", "adversarial": adversarial})
    batches = trainer._batches()
    for _ in range(3):
        trainer.train_step(batches)
    values = trainer.metrics.read(lambda sums: sums)
    assert {"loss/adversarial", "loss/discriminator", "weight/adversarial"} <= values.keys()
    assert all(abs(value) < 1e4 for value in values.values())
    names = trainer.objective.learners["discriminator"].state_dict()
    assert all(".heads." in name for name in names), "the frozen network is not saved"


def draws(num: int, first: int = 0, whole_batch: int | None = None) -> Draws:
    cpu = torch.device("cpu")
    return Draws(3, 5, whole_batch or num, first, num, cpu)


def test_changes_of_images_belong_to_images_and_let_gradients_through():
    config, images = AugmentConfig(cutout=0.4), pixels(8).requires_grad_()
    changed = augment(images, config, draws(8), "fake")
    parts = [augment(images[i : i + 4], config, draws(4, i, 8), "fake") for i in (0, 4)]
    assert torch.equal(torch.cat(parts), changed)
    assert not torch.equal(changed, augment(images, config, draws(8), "real"))
    changed.sum().backward()
    assert images.grad.abs().max() > 0


def test_each_change_can_be_left_out():
    images = pixels(6)
    shifted = augment(images, AugmentConfig(colour=False, translation=0.25), draws(6), "a")
    for before, after in zip(images, shifted, strict=True):
        shifts = [(y, x) for y in range(-4, 5) for x in range(-4, 5)]
        assert any(torch.equal(after, moved(before, y, x)) for y, x in shifts)
    cut = augment(images, AugmentConfig(colour=False, translation=0, cutout=0.5), draws(6), "a")
    for before, after in zip(images, cut, strict=True):
        gone = (after == 0).all(dim=0)
        assert 16 <= gone.sum() <= 64 and torch.equal(before[:, ~gone], after[:, ~gone])


def moved(image: Tensor, y: int, x: int) -> Tensor:
    """An image whose pixels come from (y, x) further, with 0 from outside."""
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
    return padded[:, 4 + y : 20 + y, 4 + x : 20 + x]


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"adversarial": ADVERSARIAL | {"width": 32}}, "width: of the patch discriminator"),
        ({"adversarial": ADVERSARIAL | {"features": FEATURES | {"kernel": 2}}}, "2 is even"),
        (
            {"adversarial": ADVERSARIAL | {"augment": {"translation": 0, "colour": False}}},
            "method.adversarial.augment: translation 0, colour false and cutout 0 change nothing",
        ),
        ({"decoder": tiny.DECODER | {"heads": 3}}, "width 16 is no multiple of heads 3"),
    ],
)
def test_settings_that_can_not_take_effect_are_refused(method, message):
    with pytest.raises(UserError, match=message):
        parse_recipe(content(method), "tiny")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"input_size": 3}, r"input_size: 3 gives 'demo' no tokens, .* pass at least 8"),
        ({"input_size": 7}, r"input_size: 7 gives 'demo' 1 token, .* pass at least 8"),
        ({"input_size": 8, "kernel": 11}, r"kernel: 11 is too large for the 4 tokens .* at most 9"),
        ({"layers": [99]}, r"layers: \[99\] out of range"),
        ({"name": "vit_none"}, r"name: timm knows no model 'vit_none'"),
        (
            {"checkpoint": "teacher.checkpoint"},
            r"checkpoint: no such file 'teacher.checkpoint'; pass method.adversarial.features.checkpoint=",
        ),
    ],
)
def test_features_that_can_not_be_judged_are_refused_before_training(features, message):
    adversarial = ADVERSARIAL | {"features": FEATURES | features}
    recipe = parse_recipe(content({"adversarial": adversarial}), "tiny")
    with pytest.raises(UserError, match=rf"method\.adversarial\.features\.{message}"):
        build_objective(recipe, place="tiny")


@torch.no_grad()
@pytest.mark.parametrize("features", [{"input_size": 8, "kernel": 9}, {"input_size": 11}])
def test_the_fewest_tokens_are_judged(features):
    config = FeaturesConfig(name="demo", layers=(0, 1), **features)
    discriminator = FeatureDiscriminator(config).eval()
    assert discriminator(pixels(2)).shape == (2, 3, 1, 4)


@torch.no_grad()
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("resize", ["bilinear", "bicubic"])
def test_images_are_judged_as_normalise_and_resize_say(normalise, resize):
    config = FeaturesConfig(
        input_size=16, name="demo", layers=(0, 1), normalise=normalise, resize=resize
    )
    discriminator, seen = FeatureDiscriminator(config), []
    (network,) = discriminator.frozen_modules()
    network.mean += 0.1  # demo's own normalisation leaves [-1, 1] as it is
    given = network.features_of_input
    network.features_of_input = lambda x: seen.append(x) or given(x)
    images = torch.rand(2, 3, 24, 24) * 2 - 1
    discriminator(images)
    torch.testing.assert_close(seen[0], network.preprocess(images))
    assert FeaturesConfig().resize == "bilinear"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            {"reconstruction_weight": 0, "adversarial": ADVERSARIAL | {"start_step": 1}},
            "method.reconstruction_weight: 0 with method.perceptual=none compares no images",
        ),
        (
            {"perceptual": "teacher", "perceptual_weight": 0, "reconstruction_weight": 0},
            "compares no",
        ),
        ({"perceptual_weight": 3}, "method.perceptual_weight takes no effect .*perceptual=none;"),
        (
            {"perceptual": "teacher", "lpips_net": "alex"},
            "method.lpips_net takes no effect .*=vgg$",
        ),
        ({"adversarial": ADVERSARIAL | {"weight": 0}}, "method.adversarial.weight: 0 trains a"),
        (
            {"adversarial": ADVERSARIAL | {"adaptive": False, "max_adaptive": 3}},
            "method.adversarial.max_adaptive takes no effect",
        ),
        (
            {"adversarial": ADVERSARIAL | {"augment": {"translation": 0.03, "colour": False}}},
            "method.adversarial.augment: changes nothing, as shares of 16x16 images round to 0",
        ),
    ],
)
def test_settings_without_effect_are_refused_but_in_a_run_that_goes_on(method, message, tmp_path):
    recipe = parse_recipe(content(method), "tiny")
    with pytest.raises(UserError, match=message):
        check_tokenizer(recipe, tmp_path / "run")
    assert plan_tokenizer(recipe, tmp_path / "run", resume=True, place="tiny").recipe == recipe


def test_a_network_without_patch_tokens_is_refused(tmp_path):
    name, file = "test_resnet.r160_in1k", tmp_path / "resnet.pth"
    torch.save(timm.create_model(name).state_dict(), file)
    recipe = content()
    recipe["teacher"] = {"name": name, "checkpoint": str(file)}
    with pytest.raises(UserError, match="RAE's encoder is a vision transformer, and 'test_resnet"):
        build_objective(parse_recipe(recipe, "tiny"), place="tiny")
    recipe["teacher"]["final_norm"] = "plain"
    with pytest.raises(
        UserError, match="no layer norm after its blocks; it is no vision transformer"
    ):
        build_objective(parse_recipe(recipe, "tiny"), place="tiny")


# Composites --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_composite_takes_a_rae_as_its_texture(run, tokenizer, tmp_path):
    recipe = tiny.content(tiny.SEMANTICS["reglue"] | {"texture": str(run)}, steps=2)
    recipe["method"]["min_texture_psnr"] = None
    with torch.enable_grad():
        ours = train_tokenizer(parse_recipe(recipe, "tiny"), tmp_path / "reglue")
    again = Tokenizer.from_pretrained(tmp_path / "reglue")
    latents = again.encode(pixels(2))
    assert latents["texture"].shape == (2, 128, 4, 4) and "semantic" in latents
    torch.testing.assert_close(latents.texture, tokenizer.encode(pixels(2)).texture)
    torch.testing.assert_close(
        again.decode(latents), tokenizer.decode({"texture": latents.texture})
    )
    known = fingerprint(ours)
    assert known == fingerprint(again)
    again.texture.teacher_fingerprint = "another encoder's"
    assert fingerprint(again) != known, "a cache of latents would be taken for this one's"


# Files elsewhere ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> RAETokenizer:
    """A RAE with an encoder of DINOv2's kind, of the least size."""
    torch.manual_seed(0)
    shape = TransformerShape(width=64, depth=2, heads=1)
    network = timm.create_model(ENCODERS[768, 12], **shape.arguments())
    weights = {n: v + 0.02 * torch.randn_like(v) for n, v in network.state_dict().items()}
    config = TeacherConfig(
        name=ENCODERS[768, 12], checkpoint="teacher.safetensors", final_norm="plain", shape=shape
    )
    teacher = Teacher(config, weights)
    decoder = ViTDecoder(DecoderShape(**tiny.DECODER), channels=64, grid=(2, 2))
    decoder.take_image_scale(teacher.mean, teacher.std)
    tokenizer = RAETokenizer(decoder, teacher).eval()
    tokenizer.measure_statistics([pixels(8, 8)])
    return tokenizer


@torch.no_grad()
def test_diffusers_folder_reads_back_as_the_same_tokenizer(small, tmp_path, capsys):
    small.save_pretrained(tmp_path / "export")
    words = ["export", str(tmp_path / "export"), "--output", str(tmp_path / "diffusers")]
    assert hub.main(words) == 0
    assert "computes the decoder's position table anew" in capsys.readouterr().out  # 2x2, not 16x16
    imported = import_checkpoint(tmp_path / "diffusers", "auto", ImportOptions())
    images = pixels(2, 8, seed=1)
    latents = small.encode(images)
    torch.testing.assert_close(
        imported.model.encode(images).texture, latents.texture, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(imported.model.decode(latents), small.decode(latents))


@torch.no_grad()
def test_a_trained_position_table_travels_and_is_told_of(small, tmp_path):
    trained = copy.deepcopy(small)
    trained.decoder.positions.add_(0.5)
    (note,) = export_autoencoder(trained, tmp_path / "diffusers")
    assert "computes the decoder's position table anew" in note
    again = import_checkpoint(tmp_path / "diffusers", "auto", ImportOptions()).model
    torch.testing.assert_close(again.decoder.positions, trained.decoder.positions)


def test_what_diffusers_has_no_place_for_is_refused(run, tmp_path):
    words = ["export", str(run), "--output", str(tmp_path / "diffusers")]
    with pytest.raises(UserError, match="AutoencoderRAE has no encoder 'demo'"):
        hub.main(words)
    assert not (tmp_path / "diffusers").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalise": False}, "teacher.normalise false; it has true"),
        ({"resize": "bilinear"}, "teacher.resize bilinear; it has bicubic"),
    ],
)
def test_images_prepared_as_diffusers_does_not_are_refused(small, tmp_path, change, message):
    other = copy.deepcopy(small)
    other.teacher.config = other.teacher.config.model_copy(update=change)
    with pytest.raises(UserError, match=f"AutoencoderRAE has no {message}"):
        export_autoencoder(other, tmp_path / "diffusers")
    assert not (tmp_path / "diffusers").exists()


def test_a_decoder_alone_asks_for_its_encoder(small, tmp_path):
    state = {n: v.clone() for n, v in _decoder(small).items()}
    rules = (("to_q", "attention.query"), ("to_k", "attention.key"), ("to_v", "attention.value"))
    for theirs, official in rules:
        state = {
            n.replace(f"attention.{theirs}", f"attention.{official}"): v for n, v in state.items()
        }
    state = {n.replace("attention.to_out.0", "attention.output.dense"): v for n, v in state.items()}
    torch.save(state, tmp_path / "decoder_model.pt")
    file = tmp_path / "decoder_model.pt"
    with pytest.raises(UserError, match="a decoder alone; put its encoder's folder"):
        import_checkpoint(file, "auto", ImportOptions(heads=2))
    options = ImportOptions(teacher=small.teacher)
    with pytest.raises(UserError, match="does not say how many heads its decoder of width 16 has"):
        import_checkpoint(file, "auto", options)
    made = import_checkpoint(file, "auto", ImportOptions(teacher=small.teacher, heads=2))
    assert any("not standardised yet" in note for note in made.notes)
    raw = small.posterior_raw(to_pixels(pixels(1, 8))).mean
    torch.testing.assert_close(made.model.decode_raw(raw), small.decode_raw(raw))
