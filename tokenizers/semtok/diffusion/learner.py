"""What the diffusion transformer learns: the velocity of every part of the latents."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.diffusion.repa import projector_for, repa_loss
from semtok.objective import PREVIOUS, Carry, Inputs, StepOutput, Term
from semtok.sampler.dit import DiT, velocity_to
from semtok.sampler.draws import Draws
from semtok.sampler.latents import Latents, Posterior, on_texture_grid
from semtok.sampler.routing import DENSE
from semtok.sampler.transport import interpolate
from semtok.teachers import TeacherFeatures

BINS = 4  # of time, in which the loss is told apart
BIN_NAMES = [f"velocity_at_{(i + 0.5) / BINS:.3f}" for i in range(BINS)]


# Losses ------------------------------------------------------------------------------------------


def squared_error(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean over everything but the batch, (B,), in float32."""
    return (predicted.float() - velocity.float()).square().flatten(1).mean(dim=1)


def cosine_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """1 - cosine over channels, averaged over positions: (B, C, H, W) or (B, D) to (B,)."""
    cosine = F.cosine_similarity(predicted.float(), velocity.float(), dim=1)
    return 1 - cosine.flatten(1).mean(dim=1) if cosine.ndim > 1 else 1 - cosine


def contrast(predicted: Tensor, velocity: Tensor, before: Tensor) -> Tensor:
    """Minus the squared error to the velocity of the image before, (B,), in float32 (contrastive flow matching).

    Args:
        predicted, velocity: (B, ...).
        before: (1, ...), the velocity of the image before the first one.
    """
    return -squared_error(predicted, torch.cat([before, velocity[:-1]]))


def on_path(
    config: DiffusionConfig, data: Tensor, noise: Tensor, t: Tensor
) -> tuple[Tensor, Tensor]:
    """The point at times t (B,) between noise and data (B, ...), and what is to be predicted there.

    That is the path's velocity, but for networks that predict data: theirs is cut off near data, and so is this.
    """
    x, velocity = interpolate(config.path, data, noise, t)
    return x, velocity_to(data, x, t) if config.prediction == "data" else velocity


# The learner --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noised:
    """Latents on their paths.

    Attributes:
        data: without noise, spatial parts on the texture's grid.
        t: the time that was drawn, (B,), of which each part's follows.
        times, x, velocity: per part its time, its point on the path, and what is to be predicted there.
    """

    data: dict[str, Tensor]
    t: Tensor
    times: Mapping[str, Tensor]
    x: dict[str, Tensor]
    velocity: dict[str, Tensor]


