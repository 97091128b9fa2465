"""The scores of one tokenizer or of one generator of a comparison."""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from comparison.asked import Row
from comparison.judges import seated
from comparison.plan import Comparison, read_comparison
from comparison.recipes import base_of
from semtok.commands.evaluate_options import device
from semtok.data.images.kinds import open_sources
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.evaluation.classes import CLASS_SHARE
from semtok.evaluation.generation import see
from semtok.evaluation.image_sets import images_of_generator, labels_for
from semtok.evaluation.judges import class_share, judged, load_judge, relative_scores
from semtok.evaluation.predictors import PROBE, evaluate_latents
from semtok.evaluation.probe import probed
from semtok.evaluation.reconstruction import evaluate_reconstruction
from semtok.images import to_pixels, to_uint8
from semtok.pictures import parts_in_colours_of, write_png
from semtok.storage import read_json, write_json
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer
from semtok.training.checkpoint import checkpoint_path, list_checkpoints, read_networks

NUM_SHOWN = 18
NUM_IN_STRIP = 3
"""Images whose sampling is shown over time, of rows where a part leads."""


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
    network = load_judge(comparison.judges()[0], train, device=device()).network
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
    file = comparison.tokenizer_scores(reference, seed)
    _draw_tokenizer(file, tokenizer, to_pixels(shown, device=device()), teacher)
    write_json(file, scores)


def _draw_tokenizer(file: Path, tokenizer: Tokenizer, pixels: Tensor, teacher: Teacher) -> None:
    """Images above their reconstructions, and each spatial part of their latents in the teacher's colours."""
    latents = tokenizer.encode(pixels, value_range=(-1, 1))
    tokens = teacher.features(pixels).patches[-1]
    for part, colours in parts_in_colours_of(latents, tokens).items():
        enlarged = F.interpolate(colours, size=pixels.shape[-2:], mode="nearest")
        _write_pictures(file.with_suffix(f".{part}.png"), enlarged)
    _write_pictures(file.with_suffix(".png"), pixels, tokenizer.decode(latents))


def part_pictures(file: Path) -> dict[str, Path]:
    """The pictures of the latents' parts by their names, the texture's first, by the file of a tokenizer's scores."""
    found = {p.name[len(file.stem) + 1 : -4]: p for p in file.parent.glob(f"{file.stem}.*.png")}
    # A file of another tokenizer, whose name begins so, ends with a seed.
    names = sorted(filter(str.isidentifier, found), key=lambda part: (part != "texture", part))
    return {part: found[part] for part in names}


def strip_picture(file: Path) -> Path:
    """Where the picture of sampling over time lies, by the file of a generator's scores."""
    return file.with_suffix(".strip.png")


@torch.no_grad()
def score_generator(comparison: Comparison, row: Row, seed: int) -> None:
    """Scores of images from each of a run's checkpoints, and a picture from the last; goes on after
    the last checkpoint that is scored."""
    file = comparison.generator_scores(row, seed)
    scores: list[dict[str, float]] = read_json(file) if file.is_file() else []
    run_folder = comparison.generator_folder(row, seed)
    generator = Generator.from_pretrained(run_folder).to(device())
    seats = seated(comparison)
    num_classes = generator.network.num_classes
    labels = labels_for(comparison.settings.num_images, max(1, num_classes), balanced=True, seed=0)
    seconds = training_seconds(run_folder)
    for step in comparison.steps[len(scores) :]:
        generator.network.load_state_dict(averaged_weights(run_folder, step))
        # The same noise for each row of a seed.
        images = images_of_generator(generator, labels, seed=seed)
        seen = see(images, [seat.judge.network for seat in seats])
        by_judges: dict[str, float] = {}
        for seat in seats:
            by_judges |= judged(seen[seat.name], seat, labels if num_classes > 1 else None)
        by_judges |= relative_scores(by_judges, seats)
        # The share that rows are followed by has no judge's name.
        main = {class_share(seats[0].name): CLASS_SHARE}
        entry = {main.get(name, name): value for name, value in by_judges.items()}
        scores.append({"step": step, "seconds": seconds[step], **entry})
        write_json(file, scores)
    shown = shown_labels(num_classes)
    if seed == 0 and not generator.schedule.is_synchronous:
        in_strip = shown[:: NUM_SHOWN // NUM_IN_STRIP]
        write_png(strip_picture(file), generator.strip(in_strip, seed=seed))
    _write_pictures(file.with_suffix(".png"), generator.sample(shown, seed=seed))
    for checkpoint in list_checkpoints(run_folder / "checkpoints")[:-1]:
        shutil.rmtree(checkpoint)  # scored, and large; the run can go on from the last


def shown_labels(num_classes: int) -> list[int]:
    """Labels of the images that a report shows of each row, evenly spaced over the classes."""
    return [i * max(1, num_classes) // NUM_SHOWN for i in range(NUM_SHOWN)]


def averaged_weights(run_folder: Path, step: int) -> dict[str, Tensor]:
    """The weights that a run would have exported after a step: averaged where it averages."""
    tensors = read_networks(checkpoint_path(run_folder / "checkpoints", step))
    for prefix in ("ema.", "learners.dit.network."):
        own = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        if own:
            return own
    raise AssertionError(f"{run_folder}: a checkpoint without a network")


def training_seconds(run_folder: Path) -> dict[int, float]:
    """Seconds of training, by the steps that were logged."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["step"]: entry["seconds"] for entry in map(json.loads, lines)}


def _write_pictures(path: Path, *rows: Tensor) -> None:
    """Images side by side, without any border: the report lays them out."""
    strip = torch.cat([torch.cat(list(to_uint8(pixels).cpu()), dim=2) for pixels in rows], dim=1)
    write_png(path, strip)
