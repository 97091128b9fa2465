"""How a generator's samples are drawn, as a diffusers scheduler."""

import json
from collections.abc import Mapping
from typing import Any

from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from pydantic import ValidationError
from torch import Tensor

from semtok.sampler.draws import SampleNoise
from semtok.sampler.latents import Latents
from semtok.sampler.sampling import SamplerConfig, Watch, clock_readings, sample_latents
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
        self.settings()

    def settings(
        self,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
    ) -> SamplerConfig:
        """The sampler's settings, with those that a call has for itself.

        Args:
            guidance_scale: for all parts, or per part; 1 is none.

        Raises:
            ValueError: a setting out of range.
        """
        settings = dict(self.config.sampler)
        if num_inference_steps is not None:
            settings["steps"] = num_inference_steps
        if guidance_scale is not None:
            per_part = isinstance(guidance_scale, Mapping)
            scale = dict(guidance_scale) if per_part else guidance_scale
            settings["guidance"] = {**settings.get("guidance", {}), "scale": scale}
        try:
            return SamplerConfig.model_validate_json(json.dumps(settings))
        except ValidationError as error:
            problem = error.errors()[0]
            message = problem["msg"].removeprefix("Value error, ")
            if problem["loc"]:
                place = ".".join(str(part) for part in ("sampler", *problem["loc"]))
                message = f"{place}: {message}, got {problem['input']!r}"
            raise ValueError(message) from None

    def num_updates(self, settings: SamplerConfig) -> int:
        """How often ``sample`` will tell its watcher a state, but for the noise that it starts from."""
        shift = self.config.shift if settings.shift is None else settings.shift
        return len(clock_readings(settings, self.schedule, shift)) - 1

    def sample(
        self,
        transformer: Any,
        labels: Tensor,
        grid: tuple[int, int],
        settings: SamplerConfig,
        *,
        seed: int,
        first: int = 0,
        start: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> Latents:
        """Draws latents, spatial parts on the texture's grid.

        Args:
            transformer: a ``SemtokTransformer``, in eval mode.
            labels: int64 (B,), classes, or ``num_classes`` for none.
            grid: (rows, columns) of the texture.
            seed: of a set of samples; each has its own noise, whatever it shares a batch with.
            first: place of the first of these samples in that set.
            start: noise per part, instead of the seed's.
            watch: told the clock and the state at the start and after each step.
        """
        return sample_latents(
            transformer,
            SampleNoise(seed, range(first, first + len(labels)), labels.device),
            labels,
            grid,
            settings,
            schedule=self.schedule,
            path=self.config.path,
            shift=self.config.shift,
            start=start,
            watch=watch,
        )
