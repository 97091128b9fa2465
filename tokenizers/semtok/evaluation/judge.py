"""A judge of generated images that no tokenizer or transformer was aligned to: trained here, on real images alone.

A small convolutional network learns the classes of the training images from random weights, a seed decides. It
reads the class that an image shows, and its last features are a network for Fréchet distances. Held-out images tell
how well it reads. What a file keeps of it is of one set of images, seed and length of training.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn

from semtok.data.order import DataOrder, load_batches
from semtok.data.source import ImageBatch, ImageSource, Key
from semtok.errors import UserError
from semtok.evaluation.classes import Judge
from semtok.evaluation.generation import FeatureNetwork
from semtok.evaluation.protocol import Network, weights_digest
from semtok.images import to_pixels
from semtok.lock import made_once
from semtok.optimiser import OptimiserConfig
from semtok.progress import progress
from semtok.storage import digest, load_weights, new_file, write_tensors
from semtok.tokenizer import library_version
from semtok.training.train_config import TrainConfig

TRAINED = "trained"
"""Its name among the teachers' names."""
STEPS = 700
"""Enough for the embedded scenes: a minute on two cores."""
_MEASURES = (
    "convolutional network trained from random weights on real training images: {steps} steps of {batch} images, "
    "AdamW, cross-entropy, seed {seed}"
)
_BATCH_SIZE = 64
_LEARNING_RATE, _WEIGHT_DECAY, _SMOOTHING = 4e-3, 0.05, 0.05
_WARMUP_SHARE = 0.2
_MOST_PIXELS, _LAST_GRID = 64, 8
_FIRST_WIDTH, _WIDTH = 32, 128
_FORMAT = "2"  # of what is trained: raise it with every change that gives other weights


class JudgeNetwork(nn.Module):
    """Images to the logits of their classes.

    Convolutions halve the grid until its shorter side is at most 8. Two channels tell each place where in the image
    it is, as classes may be of places. Larger images are first made smaller, to a shorter side of 64.

    Args:
        image_size: (height, width) of the images.
    """

    def __init__(self, num_classes: int, image_size: tuple[int, int]) -> None:
        super().__init__()
        shrink = min(1.0, _MOST_PIXELS / min(image_size))
        self.input_size = (round(image_size[0] * shrink), round(image_size[1] * shrink))
        halvings = max(1, math.ceil(math.log2(min(self.input_size) / _LAST_GRID)))
        widths = [5, _FIRST_WIDTH, 2 * _FIRST_WIDTH] + [_WIDTH] * (2 * halvings - 2)
        layers: list[nn.Module] = []
        for number, (ours, next_width) in enumerate(pairwise(widths)):
            layers.append(nn.Conv2d(ours, next_width, 3, 2 - number % 2, 1, bias=False))
            layers += [nn.BatchNorm2d(next_width), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.neck = nn.Sequential(
            nn.Linear(2 * widths[-1], _WIDTH), nn.BatchNorm1d(_WIDTH), nn.ReLU()
        )
        self.head = nn.Linear(_WIDTH, num_classes)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] to what the last layer reads, (B, 128), at least 0."""
        if tuple(pixels.shape[-2:]) != self.input_size:
            pixels = F.interpolate(pixels, size=self.input_size, mode="bilinear", antialias=True)
        (height, width), num = self.input_size, len(pixels)
        down = torch.linspace(-1, 1, height, device=pixels.device)
        right = torch.linspace(-1, 1, width, device=pixels.device)
        places = (
            repeat(down, "h -> b 1 h w", b=num, w=width),
            repeat(right, "w -> b 1 h w", b=num, h=height),
        )
        seen = self.body(torch.cat([pixels, *places], dim=1))
        return self.neck(
            torch.cat([reduce(seen, "b c h w -> b c", how) for how in ("mean", "max")], dim=1)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.features(pixels))


def trained_judge(
    train: ImageSource,
    *,
    num_images: int,
    cache: Path,
    device: torch.device,
    seed: int = 0,
    steps: int = STEPS,
) -> Judge:
    """The judge of these images: out of the cache, or trained now and kept there. Where another process trains it, this
    one waits for that.

    On a CPU the same images, seed and number of threads give the same weights.

    Args:
        num_images: to learn from, ``train.chosen`` of them.
        cache: a folder; a file in it is of one set of images, seed and number of steps.
        steps: of training, 64 images each; more where held-out images are read badly.

    Raises:
        UserError: the images are all of one class, or one can't be read.
    """
    if train.num_classes < 2:
        raise UserError(
            "a trained judge learns to tell classes apart, and the images have one class; take a teacher in its place"
        )
    num_images = min(num_images, len(train))
    fresh = _fresh(train, seed).to(device)
    file = cache / f"{_key(train, num_images, seed, steps)}.safetensors"

    def make() -> JudgeNetwork:
        _train(fresh, train, num_images, seed=seed, steps=steps)
        with new_file(file) as temporary:
            write_tensors(temporary, fresh.state_dict(), {"semtok": library_version()})
        return fresh

    what = "a command that trains this judge"
    network = made_once(file, what, read=partial(_kept, fresh), make=make)
    network.requires_grad_(False).eval()

    def see(images: Tensor) -> dict[str, Tensor]:
        return {"pooled": network.features(to_pixels(images, device=device))}

    @torch.no_grad()
    def read(features: np.ndarray) -> np.ndarray:
        return network.head(torch.from_numpy(features).to(device)).argmax(dim=1).cpu().numpy()

    weights = weights_digest(network)
    size = "x".join(map(str, network.input_size))
    model = f"judge trained on {num_images} images, seed {seed}, {steps} steps"
    told = Network(f"semtok {library_version()}", model, f"{size}, bilinear", weights)
    measures = _MEASURES.format(steps=steps, batch=_BATCH_SIZE, seed=seed)
    seen_by = FeatureNetwork(TRAINED, weights, torch.no_grad()(see), told)
    return Judge(seen_by, read, measures, num_images)


def _fresh(train: ImageSource, seed: int) -> JudgeNetwork:
    """With its first weights; no random number of anybody else is drawn."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        network = JudgeNetwork(train.num_classes, train.image_size)
    return network.to(memory_format=torch.channels_last)


