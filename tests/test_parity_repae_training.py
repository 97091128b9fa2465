"""REPA-E's training against a kit of its official code: where statistics begin, and two steps with all their updates.

The steps run through the learners, optimisers and the average of a training, on the kit's recorded random numbers.
Weights stay in the official convention of time, noise at 1: folded into ours, Adam would take other steps.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from parity import Kit, kits, load_kit
from semtok.hub.checkpoints import read_checkpoint
from semtok.hub.formats import read_statistics
from semtok.hub.import_dit import import_dit, our_name
from semtok.hub.import_vae import import_autoencoder
from semtok.hub.import_vae import our_name as our_vae_name
from semtok.images import to_pixels
from semtok.methods import image_losses
from semtok.methods.adversarial import PatchDiscriminator
from semtok.methods.repae import REPAEObjective
from semtok.methods.repae_config import REPAEConfig
from semtok.methods.vae import KLTokenizer, VAEConfig
from semtok.objective import MethodContext, StepOutput, Unregistered
from semtok.sampler.dit import DiT
from semtok.sampler.latents import Latents
from semtok.settings import parse
from semtok.teachers import TeacherFeatures
from semtok.training.ema import ModelEMA
from semtok.training.optimisers import Optimisers
from semtok.training.process import make_accelerator
from semtok.training.train_config import TrainConfig

TENSOR, SUM = {"atol": 5e-5, "rtol": 0.0}, {"atol": 0.0, "rtol": 1e-5}
ALIGNED = "transformer_alignment"


@pytest.fixture(params=kits("repae_training"))
def kit(request) -> Kit:
    return load_kit(request.param)


class OfficialDiT(DiT):
    """With REPA's time and sign: noise at 1, velocities from data to noise."""

    def _embed_times(self, times: Mapping[str, Tensor]) -> Tensor:
        return super()._embed_times({name: 1 - t for name, t in times.items()})

    def _velocity(self, *args: Any) -> Latents:
        return super()._velocity(*args).map(torch.neg)


def official(kit: Kit, state: Mapping[str, Tensor]) -> tuple[DiT, nn.Module]:
    """The transformer of a state dict, its positions trained, and REPA's projector."""
    imported = import_dit(state, place="kit", heads=kit.heads, family="sit")
    found, side = imported.network, math.isqrt(state["pos_embed"].shape[1])
    shape = found.config.model_copy(update={"learned_positions": (side, side)})
    network = OfficialDiT(shape, found.spec, num_classes=found.num_classes)
    network.load_state_dict(found.state_dict() | {"positions": state["pos_embed"][0]})
    (projector,) = imported.projectors
    return network.train(), projector


class StandIn(nn.Module):
    """What the kit has for LPIPS."""

    def __init__(self, kit: Kit) -> None:
        super().__init__()
        file = kit.folder / kit.case["files"]["perceptual_stand_in"]
        (self.weight,) = safetensors.torch.load_file(file).values()

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        ours, theirs = (
            nn.functional.conv2d(image, self.weight, stride=2, padding=1) for image in (x_hat, x)
        )
        return (ours - theirs).square().mean(dim=(1, 2, 3))


class Recorded:
    """The random numbers of one step, in the place of ``Draws``."""

    def __init__(self, kit: Kit, step: int) -> None:
        def recorded(name: str) -> Tensor:
            return kit[f"two_steps/{name}"][step]

        self.numbers = {
            "posterior": recorded("vae_noise"),
            "time": own_time(kit, recorded("t_draw").flatten()),
            "noise/texture": recorded("noises"),
        }
        if "two_steps/label_drop_draw" in kit.tensors:
            self.numbers["class_dropout"] = recorded("label_drop_draw")

    def __call__(self, name: str, shape: tuple[int, ...] = ()) -> Tensor:
        if name == "posterior/texture":
            return torch.zeros(1, *shape)
        if name == "class_dropout" and name not in self.numbers:
            return torch.ones(len(self.numbers["time"]))
        return self.numbers[name]

    normal = uniform = __call__


def is_logit_normal(kit: Kit) -> bool:
    settings = kit.settings("two_steps")
    return settings["weighting"] == "lognormal" and settings["path_type"] == "linear"


def own_time(kit: Kit, draw: Tensor) -> Tensor:
    """What our law of time makes the step's time of: the other end is noise here."""
    if kit.settings("two_steps")["weighting"] == "uniform":
        return 1 - draw
    return -draw if is_logit_normal(kit) else 1 - 2 / math.pi * draw.exp().atan()


