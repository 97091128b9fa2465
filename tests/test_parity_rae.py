"""RAE against kits of its official code: the tokenizer of its files, its statistics, and a step of its first stage."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from parity import Kit, kits, load_kit
from semtok.errors import UserError
from semtok.hub.formats import open_checkpoint
from semtok.hub.import_rae import EPS
from semtok.hub.imports import Imported, import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.images import to_pixels
from semtok.methods import image_losses
from semtok.methods.augment import augmented
from semtok.methods.decoder_noise import DecoderNoiseConfig, noise_for_decoder
from semtok.methods.rae import RAEConfig, RAEObjective, RAETokenizer, encoder_tokens
from semtok.objective import MethodContext
from semtok.sampler.latents import Latents
from semtok.training.ema import ModelEMA

TENSOR = {"atol": 5e-5, "rtol": 0.0}
RATIO = {"atol": 0.0, "rtol": 1e-5}
ROUNDED = {"atol": 1e-4, "rtol": 0.0}  # of means: a pixel may land on the other side of a level


@pytest.fixture(params=kits("rae"))
def kit(request) -> Kit:
    return load_kit(request.param)


def read(kit: Kit, file: str = "decoder", weights: str = "ema") -> Imported:
    return import_checkpoint(
        kit.folder / kit.case["files"][file], "auto", ImportOptions(weights=weights)
    )


def to_map(tokens: Tensor, side: int) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=side)


def side_of(kit: Kit) -> int:
    return kit["decode/latent"].shape[-1]


@torch.no_grad()
@pytest.mark.parametrize("case", ["encode", "encode_other_size"])
def test_parity_rae_encodes(kit, case):
    tokenizer, side = read(kit).model, side_of(kit)
    pixels = to_pixels(kit[f"{case}/image_uint8"])
    seen = tokenizer.teacher.preprocess(pixels, (side, side))
    torch.testing.assert_close(seen, kit[f"{case}/encoder_input"], **TENSOR)
    features = tokenizer.teacher.features(pixels, grid=(side, side))
    tokens = encoder_tokens(features, spatial_mean=False)
    torch.testing.assert_close(tokens, to_map(kit[f"{case}/tokens"], side), **TENSOR)
    latents = tokenizer.posterior_raw(pixels, features).mean
    latents = tokenizer.standardise(latents).texture
    torch.testing.assert_close(latents, kit[f"{case}/latent"], **TENSOR)


@torch.no_grad()
def test_parity_rae_encodes_whole_images_in_one_call(kit):
    for file in ("decoder", "checkpoint"):
        latents = read(kit, file).model.encode(kit["encode/image_uint8"]).texture
        torch.testing.assert_close(latents, kit["encode/latent"], **TENSOR)


@torch.no_grad()
@pytest.mark.parametrize("case", ["encode", "encode_other_size"])
def test_parity_rae_encodes_as_diffusers_does(kit, case):
    tokenizer, side = read(kit, "diffusers").model, side_of(kit)
    features = tokenizer.teacher.features(to_pixels(kit[f"{case}/image_uint8"]), grid=(side, side))
    tokens = encoder_tokens(features, spatial_mean=False)
    latents = tokenizer.standardise(Latents({"texture": tokens})).texture
    torch.testing.assert_close(latents, kit[f"{case}/diffusers_latent"], **TENSOR)


class KitDraws:
    """A kit's random numbers, by the names that a step asks for."""

    def __init__(self, kit: Kit, case: str, numbers: dict[str, str]) -> None:
        self.kit, self.case, self.numbers = kit, case, numbers

    def __getitem__(self, name: str) -> Tensor:
        return self.kit[f"{self.case}/{self.numbers[name]}"]

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return to_map(self[name], shape[-1])

    def uniform(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        numbers = self[name]
        if name.startswith("augment"):
            return rearrange(numbers, "n b 1 1 -> b n")
        return numbers.view(-1, *shape)

    def uniform_of_step(self, name: str) -> Tensor:
        base, _, kind = name.rpartition("_")
        return self.kit[f"{self.case}/{self.numbers[base].replace('rand', 'gate')}"][int(kind)][
            None
        ]


def noise_of(kit: Kit) -> DecoderNoiseConfig:
    return DecoderNoiseConfig(
        law="additive", strength=kit.case["constructor"]["rae_kwargs"]["noise_tau"]
    )


@torch.no_grad()
def test_parity_rae_encodes_with_noise(kit):
    tokenizer = read(kit).model
    numbers = {"decoder_noise_level": "sigma_uniform", "decoder_noise": "noise"}
    pixels = to_pixels(kit["encode_noise/image_uint8"])
    tokens = tokenizer.posterior_raw(pixels).mean.texture
    noisy = noise_for_decoder(tokens, noise_of(kit), KitDraws(kit, "encode_noise", numbers))
    latents = tokenizer.standardise(Latents({"texture": noisy})).texture
    torch.testing.assert_close(latents, kit["encode_noise/latent"], **TENSOR)


@torch.no_grad()
def test_parity_rae_decodes(kit):
    latents, side = Latents({"texture": kit["decode/latent"]}), side_of(kit)
    for file in ("decoder", "checkpoint"):
        tokenizer = read(kit, file).model
        raw = tokenizer.destandardise(latents)
        torch.testing.assert_close(raw.texture, to_map(kit["decode/decoder_input"], side), **TENSOR)
        pixels = tokenizer.decode_raw(raw)  # twice the distance of images in [0, 1]
        torch.testing.assert_close((pixels + 1) / 2, kit["decode/image"], **TENSOR)
        decoder = tokenizer.decoder
        unit = ((pixels + 1) / 2 - decoder.image_mean) / decoder.image_std
        torch.testing.assert_close(unit, kit["decode/unpatchified"], atol=2e-4, rtol=0)
        patch = decoder.shape.patch_size
        logits = rearrange(unit, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)
        torch.testing.assert_close(logits, kit["decode/logits"], atol=2e-4, rtol=0)


@torch.no_grad()
def test_parity_rae_decodes_as_diffusers_does(kit):
    imported = read(kit, "diffusers")
    assert imported.format == "diffusers-rae"
    assert any("position table" in note for note in imported.notes)
    tokenizer, latents = imported.model, Latents({"texture": kit["decode/latent"]})
    pixels = tokenizer.decode_raw(tokenizer.destandardise(latents))
    torch.testing.assert_close((pixels + 1) / 2, kit["decode/diffusers_image"], **TENSOR)
    tokenizer.decoder.load_state_dict(read(kit).model.decoder.state_dict())
    pixels = tokenizer.decode_raw(tokenizer.destandardise(latents))
    torch.testing.assert_close((pixels + 1) / 2, kit["decode/diffusers_image_same_pos"], **TENSOR)


@torch.no_grad()
def test_parity_rae_statistics(kit):
    """Published ones are a running mean of batches; each batch's moments are measured as every tokenizer's are."""
    tokenizer, settings = read(kit).model, kit.settings("stats")
    mean = torch.zeros_like(tokenizer.texture_mean)
    var, momentum = torch.ones_like(mean), settings["momentum"]
    for images in kit["stats/image_uint8"]:
        tokenizer.measure_statistics([to_pixels(images)])
        mean.lerp_(tokenizer.texture_mean, momentum)
        var.lerp_(tokenizer.texture_std.square(), momentum)
    torch.testing.assert_close(mean, kit["stats/mean"], **TENSOR)
    torch.testing.assert_close(var, kit["stats/var"], **TENSOR)
    stated = torch.load(kit.folder / kit.case["files"]["stats"], weights_only=True)
    file = read(kit).model
    torch.testing.assert_close(file.texture_mean, stated["mean"])
    torch.testing.assert_close(file.texture_std, (stated["var"] + EPS).sqrt())


# A step of the first stage -----------------------------------------------------------------------

NUMBERS = {
    "decoder_noise_level": "sigma_uniform",
    "decoder_noise": "token_noise",
    "augment_generator": "generator_fake_aug_rand",
    "augment_fake": "disc_fake_aug_rand",
    "augment_real": "disc_real_aug_rand",
}


class StandIn(nn.Module):
    """The kit's distance in the place of LPIPS."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        a, b = (F.conv2d(x, self.weight, stride=2, padding=1) for x in (reconstruction, pixels))
        return (a - b).square().mean(dim=(1, 2, 3))


def adversarial(kit: Kit) -> dict[str, Any]:
    made, files = kit.case["constructor"], kit.case["files"]
    dino, aug = made["dino_recipe"], made["disc_cfg"]["augment"]
    shape = {"width": dino["embed_dim"], "depth": dino["depth"], "heads": dino["num_heads"]}
    return {
        "weight": made["loss_cfg"]["disc_weight"],
        "max_adaptive": made["loss_cfg"]["max_d_weight"],
        "start_step": 0,
        "adaptive_eps": 1e-6,
        "fresh": True,
        "augment": {"probability": aug["prob"], "cutout": aug["cutout"]},
        "features": {
            "checkpoint": str(kit.folder / files["dino"]),
            "shape": shape | {"patch_size": dino["patch_size"]},
            "layers": tuple(dino["key_depths"]),
            "kernel": made["disc_cfg"]["arch"]["ks"],
        },
        "weights": str(kit.folder / files["checkpoint"]),
    }


@pytest.fixture
def objective(kit, monkeypatch) -> RAEObjective:
    """The objective with the weights of the kit's checkpoint."""
    weight = load_file(kit.folder / kit.case["files"]["perceptual_stand_in"]).values()
    monkeypatch.setattr(image_losses, "LPIPS", lambda net: StandIn(next(iter(weight))))
    tokenizer = read(kit, "checkpoint", "model").model
    loss = kit.case["constructor"]["loss_cfg"]
    config = RAEConfig(
        decoder=tokenizer.decoder.shape,
        decoder_noise=noise_of(kit),
        reconstruction_weight=0.5,  # distances in [0, 1] are half of those in [-1, 1]
        perceptual="lpips",
        perceptual_weight=loss["perceptual_weight"],
        adversarial=adversarial(kit),
    )
    size = tuple(kit["stage1_step/image_uint8"].shape[-2:])
    objective = RAEObjective(config, MethodContext(size, tokenizer.teacher, 1))
    objective.averaged_module().load_state_dict(tokenizer.decoder.state_dict())
    return objective


def prepared(kit: Kit, objective: RAEObjective) -> tuple[dict[str, Any], KitDraws]:
    batch = type("Images", (), {"pixels": to_pixels(kit["stage1_step/image_uint8"])})
    return objective.prepare(batch), KitDraws(kit, "stage1_step", NUMBERS)


THEIRS = {
    "positions": "decoder_pos_embed",
    "cls_token": "trainable_cls_token",
    "embed": "decoder_embed",
    "norm": "decoder_norm",
    "head": "decoder_pred",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
}


def official_gradients(decoder: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gradients by the official names."""
    for name, parameter in decoder.named_parameters():
        stem, _, kind = name.rpartition(".")
        if name in THEIRS:
            yield THEIRS[name], parameter.grad
        elif not name.startswith("blocks."):
            yield f"{THEIRS[stem]}.{kind}", parameter.grad
        else:
            _, block, inner = stem.split(".", 2)
            if inner == "attn.qkv":
                for part, grad in zip(
                    ("query", "key", "value"), parameter.grad.chunk(3), strict=True
                ):
                    yield f"decoder_layers.{block}.attention.attention.{part}.{kind}", grad
            else:
                yield f"decoder_layers.{block}.{THEIRS[inner]}.{kind}", parameter.grad


def generator_step(kit: Kit, objective: RAEObjective) -> None:
    """The decoder's part of the step, held to the kit."""
    inputs, draws = prepared(kit, objective)
    learner, decoder = objective.learner, objective.averaged_module()
    seen = learner(inputs, draws, 0, {})
    terms, means = seen.terms, {n: t.value.mean() for n, t in seen.terms.items()}
    expected = {n: kit[f"stage1_step/{n}"] for n in ("rec_loss", "perceptual_loss", "gan_loss")}
    torch.testing.assert_close(means["l1"] / 2, expected["rec_loss"], **TENSOR)
    torch.testing.assert_close(means["perceptual"], expected["perceptual_loss"], **TENSOR)
    torch.testing.assert_close(means["adversarial"], expected["gan_loss"], **TENSOR)
    wanted = terms["l1"].weight * means["l1"] + terms["perceptual"].weight * means["perceptual"]
    torch.testing.assert_close(wanted, kit["stage1_step/recon_total"], **TENSOR)
    weight = kit["stage1_step/adaptive_weight"] * objective.config.adversarial.weight
    torch.testing.assert_close(terms["adversarial"].weight, weight, **RATIO)
    total = wanted + terms["adversarial"].weight * means["adversarial"]
    torch.testing.assert_close(total, kit["stage1_step/total_loss"], **TENSOR)
    x_hat = seen.carry["reconstruction"]
    torch.testing.assert_close((x_hat + 1) / 2, kit["stage1_step/reconstruction"], **TENSOR)
    for name, value in (("recon", wanted), ("gan", means["adversarial"])):
        (grad,) = torch.autograd.grad(value, decoder.head.weight, retain_graph=True)
        norm = kit[f"stage1_step/{name}_grad_norm_last"]
        torch.testing.assert_close(grad.norm(), norm, **RATIO)
    total.backward()
    norms = {name: grad.norm() for name, grad in official_gradients(decoder)}
    names = kit.case["cases"]["stage1_step"]["grad_norm_names"]
    assert norms.keys() == set(names)
    ours = torch.stack([norms[name] for name in names])
    torch.testing.assert_close(ours, kit["stage1_step/grad_norms"], rtol=1e-5, atol=1e-7)


def test_parity_rae_trains_the_decoder(kit, objective):
    generator_step(kit, objective)
    decoder, average = objective.averaged_module(), read(kit, "checkpoint", "ema").model.decoder
    ema = ModelEMA(decoder, kit.case["constructor"]["ema_decay"], warmup=False)
    ema.module.load_state_dict(average.state_dict())
    torch.optim.AdamW(decoder.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0).step()
    ema.update()
    bias = decoder.head.bias.detach()
    torch.testing.assert_close(bias, kit["stage1_step/decoder_pred_bias_after"], **TENSOR)
    bias = ema.module.head.bias.detach()
    torch.testing.assert_close(bias, kit["stage1_step/ema_decoder_pred_bias_after"], **TENSOR)


def test_parity_rae_judges(kit, objective):
    """The generator's images as the discriminator gets and judges them."""
    inputs, draws = prepared(kit, objective)
    fake = kit["stage1_step/reconstruction"] * 2 - 1
    config = objective.config.adversarial.augment
    gates = kit["stage1_step/generator_fake_aug_gate"]
    fake = augmented(fake, config, gates, draws.uniform("augment_generator", (7,)))
    torch.testing.assert_close(fake, kit["stage1_step/augmented_fake"], **TENSOR)
    discriminator = objective.learners["discriminator"].discriminator.eval()
    logits = discriminator(fake).flatten(1)
    torch.testing.assert_close(logits, kit["stage1_step/logits_fake"], **TENSOR)


def test_parity_rae_trains_the_discriminator(kit, objective):
    inputs, draws = prepared(kit, objective)
    generator_step(kit, objective)
    decoder = objective.averaged_module()
    torch.optim.AdamW(decoder.parameters(), lr=2e-4, betas=(0.9, 0.95), weight_decay=0).step()
    fresh = objective.learner.fresh_reconstruction(inputs)
    torch.testing.assert_close((fresh + 1) / 2, kit["stage1_step/reconstruction_after"], **TENSOR)
    learner, judged = objective.learners["discriminator"], []
    learner.discriminator.register_forward_hook(lambda _, given, out: judged.append((*given, out)))
    output = learner(inputs, draws, 0, {})
    (fake_input, fake), (real_input, real) = judged
    torch.testing.assert_close(real_input, kit["stage1_step/disc_input_real"], **TENSOR)
    torch.testing.assert_close(fake_input, kit["stage1_step/disc_input_fake"], atol=2e-2, rtol=0)
    assert (fake_input - kit["stage1_step/disc_input_fake"]).abs().mean() < 1e-4
    torch.testing.assert_close(real.flatten(1), kit["stage1_step/disc_logits_real"], **TENSOR)
    expected = kit["stage1_step/disc_logits_fake"]
    torch.testing.assert_close(fake.flatten(1), expected, atol=5e-3, rtol=0)
    torch.testing.assert_close(fake.mean(), expected.mean(), **ROUNDED)
    loss = output.terms["discriminator"].value.mean()
    torch.testing.assert_close(loss, kit["stage1_step/disc_loss"], **ROUNDED)
    told = {name: output.metrics[f"logits_{name}"] for name in ("real", "fake")}
    torch.testing.assert_close(told["real"], kit["stage1_step/disc_logits_real"].mean(), **ROUNDED)
    torch.testing.assert_close(told["fake"], expected.mean(), **ROUNDED)
    loss.backward()
    state = dict(learner.discriminator.named_parameters()) | dict(
        learner.discriminator.named_buffers()
    )
    case = kit.case["cases"]["stage1_step"]
    ours = torch.stack([state[n].grad.norm() for n in case["disc_grad_norm_names"]])
    torch.testing.assert_close(ours, kit["stage1_step/disc_grad_norms"], rtol=1e-3, atol=1e-5)
    u = torch.cat([state[n].flatten() for n in case["spectral_u_names"]])
    torch.testing.assert_close(u, kit["stage1_step/spectral_u_after"], **TENSOR)
    right = ((fake < 0).float().mean() + (real > 0).float().mean()) / 2
    torch.testing.assert_close(right, kit["stage1_step/disc_accuracy"], atol=1e-2, rtol=0)


def test_a_file_of_stage_one_is_read_whole(kit):
    imported = read(kit, "checkpoint")
    assert imported.format == "rae" and isinstance(imported.model, RAETokenizer)
    state = open_checkpoint(kit.folder / kit.case["files"]["checkpoint"]).state
    fates = {name: imported.became[name] for name in state}
    assert {n for n, fate in fates.items() if fate != "network"} == {
        "encoder.encoder.embeddings.mask_token"
    }
    assert imported.became["disc"] == "left out, other weights"


def copied(kit: Kit, tmp_path: Path) -> Path:
    """The kit's files, to be changed."""
    folder = tmp_path / "kit"
    shutil.copytree(kit.folder, folder, copy_function=shutil.copyfile)
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("file", "beside", "key"),
    [
        ("checkpoint", "decoder_config/config.json", "decoder_num_attention_heads"),
        ("diffusers", "diffusers/config.json", "decoder_num_attention_heads"),
        ("checkpoint", "encoder/preprocessor_config.json", "image_mean"),
    ],
)
def test_what_json_beside_a_file_has_to_say_is_named(kit, file, beside, key, tmp_path):
    folder = copied(kit, tmp_path)
    content = json.loads((folder / beside).read_text())
    del content[key]
    (folder / beside).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{beside}.*: says no {key}"):
        import_checkpoint(folder / kit.case["files"][file], "auto", ImportOptions())


@pytest.mark.parametrize("content", [[], "text", None])
@pytest.mark.parametrize(
    ("file", "beside"),
    [
        ("diffusers", "diffusers/config.json"),
        ("checkpoint", "encoder/config.json"),
        ("checkpoint", "encoder/preprocessor_config.json"),
        ("checkpoint", "decoder_config/config.json"),
    ],
)
def test_json_that_holds_no_settings_is_one_line(kit, file, beside, content, tmp_path):
    folder = copied(kit, tmp_path)
    (folder / beside).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"{beside}: expected settings") as told:
        import_checkpoint(folder / kit.case["files"][file], "auto", ImportOptions())
    assert "\n" not in str(told.value)


