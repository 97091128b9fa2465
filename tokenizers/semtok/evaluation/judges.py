"""Judges by the words that name them, and what they make of real images and of generated ones.

A judge is a small network trained on the real images alone (``trained``), or any frozen network, whose reader of
classes is fitted on real training images. It gives a Fréchet distance, precision, recall and a kernel distance in its
features, and the share of images that show their class. Several judges give FDr too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from semtok.data.source import ImageSource
from semtok.errors import UserError, did_you_mean, named_here
from semtok.evaluation.classes import CLASS_SHARE, MEASURES, Judge, accuracy, class_reader
from semtok.evaluation.frechet import frechet_distance, relative_frechet
from semtok.evaluation.generation import (
    MAX_REFERENCE_FEATURES,
    SetFeatures,
    features_kept,
    generation_scores,
    see_reference,
    teacher_network,
)
from semtok.evaluation.image_sets import images_of_source
from semtok.evaluation.judge import STEPS, TRAINED, trained_judge
from semtok.evaluation.protocol import file_digest
from semtok.settings import apply_overrides, parse
from semtok.storage import cache_folder
from semtok.teachers import DEMO, Teacher, TeacherConfig, name_in_timm

TEACHER = "teacher"
"""The word for the network that the command's teacher options name."""
WORDS = (
    f"{TRAINED} (a small network that learns the classes from the real images alone), {TEACHER}, {DEMO} (the embedded "
    "teacher), or settings of a frozen network, as name=vit_small_patch14_dinov2 checkpoint=FILE input_size=56 "
    "layers=[-2]"
)
"""What may name a judge, for an option's help."""


@dataclass(frozen=True)
class JudgeChoice:
    """Which judge; nothing of it is loaded.

    Attributes:
        name: in the names of its scores; no other judge of the set has it.
        config: of a frozen network; None: it is to be trained.
    """

    name: str
    config: TeacherConfig | None

    def is_of(self, teacher: TeacherConfig) -> bool:
        """Whether its network is a teacher's, or may be: of one name, and of one file where both have one."""
        if self.config is None or name_in_timm(self.config.name) != name_in_timm(teacher.name):
            return False
        files = {config.checkpoint for config in (self.config, teacher)}
        # Whether timm's own weights are those of a file nobody knows before they are loaded.
        return None in files or len({file_digest(Path(str(file))) for file in files}) == 1


def judge_choices(
    judges: Sequence[Sequence[str]], teacher: TeacherConfig, *, place: str = "--judge"
) -> tuple[JudgeChoice, ...]:
    """The judges that words name, in their order.

    Args:
        judges: the words of each, see ``WORDS``.
        teacher: whom ``teacher`` means.
        place: the option, for messages.

    Raises:
        UserError: unknown words, a network that timm does not know, or two judges of one name.
    """
    choices = tuple(_choice(words, teacher, place) for words in judges)
    names = [choice.name for choice in choices]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{place}: two judges are called '{name}'; leave one out")
    return choices


def _choice(words: Sequence[str], teacher: TeacherConfig, place: str) -> JudgeChoice:
    known = {TRAINED: None, TEACHER: teacher, DEMO: TeacherConfig()}
    place = f"{place} {' '.join(words)}"
    if len(words) == 1 and words[0] in known:
        config = known[words[0]]
    else:
        wrong = [word for word in words if "=" not in word]
        if wrong or not words:
            way_out = f"give {place.split()[0]} once for each judge"
            if len(words) == 1:
                way_out = did_you_mean(words[0], known, "a network is name=…")
            expected = f"expected {', '.join(known)}, or settings as name=…"
            raise UserError(f"{place}: {expected}; {way_out}")
        try:
            config = parse(TeacherConfig, apply_overrides({}, list(words)), "settings")
            with named_here(r"^teacher\.", ""):
                name_in_timm(config.name)
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
    return JudgeChoice(TRAINED if config is None else config.name, config)


def check_judges(
    choices: Sequence[JudgeChoice], train: ImageSource, *, place: str = "--judge"
) -> None:
    """Builds what is frozen, so that nothing is found wrong after hours.

    Raises:
        UserError: weights that can't be loaded, or a judge that would learn classes that images do not have.
    """
    for choice in choices:
        if choice.config is not None:
            _teacher(choice, place)
        elif train.num_classes < 2:
            raise UserError(
                f"{place} {TRAINED}: learns to tell classes apart, and the images have one class; leave it out"
            )


def load_judge(
    choice: JudgeChoice,
    train: ImageSource | None,
    *,
    device: torch.device,
    num_images: int | None = None,
    seed: int = 0,
    steps: int = STEPS,
    place: str = "--judge",
) -> Judge:
    """The judge, on the device. A frozen one has no reader of classes yet, see ``with_reader``.

    Args:
        train: images that a trained one learns from; of these ``num_images``, ``seed`` and ``steps``, see
            ``trained_judge``. None: there are none.
        num_images: None: all.

    Raises:
        UserError: weights that can't be loaded, images of one class, or one that can't be read.
    """
    if choice.config is not None:
        return Judge(teacher_network(_teacher(choice, place).to(device)), None, MEASURES)
    if train is None:
        raise UserError(
            f"{place} {TRAINED}: learns from training images with classes, and files have none; give data settings"
        )
    number = len(train) if num_images is None else num_images
    cache = cache_folder("judges")
    return trained_judge(
        train, num_images=number, cache=cache, device=device, seed=seed, steps=steps
    )