def _key(train: ImageSource, num_images: int, seed: int, steps: int) -> str:
    size = f"{train.image_size[0]}x{train.image_size[1]}"
    number = f"{num_images} of {len(train)} at {size}"
    number += " and their mirror images" if train.flip else ""
    words = (train.identity, train.labels_state, number, *train.class_names)
    return digest(_FORMAT, str(seed), str(steps), *words, size=12)


def _kept(network: JudgeNetwork, file: Path) -> JudgeNetwork:
    """The network with the weights that a cache's file holds."""
    load_weights(network, file)
    return network


@torch.enable_grad()  # also where its caller scores without gradients
def _train(
    network: JudgeNetwork, train: ImageSource, num_images: int, *, seed: int, steps: int
) -> None:
    device = next(network.parameters()).device
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY
    )
    config = TrainConfig(
        steps=steps,
        batch_size=_BATCH_SIZE,
        optimiser=OptimiserConfig(learning_rate=_LEARNING_RATE),
        schedule="cosine",
        warmup_steps=max(1, round(_WARMUP_SHARE * steps)),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, config.learning_rate_factor)
    network.train()
    with progress("training the judge", steps, "steps") as advance:
        for batch in _batches(train, num_images, seed, steps):
            logits = network(to_pixels(batch.images, device=device))
            loss = F.cross_entropy(logits, batch.labels.to(device), label_smoothing=_SMOOTHING)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            advance(1)


def _batches(train: ImageSource, num_images: int, seed: int, steps: int) -> Iterator[ImageBatch]:
    """Epochs of the chosen images in random order, mirrored where training may, cropped at the centre."""
    is_whole = num_images == len(train)
    chosen = None if is_whole else train.chosen(num_images)
    blocks = train.block_size if is_whole else None
    order = DataOrder(num_images, _BATCH_SIZE, seed, train.flip, blocks)

    def keys() -> Iterator[list[Key]]:
        for step in range(steps):
            batch = order.keys(step)
            yield batch if chosen is None else [Key(chosen[k.index], k.mirrored) for k in batch]

    return load_batches(
        train,
        keys(),
        num_workers=0 if train.is_cheap else train.num_workers,
        pin_memory=torch.cuda.is_available(),
    )
