"""REPA-E against a kit of its official code: a run's file as a whole generator, and the losses of its step."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from parity import Kit, kits, load_kit
from semtok import Generator, Tokenizer
from semtok.diffusion.training import squared_error
from semtok.hub.checkpoints import read_checkpoint
from semtok.hub.formats import open_checkpoint, read_statistics
from semtok.hub.import_dit import ImportedDiT, import_dit, our_name
from semtok.hub.import_vae import our_name as our_vae_name
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.images import to_pixels
from semtok.methods.adversarial import PatchDiscriminator, hinge_loss
from semtok.methods.image_losses import reconstruction_loss
from semtok.methods.vae import kl_loss
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import Latents, Posterior
from semtok.sampler.sampling import SamplerConfig, integrate, velocity_function
from semtok.sampler.transport import Schedule, interpolate
from semtok.teachers import alignment_loss

TENSOR, IMAGE = {"atol": 5e-5, "rtol": 0.0}, {"atol": 1e-4, "rtol": 0.0}
SUM = {"atol": 0.0, "rtol": 1e-5}
TOGETHER = Schedule({"texture": 0.0})
EPS = 1e-4  # of the norm that standardises the latents in training


@pytest.fixture(params=kits("repae"))
def kit(request) -> Kit:
    return load_kit(request.param)


@pytest.fixture
def generator(kit) -> Generator:
    file = kit.folder / kit.case["files"]["checkpoint"]
    imported = import_checkpoint(file, "auto", ImportOptions(heads=kit.heads))
    assert imported.format == "repa-e" and isinstance(imported.model, Generator)
    return imported.model


def network(kit: Kit, weights: str) -> tuple[ImportedDiT, Tensor, Tensor]:
    """The transformer with the projectors, and the latents' running mean and variance."""
    state = open_checkpoint(kit.folder / kit.case["files"]["checkpoint"], weights).state
    imported = import_dit(state, place="kit", heads=kit.heads, family="repa")
    return imported, state["bn.running_mean"], state["bn.running_var"]


def per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def aligned(imported: ImportedDiT, kit: Kit, case: str, x: Tensor, labels: Tensor, t: Tensor):
    """Velocity and alignment loss with that case's targets."""
    depth = kit.case["constructor"]["kwargs"]["encoder_depth"]
    output = imported.network({"texture": x}, {"texture": t}, labels, hidden_after=depth)
    side = round(output.hidden.shape[1] ** 0.5)
    predicted, target = (
        tokens.transpose(1, 2).unflatten(2, (side, side))
        for tokens in (imported.projectors[0](output.hidden), kit[f"{case}/z_0"])
    )
    return output.velocity.texture, alignment_loss(predicted, target).mean()


def test_parity_repae_forward(kit, generator):
    x, t, y = (kit[f"forward/{name}"] for name in ("x_t", "t", "y"))
    with torch.no_grad():
        ours = generator.network({"texture": x}, {"texture": 1 - t}, y).velocity.texture
    torch.testing.assert_close(-ours, kit["forward/velocity"], **TENSOR)


def test_parity_repae_latent_statistics(kit, generator):
    tokenizer = generator.tokenizer
    ours = tokenizer.standardise(Latents({"texture": kit["bn/latents"]}))
    torch.testing.assert_close(ours.texture, kit["bn/normalised_by_latents_stats"], **TENSOR)
    back = tokenizer.destandardise(Latents({"texture": kit["bn/normalised"]}))
    torch.testing.assert_close(back.texture, kit["bn/denormalised"], **TENSOR)
    mean, std = read_statistics(kit.folder / kit.case["files"]["latents_stats"])
    torch.testing.assert_close(mean, tokenizer.texture_mean, **TENSOR)
    torch.testing.assert_close(std, tokenizer.texture_std, **TENSOR)
    parts = (Latents({"texture": half}) for half in kit["posterior/moments"].chunk(2, dim=1))
    posterior = tokenizer.standardise_posterior(Posterior(*parts))
    drawn = posterior.sample_with({"texture": kit["posterior/noise"]}).texture
    torch.testing.assert_close(drawn, kit["posterior/latents"], **TENSOR)


