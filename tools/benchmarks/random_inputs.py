"""Random images and weights: what a step costs does not depend on their values, and nothing is fetched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor

from semtok.data.source import ImageBatch, ImageSource
from semtok.perceptual import backbone_file
from semtok.recipe import TokenizerRecipe
from semtok.registry import MethodConfig
from semtok.storage import write_tensors
from semtok.teachers import TeacherConfig, name_in_timm

POOL = 64
"""Different images; more would only take memory."""
_BACKBONES = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


class RandomSource(ImageSource):
    """A thousand classes in turn; nothing is read."""

    class_names = tuple(map(str, range(1000)))
    flip = False

    def __init__(self, image_size: tuple[int, int], num_images: int = 1_000_000) -> None:
        self.attributes, self.image_size, self.num_images = {}, image_size, num_images

    def __len__(self) -> int:
        return self.num_images

    def labels(self, indices: Sequence[int]) -> Tensor:
        """int64 (B,)."""
        return torch.tensor(indices) % len(self.class_names)


class RandomImages(RandomSource):
    """Noise in the size that a recipe asks for, as uint8, as every source gives it."""

    name = "random images"

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__(image_size)
        generator = torch.Generator().manual_seed(0)
        shape = (POOL, 3, *image_size)
        self._images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        return ImageBatch(self._images[torch.tensor(indices) % POOL], self.labels(indices))


def random_teacher(config: TeacherConfig, folder: Path) -> TeacherConfig:
    """The same teacher with random weights, which are written to the folder; the embedded one is at hand anyway.

    Raises:
        UserError: timm knows no such network.
    """
    if config.name == "demo" or config.checkpoint is not None:
        return config
    folder.mkdir(exist_ok=True, parents=True)
    weights = folder / f"{config.name}.safetensors"
    if not weights.is_file():
        network = timm.create_model(name_in_timm(config.name), pretrained=False, num_classes=0)
        write_tensors(weights, network.state_dict())
    return config.model_copy(update={"checkpoint": str(weights)})


def vae_of(method: MethodConfig) -> tuple[str, MethodConfig]:
    """Where the settings of a method's image autoencoder stand in a recipe, and those: a joint training holds them."""
    inner = getattr(method, "tokenizer", None)
    return ("method", method) if inner is None else ("method.tokenizer", inner)


@contextmanager
def random_weights(
    recipe: TokenizerRecipe[Any, Any], folder: Path
) -> Iterator[TokenizerRecipe[Any, Any]]:
    """Within this context the recipe's networks are built without fetching weights.

    Args:
        folder: for the random ones.
    """
    teacher = recipe.teacher and random_teacher(recipe.teacher, folder)
    method, (place, vae) = recipe.method, vae_of(recipe.method)
    adversarial = getattr(vae, "adversarial", None)
    if adversarial is not None and adversarial.features is not None:
        features = random_teacher(adversarial.features, folder)
        adversarial = adversarial.model_copy(update={"features": features})
        vae = vae.model_copy(update={"adversarial": adversarial})
        method = vae if place == "method" else method.model_copy(update={"tokenizer": vae})
    hub = torch.hub.get_dir()
    if getattr(vae, "perceptual", None) == "lpips":
        torch.hub.set_dir(str(folder / "hub"))
        net = vae.lpips_net
        file = backbone_file(net)
        file.parent.mkdir(parents=True, exist_ok=True)
        backbone = getattr(torchvision.models, _BACKBONES[net])(weights=None)
        torch.save(backbone.state_dict(), file)
    try:
        yield recipe.model_copy(update={"teacher": teacher, "method": method})
    finally:
        torch.hub.set_dir(hub)
