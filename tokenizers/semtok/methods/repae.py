"""REPA-E (Leng et al. 2025, arXiv 2504.10483): a VAE and a diffusion transformer that are trained together.

In each step the VAE learns by its own losses and by REPA's loss through the frozen transformer, the discriminator
learns as ever, and the transformer learns velocities and REPA's loss on latents that carry no gradient. The loss of
velocities never reaches the VAE. Latents are standardised by running statistics, which become the tokenizer's.

Any method of a VAE and any transformer go together here. What differs from the published code: running statistics are
divided by with their epsilon in the exported tokenizer too, as the transformer has seen latents; there without.
"""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semtok.diffusion.generator import Generator
from semtok.diffusion.learner import DiTLearner
from semtok.diffusion.repa import REPAConfig
from semtok.diffusion.training import DiffusionObjective
from semtok.errors import named_here
from semtok.methods.repae_config import METHOD, OWN, REPAEConfig
from semtok.methods.standardiser import RunningStandardiser
from semtok.methods.texture_classes import stated_statistics
from semtok.methods.vae import AutoencoderLearner, KLTokenizer, VAEObjective
from semtok.objective import (
    Batch,
    Carry,
    Inputs,
    MethodContext,
    StepOutput,
    Term,
    TokenizerObjective,
    Unregistered,
    without_gradients,
)
from semtok.optimiser import OptimiserConfig
from semtok.registry import get_method, register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import Latents, Posterior
from semtok.statistics import StreamingMoments

# The players -------------------------------------------------------------------------------------


def _exactly(z: Tensor) -> Posterior:
    return Posterior(Latents({"texture": z}), Latents({"texture": torch.zeros_like(z)}))


class JointDiTLearner(nn.Module):
    """A transformer's learner on latents that the VAE has just drawn, and the statistics that standardise them."""

    called_by_others = ("alignment",)

    def __init__(self, dit: DiTLearner, channels: int) -> None:
        super().__init__()
        self.dit, self.standardiser = dit, RunningStandardiser(channels)

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """The transformer's losses, on ``carry['latents']`` (B, C, h, w), which the batch itself standardises."""
        z = self.standardiser.by_batch(carry["latents"])
        output = self.dit({**inputs, "posterior": _exactly(z)}, draws, step, {})
        terms = {f"transformer/{name}": term for name, term in output.terms.items()}
        return StepOutput(terms, output.metrics)

    def alignment(self, z: Tensor, inputs: Inputs, draws: Draws) -> Tensor:
        """REPA's loss (B,) of raw latents z, at the times and with the noise of ``forward``. Gradients reach z alone,
        and the statistics stay as they are."""
        with without_gradients(self.dit):
            noised = self.dit.noised(_exactly(self.standardiser.by_running(z)), draws)
            return self.dit.alignment(noised, inputs["labels"], inputs["features"])


