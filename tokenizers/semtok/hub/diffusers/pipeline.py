"""Images of given classes, from a transformer that denoises several parts of the latents together."""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor


# diffusers runs this file again whenever it loads a folder of this kind, so the class keeps to itself:
# it needs no other definition of this module, which the next folder's may replace.
class SemtokPipeline(DiffusionPipeline):
    """A class-conditional (or unconditional) latent diffusion transformer.

    Args:
        transformer: a ``SemtokTransformer``.
        scheduler: a ``SemtokScheduler``.
        vae: decodes the texture part. Its ``latents_mean`` and ``latents_std`` restore the scale.
        id2label: the classes' names by their numbers (as text); empty: an unconditional model.
        height, width: of the images, in pixels.
        can_be_guided: whether training has prepared for guidance by a null label.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL,
        id2label: Optional[dict[str, str]] = None,  # noqa: UP045 diffusers reads no | before 0.37
        height: int = 256,
        width: int = 256,
        can_be_guided: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label or {}, height=height, width=width, can_be_guided=can_be_guided
        )
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        num_images_per_class: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        seed: int = 0,
        first: int = 0,
        latents: Mapping[str, Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draws images. Image i of a seed is the same in a batch of any size, unless the model's sampler is
        ``dopri5`` with ``error_over: batch``, where the images of one call share their steps.

        Args:
            class_labels: classes, by number or name; None, also in a list, is any class.
            num_images_per_class: images of each of these labels, one after the other.
            num_inference_steps: instead of the model's own. Where a part leads, a few are added.
            guidance_scale: instead of the model's own; 1 is none, and per part it is a mapping.
            seed: of the whole set that these images belong to.
            first: place of the first of them in that set.
            latents: noise per part to start from, instead of the seed's: ``texture`` (B, C, H, W),
                and what other parts the model has, spatial ones on the texture's grid.
            output_type: ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W), both in [0, 1], or
                ``latent`` for the latents, a mapping from part to tensor.
            return_dict: False: a tuple with the images alone.

        Raises:
            ValueError: a label, scale, shape or setting that does not fit this model.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: expected pil, np, pt or latent")
        labels = self._numbers(class_labels, num_images_per_class)
        settings = self.scheduler.settings(
            num_inference_steps=num_inference_steps, guidance_scale=guidance_scale
        )
        self._check_guidance(settings.guidance)
        device = self._execution_device
        grid = self._shapes()["texture"][1:]
        start = None if latents is None else self._start(latents, len(labels), device)
        with self.progress_bar(total=self.scheduler.num_updates(settings)) as bar:
            drawn = self.scheduler.sample(
                self.transformer,
                torch.tensor(labels, dtype=torch.int64, device=device),
                grid,
                settings,
                seed=seed,
                first=first,
                start=start,
                watch=lambda clock, state: bar.update() if clock > 0 else None,
            )
        if output_type == "latent":
            images = dict(drawn)
        else:
            images = self.image_processor.postprocess(
                self._decode(drawn["texture"]), output_type=output_type
            )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, texture: Tensor) -> Tensor:
        """Standardised latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1]."""
        mean, std = (
            torch.tensor(self.vae.config[key], device=texture.device).view(1, -1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        raw = (texture * std + mean).to(self.vae.dtype)
        return self.vae.decode(raw).sample.float().clamp(-1, 1)

    def _numbers(
        self, labels: int | str | Sequence[int | str | None] | None, num_images: int
    ) -> list[int]:
        names, num_classes = self.config.id2label, self.transformer.num_classes
        numbers = {name: int(number) for number, name in names.items()}
        several = [labels] if labels is None or isinstance(labels, int | str) else list(labels)
        if not several or num_images < 1:
            raise ValueError("no images asked for: give class_labels and num_images_per_class")
        chosen = []
        for label in several:
            known = numbers.get(label, -1) if isinstance(label, str) else label
            number = num_classes if known is None else int(known)
            if not 0 <= number <= num_classes:
                raise ValueError(
                    f"class_labels: no class {label!r}; this model has 0 to {num_classes - 1}, or by name "
                    f"{', '.join(list(numbers)[:8])}{' …' if len(numbers) > 8 else ''}; None is any class"
                )
            chosen += [number] * num_images
        return chosen

    def _check_guidance(self, guidance: Any) -> None:
        parts = self.transformer.spec.names
        unknown = (
            sorted(set(guidance.scale) - set(parts)) if isinstance(guidance.scale, dict) else []
        )
        if unknown:
            raise ValueError(
                f"guidance_scale: no part {', '.join(unknown)}; this model's: {', '.join(parts)}"
            )
        guidance.check_fits(self.transformer.spec)
        is_guided = any(guidance.scale_of(part) != 1 for part in parts)
        if is_guided and not self.config.can_be_guided:
            raise ValueError(
                "guidance_scale: this model was trained without the null label that guidance needs; pass 1"
            )

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each part without the batch axis, spatial ones on the texture's grid."""
        spec = self.transformer.spec
        grid = spec.shape("texture", (self.config.height, self.config.width))[1:]
        return {p.name: (p.channels, *grid) if p.is_spatial else (p.channels,) for p in spec.parts}

    def _start(
        self, latents: Mapping[str, Tensor], num_images: int, device: torch.device
    ) -> dict[str, Tensor]:
        expected = {name: (num_images, *shape) for name, shape in self._shapes().items()}
        given = {name: tuple(part.shape) for name, part in latents.items()}
        if given != expected:
            raise ValueError(f"latents: expected {expected}, got {given}")
        return {name: latents[name].to(device, torch.float32) for name in expected}
