"""What a caller asks of a model in one call, checked, and drawn. The words are those of diffusers' pipelines.

A ``Generator`` and an exported pipeline both answer a ``SampleRequest``, so that a word means the same in both.
"""

import difflib
import itertools
import operator
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from semtok.sampler.dit import DiT
from semtok.sampler.draws import SampleNoise
from semtok.sampler.guidance import Base
from semtok.sampler.latents import Latents
from semtok.sampler.sampling import (
    SamplerConfig,
    Start,
    Watch,
    clock_readings,
    sample_latents,
)
from semtok.sampler.transport import PathName, Schedule

ClassLabels = int | str | None | Sequence[int | str | None] | Tensor
Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any] | None]
"""``callback(model, step, clock, {"latents": {part: (B, ...)}})``; latents that it returns are gone on from."""
STRENGTH = 0.8
"""Of image-to-image, where a call says none."""
_MOST_NAMES = 8
NEEDED: Mapping[Base, str] = {
    "null_label": "the null label",
    "dropped_path": "the dropped path and the null label",
    "inner_head": "the second head",
}
"""What guidance from each base needs of training."""


@dataclass(frozen=True)
class Sampled:
    """What is sampled from: a network and how it was trained.

    Attributes:
        network: in eval mode.
        class_names: by number; empty: an unconditional model.
        grid: (rows, columns) of the texture, on which all spatial parts are drawn.
        shift: of the training times.
    """

    network: DiT
    class_names: Sequence[str]
    grid: tuple[int, int]
    schedule: Schedule
    path: PathName
    shift: float

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each part without the batch axis, spatial ones on the texture's grid."""
        return self.network.spec.shapes_on(self.grid)


