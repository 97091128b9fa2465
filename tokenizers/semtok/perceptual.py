"""Perceptual distances between images, one value per sample."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.progress import announce
from semtok.storage import DAMAGE, as_damage, first_line
from semtok.teachers import Teacher, TeacherFeatures

_BACKBONE_FILES = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}
_LEAST_SIDE = {"vgg": 16, "squeeze": 17, "alex": 31}
"""In pixels: of smaller images a backbone's pooling layers leave nothing."""


def backbone_file(net: str) -> Path:
    """Where torchvision's cache has, or would have, the weights of one of LPIPS' backbones."""
    return Path(torch.hub.get_dir()) / "checkpoints" / _BACKBONE_FILES[net]


def check_lpips_size(net: str, image_size: tuple[int, int]) -> None:
    """Raises ValueError where images of (height, width) are too small for one of LPIPS' backbones."""
    if min(image_size) < _LEAST_SIDE[net]:
        raise ValueError(
            f"method.lpips_net: {net} needs images of at least {_LEAST_SIDE[net]} pixels a side, and there are some of "
            f"{image_size[0]}x{image_size[1]}"
        )


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018) by the ``lpips`` package, with its real weights.

    The package brings its linear weights; the ImageNet backbone comes from torchvision's cache.

    Args:
        net: ``vgg`` (528 MB; what VAEs are trained with), ``alex`` (233 MB) or ``squeeze`` (5 MB).

    Raises:
        UserError: the backbone's weights are neither cached nor to be had, or damaged.
    """

    def __init__(self, net: str = "vgg") -> None:
        super().__init__()
        import lpips  # slow to import, and only recipes with this loss need it

        file = backbone_file(net)
        if not file.is_file():
            announce(f"perceptual loss: fetching torchvision's {net} weights to {file}")
        try:
            with as_damage():
                self.lpips = lpips.LPIPS(net=net, verbose=False)
        except DAMAGE as error:
            raise UserError(
                f"method.perceptual: lpips needs {file.name}, which can't be loaded ({first_line(error)}); "
                f"put the file at {file}, or set method.perceptual=teacher or method.perceptual=none"
            ) from None
        self.lpips.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)

    def forward(self, reconstruction: Tensor, pixels: Tensor) -> Tensor:
        """Distance (B,) of two batches of pixels (B, 3, H, W) in [-1, 1]."""
        return self.lpips(reconstruction.float(), pixels.float()).flatten()


def teacher_distance(teacher: Teacher, reconstruction: Tensor, target: TeacherFeatures) -> Tensor:
    """Mean squared distance (B,) of unit-length patch tokens in the frozen teacher.

    Args:
        reconstruction: pixels (B, 3, H, W), which gradients flow to.
        target: the teacher's features of the images themselves.
    """
    # A transformer's tokens may be asked for on another grid than its own size gives; a CNN's layers have several.
    grid = tuple(target.patches[-1].shape[-2:]) if teacher.is_transformer else None
    seen = teacher.features(reconstruction, grid=grid, differentiable=True)
    distances = [
        (F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1))
        .square()
        .sum(dim=1)
        .mean(dim=(1, 2))
        for a, b in zip(seen.patches, target.patches, strict=True)
    ]
    return torch.stack(distances).mean(dim=0)
