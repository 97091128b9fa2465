"""Images of given classes, from a transformer that denoises several parts of the latents together."""

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    ModelMixin,
    SchedulerMixin,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps
from torch import Tensor


# diffusers runs this file again whenever it loads a folder of this kind, so the class keeps to itself:
# it needs no other definition of this module, which the next folder's may replace.
class SemtokPipeline(DiffusionPipeline):
    """A class-conditional (or unconditional) latent diffusion transformer.

    Args:
        transformer: a ``SemtokTransformer``.
        scheduler: a ``SemtokScheduler``.
        vae: decodes the texture part: an autoencoder of diffusers, or a ``SemtokDecoder``. ``latents_mean`` and
            ``latents_std`` of its config, or its buffers of these names, restore the scale.
        id2label: the classes' names by their numbers (as text); empty: an unconditional model.
        height, width: of the images, in pixels.
        can_be_guided: for each base of guidance whether training has prepared for it; None: for a null label alone.
    """

    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        vae: ModelMixin,
        id2label: Optional[dict[str, str]] = None,  # noqa: UP045 diffusers reads no | before 0.37
        height: int = 256,
        width: int = 256,
        can_be_guided: Optional[dict[str, bool]] = None,  # noqa: UP045
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(
            id2label=id2label or {},
            height=height,
            width=width,
            can_be_guided={"null_label": True} if can_be_guided is None else can_be_guided,
        )
        self.image_processor = VaeImageProcessor()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str | None] | None = None,
        num_images_per_class: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        seed: int | None = None,
        first: int = 0,
        latents: Tensor | Mapping[str, Tensor] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        image: Any = None,
        value_range: tuple[float, float] | None = None,
        strength: float | None = None,
        guidance_base: str | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict], dict | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draws images. Image i of a seed is the same in a batch of any size, unless the model's sampler is
        ``dopri5`` with ``error_over: batch``, where the images of one call share their steps.

        Args:
            class_labels: classes, by number or name; None, also in a list, is any class.
            num_images_per_class: images of each of these labels, one after the other.
            num_inference_steps: instead of the model's own. Where a part leads, a few are added.
            guidance_scale: instead of the model's own; 1 is none, and per part it is a mapping.
            seed: of the whole set that these images belong to. Without seed and generator noise is new.
            first: place of the first of these images in the set of the seed.
            latents: noise to start from: a tensor (B, C, H, W) where texture is the only part; else per part,
                spatial ones on the texture's grid.
            output_type: ``pil``, ``np`` (B, H, W, 3) or ``pt`` (B, 3, H, W), both in [0, 1], or ``latent``.
            return_dict: False: a tuple with the images alone.
            generator: a ``torch.Generator`` from which each image's seed is drawn, or one for each image.
            image: to start from, one or one for each: PIL, or uint8 or floats, shaped as ``np`` and ``pt``.
            value_range: (black, white) of an image of floats; None: (0, 1), as ``np`` and ``pt`` give them.
            strength: the share of the time axis that is sampled from ``image`` on, in (0, 1]; by default 0.8.
            guidance_base: away from ``null_label``, ``dropped_path`` or ``inner_head``; None: the model's own.
            callback_on_step_end: called as (pipeline, step, time, ``{"latents": {part: tensor}}``) after each
                step; ``latents`` that it returns are gone on from.
            callback_on_step_end_tensor_inputs: ``latents`` is all there is.

        Raises:
            ValueError: a label, scale, shape or setting that does not fit this model.
        """
        words = {
            "class_labels": class_labels,
            "num_images_per_class": num_images_per_class,
            "num_inference_steps": num_inference_steps,
            **{"guidance_scale": guidance_scale, "guidance_base": guidance_base},
            **{"seed": seed, "generator": generator, "first": first, "latents": latents},
            "strength": strength,
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: expected pil, np, pt or latent")
        images = dict(drawn := self._draw(words, image, value_range or (0, 1)))
        if output_type != "latent":
            pixels = self._decode(drawn["texture"])
            images = self.image_processor.postprocess(pixels, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _draw(
        self, words: Mapping[str, Any], image: Any, value_range: tuple[float, float]
    ) -> Mapping[str, Tensor]:
        """The latents of a call."""
        if not hasattr(self.scheduler, "own_settings"):
            raise ValueError(
                f"scheduler: {type(self.scheduler).__name__} can't draw this model's parts, each in its own time; "
                "keep SemtokScheduler, whose from_config takes another sampler={'method': …}"
            )
        request = self.scheduler.request(**words)
        spec, names = self.transformer.spec, self.config.id2label
        grid = spec.shape("texture", (self.config.height, self.config.width))[1:]
        class_names = [names[number] for number in sorted(names, key=int)]
        model = self.scheduler.sampled(self.transformer, class_names, grid)
        settings = request.settings(self.scheduler.own_settings())
        prepared = self.config.can_be_guided.get(settings.guidance.base, False)
        self.scheduler.check(settings, model, can_be_guided=prepared)
        return self.scheduler.sample(
            model,
            request,
            settings,
            device=self._execution_device,
            image=None if image is None else self._encode(image, value_range),
            owner=self,
            bar=lambda steps: self.progress_bar(total=steps),
        )

    def _decode(self, texture: Tensor) -> Tensor:
        """Standardised latents (B, C, h, w) to pixels (B, 3, H, W) in [-1, 1]."""
        mean, std = self._statistics(texture.device)
        raw = (texture * std + mean).to(self.vae.dtype)
        return self.vae.decode(raw).sample.float().clamp(-1, 1)

    def _encode(self, image: Any, value_range: tuple[float, float]) -> Tensor:
        """Images to standardised latents (B, C, h, w), float32: the mean of their posterior."""
        parts = [part for part in self.transformer.spec.names if part != "texture"]
        if parts:
            raise ValueError(
                f"image: this model also draws {', '.join(parts)}, for which an image needs the teacher, and a "
                "pipeline has none; semtok's Generator takes image"
            )
        if not hasattr(self.vae, "encode"):
            raise ValueError(
                "image: this model's latents are a vision model's tokens, and a pipeline has its decoder alone; "
                "semtok's Generator takes image"
            )
        pixels = self._pixels(image, value_range).to(self._execution_device, self.vae.dtype)
        mean, std = self._statistics(pixels.device)
        coded = self.vae.encode(pixels)[0]
        raw = coded if isinstance(coded, Tensor) else coded.mean  # of a posterior
        return (raw.float() - mean) / std

    def _pixels(self, image: Any, value_range: tuple[float, float]) -> Tensor:
        """PIL images, uint8, or floats in a range, to pixels (B, 3, H, W) in [-1, 1]. Transparency is over white, and
        a camera's note of which way is up is followed.

        Raises:
            ValueError: another kind, range or size.
        """
        several = image if isinstance(image, list) else [image]
        if not several:
            raise ValueError("image: an empty list; give one image, or one for each")
        if all(isinstance(entry, Image.Image) for entry in several):
            deep = [entry.mode for entry in several if entry.mode[0] in "IF"]
            if deep:
                raise ValueError(f"image: mode {deep[0]} has no known range; convert it to RGB")
            layers = [ImageOps.exif_transpose(entry).convert("RGBA") for entry in several]
            grounds = [Image.new("RGBA", layer.size, "white") for layer in layers]
            several = [Image.alpha_composite(*pair) for pair in zip(grounds, layers, strict=True)]
        elif any(isinstance(entry, str | os.PathLike) for entry in several):
            raise ValueError("image: a path; open it by PIL.Image.open")
        else:
            several = [self._unit(entry, value_range) for entry in several]
        as_they_are = VaeImageProcessor(do_resize=False, do_normalize=False, do_convert_rgb=True)
        pixels = as_they_are.preprocess(several)
        expected = (3, self.config.height, self.config.width)
        if tuple(pixels.shape[1:]) != expected:
            raise ValueError(
                f"image: expected (B, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}"
            )
        low, high = pixels.min().item(), pixels.max().item()
        if not (low >= -1 / 510 and high <= 1 + 1 / 510):
            raise ValueError(
                f"image: floats lie from {low:g} to {high:g}, where 0 is black and 1 is white; pass "
                "value_range=(black, white), as (-1, 1)"
            )
        return pixels * 2 - 1

    @staticmethod
    def _unit(image: Any, value_range: tuple[float, float]) -> Any:
        """An array or a tensor with black at 0 and white at 1."""
        if not isinstance(image, np.ndarray | Tensor):
            raise ValueError(
                f"image: expected PIL images, arrays or tensors, got {type(image).__name__}"
            )
        if image.dtype in (np.uint8, torch.uint8):
            return image / np.float32(255) if isinstance(image, np.ndarray) else image.float() / 255
        black, white = value_range
        if not black < white:
            raise ValueError(f"value_range: expected (black, white), got {value_range}")
        return (image - black) / (white - black)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the raw latents: per channel, (1, C, 1, 1), or also per position,
        (1, C, h, w)."""
        config = self.vae.config
        held = config if "latents_mean" in config else dict(self.vae.named_buffers())
        mean, std = (
            torch.as_tensor(held[key], dtype=torch.float32, device=device)
            for key in ("latents_mean", "latents_std")
        )
        shape = (1, *mean.shape) if mean.ndim == 3 else (1, -1, 1, 1)
        return mean.view(shape), std.view(shape)

    def save_pretrained(self, save_directory: str | os.PathLike, **options: Any) -> None:
        """Writes the pipeline with its code, so that it loads again with ``trust_remote_code=True``.

        Args:
            save_directory: a folder; files there of the same names are replaced.
            options: as ``DiffusionPipeline.save_pretrained`` takes them, but for ``push_to_hub``.

        Raises:
            ValueError: ``push_to_hub``, before which the code would have to be there.
        """
        if options.pop("push_to_hub", False):
            raise ValueError(
                "push_to_hub: save to a folder, and upload that by huggingface_hub's upload_folder"
            )
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        place = folder / "model_index.json"
        index = json.loads(place.read_text(encoding="utf-8"))
        for name in ("", "transformer", "scheduler", "vae"):
            kind = type(getattr(self, name) if name else self)
            if kind.__module__.startswith("diffusers."):  # an autoencoder, whose code is there
                continue
            module = kind.__module__.rpartition(".")[2]
            (folder / name / f"{module}.py").write_bytes(Path(inspect.getfile(kind)).read_bytes())
            index[name or "_class_name"] = [module, kind.__name__]
        place.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
