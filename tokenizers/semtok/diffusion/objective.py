"""What the diffusion transformer learns: the velocity of every part of the latents."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from semtok.alignment import alignment_loss
from semtok.config import Config
from semtok.diffusion.dit import DiT, DiTArchitecture, architecture
from semtok.diffusion.sampling import SampleNoise, SamplerConfig, sample_latents
from semtok.diffusion.transport import PathName, Schedule, TimeConfig, interpolate
from semtok.latents import Latents
from semtok.nets.transformer import silu_mlp
from semtok.objective import Draws, Objective, Reference, StepOutput, Term
from semtok.pictures import rows_of_images
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

_BINS = 4  # of time, in which the loss is told apart


# Settings ----------------------------------------------------------------------------------------


class REPAConfig(Config):
    """Representation alignment (REPA, Yu et al. 2024): a block's tokens resemble the teacher's."""

    weight: float = 0.5
    depth: int = Field(8, ge=1)
    """After which block; REPA has 8 for L and XL, 4 for B."""
    projector_width: int = Field(2048, ge=1)


class DiffusionConfig(Config):
    """Settings of the diffusion transformer and its training."""

    network: str | DiTArchitecture
    """A preset such as SiT-B/2 or LightningDiT-XL/1, or a shape spelt out."""
    path: PathName = "linear"
    time: TimeConfig = TimeConfig()
    leads: dict[str, float] | None = None
    """Per part, by how much of the time axis it leads; None: the tokenizer's defaults."""
    loss_weights: dict[str, float] | None = None
    """Per part, of the velocity's squared error; None: the tokenizer's defaults."""
    cosine_weight: float = 0.0
    """Of 1 - cosine between predicted and true velocity over each part's channels (LightningDiT)."""
    class_dropout: float = Field(0.1, ge=0, le=1)
    """How often a label is replaced by the null label, which guidance needs."""
    repa: REPAConfig | None = None
    checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""


# Losses ------------------------------------------------------------------------------------------


