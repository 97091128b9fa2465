"""How a generator's samples are drawn, as a diffusers scheduler."""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from pydantic import ValidationError
from torch import Tensor

from semtok.sampler.latents import Latents
from semtok.sampler.request import (
    Sampled,
    SampleRequest,
    check_guidance_fits,
    draw,
    num_steps,
    told,
)
from semtok.sampler.sampling import SamplerConfig
from semtok.sampler.transport import PathName, Schedule


class SemtokScheduler(SchedulerMixin, ConfigMixin):
    """Draws the parts of the latents along their velocity, on one clock, each in its own time.

    It has no ``step``: when a part moves, and how often the network is asked for a step, is for
    ``sample`` to know. Other settings than a model's own are a copy of it with other ones:
    ``SemtokScheduler.from_config(scheduler.config, sampler=scheduler.config.sampler | {"method": "heun"})``.

    Args:
        sampler: method, steps, guidance and their like, see ``SamplerConfig``.
        starts: per part, where it starts on the clock.
        path: between noise and data, as in training.
        shift: of the times, as in training; ``sampler["shift"]`` goes before it.

    Raises:
        ValueError: settings out of range.
    """

    @register_to_config
    def __init__(
        self,
        sampler: dict[str, Any],
        starts: dict[str, float],
        path: PathName = "linear",
        shift: float = 1.0,
    ) -> None:
        self.schedule = Schedule(dict(starts))
        self.own_settings()

    def own_settings(self) -> SamplerConfig:
        """The settings that a call starts from.

        Raises:
            ValueError: a setting out of range.
        """
        try:
            return SamplerConfig.model_validate_json(json.dumps(self.config.sampler))
        except ValidationError as error:
            raise ValueError(told(error)) from None

    def request(self, **words: Any) -> SampleRequest:
        """A call's words, see ``SampleRequest``."""
        return SampleRequest(**words)

    def sampled(
        self, transformer: Any, class_names: Sequence[str], grid: tuple[int, int]
    ) -> Sampled:
        """What is sampled from.

        Args:
            transformer: a ``SemtokTransformer``, in eval mode.
            grid: (rows, columns) of the texture.
        """
        path, shift = self.config.path, self.config.shift
        return Sampled(transformer, class_names, grid, self.schedule, path, shift)

    def check(self, settings: SamplerConfig, model: Sampled, *, can_be_guided: bool) -> None:
        """Raises ValueError where a model can't be guided so."""
        check_guidance_fits(settings, model.network, can_be_guided=can_be_guided)

    def sample(
        self,
        model: Sampled,
        request: SampleRequest,
        settings: SamplerConfig,
        *,
        device: torch.device,
        image: Tensor | None = None,
        owner: Any = None,
        bar: Callable[[int], Any] | None = None,
    ) -> Latents:
        """Draws latents, spatial parts on the texture's grid.

        Args:
            settings: of ``request.settings(own_settings())``.
            image: latents (B, C, H, W) of images to start from, where texture is the only part.
            owner: what a callback is given first.
            bar: a progress bar of so many steps, with ``update()``; used as a context.
        """
        latents = None if image is None else Latents({"texture": image})
        start = request.start(model, latents)
        steps = num_steps(model, settings, start)
        with bar(steps) if bar is not None else nullcontext() as shown:
            watch = request.watch(owner, shown.update if shown is not None else None)
            return draw(model, request, settings, start=start, device=device, watch=watch)
