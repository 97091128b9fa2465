"""Stored images as the evaluation of tokenizers by LightningDiT reads them."""

from collections.abc import Sequence

import numpy as np
import torch
import torchvision.transforms.functional as transforms
from einops import rearrange
from torch import Tensor

from semtok.data.images.decoding import Unreadable, read_image, whole_image
from semtok.data.images.encoded import StoredImages
from semtok.data.source import ImageBatch, ImageSource
from semtok.errors import UserError


class ResizedImages(ImageSource):
    """The images of a source, each resized as a tensor of floats and cropped at its centre, none mirrored.

    The shorter side becomes the size, bilinearly and, as torchvision does with tensors since its version 0.17,
    antialiased; nothing is rounded to 8 bits. (LightningDiT's ``evaluate_tokenizer``: ToTensor, Resize,
    CenterCrop.)

    Args:
        source: whose order and labels these are; of square images.

    Raises:
        UserError: images that are not stored, or not square.
    """

    flip = False

    def __init__(self, source: ImageSource) -> None:
        if not isinstance(source, StoredImages):
            raise UserError(
                f"{source.name} are drawn at their size, and have no files that could be resized; "
                "give kind=folder, tars, parquet or mds"
            )
        height, width = source.image_size
        if height != width:
            raise UserError(f"size: expected a square, got {height}x{width}")
        self.source, self.image_size = source, source.image_size
        self.class_names, self.attributes = source.class_names, source.attributes
        self.name, self.block_size = source.name, source.block_size
        self.num_workers = source.num_workers

    def __len__(self) -> int:
        return len(self.source)

    def chosen(self, num_images: int) -> list[int]:
        return self.source.chosen(num_images)

    def labels_of(self, indices: Sequence[int]) -> Tensor:
        return self.source.labels_of(indices)

    def load(self, indices: Sequence[int]) -> ImageBatch:
        """Reads images; ``images`` are pixels, float32 (B, 3, H, W) in [-1, 1].

        Raises:
            UserError: one of them can't be read: no other may stand for it.
        """
        pixels = []
        for index, content in zip(indices, self.source.contents(indices), strict=True):
            image = read_image(content, self._resized)
            if isinstance(image, Unreadable):
                raise UserError(
                    f"{self.source.image_name(index)}: can't be read as an image ({image.reason}); remove it"
                )
            pixels.append(image)
        return ImageBatch(torch.stack(pixels), self.labels_of(indices))

    def _resized(self, content: bytes) -> Tensor:
        image = np.array(whole_image(content))
        pixels = rearrange(torch.from_numpy(image), "h w c -> c h w").float() / 255
        side = self.image_size[0]
        resized = transforms.resize(
            pixels, [side], interpolation=transforms.InterpolationMode.BILINEAR, antialias=True
        )
        return transforms.center_crop(resized, [side, side]) * 2 - 1