def squared_error(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean over everything but the batch, (B,), in float32."""
    return (predicted.float() - velocity.float()).square().flatten(1).mean(dim=1)


def cosine_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """1 - cosine over channels, averaged over positions: (B, C, H, W) or (B, D) to (B,)."""
    cosine = F.cosine_similarity(predicted.float(), velocity.float(), dim=1)
    return 1 - cosine.flatten(1).mean(dim=1) if cosine.ndim > 1 else 1 - cosine


# The player --------------------------------------------------------------------------------------


class DiTPlayer(nn.Module):
    """The network, with REPA's projector where the recipe has it."""

    def __init__(
        self, config: DiffusionConfig, network: DiT, schedule: Schedule, teacher: Teacher | None
    ) -> None:
        super().__init__()
        self.config, self.schedule, self.network = config, schedule, network
        self.projector = None
        if config.repa is not None:
            assert teacher is not None, "REPA needs a teacher"
            width = network.config.width
            self.projector = silu_mlp(width, config.repa.projector_width, teacher.widths[-1])

    def forward(
        self, inputs: Mapping[str, Any], draws: Draws, step: int, carry: Mapping[str, Tensor]
    ) -> StepOutput:
        """Losses of one micro-batch.

        Args:
            inputs: ``posterior`` of the latents, ``labels`` (B,), ``features`` or None.
            carry: unused, there is one player.
        """
        config, posterior = self.config, inputs["posterior"]
        shapes = {name: tuple(part.shape[1:]) for name, part in posterior.mean.items()}
        latents = posterior.sample_with(
            {name: draws.normal(f"posterior/{name}", shape) for name, shape in shapes.items()}
        )
        data = on_texture_grid(latents)
        dropped = draws.uniform("class_dropout") < config.class_dropout
        labels = torch.where(dropped, self.network.num_classes, inputs["labels"])
        dimension = sum(part[0].numel() for part in data.values())
        t = config.time.draw(draws, dimension)
        times = self.schedule.times(t * self.schedule.length)

        x, velocity = {}, {}
        for name, part in data.items():
            noise = draws.normal(f"noise/{name}", tuple(part.shape[1:]))
            x[name], velocity[name] = interpolate(config.path, part, noise, times[name])
        depth = config.repa.depth if config.repa is not None else None
        output = self.network(x, times, labels, hidden_after=depth)
        terms = self._velocity_terms(output.velocity, velocity)
        if config.repa is not None:
            value = self._alignment(output.hidden, inputs["features"].patches[-1], data)
            terms["alignment"] = Term(value, config.repa.weight)
        return StepOutput(terms, metrics=_by_time(t, terms["velocity/texture"].value))

    def _velocity_terms(
        self, predicted: Latents, velocity: Mapping[str, Tensor]
    ) -> dict[str, Term]:
        weights, terms = self.config.loss_weights or {}, {}
        for name, target in velocity.items():
            weight = weights.get(name, 1.0)
            terms[f"velocity/{name}"] = Term(squared_error(predicted[name], target), weight)
            if self.config.cosine_weight:
                terms[f"cosine/{name}"] = Term(
                    cosine_loss(predicted[name], target), self.config.cosine_weight
                )
        return terms

    def _alignment(self, hidden: Tensor, target: Tensor, data: Mapping[str, Tensor]) -> Tensor:
        patch = self.network.config.patch_size
        tokens = self.projector(hidden[:, len(self.network.vectors) :])
        height = data["texture"].shape[-2] // patch
        return alignment_loss(rearrange(tokens, "b (h w) d -> b d h w", h=height), target)


def on_texture_grid(latents: Latents) -> dict[str, Tensor]:
    """Spatial parts resampled bilinearly to the texture's grid, where theirs is another."""
    size = latents.texture.shape[-2:]
    return {
        name: F.interpolate(part, size=size, mode="bilinear")
        if part.ndim == 4 and part.shape[-2:] != size
        else part
        for name, part in latents.items()
    }


def _by_time(t: Tensor, loss: Tensor) -> dict[str, Tensor]:
    """Sum and count of the loss in each quarter of the time axis, for means over steps."""
    bins = (t.detach() * _BINS).long().clamp_max(_BINS - 1)
    chosen = F.one_hot(bins, _BINS).to(loss.dtype)  # (B, bins)
    sums, counts = (loss.detach()[:, None] * chosen).sum(dim=0), chosen.sum(dim=0)
    return {
        f"velocity_at_{(i + 0.5) / _BINS:.3f}": torch.stack([sums[i], counts[i]])
        for i in range(_BINS)
    }


# The objective -----------------------------------------------------------------------------------


class DiffusionObjective(Objective):
    """Trains a diffusion transformer on a frozen tokenizer's latents.

    Args:
        tokenizer: whose latents; its spec shapes the network, its defaults fill in what the
            settings leave open.
        sampler: how the pictures on the way are drawn.

    Raises:
        ValueError: settings that fit neither the tokenizer's parts nor its grid.
        UserError: an unknown preset.
    """

    def __init__(
        self,
        config: DiffusionConfig,
        tokenizer: Tokenizer,
        *,
        num_classes: int,
        image_size: tuple[int, int],
        sampler: SamplerConfig,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.config = resolve_defaults(config, tokenizer)
        self.sampler, self.image_size = sampler, image_size
        self.schedule = Schedule.from_leads(self.config.leads)
        self._tokenizer = Reference(tokenizer.eval().requires_grad_(False))
        self._teacher = Reference(teacher) if teacher is not None else None
        shape = architecture(config.network)
        self.grid = tokenizer.spec.shape("texture", image_size)[1:]
        if any(side % shape.patch_size for side in self.grid):
            raise ValueError(
                f"diffusion.network: patch size {shape.patch_size} does not divide the latent grid "
                f"{self.grid[0]}x{self.grid[1]}"
            )
        if config.repa is not None and config.repa.depth > shape.depth:
            raise ValueError(
                f"diffusion.repa.depth: {config.repa.depth} is more than the network's {shape.depth} blocks"
            )
        network = DiT(
            shape,
            tokenizer.spec,
            num_classes=num_classes,
            timed_parts=timed_parts(self.schedule),
        )
        network.checkpointing = config.checkpointing
        player = DiTPlayer(self.config, network, self.schedule, teacher)
        self.players = nn.ModuleDict({"dit": player})

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer.module

    def compiled_modules(self) -> list[nn.Module]:
        return list(self.players["dit"].network.blocks)

    def frozen_modules(self) -> list[nn.Module]:
        held = (self._tokenizer, self._teacher)
        return [reference.module for reference in held if reference is not None]

    def averaged_module(self) -> nn.Module:
        return self.players["dit"].network

    def prepare(
        self, pixels: Tensor, labels: Tensor, attributes: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        with torch.no_grad():
            posterior = self.tokenizer.posterior(pixels)
        features = self._teacher.module.features(pixels) if self._teacher is not None else None
        return {"posterior": posterior, "labels": labels, "features": features}

    def validate(
        self, averaged: nn.Module, pixels: Tensor, inputs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Squared error of the texture's velocity at fixed times, with noise that belongs to the batch."""
        data = on_texture_grid(inputs["posterior"].mean)
        errors = {}
        for i in range(_BINS):
            t = torch.full((len(pixels),), (i + 0.5) / _BINS, device=pixels.device)
            times = self.schedule.times(t * self.schedule.length)
            noise = SampleNoise(i, range(len(pixels)), pixels.device)
            x, velocity = {}, {}
            for name, part in data.items():
                own = noise(tuple(part.shape[1:]))
                x[name], velocity[name] = interpolate(self.config.path, part, own, times[name])
            predicted = averaged(x, times, inputs["labels"]).velocity
            errors[f"velocity_at_{t[0]:.3f}"] = squared_error(
                predicted.texture, velocity["texture"]
            )
        return {"velocity": torch.stack(list(errors.values())).mean(dim=0), **errors}

    def picture(self, averaged: nn.Module, pixels: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Samples of the validation images' classes, always from the same noise; below, the images."""
        labels = inputs["labels"]
        noise = SampleNoise(0, range(len(labels)), pixels.device)
        latents = self.sample(averaged, noise, labels)
        return rows_of_images([self.tokenizer.decode(latents), pixels])

    def sample(self, network: DiT, noise: SampleNoise, labels: Tensor) -> Latents:
        """Latents of the given classes, by the recipe's sampler."""
        dimension = sum(
            self.grid[0] * self.grid[1] * part.channels if part.is_spatial else part.channels
            for part in network.spec.parts
        )
        return sample_latents(
            network,
            noise,
            labels,
            self.grid,
            self.sampler,
            schedule=self.schedule,
            path=self.config.path,
            shift=self.config.time.shift_for(dimension),
        )


def resolve_defaults(config: DiffusionConfig, tokenizer: Tokenizer) -> DiffusionConfig:
    """Fills leads and loss weights from the tokenizer's defaults.

    Raises:
        ValueError: a part that the tokenizer does not have.
    """
    defaults = tokenizer.diffusion_defaults
    for key in ("leads", "loss_weights"):
        unknown = (getattr(config, key) or {}).keys() - defaults.keys()
        if unknown:
            raise ValueError(
                f"diffusion.{key}: no part {sorted(unknown)} in this tokenizer's latents; its parts: "
                f"{', '.join(defaults)}"
            )
    leads = {name: d.lead for name, d in defaults.items()} | (config.leads or {})
    weights = {n: d.loss_weight for n, d in defaults.items()} | (config.loss_weights or {})
    return config.model_copy(update={"leads": leads, "loss_weights": weights})


def timed_parts(schedule: Schedule) -> tuple[str, ...]:
    """Parts whose time the network is told separately: the leading ones first; none without a lead."""
    if schedule.is_synchronous:
        return ()
    return tuple(sorted(schedule.starts, key=lambda name: schedule.starts[name]))
