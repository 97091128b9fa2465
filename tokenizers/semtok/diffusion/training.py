"""What the diffusion transformer learns: the velocity of every part of the latents."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from semtok.diffusion.diffusion_config import (
    DiffusionConfig,
    build_network,
    check_guidance,
    resolve_defaults,
)
from semtok.diffusion.generator import Generator
from semtok.diffusion.learner import BIN_NAMES, BINS, DiTLearner, on_path, squared_error
from semtok.diffusion.repa import REPAConfig
from semtok.objective import Batch, Inputs, Objective, Unregistered
from semtok.pictures import Row, principal_components, rows_of_images
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.draws import SampleNoise
from semtok.sampler.latents import Latents, on_texture_grid
from semtok.sampler.sampling import SamplerConfig
from semtok.teachers import Teacher, TeacherFeatures
from semtok.tokenizer import Tokenizer


class DiffusionObjective(Objective):
    """Trains a diffusion transformer on a frozen tokenizer's latents.

    Args:
        tokenizer: whose latents; its spec shapes the network, its defaults fill in what the
            settings leave open.
        sampler: how the pictures on the way are drawn.
        teacher: whose features REPA's targets are; None: the tokenizer's own.
        cached_width: D of REPA's targets where batches come with them, and no teacher is asked.

    Raises:
        ValueError: settings that fit neither the tokenizer's parts nor its grid.
        UserError: an unknown preset, or a teacher that does not take images of this shape.
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
        cached_width: int | None = None,
    ) -> None:
        super().__init__()
        tokenizer.check_image_size(image_size)
        self.config = resolve_defaults(config, tokenizer)
        self.sampler, self.image_size = sampler, image_size
        self.class_names = () if config.unconditional else tuple(class_names)
        self.schedule = self.config.schedule
        check_guidance(self.config, sampler, tokenizer.spec)
        self._tokenizer = Unregistered(tokenizer.eval().requires_grad_(False))
        self._teacher: Unregistered | None = None
        self._shared_teacher = False
        repa, shape = self.config.repa, config.architecture
        if repa:
            _check_depth(repa, shape)
        target_width = None
        if repa:
            target_width = self._find_targets(tokenizer, teacher, cached_width)
        rows, columns = tokenizer.spec.shape("texture", image_size)[1:]
        if rows % shape.patch_size or columns % shape.patch_size:
            raise ValueError(
                f"diffusion.network: patch size {shape.patch_size} does not divide the latent grid "
                f"{rows}x{columns}"
            )
        if config.routing is not None:
            config.routing.check_grid((rows // shape.patch_size, columns // shape.patch_size))
        network = build_network(self.config, tokenizer.spec, num_classes=len(self.class_names))
        network.checkpointing = config.checkpointing
        learner = DiTLearner(self.config, network, target_width)
        self.learners = nn.ModuleDict({"dit": learner})

    def check_use(self) -> None:
        """Raises ValueError where settings would change nothing.

        A run that goes on is not asked: an earlier version may have begun it.
        """
        self.sampler.guidance.check_use()
        if self.config.repa:
            self.config.repa.check_use()
        if self.config.routing is not None:
            spec, patch = self._tokenizer.module.spec, self.config.architecture.patch_size
            rows, columns = spec.shape("texture", self.image_size)[1:]
            num_vectors = sum(not part.is_spatial for part in spec.parts)
            self.config.routing.check_use(rows * columns // patch**2, num_vectors)

    def _find_targets(
        self, tokenizer: Tokenizer, teacher: Teacher | None, cached_width: int | None
    ) -> int:
        """Decides where REPA's targets come from; gives their width."""
        if self.config.repa.targets == "decoded":
            widths = getattr(tokenizer, "feature_widths", None)
            if widths is None:
                raise ValueError(
                    "diffusion.repa.targets: this tokenizer's latents have no semantic part to decode; "
                    "pass diffusion.repa.targets=teacher"
                )
            return widths[-1]
        if cached_width is not None:
            return cached_width
        own = tokenizer.teacher_config
        # One forward pass serves the tokenizer and REPA where both mean the same teacher.
        shared = own is not None and (teacher is None or teacher.config == own)
        teacher = tokenizer.teacher if shared else teacher
        if teacher is None:
            raise ValueError("diffusion.repa needs a teacher; give teacher.name=…")
        if not shared:
            teacher.check_grid(teacher.grid(self.image_size))
        self._teacher, self._shared_teacher = Unregistered(teacher), shared
        return teacher.widths[-1]

    @property
    def target_teacher(self) -> Teacher | None:
        """The teacher whose features of the images REPA's targets are, where there is one."""
        return self._teacher.module if self._teacher is not None else None

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer.module

    def on(self, tokenizer: Tokenizer) -> "DiffusionObjective":
        """The same stage, with the same learners, on another tokenizer of such latents."""
        other = copy.copy(self)
        other._tokenizer = Unregistered(tokenizer)
        return other

    def compares_neighbours(self) -> bool:
        return self.config.is_contrastive

    def compiled_modules(self) -> list[nn.Module]:
        return self.learners["dit"].network.every_block

    def sharded_blocks(self) -> dict[str, list[nn.Module]]:
        return {"dit": self.compiled_modules()}

    def frozen_modules(self) -> list[nn.Module]:
        held = [self.tokenizer, self.target_teacher, self.tokenizer.loaded_teacher]
        return [module for module in dict.fromkeys(held) if module is not None]

    def averaged_module(self) -> nn.Module:
        return self.learners["dit"].network

    @torch.no_grad()
    def prepare(self, batch: Batch) -> dict[str, Any]:
        """Teachers compute in the caller's autocast, the tokenizer always in float32."""
        posterior, features = batch.latents, batch.features
        in_float32 = torch.autocast(batch.labels.device.type, enabled=False)
        if posterior is None:
            assert batch.pixels is not None
            features = self.tokenizer.features(batch.pixels)
            own = features.map(Tensor.float) if features is not None else None
            with in_float32:
                posterior = self.tokenizer.posterior(batch.pixels, own)
            if self._teacher is not None and not self._shared_teacher:
                features = self._teacher.module.features(batch.pixels)
        if self.config.repa and self.config.repa.targets == "decoded":
            with in_float32:
                features = self._decoded(posterior.mean)
        # The null label is the only one of an unconditional model.
        labels = torch.zeros_like(batch.labels) if self.config.unconditional else batch.labels
        return {"posterior": posterior, "labels": labels, "features": features}

    def _decoded(self, latents: Latents) -> TeacherFeatures:
        """The features that the semantic part stands for; the global part is a pooled token as it is."""
        patches = self.tokenizer.decode_features(latents)
        last = patches[:, -self.tokenizer.feature_widths[-1] :]
        raw = self.tokenizer.destandardise(latents)
        return TeacherFeatures((last,), raw["global"] if "global" in raw else last.mean(dim=(2, 3)))

    def validate(
        self, averaged: nn.Module, pixels: Tensor | None, inputs: Inputs, *, indices: Sequence[int]
    ) -> dict[str, Tensor]:
        """Squared error of each part's velocity at fixed times, with noise that belongs to the image:
        ``velocity``, the texture's, also for each time; ``velocity_<part>`` for the others."""
        data = on_texture_grid(inputs["posterior"].mean)
        num, device = len(inputs["labels"]), inputs["labels"].device
        by_time: list[dict[str, Tensor]] = []
        for i in range(BINS):
            t = torch.full((num,), (i + 0.5) / BINS, device=device)
            times = self.schedule.times(t * self.schedule.length)
            noise = SampleNoise(i, indices, device)
            x, velocity = {}, {}
            for name, part in data.items():
                own = noise(tuple(part.shape[1:]))
                x[name], velocity[name] = on_path(self.config, part, own, times[name])
            predicted = averaged(x, times, inputs["labels"]).velocity
            by_time.append({n: squared_error(predicted[n], velocity[n]) for n in data})
        means = {n: torch.stack([errors[n] for errors in by_time]).mean(dim=0) for n in data}
        return {
            "velocity": means.pop("texture"),
            **dict(zip(BIN_NAMES, (errors["texture"] for errors in by_time), strict=True)),
            **{f"velocity_{name}": value for name, value in means.items()},
        }

    def picture(self, averaged: nn.Module, pixels: Tensor | None, inputs: Inputs) -> Tensor:
        """Samples of the validation images' classes, always from the same noise; below, the images, or
        what their cached latents decode to.

        Under each, where there is one, the semantic part, in the same colours.
        """
        generator = self.generator(averaged)
        labels = inputs["labels"].tolist()
        latents = generator.sample_latents(labels, seed=0)
        samples = self.tokenizer.decode(latents)
        if pixels is None:
            pixels = self.tokenizer.decode(inputs["posterior"].mean)
        sampled = [Row("sample", samples, [generator.class_name(label) for label in labels])]
        held_out = [Row("real image\nof this class", pixels)]
        if "semantic" in latents:
            real = on_texture_grid(inputs["posterior"].mean)["semantic"]
            for rows, part in ((sampled, latents["semantic"]), (held_out, real)):
                rows.append(Row("semantic\n(PCA)", principal_components(part, of=real)))
        return rows_of_images([*sampled, *held_out])

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


def _check_depth(repa: REPAConfig, shape: DiTArchitecture) -> None:
    """Raises ValueError where a network has no such block, or one whose tokens are no map."""
    depth = repa.depth_in(shape.depth)
    if depth > shape.depth:
        raise ValueError(
            f"diffusion.repa.depth: {repa.depth} is more than the network's {shape.depth} blocks"
        )
    if repa.projector == "conv" and shape.is_routed(depth):
        raise ValueError(
            f"diffusion.repa.projector: conv needs the whole map of tokens, of which token routing drops some at block "
            f"{depth}; pass diffusion.repa.depth={shape.split[0]} or fewer"
        )