@dataclass(frozen=True)
class SampleRequest:
    """The words of one call.

    Attributes:
        class_labels: classes, by number or name; None, also in a list, is any class, as is the number of classes.
        num_images_per_class: images of each of these labels, one after the other.
        num_inference_steps: instead of the model's own. Where a part leads, a few are added.
        guidance_scale: instead of the model's own; 1 is none, and per part it is a mapping.
        guidance_base: what is guided away from, instead of the model's own: ``null_label``, ``dropped_path`` or
            ``inner_head``, see ``GuidanceConfig``.
        seed: of the whole set that these images belong to. Without seed and generator each call has new noise, by
            torch's global generator.
        generator: a ``torch.Generator`` from which each image's seed is drawn, or one for each image.
        first: place of the first of these images in the set of the seed.
        latents: noise to start from instead of drawn noise: a tensor where texture is the only part, else a
            mapping from part to tensor, spatial ones (B, C, H, W) on the texture's grid.
        strength: of image-to-image: the share of the time axis that is sampled, in (0, 1]; 1 keeps nothing of
            the image. None: 0.8, where an image is given.
        callback_on_step_end: see ``Callback``. ``clock`` is the time after the step, from noise 0 to data 1 (more
            where a part leads).
        callback_on_step_end_tensor_inputs: ``latents`` is all there is.
    """

    class_labels: ClassLabels = None
    num_images_per_class: int = 1
    num_inference_steps: int | None = None
    guidance_scale: float | Mapping[str, float] | None = None
    guidance_base: Base | None = None
    seed: int | None = None
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    first: int = 0
    latents: Tensor | Mapping[str, Tensor] | None = None
    strength: float | None = None
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.seed is not None and self.generator is not None:
            raise ValueError("seed and generator both say where noise comes from; give one of them")
        if self.first and self.seed is None:
            raise ValueError("first: is a place in the set of a seed; give seed too")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength: expected more than 0 and at most 1, got {self.strength}")
        unknown = sorted(set(self.callback_on_step_end_tensor_inputs) - {"latents"})
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: no tensor {', '.join(unknown)}; latents is all there is"
            )

    def _check_numbers(self) -> None:
        """Raises ValueError where a word of this call is of another kind than it should be."""
        if self.seed is not None:
            _check_whole("seed", self.seed, least=0)
        _check_whole("first", self.first, least=0)
        _check_whole("num_images_per_class", self.num_images_per_class, least=None)
        strength = self.strength
        if strength is not None and (isinstance(strength, bool) or not isinstance(strength, Real)):
            raise ValueError(
                f"strength: expected a number more than 0 and at most 1, got {strength!r}"
            )
        callback = self.callback_on_step_end
        if callback is not None and not callable(callback):
            raise ValueError(
                f"callback_on_step_end: expected a function of (model, step, clock, latents), got {callback!r}"
            )

    def settings(self, own: SamplerConfig) -> SamplerConfig:
        """A model's own sampler with the steps and the guidance of this call.

        Raises:
            ValueError: one out of range, steps where the sampler chooses them, or a base where nothing is guided.
        """
        steps, scale = self.num_inference_steps, self.guidance_scale
        if steps is not None and own.method == "dopri5":
            raise ValueError(
                "num_inference_steps: this model's sampler, dopri5, chooses its steps; leave it out, or take a "
                "sampler of another method"
            )
        settings = own.model_dump()
        if steps is not None:
            settings["steps"] = steps
        if scale is not None:
            settings["guidance"]["scale"] = dict(scale) if isinstance(scale, Mapping) else scale
        if self.guidance_base is not None:
            settings["guidance"]["base"] = self.guidance_base
        try:
            chosen = SamplerConfig.model_validate(settings)
        except ValidationError as error:
            raise ValueError(told(error)) from None
        if self.guidance_base is not None and not chosen.guidance.guides:
            raise ValueError("guidance_base: nothing is guided; give guidance_scale, other than 1")
        return chosen

    def numbers(self, model: Sampled) -> list[int]:
        """The class of each image, the number of classes for none.

        Raises:
            ValueError: no image is asked for, or a class that there is not.
        """
        given = self.class_labels
        given = given.tolist() if isinstance(given, Tensor) else given
        given = (
            list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        )
        if not given or self.num_images_per_class < 1:
            raise ValueError("no images asked for: give class_labels and num_images_per_class")
        known = class_numbers(model.class_names)
        return [
            _number(label, known, model.network.num_classes)
            for label in given
            for _ in range(self.num_images_per_class)
        ]

    def noise(self, num_images: int, device: torch.device) -> SampleNoise:
        """The noise of each image.

        Raises:
            ValueError: another number of generators than of images, or something else than generators.
        """
        if self.seed is not None:
            return SampleNoise(self.seed, range(self.first, self.first + num_images), device)
        sources = self.generator
        if not isinstance(sources, Sequence):
            sources = [sources] * num_images
        if len(sources) != num_images:
            raise ValueError(
                f"generator: {len(sources)} of them for {num_images} images; give one, or one for each image"
            )
        for source in sources:
            if source is not None and not isinstance(source, torch.Generator):
                raise ValueError(
                    f"generator: expected a torch.Generator, or a list of them, got {type(source).__name__}; a "
                    "number goes to seed"
                )
        return SampleNoise.of_seeds([_drawn_seed(source) for source in sources], device)

    def start(self, model: Sampled, image: Latents | None = None) -> Start:
        """Where sampling starts.

        Args:
            image: latents of the image (1, ...) or images (B, ...) to start from, on the texture's grid.

        Raises:
            ValueError: latents of other parts or shapes, or a strength without an image.
        """
        num_images = len(self.numbers(model))
        noise = None
        if self.latents is not None:
            noise = _fitting(self.latents, model, num_images)
        if image is None:
            if self.strength is not None:
                raise ValueError("strength: says how much of an image is kept; give image too")
            return Start(noise)
        count = len(image.texture)
        if count not in (1, num_images):
            raise ValueError(
                f"image: {count} images for {num_images} to draw; give one, or one for each"
            )
        expected = {name: (count, *shape) for name, shape in model.shapes().items()}
        given = {name: tuple(part.shape) for name, part in image.items()}
        if given != expected:
            raise ValueError(f"image: its latents are {given}; this model draws {expected}")
        data = {
            name: part.float().expand(num_images, *part.shape[1:]) for name, part in image.items()
        }
        return Start(noise, data, STRENGTH if self.strength is None else self.strength)

    def watch(
        self, owner: Any, advance: Callable[[], Any] | None = None, also: Watch | None = None
    ) -> Watch:
        """Calls the caller's callback after each step.

        Args:
            owner: what the callback is given first.
            advance: called after each step too.
            also: told the clock and the state, and those at the start.
        """
        steps = itertools.count(-1)  # the first reading is the start

        def after(clock: float, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
            step, changed = next(steps), None
            if step >= 0 and self.callback_on_step_end is not None:
                answer = self.callback_on_step_end(owner, step, clock, {"latents": dict(state)})
                changed = _answered(answer, state)
            if step >= 0 and advance is not None:
                advance()
            if also is not None:
                also(clock, changed or state)
            return changed

        return after


def draw(
    model: Sampled,
    request: SampleRequest,
    settings: SamplerConfig,
    *,
    start: Start,
    device: torch.device,
    weak: DiT | None = None,
    watch: Watch | None = None,
) -> Latents:
    """Draws what is asked for: latents, spatial parts on the texture's grid, float32.

    Args:
        settings: of ``request.settings``.
        start: of ``request.start``.
        weak: the network of autoguidance.
        watch: of ``request.watch``.

    Raises:
        ValueError: what is asked for does not fit the model.
    """
    settings.check_network(model.network.architecture)
    numbers = request.numbers(model)
    return sample_latents(
        model.network,
        request.noise(len(numbers), device),
        torch.tensor(numbers, dtype=torch.int64, device=device),
        model.grid,
        settings,
        schedule=model.schedule,
        path=model.path,
        shift=model.shift,
        weak=weak,
        start=start.to(device),
        watch=watch,
    )


def num_steps(model: Sampled, settings: SamplerConfig, start: Start) -> int:
    """How many steps ``draw`` will take."""
    shift = model.shift if settings.shift is None else settings.shift
    return len(clock_readings(settings, model.schedule, shift, start.clock(model.schedule))) - 1


def told(error: ValidationError) -> str:
    """What is wrong with a sampler's settings, in one line."""
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    place = ".".join(str(part) for part in ("sampler", *problem["loc"]))
    return f"{place}: {message}, got {problem['input']!r}"


def check_guidance_fits(settings: SamplerConfig, network: DiT, *, can_be_guided: bool) -> None:
    """Raises ValueError where guidance names no part of a model, or where it was not trained for it."""
    guidance, spec = settings.guidance, network.spec
    settings.check_network(network.architecture)
    if isinstance(guidance.scale, dict):
        unknown = sorted(guidance.scale.keys() - set(spec.names))
        if unknown:
            raise ValueError(
                f"guidance_scale: no part {', '.join(unknown)}; this model's: {', '.join(spec.names)}"
            )
    guidance.check_fits(spec)
    if not can_be_guided and any(guidance.scale_of(part) != 1 for part in spec.names):
        raise ValueError(
            f"guidance_scale: this model was trained without {NEEDED[guidance.base]} that guidance needs; pass 1"
        )


def class_numbers(names: Sequence[str]) -> dict[str, int]:
    """The number of each class name, whatever way its accents are written in."""
    return {composed(name): number for number, name in enumerate(names)}


def composed(name: str) -> str:
    """A name with its accents as one character with their letter, whatever way they are written in."""
    return unicodedata.normalize("NFC", name)


def _number(label: Any, known: Mapping[str, int], num_classes: int) -> int:
    if label is None:
        return num_classes
    try:
        is_name = isinstance(label, str)
        number = known.get(composed(label), -1) if is_name else operator.index(label)
    except TypeError:
        number = -1
    if 0 <= number <= num_classes:
        return number
    if not num_classes:
        raise ValueError(
            f"class_labels: no class {label!r}; this model has none, give None for each image"
        )
    names = ", ".join(list(known)[:_MOST_NAMES]) + (" …" if len(known) > _MOST_NAMES else "")
    near = difflib.get_close_matches(label, known, n=1) if isinstance(label, str) else []
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(
        f"class_labels: no class {label!r}; {hint}this model has 0 to {num_classes - 1}, or by name {names}; None is "
        "any class"
    )


def _check_whole(word: str, value: Any, *, least: int | None) -> None:
    """Raises ValueError where a value is no whole number, or less than the least."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or (least is not None and number < least):
        bound = "" if least is None else f" of at least {least}"
        raise ValueError(f"{word}: expected a whole number{bound}, got {value!r}")


def _drawn_seed(generator: torch.Generator | None) -> int:
    device = generator.device if generator is not None else torch.device("cpu")
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _fitting(
    latents: Tensor | Mapping[str, Tensor], model: Sampled, num_images: int
) -> dict[str, Tensor]:
    """Noise of a caller's, per part."""
    expected = {name: (num_images, *shape) for name, shape in model.shapes().items()}
    if isinstance(latents, Tensor) and len(expected) == 1:
        latents = {"texture": latents}
    if not isinstance(latents, Mapping):
        raise ValueError(
            f"latents: expected a mapping from part to tensor, {expected}, got {_kind(latents)}"
        )
    given = {
        name: tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
        for name, part in latents.items()
    }
    if given != expected:
        raise ValueError(f"latents: expected {expected}, got {given}")
    for name, part in latents.items():
        if not part.is_floating_point():
            raise ValueError(f"latents: expected floating-point numbers, got {part.dtype} ({name})")
        if not part.isfinite().all():
            raise ValueError(
                f"latents: {name} has values that are not finite; mend what made them so"
            )
    return {name: latents[name].float() for name in expected}


def _kind(value: Any) -> str:
    return f"one of {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _answered(answer: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The latents that a callback has returned, or None."""
    if answer is None or (isinstance(answer, Mapping) and "latents" not in answer):
        return None
    changed = answer["latents"] if isinstance(answer, Mapping) else None
    if isinstance(changed, Tensor) and len(state) == 1:
        changed = {"texture": changed}
    shapes = {name: tuple(part.shape) for name, part in state.items()}
    given = type(answer if changed is None else changed).__name__
    if isinstance(changed, Mapping):
        given = {name: tuple(getattr(part, "shape", ())) for name, part in changed.items()}
    if given != shapes:
        raise ValueError(
            f"callback_on_step_end: expected it to return {{'latents': …}} of {shapes}, got {given}"
        )
    return {name: changed[name].to(part) for name, part in state.items()}