def settings_of(kit: Kit, vae: Path) -> REPAEConfig[VAEConfig]:
    """As a recipe would have them."""
    losses, steps = kit.case["loss_config"]["losses"], kit.settings("two_steps")
    kwargs = kit.case["constructor"]["kwargs"]
    adversarial = {
        "weight": losses["discriminator_factor"] * losses["discriminator_weight"],
        "start_step": max(0, losses["discriminator_start"] - steps["global_step"]),
        "adaptive": False,
        "width": 8,  # the network itself is the kit's
        "num_layers": 1,
        "norm": "batch",
        "lecam_weight": losses["lecam_regularization_weight"],
        "optimiser": optimiser(steps["disc_lr"]),
    }
    tokenizer = {
        "name": "vae",
        "vae": str(vae),
        "reconstruction": {"l1": "l1", "l2": "mse"}[losses["reconstruction_loss"]],
        "reconstruction_weight": losses["reconstruction_weight"] / math.exp(losses["logvar_init"]),
        "kl_weight": losses["kl_weight"],
        "perceptual": "lpips",
        "perceptual_weight": losses["perceptual_weight"],
        "adversarial": adversarial,
    }
    law = "logit_normal" if is_logit_normal(kit) else "uniform"
    shape = {"depth": kwargs["depth"], "width": kwargs["hidden_size"], "heads": kit.heads}
    diffusion = {
        "network": shape | {"patch_size": kwargs["patch_size"]},
        "path": steps["path_type"],
        "time": {"law": law},
        "class_dropout": kwargs["class_dropout_prob"],
        "repa": {"weight": steps["proj_coeff"], "depth": kwargs["encoder_depth"]},
    }
    joint = {"alignment_weight": steps["vae_align_proj_coeff"], "average_vae": False}
    joint |= {"diffusion_optimiser": optimiser(steps["lr"])}
    content = {"tokenizer": tokenizer, "diffusion": diffusion, **joint}
    return parse(REPAEConfig[VAEConfig], content, "kit")


def optimiser(rate: float) -> dict[str, Any]:
    return {"learning_rate": rate, "betas": [0.9, 0.999], "weight_decay": 0.0}


def standardised_by(kit: Kit, folder: Path) -> Path:
    """The kit's VAE as an export of this library, with the statistics that lie beside it."""
    files = kit.case["files"]
    state = read_checkpoint(kit.folder / files["checkpoint"])["vae"]
    statistics = read_statistics(kit.folder / files["latents_stats"])
    tokenizer = KLTokenizer(
        import_autoencoder(state, place="kit"), method="vae", statistics=statistics
    )
    tokenizer.save_pretrained(folder)
    return folder