def test_positions_that_training_has_moved_come_with_the_generator(kit, tmp_path):
    """As those of every published run, after whose first step they are no codes any more."""
    content = dict(read_checkpoint(kit.folder / kit.case["files"]["checkpoint"]))
    moved = content["ema"]["pos_embed"] + 0.1
    content["ema"] = {**content["ema"], "pos_embed": moved}
    torch.save(content, tmp_path / "0400000.pt")
    imported = import_checkpoint(tmp_path / "0400000.pt", "auto", ImportOptions(heads=kit.heads))
    assert imported.became["pos_embed"] == "network"
    imported.save(tmp_path / "export")
    again = Generator.from_pretrained(str(tmp_path / "export"))
    assert torch.equal(again.network.positions, moved[0])
    assert again.sample([0], num_inference_steps=2, seed=0).isfinite().all()
    tokenizer = Tokenizer.from_pretrained(tmp_path / "export" / "tokenizer")
    torch.testing.assert_close(tokenizer.texture_mean, content["ema"]["bn.running_mean"])


@pytest.mark.parametrize("case", ["ode_euler_cfg", "sde_cfg"])
def test_parity_repae_samples_and_their_images(kit, generator, case):
    settings = kit.settings(case)
    low, high = settings["guidance_low"], settings["guidance_high"]
    guidance = GuidanceConfig(scale=settings["cfg_scale"], interval=(1 - high, 1 - low))
    config = SamplerConfig(
        method="sde" if settings["kind"] == "sde" else "euler",
        steps=settings["num_steps"],
        guidance=guidance,
    )
    draws: Iterator[Tensor] = iter(kit[f"{case}/noise"] if settings["kind"] == "sde" else [])
    velocity = velocity_function(generator.network, kit[f"{case}/y"], TOGETHER, guidance)
    with torch.no_grad():
        samples = integrate(
            velocity,
            {"texture": kit[f"{case}/latents"]},
            config,
            schedule=TOGETHER,
            noise=lambda _: next(draws),
        )
        raw = generator.tokenizer.destandardise(samples)
        image = generator.tokenizer.decode_raw(Latents({"texture": raw.texture[:1]}))
    torch.testing.assert_close(samples.texture, kit[f"{case}/samples"], **TENSOR)
    torch.testing.assert_close(raw.texture, kit[f"{case}/denormalised"], **IMAGE)
    torch.testing.assert_close(image, kit[f"{case}/decoded"], **IMAGE)


def test_parity_repae_losses(kit):
    imported, mean, var = network(kit, "ema")
    latents, t = kit["eval_loss/latents"], 1 - kit["eval_loss/t"]
    z = (latents - per_channel(mean)) * (per_channel(var) + EPS).rsqrt()
    x, velocity = interpolate("linear", z, kit["eval_loss/noises"], t)
    with torch.no_grad():
        ours, alignment = aligned(imported, kit, "eval_loss", x, kit["eval_loss/y"], t)
    torch.testing.assert_close(-ours, kit["eval_loss/model_output"], **TENSOR)
    torch.testing.assert_close(
        squared_error(ours, velocity), kit["eval_loss/denoising_loss"], **SUM
    )
    torch.testing.assert_close(alignment - 1, kit["eval_loss/proj_loss"], **TENSOR)