def _teacher(choice: JudgeChoice, place: str) -> Teacher:
    assert choice.config is not None
    try:
        return Teacher(choice.config)
    except UserError as error:
        raise UserError(f"{place} {choice.name}: {error}") from None


# Real images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """What a judge makes of real images that nothing was trained on.

    Attributes:
        num_images: how many.
        digest: of their pixels.
        distance: Fréchet distance to the reference.
        read_right: share of them that it reads as their class; None: it reads none.
    """

    num_images: int
    digest: str | None
    distance: float
    read_right: float | None


@dataclass(frozen=True)
class Seat:
    """A judge with what it saw of real images.

    Attributes:
        reference: that generated images are compared with.
        held_out: None: no such images are at hand.
    """

    judge: Judge
    reference: SetFeatures
    held_out: HeldOut | None = None

    @property
    def name(self) -> str:
        return self.judge.network.name

    def told(self) -> dict[str, Any]:
        """As JSON has it: the network with its weights' digest, and how far to trust it."""
        network = self.judge.network.protocol
        return {
            "network": asdict(network) if network is not None else None,
            "measures": self.judge.measures if self.judge.read is not None else None,
            "num_fitted": self.judge.num_fitted,
            "held_out": asdict(self.held_out) if self.held_out is not None else None,
        }


def with_reader(judge: Judge, train: ImageSource, num_images: int, cache: Path) -> Judge:
    """The judge with a reader of classes, fitted on ``train.chosen(num_images)`` where it has none; as it is where
    these are all of one class.

    Args:
        num_images: of more than 10,000, so many are taken.
        cache: of features, a folder.
    """
    if judge.read is not None or train.num_classes < 2:
        return judge
    labels = _labels(train, num_images)
    if len(set(labels.tolist())) < 2:
        return judge
    seen = see_reference(images_of_source(train, num_images), judge.network, cache)
    assert seen.features is not None
    reader = class_reader(seen.features.numpy(), labels, cache=cache)
    return replace(judge, read=reader, num_fitted=len(labels))


def with_held_out(seat: Seat, held_out: ImageSource, num_images: int, cache: Path) -> Seat:
    """The judge with what it makes of ``held_out.chosen(num_images)``, of which there are two or more.

    Args:
        num_images: as many as are generated, for FDr.
        cache: of features, a folder.
    """
    seen = see_reference(images_of_source(held_out, num_images), seat.judge.network, cache)
    right = None
    if seat.judge.read is not None and seen.features is not None:
        read = seat.judge.read(seen.features.numpy())
        right, _ = accuracy(read, _labels(held_out, num_images))
    distance = frechet_distance(seen.pooled, seat.reference.pooled)
    return replace(seat, held_out=HeldOut(seen.num_images, seen.digest, distance, right))


def take_seat(
    judge: Judge,
    reference: SetFeatures,
    sources: tuple[ImageSource, ImageSource],
    *,
    num_fitted: int,
    num_held_out: int,
    cache: Path,
) -> Seat:
    """The judge with its reader of classes, see ``with_reader``, and what it makes of held-out images; nothing of these
    where they are fewer than two.

    Args:
        sources: training and held-out images.
        num_fitted: of the training images.
        num_held_out: at most so many.
        cache: of features, a folder.
    """
    train, held_out = sources
    seat = Seat(with_reader(judge, train, num_fitted, cache), reference)
    number = min(num_held_out, len(held_out))
    return with_held_out(seat, held_out, number, cache) if number > 1 else seat


def _labels(source: ImageSource, num_images: int) -> np.ndarray:
    """Of the images whose features ``see_reference`` has, in its order."""
    labels = source.labels_of(source.chosen(num_images)).numpy()
    return labels[features_kept(len(labels), MAX_REFERENCE_FEATURES).numpy()]


# Generated images --------------------------------------------------------------------------------


def judged(seen: SetFeatures, seat: Seat, labels: Sequence[int] | None) -> dict[str, float]:
    """Scores of one set of generated images by one judge: those of ``generation_scores``, and ``shares``."""
    return generation_scores(seen, seat.reference) | shares(seen, seat, labels)


def shares(seen: SetFeatures, seat: Seat, labels: Sequence[int] | None) -> dict[str, float]:
    """``shown class (NAME)``: the share of images that a judge reads as their class; nothing where it reads none.

    Args:
        seen: what its network saw of them, in their order.
        labels: that the images were asked to show; None: none, or of one class.
    """
    if labels is None or seat.judge.read is None:
        return {}
    assert seen.features is not None
    share, _ = accuracy(seat.judge.read(seen.features.numpy()), np.array(labels))
    return {class_share(seat.name): share}


def relative_scores(scores: Mapping[str, float], seats: Sequence[Seat]) -> dict[str, float]:
    """FDr and its parts, see ``relative_frechet``; nothing where not two judges saw held-out images.

    Args:
        scores: of all judges, see ``judged``.
    """
    real = {seat.name: seat.held_out.distance for seat in seats if seat.held_out is not None}
    if len(real) < 2:
        return {}
    return relative_frechet({name: scores[f"FD-{name}"] for name in real}, real)


def class_share(name: str) -> str:
    """What the share of images that a judge reads as their class is called."""
    return f"{CLASS_SHARE} ({name})"