class Trained:
    """A joint training of the kit's networks, before its first step."""

    def __init__(self, kit: Kit, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(image_losses, "LPIPS", lambda net: StandIn(kit))
        self.kit, steps = kit, kit.settings("two_steps")
        content = read_checkpoint(kit.folder / kit.case["files"]["checkpoint"])
        kwargs = kit.case["constructor"]["kwargs"]
        images, widths = kit["two_steps/image_uint8"], tuple(kwargs["z_dims"])
        context = MethodContext(
            tuple(images.shape[-2:]),
            teacher_of(widths),
            steps=2,
            class_names=tuple(map(str, range(kwargs["num_classes"]))),
        )
        config = settings_of(kit, standardised_by(kit, folder / "vae"))
        self.objective = REPAEObjective(config, context)
        self._take_networks(content)
        train = {
            "steps": 2,
            "batch_size": len(images),
            "optimiser": optimiser(steps["vae_lr"]),
            "clip_norm": steps["max_grad_norm"],
        }
        train = parse(TrainConfig, train, "kit")
        self.optimisers = Optimisers(self.objective, train, make_accelerator(train, folder))
        self.ema = ModelEMA(self.objective.averaged_module(), steps["ema_decay"], warmup=False)
        self.ema.module.network.load_state_dict(official(kit, content["ema"])[0].state_dict())
        self._take_statistics(self.ema.module.standardiser, content["ema"])
        side = math.isqrt(kit["two_steps/z_0"].shape[1])
        target = kit["two_steps/z_0"].transpose(1, 2).unflatten(2, (side, side))
        self.inputs = {
            "pixels": to_pixels(images, device=torch.device("cpu")),
            "labels": kit["two_steps/y"],
            "features": TeacherFeatures((target,), target.mean(dim=(2, 3))),
        }

    def _take_networks(self, content: Mapping[str, Any]) -> None:
        learners, kit = self.objective.learners, self.kit
        self.dit = learners["dit"].dit
        self.dit.network, self.dit.projector = official(kit, content["model"])
        self.objective.averaged_module().network = self.dit.network
        self.standardiser = learners["dit"].standardiser
        self._take_statistics(self.standardiser, content["model"])
        kwargs = kit.case["discriminator_constructor"]["kwargs"]
        critic = PatchDiscriminator(
            width=kwargs["ndf"], num_layers=kwargs["n_layers"], norm="batch"
        )
        state = content["discriminator"]
        critic.load_state_dict({n.replace("main.", "layers."): v for n, v in state.items()})
        learners["discriminator"].discriminator = self.critic = critic
        learners["autoencoder"].vae._discriminator = Unregistered(critic)
        self.vae = learners["autoencoder"].vae.autoencoder
        self.objective.learners.train()

    @staticmethod
    def _take_statistics(standardiser: nn.Module, state: Mapping[str, Tensor]) -> None:
        standardiser.mean.copy_(state["bn.running_mean"])
        standardiser.var.copy_(state["bn.running_var"])
        standardiser.num_updates.fill_(1)

    def modules_of_the_vae(self) -> list[nn.Module]:
        return [getattr(self.vae, name) for name in self.kit.settings("two_steps")["vae_modules"]]

    def step(self, number: int) -> dict[str, Any]:
        """One step with its updates; what the kit records of it, by the same names."""
        draws, carry, found = Recorded(self.kit, number), {}, {}
        active = self.objective.active_learners(number)
        for name in active:
            output = self.objective.learners[name](self.inputs, draws, number, carry)
            if name == "autoencoder":
                z = output.carry["latents"]
                found |= self._of_the_vae(output)
                found["reconstruction_first"] = output.carry["reconstruction"][:1]
                found["z"], found["time_input"] = z, 1 - self._time(z, draws)
            total(output).backward()
            found |= {"discriminator": self._of_the_discriminator, "dit": self._of_the_dit}.get(
                name, self._whole_vae
            )(output)
            carry |= output.carry
        self.optimisers.step(active)
        self.ema.update()
        return found

    def _time(self, z: Tensor, draws: Recorded) -> Tensor:
        shape = {"texture": tuple(z.shape[1:])}
        return self.dit.config.time.draw(draws, shape).view(-1, 1, 1, 1)

    def _of_the_vae(self, output: StepOutput) -> dict[str, Tensor]:
        terms, (name,) = output.terms, output.terms.keys() & {"l1", "mse"}
        weighted = {n: t.weight * t.value.mean() for n, t in terms.items()}
        aligned = terms[ALIGNED].value.mean()
        without = torch.stack([v for n, v in weighted.items() if n != ALIGNED]).sum()
        found = {
            "reconstruction_loss": weighted[name],
            "perceptual_loss": weighted["perceptual"],
            "kl_loss": weighted["kl"],
            "vae_loss_without_alignment": without,
            "align_proj_loss": aligned - 1,
            "vae_total_loss": without + terms[ALIGNED].weight * (aligned - 1),
            "vae_reconstruction_part_grad_norms": self._norms(without),
            "vae_alignment_part_grad_norms": self._norms(aligned),
        }
        if "adversarial" in terms:
            found["gan_loss"] = terms["adversarial"].value.mean()
            found["weighted_gan_loss"] = weighted["adversarial"]
        return found

    def _norms(self, loss: Tensor) -> Tensor:
        norms = []
        for module in self.modules_of_the_vae():
            grads = torch.autograd.grad(
                loss, list(module.parameters()), retain_graph=True, allow_unused=True
            )
            norms.append(norm_of(grads))
        return torch.stack(norms)

    def _whole_vae(self, output: StepOutput) -> dict[str, Tensor]:
        own = [[p.grad for p in module.parameters()] for module in self.modules_of_the_vae()]
        return {
            "vae_module_grad_norms": torch.stack([norm_of(grads) for grads in own]),
            "vae_total_grad_norm": norm_of([g for grads in own for g in grads]),
        }

    def _of_the_discriminator(self, output: StepOutput) -> dict[str, Tensor]:
        terms = {n: t.weight * t.value.mean() for n, t in output.terms.items()}
        return {
            "discriminator_loss": sum(terms.values()),
            "lecam_loss": terms.get("lecam", torch.zeros(())),
            "logits_real": output.metrics["logits_real"],
            "logits_fake": output.metrics["logits_fake"],
            "disc_total_grad_norm": norm_of([p.grad for p in self.critic.parameters()]),
        }

    def _of_the_dit(self, output: StepOutput) -> dict[str, Tensor]:
        velocity, alignment = (
            output.terms[f"transformer/{name}"] for name in ("velocity/texture", "alignment")
        )
        aligned = alignment.value.mean() - 1
        learner = self.objective.learners["dit"]
        names = self.kit.settings("two_steps")["sit_modules"]
        parameters = dict(self.dit.network.named_parameters())
        parameters |= {f"projectors.{n}": p for n, p in self.dit.projector.named_parameters()}
        prefixes = [self._prefix(name) for name in names]
        norms = [
            norm_of([p.grad for n, p in parameters.items() if n.startswith(prefix)])
            for prefix in prefixes
        ]
        return {
            "denoising_loss": velocity.value,
            "sit_proj_loss": aligned,
            "sit_total_loss": velocity.value.mean() + alignment.weight * aligned,
            "sit_module_grad_norms": torch.stack(norms),
            "sit_total_grad_norm": norm_of([p.grad for p in learner.parameters()]),
        }

    @staticmethod
    def _prefix(name: str) -> str:
        ours = {"pos_embed": "positions", "x_embedder": "patch_embed", "t_embedder": "time_embed"}
        return ours.get(name, {"y_embedder": "label_embed", "final_layer": "final"}.get(name, name))

    def after(self) -> dict[str, Tensor]:
        """Statistics after a step."""
        buffers = [b for b in self.critic.buffers() if b.is_floating_point()]
        return {
            "bn_running_mean": self.standardiser.mean,
            "bn_running_var": self.standardiser.var,
            "ema_bn_running_mean": self.ema.module.standardiser.mean,
            "ema_bn_running_var": self.ema.module.standardiser.var,
            "discriminator_bn_buffers": torch.cat(buffers),
        }

    def parameter(self, whose: str, name: str) -> Tensor:
        if whose == "vae":
            return self.vae.get_parameter(
                our_vae_name(name, len(self.vae.config.block_out_channels))
            )
        if whose == "disc":
            return self.critic.get_parameter(name.replace("main.", "layers."))
        network = self.dit.network if whose == "sit" else self.ema.module.network
        if name == "pos_embed":
            return network.positions[None]
        return network.get_parameter(our_name(name))


def total(output: StepOutput) -> Tensor:
    return torch.stack([t.weight * t.value.mean() for t in output.terms.values()]).sum()


def norm_of(grads: Any) -> Tensor:
    found = [g.norm() for g in grads if g is not None]
    return torch.stack(found).norm() if found else torch.zeros(())


def teacher_of(widths: tuple[int, ...]) -> SimpleNamespace:
    """Stands where a teacher does that gives any grid; the kit has what it saw."""
    return SimpleNamespace(widths=widths, grid=lambda size: size, check_grid=lambda grid: None)


def test_parity_repae_statistics_begin_from_the_published_ones(kit, tmp_path, monkeypatch):
    monkeypatch.setattr(image_losses, "LPIPS", lambda net: StandIn(kit))
    config = settings_of(kit, standardised_by(kit, tmp_path / "vae"))
    context = MethodContext((32, 32), teacher_of((8,)), 1, class_names=("a",))
    standardiser = REPAEObjective(config, context).learners["dit"].standardiser
    torch.testing.assert_close(standardiser.mean, kit["init_bn/running_mean"], **TENSOR)
    torch.testing.assert_close(standardiser.var, kit["init_bn/running_var"], atol=5e-5, rtol=1e-6)
    ours = standardiser.by_running(kit["init_bn/latents"])
    torch.testing.assert_close(ours, kit["init_bn/normalised"], **TENSOR)


def test_parity_repae_two_steps_with_all_updates(kit, tmp_path, monkeypatch):
    training = Trained(kit, tmp_path, monkeypatch)
    compared = set()
    for number in (1, 2):
        begin = f"two_steps/step{number}_"
        found = training.step(number - 1) | training.after()
        for name, ours in found.items():
            if begin + name not in kit.tensors:
                continue
            limits = SUM | {"atol": 1e-6} if "grad_norm" in name else TENSOR
            theirs = kit[begin + name]
            ours = ours.detach().view_as(theirs)
            told = f"step {number}, {name}"
            torch.testing.assert_close(ours, theirs, msg=lambda m, t=told: f"{t}: {m}", **limits)
            compared.add(begin + name)
        for name in (n for n in kit.tensors if n.startswith(f"{begin}after_")):
            whose, parameter = name.removeprefix(f"{begin}after_").split(".", 1)
            ours = training.parameter(whose, parameter)
            told = f"step {number}, {parameter}"
            torch.testing.assert_close(
                ours, kit[name], msg=lambda m, t=told: f"{t}: {m}", atol=2e-5, rtol=0
            )
            compared.add(name)
    left = {n for n in kit.tensors if n.startswith("two_steps/step")} - compared
    # A factor that is 1 from the discriminator's first step on, before which it does not play here.
    assert all(name.endswith("_discriminator_factor") for name in left)
