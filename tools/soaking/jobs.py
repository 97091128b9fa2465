"""What is killed: one command each, small, in a folder of its own, that writes all that others of its kind write."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.pictures import write_png

WHOLE, KILLED = "whole", "killed"
IMAGES = Path("inputs") / "images"
_NUM_IMAGES = {"train": 24, "val": 8}
# Two levels up from where a job runs.
_DATA = ("kind=folder", f"path=../../{IMAGES}", "size=16", "num_workers=2")
_ALL = ("train.precision=fp32", "train.batch_size=4", "train.log_every=1", "train.sample_every=6")
_ALL += ("train.num_validation_images=4", "train.num_statistics_images=8", "train.warmup_steps=2")
_ALL += ("train.num_sample_images=2", "train.keep_last=2", "train.checkpoint_every=2")


@dataclass(frozen=True)
class Job:
    """A command, and how it is given again.

    Attributes:
        words: of ``semtok``.
        needs: another job, whose whole run this one reads.
        is_done: what a command says that was killed after its work was whole, where it then ends with an error.
    """

    name: str
    words: tuple[str, ...]
    needs: str | None = None
    is_done: str | None = None


def _training(name: str, words: tuple[str, ...], steps: int) -> Job:
    data = tuple(f"data.{word}" for word in _DATA)
    at = (f"train.steps={steps}", f"train.export_at=[{steps // 2 + 1}]")
    command = (*words, "--output", "run", "--resume", "auto", *data, *_ALL, *at)
    return Job(name, command)


_MODEL = f"../../train_dit/{WHOLE}/run"
JOBS = (
    _training(
        "train_tokenizer",
        (
            *("train_tokenizer", "send_vae", "train.ema_decay=0.9"),
            "method.vae={block_channels: [8, 8, 16], layers_per_block: 1, latent_channels: 4, norm_groups: 4}",
            "method.adversarial={start_step: 3, width: 8, num_layers: 1}",
        ),
        steps=12,
    ),
    _training(
        "train_coder", ("train_tokenizer", "semvae", "method.feature_cache=features"), steps=12
    ),
    _training(
        "train_dit",
        (
            *("train_dit", "--tokenizer", "demo", "data.cache=latents", "sampler.steps=4"),
            *("diffusion.network={preset: LightningDiT-T/2, width: 32, heads: 2}",),
            *("train.ema_decay=0.9", "train.averages={every: 3, keep: 4}"),
        ),
        steps=12,
    ),
    Job(
        "cache_latents",
        ("cache_latents", "--tokenizer", "demo", "--output", "cache", "--shard-size", "2")
        + ("--batch-size", "2", "--data", *_DATA),
    ),
    Job(
        "convert",
        ("convert", "--data", "kind=folder", f"path=../../{IMAGES}", "--output", "shards")
        + ("--shard-megabytes", "0.002"),
    ),
    Job(
        "sample",
        ("sample", _MODEL, "--num", "32", "--batch-size", "2", "--output", "set"),
        needs="train_dit",
    ),
    Job(
        "sample_archive",
        ("sample", _MODEL, "--num", "24", "--batch-size", "2", "--output", "set.npz"),
        needs="train_dit",
    ),
    Job(
        "sample_grid",
        ("sample", _MODEL, "--num", "8", "--batch-size", "1", "--output", "grid.png"),
        needs="train_dit",
        is_done="exists already",
    ),
    Job(
        "hub_checkpoint",
        ("hub", "checkpoint", _MODEL, "--output", "export"),
        needs="train_dit",
        is_done="exists already",
    ),
)


def draw_images(folder: Path) -> None:
    """Small PNG files of two classes, as a folder of one's own images, in a folder that is made for them."""
    config = ShapesConfig(size=32, num_images=_NUM_IMAGES["train"], classes=("shape",))
    for part, source in zip(_NUM_IMAGES, Shapes.open(config), strict=True):
        batch = source.load(range(_NUM_IMAGES[part]))
        for number, image in enumerate(batch.images):
            write_png(folder / part / "ab"[number % 2] / f"{number:03d}.png", image)


def fresh(folder: Path) -> Path:
    """A folder with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