DIFFUSERS, ENCODER = "diffusers/config.json", "encoder/config.json"
IMAGES, DECODER = "encoder/preprocessor_config.json", "decoder_config/config.json"


@pytest.mark.parametrize(
    ("beside", "key", "value", "reason"),
    [
        (ENCODER, "num_attention_heads", "a", "got 'a'"),
        (ENCODER, "num_attention_heads", 0, "got 0"),
        (ENCODER, "num_attention_heads", 5, "5 does not divide its width of 64"),
        (IMAGES, "image_mean", "a", "got 'a'"),
        (IMAGES, "image_mean", [0.5, 0.5], "too few"),
        (IMAGES, "image_std", [0.5, 0.5, None], "got None"),
        (DECODER, "decoder_num_attention_heads", 0, "got 0"),
        (DECODER, "decoder_num_attention_heads", "4x", "got '4x'"),
        (DECODER, "decoder_num_attention_heads", None, "got None"),
        (DECODER, "decoder_num_attention_heads", 5, "5 does not divide its width of 48"),
        (DIFFUSERS, "decoder_num_attention_heads", 0, "got 0"),
        (DIFFUSERS, "decoder_num_attention_heads", 5, "5 does not divide its width of 48"),
        (DIFFUSERS, "encoder_patch_size", 0, "got 0"),
        (DIFFUSERS, "encoder_patch_size", 13, "56 is no multiple of encoder_patch_size 13"),
        (DIFFUSERS, "encoder_patch_size", 28, "28, but its tensors say 14"),
        (DIFFUSERS, "foo_setting", 3, "unknown key"),
        (DIFFUSERS, "image_size", 128, "128, but its tensors say 64"),
        (DIFFUSERS, "decoder_hidden_size", 64, "64, but its tensors say 48"),
        (DIFFUSERS, "encoder_norm_mean", [0.5, 0.5, 0.5], "this encoder's is"),
        (DIFFUSERS, "latents_mean", 3.0, "differs from the tensor _latents_mean"),
        (DIFFUSERS, "latents_std", ["a"], "no array of numbers"),
        (DIFFUSERS, "reshape_to_2d", False, "got False"),
        (DIFFUSERS, "scaling_factor", 0, "got 0"),
        (DIFFUSERS, "scaling_factor", float("nan"), "finite"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line_with_file_and_key(
    kit, beside, key, value, reason, tmp_path
):
    folder = copied(kit, tmp_path)
    content = json.loads((folder / beside).read_text())
    (folder / beside).write_text(json.dumps(content | {key: value}))
    file = kit.case["files"]["diffusers" if beside == DIFFUSERS else "checkpoint"]
    with pytest.raises(UserError, match=f"{beside}: .*{key}") as told:
        import_checkpoint(folder / file, "auto", ImportOptions())
    assert reason in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"_latents_mean": None}, "_latents_mean missing"),
        ({"_latents_std": None}, "_latents_std missing"),
        ({"encoder_mean": None}, "encoder_mean missing"),
        ({"encoder_std": torch.ones(2)}, "standardises images by"),
        ({"foo.bar": torch.zeros(1)}, "foo.bar unknown"),
        ({"encoder.foo.bar": torch.zeros(1)}, "encoder's foo.bar unknown"),
        ({"decoder.foo.bar": torch.zeros(1)}, "foo.bar unknown"),
        ({"decoder.decoder_embed.weight": None}, "decoder_embed.weight is missing"),
        ({"_latents_std": torch.tensor(torch.inf)}, "latents_std differs"),
    ],
)
def test_tensors_of_diffusers_folder_that_do_not_fit_are_named(kit, change, told, tmp_path):
    folder = copied(kit, tmp_path) / kit.case["files"]["diffusers"]
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | change
    save_file({name: value for name, value in state.items() if value is not None}, file)
    with pytest.raises(UserError, match=told) as error:
        import_checkpoint(folder, "auto", ImportOptions())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_a_tensor_of_neither_network_of_stage_one_is_named(kit, weights, tmp_path):
    file = copied(kit, tmp_path) / kit.case["files"]["checkpoint"]
    content = torch.load(file, weights_only=True)
    content[weights]["other.x"] = torch.zeros(1)
    torch.save(content, file)
    with pytest.raises(UserError, match=r"other\.x unknown"):
        import_checkpoint(file, "auto", ImportOptions(weights=weights))


@pytest.mark.parametrize("number", [torch.inf, torch.nan, -1.0])
def test_statistics_that_no_tokens_have_are_refused(kit, number, tmp_path):
    folder = copied(kit, tmp_path)
    file = folder / kit.case["files"]["stats"]
    content = torch.load(file, weights_only=True)
    content["var"].view(-1)[0] = number
    torch.save(content, file)
    with pytest.raises(UserError, match=f"{file.name}: .*finite and positive"):
        import_checkpoint(folder / kit.case["files"]["checkpoint"], "auto", ImportOptions())


def test_trained_weights_alone_are_taken_where_they_are_asked_for(kit, tmp_path):
    file = copied(kit, tmp_path) / kit.case["files"]["checkpoint"]
    content = torch.load(file, weights_only=True)
    del content["ema"]
    torch.save(content, file)
    with pytest.raises(UserError, match="holds no 'ema' beside 'model'; give --weights model"):
        import_checkpoint(file, "auto", ImportOptions())
    assert import_checkpoint(file, "auto", ImportOptions(weights="model")).format == "rae"
