"""What the diffusion transformer learns: the velocity of every part of the latents."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from semtok.alignment import alignment_loss
from semtok.diffusion.config import DiffusionConfig, build_network, resolve_defaults
from semtok.diffusion.dit import DiT, architecture
from semtok.diffusion.generator import Generator
from semtok.diffusion.sampling import SampleNoise, SamplerConfig
from semtok.diffusion.transport import interpolate
from semtok.latents import Latents
from semtok.nets.transformer import silu_mlp
from semtok.objective import Draws, Objective, Reference, StepOutput, Term
from semtok.pictures import rows_of_images
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer

_BINS = 4  # of time, in which the loss is told apart


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

    def __init__(self, config: DiffusionConfig, network: DiT, teacher: Teacher | None) -> None:
        super().__init__()
        self.config, self.schedule, self.network = config, config.schedule, network
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


def _check_guidance(config: DiffusionConfig, sampler: SamplerConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError where the sampler guides what the training does not prepare for."""
    scale, parts = sampler.guidance.scale, [part.name for part in tokenizer.spec.parts]
    unknown = sorted(scale.keys() - set(parts)) if isinstance(scale, dict) else []
    if unknown:
        raise ValueError(
            f"sampler.guidance.scale: no part {unknown}; the parts are {', '.join(parts)}"
        )
    if all(sampler.guidance.scale_of(part) == 1 for part in parts):
        return
    if config.unconditional:
        raise ValueError(
            "sampler.guidance.scale: an unconditional model has no classes to guide by; pass 1"
        )
    if config.class_dropout == 0:
        raise ValueError(
            "sampler.guidance.scale: guidance needs the null label, which diffusion.class_dropout=0 never "
            "trains; pass sampler.guidance.scale=1 or some dropout"
        )


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
        class_names: Sequence[str],
        image_size: tuple[int, int],
        sampler: SamplerConfig,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.config = resolve_defaults(config, tokenizer)
        self.sampler, self.image_size = sampler, image_size
        self.class_names = () if config.unconditional else tuple(class_names)
        self.schedule = self.config.schedule
        _check_guidance(self.config, sampler, tokenizer)
        self._tokenizer = Reference(tokenizer.eval().requires_grad_(False))
        self._teacher = Reference(teacher) if teacher is not None else None
        shape = architecture(config.network)
        rows, columns = tokenizer.spec.shape("texture", image_size)[1:]
        if rows % shape.patch_size or columns % shape.patch_size:
            raise ValueError(
                f"diffusion.network: patch size {shape.patch_size} does not divide the latent grid "
                f"{rows}x{columns}"
            )
        if config.repa is not None and config.repa.depth > shape.depth:
            raise ValueError(
                f"diffusion.repa.depth: {config.repa.depth} is more than the network's {shape.depth} blocks"
            )
        network = build_network(self.config, tokenizer.spec, num_classes=len(self.class_names))
        network.checkpointing = config.checkpointing
        player = DiTPlayer(self.config, network, teacher)
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
        if self.config.unconditional:
            labels = torch.zeros_like(labels)  # the null label, and the only one
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
        samples = self.generator(averaged).sample(inputs["labels"].tolist())
        return rows_of_images([samples, pixels])

    def generator(self, averaged: nn.Module) -> Generator:
        """The generator to export, on the given weights of ``averaged_module``."""
        return Generator(
            averaged,
            self.tokenizer,
            self.config,
            self.sampler,
            class_names=self.class_names,
            image_size=self.image_size,
        )