def test_parity_repae_step_of_the_vae(kit, generator):
    """Reconstruction, KL, adversarial and alignment terms, and their gradients in every parameter."""
    imported, mean, var = network(kit, "model")
    autoencoder = generator.tokenizer.autoencoder.train()
    pixels = to_pixels(kit["step/image_uint8"], device=torch.device("cpu"))
    torch.testing.assert_close(pixels, kit["step/processed_image"], **TENSOR)
    posterior = autoencoder.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.parameters, kit["step/moments"], **TENSOR)
    z = posterior.mean + posterior.std * kit["step/vae_noise"]
    reconstruction = autoencoder.decode(z).sample
    torch.testing.assert_close(reconstruction, kit["step/reconstruction"], **IMAGE)

    settings = kit.case["loss_config"]["losses"]
    l1 = reconstruction_loss(reconstruction, pixels, "l1").mean()
    torch.testing.assert_close(l1, kit["step/reconstruction_loss"], **SUM)
    kl = kl_loss(posterior.mean, posterior.logvar)
    torch.testing.assert_close(kl, kit["step/kl_per_sample"], **SUM)
    critic = discriminator(kit)
    gan = -critic(reconstruction).mean()
    torch.testing.assert_close(gan, kit["step/gan_loss"], **TENSOR)
    loss = l1 + settings["kl_weight"] * kl.mean() + settings["discriminator_weight"] * gan
    torch.testing.assert_close(loss, kit["step/vae_loss_without_alignment"], **TENSOR)

    t = 1 - kit["step/t"]
    standardised = (z - per_channel(mean)) * (per_channel(var) + EPS).rsqrt()
    x, _ = interpolate("linear", standardised, kit["step/noises"], t)
    _, alignment = aligned(imported, kit, "step", x, kit["step/y"], t)
    torch.testing.assert_close(alignment - 1, kit["step/align_proj_loss"], **TENSOR)
    (loss + kit.settings("step")["vae_align_proj_coeff"] * alignment).backward()
    levels = len(autoencoder.config.block_out_channels)
    parameters = dict(autoencoder.named_parameters())
    names = kit.case["cases"]["step"]["vae_grad_norm_names"]
    ours = torch.stack([parameters[our_vae_name(name, levels)].grad.norm() for name in names])
    torch.testing.assert_close(ours, kit["step/vae_grad_norms"], atol=1e-5, rtol=1e-4)


def test_parity_repae_step_of_the_discriminator_and_of_the_transformer(kit):
    critic, step = discriminator(kit), {name: kit[f"step/{name}"] for name in ("z", "noises", "t")}
    fake = critic(
        kit["step/reconstruction"]
    )  # its running statistics see the generator's pass first
    real, fake = critic(kit["step/processed_image"]), critic(kit["step/reconstruction"])
    loss = hinge_loss(real, fake).mean()
    torch.testing.assert_close(loss, kit["step/discriminator_loss"], **TENSOR)
    loss.backward()
    norms = torch.stack([p.grad.norm() for p in critic.parameters()])
    torch.testing.assert_close(norms, kit["step/discriminator_grad_norms"], atol=1e-5, rtol=1e-4)

    imported, _, _ = network(kit, "model")
    standardised = F.batch_norm(step["z"], None, None, training=True, eps=EPS)
    t = 1 - step["t"]
    x, velocity = interpolate("linear", standardised, step["noises"], t)
    ours, alignment = aligned(imported, kit, "step", x, kit["step/effective_y"], t)
    denoising = squared_error(ours, velocity)
    torch.testing.assert_close(denoising, kit["step/denoising_loss"], **SUM)
    torch.testing.assert_close(alignment - 1, kit["step/sit_proj_loss"], **TENSOR)
    (denoising.mean() + kit.settings("step")["proj_coeff"] * alignment).backward()
    parameters = dict(imported.network.named_parameters()) | {
        f"projectors.{name}": p for name, p in imported.projectors.named_parameters()
    }
    names = kit.case["cases"]["step"]["sit_grad_norm_names"]
    for name, expected in zip(names, kit["step/sit_grad_norms"], strict=True):
        if name != "pos_embed":  # fixed there, computed here
            norm = parameters[our_name(name)].grad.norm()
            torch.testing.assert_close(norm, expected, atol=1e-5, rtol=1e-4)


def discriminator(kit: Kit) -> PatchDiscriminator:
    content = open_checkpoint(kit.folder / kit.case["files"]["checkpoint"]).content
    settings = kit.case["discriminator_constructor"]["kwargs"]
    critic = PatchDiscriminator(
        width=settings["ndf"], num_layers=settings["n_layers"], norm="batch"
    )
    critic.load_state_dict(
        {n.replace("main.", "layers."): v for n, v in content["discriminator"].items()}
    )
    return critic.train()
