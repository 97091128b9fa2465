"""The scores of one tokenizer or of one generator of a comparison."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from comparison.plan import Comparison, Row, read_comparison
from comparison.recipes import base_of
from comparison.results import CLASS_SHARE
from semtok.commands.evaluate_options import device
from semtok.data.images.kinds import open_sources
from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.classes import MEASURES, ClassReader, Judge, accuracy, class_reader
from semtok.evaluation.generation import (
    SetFeatures,
    generation_scores,
    see,
    see_reference,
    teacher_network,
)
from semtok.evaluation.image_sets import (
    ImageSet,
    images_of_generator,
    images_of_source,
    labels_for,
)
from semtok.evaluation.judge import TRAINED, trained_judge
from semtok.evaluation.predictors import PROBE, evaluate_latents
from semtok.evaluation.probe import probed
from semtok.evaluation.reconstruction import evaluate_reconstruction
from semtok.images import to_pixels, to_uint8
from semtok.pictures import write_png
from semtok.storage import cache_folder, read_json, read_tensors, write_json
from semtok.tokenizer import Tokenizer
from semtok.training.checkpoint import MODEL_FILE, checkpoint_path, list_checkpoints

NUM_SHOWN = 18


def score(folder: Path, kind: str, name: str, seed: str) -> None:
    """Writes the scores of one tokenizer, or of one row's generator, of a comparison that was begun.

    Args:
        kind: ``tokenizer`` or ``generator``.
        name: a tokenizer's reference, or a row's name.

    Raises:
        UserError: the comparison has none of that name, or nothing was begun there.
    """
    comparison = read_comparison(folder, int(seed) + 1 if seed.isdecimal() else 0)
    rows = {row.name: row for row in comparison.rows}
    named = {"tokenizer": comparison.tokenizers, "generator": list(rows)}.get(kind, [])
    if name not in named or not comparison.num_seeds:
        raise UserError(f"--score {kind} {name} {seed}: {folder} compares nothing of that name")
    if kind == "tokenizer":
        score_tokenizer(comparison, name, int(seed))
    else:
        score_generator(comparison, rows[name], int(seed))


@torch.no_grad()
def score_tokenizer(comparison: Comparison, reference: str, seed: int) -> None:
    """Reconstruction, probe and predictors on held-out images, and a picture of reconstructions."""
    settings = comparison.settings
    train, held_out = open_sources(comparison.data())
    tokenizer = Tokenizer.from_pretrained(comparison.tokenizer_reference(reference, seed))
    tokenizer.to(device())
    network = _judge(comparison, train).network
    report = evaluate_reconstruction(
        tokenizer,
        held_out,
        settings.num_held_out,
        extractors={f"FD-{network.name}": lambda images: network.see(images)["pooled"]},
    )
    scores: dict[str, float] = dict(report.scores)
    teacher = comparison.teacher().to(device())
    scores |= evaluate_latents(tokenizer, held_out, settings.num_held_out, teacher)
    mean = probed(tokenizer, train, held_out, settings.num_train, settings.num_held_out)
    if mean is not None:
        scores |= {PROBE: mean.f1, "probe_accuracy": mean.balanced_accuracy}
    trained = [reference]
    while (base := base_of(trained[-1])) is not None:
        trained.append(base)
    summaries = [comparison.tokenizer_folder(name, seed) / "summary.json" for name in trained]
    if summaries[0].is_file():
        known = [
            file for file in summaries if file.is_file()
        ]  # of a base that was trained before nobody knows
        scores["seconds"] = sum(read_json(file)["training_seconds"] for file in known)
    shown = held_out.load(held_out.chosen(NUM_SHOWN)).images
    pixels = to_pixels(shown, device=device())
    file = comparison.tokenizer_scores(reference, seed)
    _write_pictures(
        file.with_suffix(".png"),
        pixels,
        tokenizer.decode(tokenizer.encode(pixels, value_range=(-1, 1))),
    )
    write_json(file, scores)


@torch.no_grad()
def score_generator(comparison: Comparison, row: Row, seed: int) -> None:
    """Scores of images from each of a run's checkpoints, and a picture from the last; goes on after
    the last checkpoint that is scored."""
    file = comparison.generator_scores(row, seed)
    scores: list[dict[str, float]] = read_json(file) if file.is_file() else []
    run_folder = comparison.generator_folder(row, seed)
    generator = Generator.from_pretrained(run_folder).to(device())
    train, _ = open_sources(comparison.data())
    judge = _judge(comparison, train)
    network = judge.network
    real = images_of_source(train, comparison.settings.num_reference)
    reference = see_reference(real, network, comparison.folder / "references")
    num_classes = generator.network.num_classes
    labels = labels_for(comparison.settings.num_images, max(1, num_classes), balanced=True, seed=0)
    reader = None
    if num_classes > 1:
        reader = judge.read or _class_reader(train, real, reference)
    seconds = training_seconds(run_folder)
    for step in comparison.steps[len(scores) :]:
        generator.network.load_state_dict(averaged_weights(run_folder, step))
        # The same noise for each row of a seed.
        images = images_of_generator(generator, labels, seed=seed)
        seen = see(images, [network])[network.name]
        entry = {"step": step, "seconds": seconds[step], **generation_scores(seen, reference)}
        if reader is not None:
            entry[CLASS_SHARE], _ = accuracy(reader(seen.features.numpy()), np.array(labels))
        scores.append(entry)
        write_json(file, scores)
    shown = shown_labels(num_classes)
    _write_pictures(file.with_suffix(".png"), generator.sample(shown, seed=seed))
    for checkpoint in list_checkpoints(run_folder / "checkpoints")[:-1]:
        shutil.rmtree(checkpoint)  # scored, and large; the run can go on from the last


def _judge(comparison: Comparison, train: ImageSource) -> Judge:
    """Who sees the images. A teacher's reader of classes is fitted later, on the features of the reference."""
    if comparison.settings.judge == TRAINED:
        cache = cache_folder("judges")
        return trained_judge(train, num_images=len(train), cache=cache, device=device())
    return Judge(teacher_network(comparison.teacher().to(device())), None, MEASURES)


def shown_labels(num_classes: int) -> list[int]:
    """Labels of the images that a report shows of each row, evenly spaced over the classes."""
    return [i * max(1, num_classes) // NUM_SHOWN for i in range(NUM_SHOWN)]


def _class_reader(
    source: ImageSource, real: ImageSet, reference: SetFeatures
) -> ClassReader | None:
    """Fitted on the reference's own features, which are of ``source.chosen`` in that order."""
    labels = np.concatenate(
        [batch.labels.numpy() for batch in chosen_images(source, real.num_images, batch_size=64)]
    )
    return class_reader(reference.features.numpy(), labels) if len(set(labels)) > 1 else None


def averaged_weights(run_folder: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights that a run would have exported after a step: averaged where it averages."""
    tensors = read_tensors(checkpoint_path(run_folder / "checkpoints", step) / MODEL_FILE)
    for prefix in ("ema.", "learners.dit.network."):
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if own:
            return own
    raise AssertionError(f"{run_folder}: a checkpoint without a network")


def training_seconds(run_folder: Path) -> dict[int, float]:
    """Seconds of training, by the steps that were logged."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["step"]: entry["seconds"] for entry in map(json.loads, lines)}


def _write_pictures(path: Path, *rows: torch.Tensor) -> None:
    """Images side by side, without any border: the report lays them out."""
    strip = torch.cat([torch.cat(list(to_uint8(pixels).cpu()), dim=2) for pixels in rows], dim=1)
    write_png(path, strip)
