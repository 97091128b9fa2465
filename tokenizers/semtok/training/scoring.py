"""Scores of drawn images on the way of a training, and when given scores were first reached."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import nn

from semtok.sampler.sampling import SamplerConfig
from semtok.settings import Config

CLASSES, FD = "classes", "fd"
"""The share of images that show their class, and the Fréchet distance to real images."""


class ScoreConfig(Config):
    """Scores of images that the averaged network draws while it trains, always for the same seed and labels.

    They change nothing of what is learned, and their seconds are no training seconds.
    """

    every: int = Field(500, ge=1)
    """Steps between scores; the last step is always scored."""
    num: int = Field(360, ge=2)
    """Images drawn for each score, the classes in turn."""
    judge: str = "trained"
    """Who sees the images. ``trained``: a small network that learns the classes from the real images alone, once, so
    that nothing was aligned to it. Otherwise a teacher's name, with a classifier of its features; figures of a
    teacher that tokenizer or transformer were aligned to are no neutral ones."""
    judge_steps: int = Field(700, ge=1)
    """Of the training of ``judge: trained``, 64 images each. More where held-out images are read badly."""
    judge_seed: int = Field(0, ge=0, lt=2**32)
    """Of ``judge: trained``."""
    num_real: int = Field(4000, ge=20)
    """Real training images that the Fréchet distance compares with, and that a teacher's classifier is fitted on."""
    seed: int = Field(0, ge=0)
    """Of the images that are drawn."""
    sampler: SamplerConfig | None = None
    """How they are drawn; None: as the recipe's ``sampler`` says."""
    classes_at: tuple[Annotated[float, Field(gt=0, le=1)], ...] | None = None
    """Shares of images that show their class: at the end a run tells when each was first reached. None: 0.5 and 0.8
    where there are classes."""
    fd_at: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Fréchet distances: at the end a run tells when each was first reached."""

    @model_validator(mode="after")
    def _takes_effect(self) -> "ScoreConfig":
        for name in ("judge_steps", "judge_seed"):
            default = type(self).model_fields[name].default
            if self.judge != "trained" and getattr(self, name) != default:
                raise ValueError(
                    f"score.{name}: goes with score.judge=trained, and the judge is '{self.judge}'; leave it out"
                )
        return self


@dataclass(frozen=True)
class Scoring:
    """What a trainer scores by.

    Attributes:
        every: steps between scores.
        measure: the averaged network to its scores, by ``CLASSES`` and ``FD``; called in all processes, which get the
            same.
        targets: by score, the values to reach: shares from below, distances from above.
        about: who judges what, for ``summary.json``.
    """

    every: int
    measure: Callable[[nn.Module], dict[str, float]]
    targets: Mapping[str, tuple[float, ...]]
    about: dict[str, Any]


class Scores:
    """The scores of a run, which its checkpoints keep.

    Attributes:
        step: the last one that was scored; None: none was.
        last: its scores.
        first_reached: a row for each target: ``score``, ``at``, and the ``step``, ``images``, training ``seconds`` and
            ``value`` when it was first reached, None before.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self.last: dict[str, float] = {}
        self.first_reached: list[dict[str, Any]] = []

    def begin(self, targets: Mapping[str, tuple[float, ...]]) -> None:
        """What is to be reached, unless it is known from a checkpoint."""
        empty = dict.fromkeys(("step", "images", "seconds", "value"))
        self.first_reached = self.first_reached or [
            {"score": score, "at": at, **empty}
            for score, values in targets.items()
            for at in values
        ]

    def note(self, scores: dict[str, float], *, step: int, images: int, seconds: float) -> None:
        """Takes in the scores of a step; later ones change nothing of what is reached.

        Args:
            images: that training has seen.
            seconds: of training.
        """
        self.step, self.last = step, scores
        for row in self.first_reached:
            value = scores.get(row["score"])
            if value is None or row["step"] is not None:
                continue
            if value >= row["at"] if row["score"] == CLASSES else value <= row["at"]:
                row |= {"step": step, "images": images, "seconds": seconds, "value": value}

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "last": self.last, "first_reached": self.first_reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What a checkpoint kept; older ones kept nothing."""
        self.step, self.last = state.get("step"), state.get("last", {})
        self.first_reached = state.get("first_reached", [])
