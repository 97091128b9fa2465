"""Scores of a diffusion transformer on the way of its training: images of fixed seed and labels, seen by one judge."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from semtok.data.source import ImageSource
from semtok.diffusion.diffusion_config import check_guidance
from semtok.diffusion.generator import Generator
from semtok.diffusion.training import DiffusionObjective
from semtok.errors import UserError, did_you_mean
from semtok.evaluation.classes import (
    MEASURES,
    ClassReader,
    Judge,
    accuracy,
    class_reader,
    features_and_labels,
    real_batches,
)
from semtok.evaluation.frechet import Gaussian, frechet_distance
from semtok.evaluation.generation import FeatureNetwork, see, see_reference, teacher_network
from semtok.evaluation.image_sets import DRAWN_AT_ONCE, ImageSet, images_of_source
from semtok.evaluation.judge import TRAINED, trained_judge
from semtok.images import to_uint8
from semtok.processes import gather, num_processes, process_index, together
from semtok.sampler.sampling import SamplerConfig
from semtok.speed import computing
from semtok.statistics import StreamingMoments
from semtok.storage import cache_folder
from semtok.teachers import DEMO, Teacher, TeacherConfig, name_in_timm, teacher_names
from semtok.training.scoring import CLASSES, FD, ScoreConfig, Scoring

_NUM_HELD_OUT = 2000
_MOST_TO_FIT = 10_000
_DEFAULT_SHARES = (0.5, 0.8)


@dataclass(frozen=True)
class ScorePlan:
    """Scores of which everything was checked and nothing begun.

    Attributes:
        images: real ones, of training and held out.
        sampler: how images are drawn.
        teacher: who judges; None: the judge is to be trained.
    """

    config: ScoreConfig
    images: tuple[ImageSource, ImageSource]
    sampler: SamplerConfig
    teacher: Teacher | None


def plan_scores(
    config: ScoreConfig, objective: DiffusionObjective, images: tuple[ImageSource, ImageSource]
) -> ScorePlan:
    """Checks that scores can be taken of this model and these images.

    Raises:
        UserError: a setting that can't take effect, or an unknown teacher.
        ValueError: guidance that this model was not prepared for.
    """
    if len(objective.class_names) < 2 and config.classes_at:
        have = "no classes" if not objective.class_names else "one class"
        raise UserError(
            f"score.classes_at: the model has {have}, and images can't show another; leave it out, score.fd_at tells "
            "of distances"
        )
    if config.judge == TRAINED and images[0].num_classes < 2:
        raise UserError(
            "score.judge: trained learns to tell classes apart, and the images have one class; pass score.judge=demo "
            "or another teacher"
        )
    sampler = config.sampler or objective.sampler
    if config.sampler is not None:
        check_guidance(objective.config, sampler, objective.tokenizer.spec)
    teacher = None
    if config.judge != TRAINED:
        _check_known(config.judge)
        try:
            teacher = Teacher(TeacherConfig(name=config.judge))
        except UserError as error:
            raise UserError(f"score.judge: {error}") from None
    return ScorePlan(config, images, sampler, teacher)


def _check_known(judge: str) -> None:
    """Raises UserError where no judge is called so."""
    try:
        name_in_timm(judge)
    except UserError:
        words = f"expected {TRAINED}, {DEMO}, or a model of timm"
        hint = did_you_mean(judge, [TRAINED, *teacher_names()])
        raise UserError(
            f"score.judge: no judge is called '{judge}'; {hint}{' ' * bool(hint)}{words}"
        ) from None


def scoring(plan: ScorePlan, objective: DiffusionObjective, device: torch.device) -> Scoring:
    """Makes the judge and the moments of the real images, before training; all processes call it.

    The first process judges. All draw: batches of ``DRAWN_AT_ONCE`` in turn, which it sees in their order, so that
    scores do not depend on how many processes there are.

    Raises:
        UserError: an image that can't be read.
    """
    told: dict[str, Any] = {}
    judge = reference = None
    with together():
        if not process_index():
            judge = _judge(plan, device)
            train = images_of_source(plan.images[0], plan.config.num_real)
            reference = see_reference(train, judge.network, cache_folder("references")).pooled
            told = _about(plan, judge, reference, train.num_images)
        told = gather(told)[0]
    labels = _labels(plan.config.num, len(objective.class_names))

    def measure(averaged: nn.Module) -> dict[str, float]:
        # In float32, as the export will draw, whatever the training computes in.
        generator = objective.generator(averaged).speed_up(precision="fp32")
        scores: dict[str, float] = {}
        with together():
            drawn = _drawn(generator, plan, labels)
            if judge is None or reference is None:
                for _ in drawn.open():
                    pass
            else:
                scores = _scores(drawn, judge, reference, labels)
            scores = gather(scores)[0]
        return scores

    targets = {FD: plan.config.fd_at}
    if len(objective.class_names) > 1:
        shares = plan.config.classes_at
        targets = {CLASSES: _DEFAULT_SHARES if shares is None else shares} | targets
    return Scoring(plan.config.every, measure, targets, told)


def _labels(num: int, num_classes: int) -> list[int]:
    """The classes in turn; where there are more than images, evenly spaced over them."""
    if num < num_classes:
        return [i * num_classes // num for i in range(num)]
    return [i % max(1, num_classes) for i in range(num)]


def _judge(plan: ScorePlan, device: torch.device) -> Judge:
    config, (train, _) = plan.config, plan.images
    if plan.teacher is None:
        judge = trained_judge(
            train,
            num_images=len(train),
            cache=cache_folder("judges"),
            device=device,
            seed=config.judge_seed,
            steps=config.judge_steps,
        )
        return replace(judge, network=_in_float32(judge.network, device))
    network = _in_float32(teacher_network(plan.teacher.to(device)), device)
    num = min(config.num_real, _MOST_TO_FIT)
    read: ClassReader | None = None
    if train.num_classes > 1:
        read = class_reader(*features_and_labels(network, real_batches(train, num)))
    return Judge(network, read, MEASURES)


def _in_float32(network: FeatureNetwork, device: torch.device) -> FeatureNetwork:
    """The same network, which a training in less precision lets see as well as ever."""

    def see_images(images: Tensor) -> dict[str, Tensor]:
        with computing(device, "fp32"):
            return network.see(images)

    return replace(network, see=see_images)


def _about(
    plan: ScorePlan, judge: Judge, reference: Gaussian, num_reference: int
) -> dict[str, Any]:
    """Who judges what, and what the judge says of real held-out images; tells people of it."""
    config, (train, held_out) = plan.config, plan.images
    num = min(_NUM_HELD_OUT, len(held_out))
    features, labels = features_and_labels(judge.network, real_batches(held_out, num))
    real: dict[str, float] = {"num": num}
    if judge.read is not None:
        real[CLASSES] = accuracy(judge.read(features), labels)[0]
    if num > 1:
        moments = StreamingMoments(covariance=True)
        moments.add(torch.from_numpy(features))
        real[FD] = frechet_distance(Gaussian.of(moments), reference)
    shown = [f"{100 * real[CLASSES]:.1f} % show their class"] if CLASSES in real else []
    shown += [f"Fréchet distance {real[FD]:.4g}"] if FD in real else []
    print(
        f"scores: judge {config.judge}; {num} real held-out images: {', '.join(shown)}", flush=True
    )
    network = judge.network.protocol
    return {
        "judge": config.judge,
        "measures": judge.measures,
        "network": asdict(network) if network is not None else None,
        "reference": f"{num_reference} of {train.name}",
        "num": config.num,
        "seed": config.seed,
        "sampler": plan.sampler.model_dump(mode="json"),
        "held_out": real,
    }


def _drawn(generator: Generator, plan: ScorePlan, labels: list[int]) -> ImageSet:
    """The images, of which each process draws batches in turn; all of them have to go through the set."""

    def batches() -> Iterator[Tensor]:
        num_batches = -(-len(labels) // DRAWN_AT_ONCE)
        for first in range(0, num_batches, num_processes()):
            own = (first + process_index()) * DRAWN_AT_ONCE
            images = None
            if own < len(labels):
                pixels = generator.sample(
                    labels[own : own + DRAWN_AT_ONCE],
                    seed=plan.config.seed,
                    first=own,
                    sampler=plan.sampler,
                )
                images = to_uint8(pixels).cpu()
            yield from (batch for batch in gather(images) if batch is not None)

    return ImageSet("scoring", "", len(labels), generator.image_size, batches)


def _scores(
    drawn: ImageSet, judge: Judge, reference: Gaussian, labels: list[int]
) -> dict[str, float]:
    seen = see(drawn, [judge.network])[judge.network.name]
    scores = {FD: frechet_distance(seen.pooled, reference)}
    if judge.read is not None and len(set(labels)) > 1:
        assert seen.features is not None
        scores = {
            CLASSES: accuracy(judge.read(seen.features.numpy()), np.array(labels))[0]
        } | scores
    return scores