class DiTLearner(nn.Module):
    """The network, with REPA's projector where the settings have it.

    Args:
        config: resolved.
        target_width: D of REPA's targets, where there are any.
    """

    def __init__(self, config: DiffusionConfig, network: DiT, target_width: int | None) -> None:
        super().__init__()
        self.config, self.schedule, self.network = config, config.schedule, network
        self.projector = self._depth = None
        if config.repa:
            assert target_width is not None, "REPA needs targets"
            self.projector = projector_for(config.repa, network.config.width, target_width)
            self._depth = config.repa.depth_in(network.config.depth)

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised (SiT, eq. 5; for each part k of the latents, at its own time t_k):

            L = Σ_k λ_k ‖v_k(x_t, t, y) - (α'(t_k) x1_k + σ'(t_k) x0_k)‖² + λ_c L_cos + λ_repa L_REPA + …,

            x_t,k = α(t_k) x1_k + σ(t_k) x0_k,  x1 ~ q(latents|image),  x0 ~ N(0, I)

        with contrastive flow matching and a second head where the settings have them.

        Args:
            inputs: ``posterior`` of the latents, ``labels`` (B,), ``features`` or None, and ``PREVIOUS``.
            carry: unused, there is one learner.
        """
        config, inner = self.config, self.config.internal_guidance
        noised = self.noised(inputs["posterior"], draws)
        dropped = draws.uniform("class_dropout") < config.class_dropout
        labels = torch.where(dropped, self.network.num_classes, inputs["labels"])
        grid = self._grid(noised.data["texture"])
        route, vectors = DENSE, list(self.network.vectors)
        if config.routing is not None:
            route = config.routing.route(draws, grid, len(vectors), step)
        output = self.network(
            noised.x,
            noised.times,
            labels,
            hidden_after=self._depth,
            route=route,
            inner=inner is not None,
        )
        terms = self._velocity_terms(output.velocity, noised.velocity, step)
        if inner is not None:
            second = self._squared_errors(output.inner, noised.velocity, step)
            terms |= {
                f"inner/{n}": Term(t.value, inner.weight * t.weight) for n, t in second.items()
            }
        if config.is_contrastive:
            terms |= self._contrast_terms(
                output.velocity, noised, inputs.get(PREVIOUS), draws, step
            )
        if config.repa:
            value = repa_loss(
                config.repa,
                self.projector,
                output.hidden,
                inputs["features"],
                grid=grid,
                vectors=vectors,
                kept=route.kept if self.network.config.is_routed(self._depth) else None,
            )
            terms["alignment"] = Term(value, config.repa.weight)
        return StepOutput(terms, metrics=_by_time(noised.t, terms["velocity/texture"].value))

    def alignment(self, noised: Noised, labels: Tensor, features: TeacherFeatures) -> Tensor:
        """REPA's loss (B,) alone, on all tokens and with all labels; nothing behind the aligned block is computed.
        Activations are kept: whoever freezes the network for this call can't freeze what is recomputed later."""
        network = self.network
        recomputes, network.checkpointing = network.checkpointing, False
        try:
            hidden = network.hidden(noised.x, noised.times, labels, after=self._depth)
        finally:
            network.checkpointing = recomputes
        return repa_loss(
            self.config.repa,
            self.projector,
            hidden,
            features,
            grid=self._grid(noised.data["texture"]),
            vectors=list(self.network.vectors),
            kept=None,
        )

    def noised(self, posterior: Posterior, draws: Draws) -> Noised:
        """Latents of these posteriors at the times and with the noise of these places in the batch."""
        config = self.config
        shapes = {name: tuple(part.shape[1:]) for name, part in posterior.mean.items()}
        latents = posterior.sample_with(
            {name: draws.normal(f"posterior/{name}", shape) for name, shape in shapes.items()}
        )
        data = on_texture_grid(latents)
        t = config.time.draw(draws, {name: part.shape[1:] for name, part in data.items()})
        times = self.schedule.times(t * self.schedule.length)
        x, velocity = {}, {}
        for name, part in data.items():
            noise = draws.normal(f"noise/{name}", tuple(part.shape[1:]))
            x[name], velocity[name] = on_path(config, part, noise, times[name])
        return Noised(data, t, times, x, velocity)

    def _grid(self, texture: Tensor) -> tuple[int, int]:
        patch = self.network.config.patch_size
        return texture.shape[-2] // patch, texture.shape[-1] // patch

    def _squared_errors(
        self, predicted: Latents, velocity: Mapping[str, Tensor], step: int
    ) -> dict[str, Term]:
        return {
            name: Term(squared_error(predicted[name], target), self.config.loss_weight(name, step))
            for name, target in velocity.items()
        }

    def _velocity_terms(
        self, predicted: Latents, velocity: Mapping[str, Tensor], step: int
    ) -> dict[str, Term]:
        errors = self._squared_errors(predicted, velocity, step)
        terms = {f"velocity/{name}": term for name, term in errors.items()}
        # A part that has no weight is not to be learned by way of the cosine either.
        names = [name for name in self.network.spatial if errors[name].weight]
        if self.config.cosine_weight and names:
            value = cosine_loss(
                torch.cat([predicted[name] for name in names], dim=1),
                torch.cat([velocity[name] for name in names], dim=1),
            )
            terms["cosine"] = Term(value, self.config.cosine_weight)
        return terms

    def _contrast_terms(
        self,
        predicted: Latents,
        noised: Noised,
        previous: Posterior | None,
        draws: Draws,
        step: int,
    ) -> dict[str, Term]:
        if previous is not None:
            before = self.noised(previous, draws.of_previous()).velocity
        else:
            assert draws.num == draws.global_batch, (
                "else the image before is in another micro-batch"
            )
            before = {name: part[-1:] for name, part in noised.velocity.items()}
        weights = {name: self.config.contrastive_weight_of(name, step) for name in predicted}
        return {
            f"contrast/{name}": Term(
                contrast(predicted[name], noised.velocity[name], before[name]), weight
            )
            for name, weight in weights.items()
            if weight
        }


def _by_time(t: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Sum and count of the loss in each quarter of the time axis, for means over steps."""
    bins = (t.detach() * BINS).long().clamp_max(BINS - 1)
    # Not F.one_hot, which reads back whether its input is in range. (B, bins).
    chosen = (bins[:, None] == torch.arange(BINS, device=t.device)).to(loss.dtype)
    sums, counts = (loss.detach()[:, None] * chosen).sum(dim=0), chosen.sum(dim=0)
    return {name: torch.stack([sums[i], counts[i]]) for i, name in enumerate(BIN_NAMES)}