class JointVAELearner(nn.Module):
    """A VAE's learner with one more term."""

    def __init__(self, vae: AutoencoderLearner, dit: JointDiTLearner, weight: float) -> None:
        super().__init__()
        self.vae, self.weight, self._dit = vae, weight, Unregistered(dit)

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised (section 3.2):

            L = L_VAE + λ L_REPA(h(x_t, t, y), f(x)),  x_t = α(t) s(z) + σ(t) x0,  z ~ q(z|x)

        with L_VAE all losses of the VAE's own method, h the tokens of the frozen transformer, s the standardisation by
        running statistics, f(x) the teacher's patch tokens.

        Args:
            inputs: what that method's learner takes, and ``labels`` (B,).
            carry: unused, this learner is first.
        """
        drawn: list[Tensor] = []
        self.vae.on_draw = drawn.append
        try:
            output = self.vae(inputs, draws, step, carry)
        finally:
            self.vae.on_draw = None
        (z,) = drawn
        value = self._dit.module.alignment(z, inputs, draws)
        terms = {**output.terms, "transformer_alignment": Term(value, self.weight)}
        return replace(output, terms=terms, carry={**output.carry, "latents": z.detach()})


class Joint(nn.Module):
    """What joint training makes. The VAE is None where its average is not followed."""

    def __init__(
        self, vae: nn.Module | None, network: nn.Module, standardiser: RunningStandardiser
    ) -> None:
        super().__init__()
        self.vae, self.network, self.standardiser = vae, network, standardiser


# The objective -----------------------------------------------------------------------------------


class REPAEObjective(TokenizerObjective):
    """The VAE, where its settings have one the discriminator, and the transformer.

    Raises:
        ValueError: settings that do not go with the images or with each other.
    """

    measures = "the first statistics of the latents"

    def __init__(self, config: REPAEConfig[Any], context: MethodContext) -> None:
        super().__init__()
        self.config = config
        with named_here(METHOD, OWN):
            method = get_method(config.tokenizer.name, place="method.tokenizer.name")
            vae: VAEObjective = method.objective(config.tokenizer, context)
        diffusion = config.diffusion.model_copy(
            update={"repa": config.diffusion.repa or REPAConfig()}
        )
        autoencoder = vae.averaged_module()
        with named_here(r"\b(diffusion|sampler)\.", r"method.\1."):
            if not context.resumes:
                config.sampler.guidance.check_use()
            stage = DiffusionObjective(
                diffusion,
                copy.deepcopy(vae.tokenizer(autoencoder)).to("meta"),  # read for its shape alone
                class_names=context.class_names,
                image_size=context.image_size,
                sampler=config.sampler,
                teacher=context.teacher,
            )
        dit = JointDiTLearner(stage.learners["dit"], autoencoder.config.latent_channels)
        if config.starts_from_weights():
            place = f"VAE '{config.tokenizer.vae}'"
            dit.standardiser.start(*stated_statistics(autoencoder, place))
        learners = dict(vae.learners.items())
        learners["autoencoder"] = JointVAELearner(
            learners["autoencoder"], dit, config.alignment_weight
        )
        self.learners = nn.ModuleDict({**learners, "dit": dit})
        self._vae, self._stage = Unregistered(vae), Unregistered(stage)
        followed = autoencoder if config.average_vae else None
        self._joint = Unregistered(Joint(followed, dit.dit.network, dit.standardiser))

    def active_learners(self, step: int) -> list[str]:
        return [*self._vae.module.active_learners(step), "dit"]

    def steps_in_turn(self) -> bool:
        return self._vae.module.steps_in_turn()

    def notes(self) -> list[str]:
        return [re.sub(METHOD, OWN, line) for line in self._vae.module.notes()]

    def optimiser_config(self, learner: str, default: OptimiserConfig) -> OptimiserConfig:
        if learner == "dit":
            return self.config.diffusion_optimiser or default
        return self._vae.module.optimiser_config(learner, default)

    def compiled_modules(self) -> list[nn.Module]:
        return [*self._vae.module.compiled_modules(), *self._stage.module.compiled_modules()]

    def sharded_blocks(self) -> dict[str, list[nn.Module]]:
        """The transformer's. VAE and discriminator are small, and called outside of their learners' forward."""
        return dict(self._stage.module.sharded_blocks())

    def frozen_modules(self) -> list[nn.Module]:
        held = [*self._vae.module.frozen_modules(), self._stage.module.target_teacher]
        return list(dict.fromkeys(held))

    def averaged_module(self) -> nn.Module:
        return self._joint.module

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> None:
        """Of a VAE from scratch, the statistics that the first step standardises by: of draws from its posterior."""
        if self.config.starts_from_weights():
            return
        means, variances = StreamingMoments(), StreamingMoments()
        for batch in batches:
            q = self._vae.module.averaged_module().encode(batch.pixels).latent_dist
            means.add(q.mean)
            variances.add(q.var)
        means, variances = means.over_processes(), variances.over_processes()
        std = (means.std.square() + variances.mean).sqrt()
        self.learners["dit"].standardiser.start(means.mean, std)

    def prepare(self, batch: Batch) -> dict[str, Any]:
        unconditional = self.config.diffusion.unconditional
        labels = torch.zeros_like(batch.labels) if unconditional else batch.labels
        return {**self._vae.module.prepare(batch), "labels": labels}

    def _tokenizer_on(self, averaged: nn.Module) -> KLTokenizer:
        vae = averaged.vae if averaged.vae is not None else self._vae.module.averaged_module()
        own = averaged.standardiser
        return KLTokenizer(vae, method="repae", statistics=(own.mean, own.std))

    def tokenizer(self, averaged: nn.Module) -> KLTokenizer:
        tokenizer = self._tokenizer_on(averaged)
        return tokenizer if averaged.vae is not None else copy.deepcopy(tokenizer)

    def generator(self, averaged: nn.Module) -> Generator:
        stage = self._stage.module.on(self.tokenizer(averaged))
        return stage.generator(averaged.network)

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        """The metrics of the VAE's method, and those of the transformer."""
        tokenizer = self._tokenizer_on(averaged)
        vae, stage = self._vae.module, self._stage.module
        metrics = vae.validate(tokenizer.autoencoder, pixels, inputs, indices=indices)
        inputs = {**inputs, "posterior": tokenizer.posterior(pixels)}
        return metrics | stage.validate(averaged.network, pixels, inputs, indices=indices)

    def picture(self, averaged: nn.Module, pixels: Tensor, inputs: Inputs) -> Tensor:
        """What the VAE's method shows, and below it samples beside images of their classes."""
        tokenizer = self._tokenizer_on(averaged)
        pictures = (
            self._vae.module.picture(tokenizer.autoencoder, pixels, inputs),
            self._stage.module.on(tokenizer).picture(averaged.network, pixels, inputs),
        )
        width = max(picture.shape[-1] for picture in pictures)
        wide = [F.pad(each, (0, width - each.shape[-1]), value=255) for each in pictures]
        return torch.cat(wide, dim=1)


register_method(
    "repae",
    config=REPAEConfig,
    objective=REPAEObjective,
    tokenizer=KLTokenizer,
    papers=("REPA-E, arXiv 2504.10483",),
)
