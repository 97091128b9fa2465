"""One import on its way: the file, what the user says of it, and what became of everything."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from semtok.errors import UserError
from semtok.hub.file_settings import FileSettings
from semtok.hub.formats import Checkpoint, Format, read_statistics, statistics_beside
from semtok.statistics import are_sound
from semtok.teachers import Teacher
from semtok.tokenizer import Tokenizer


@dataclass(frozen=True)
class ImportOptions:
    """What a published file does not say of itself.

    Attributes:
        weights: the averaged or the trained ones, of a file that has both.
        tokenizer: whose latents a diffusion transformer generates, or whose image latents a coder's stand
            beside; None: it is imported as a part alone.
        teacher: whose features a coder codes.
        statistics: of raw latents: a file of mean and std, or a scaling factor; of REGLUE's compressor those
            of the features. None: the statistics file beside the checkpoint, where there is one.
        heads: attention heads of a network of unpublished width.
        semantic_channels: how many of a transformer's channels are the semantic part, where neither a tokenizer
            nor the file says it; of ReDi's PCA how many components are kept.
        image_size: pixels along a side, from which a coder's grid follows, or that of DDT; None: the published 256.
        encoder_blocks: of a transformer with a head, where its tensors do not tell; None: as published.
    """

    weights: Literal["ema", "model"] = "ema"
    tokenizer: Tokenizer | None = None
    teacher: Teacher | None = None
    statistics: Path | float | None = None
    heads: int | None = None
    semantic_channels: int | None = None
    image_size: int | None = None
    encoder_blocks: int | None = None


@dataclass
class ImportJob:
    """Collects, while a file is imported, what became of its tensors, entries and settings.

    Attributes:
        trained: where the model comes from, for its export.
        notes: what the user should know, one line each.
        fates: by name, of tensors and entries.
    """

    checkpoint: Checkpoint
    format: Format
    options: ImportOptions
    trained: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.place, self.fates = str(self.checkpoint.path), self.checkpoint.beside()

    @property
    def settings(self) -> FileSettings:
        """What the file says of itself."""
        return self.checkpoint.settings

    @property
    def became(self) -> dict[str, str]:
        """What became of every tensor, entry and setting."""
        return self.fates | self.settings.became()

    def statistics(self, channels: int | None) -> tuple[Tensor, Tensor] | None:
        """Mean and standard deviation (C,) as given, or as the file beside the checkpoint says; None: neither.

        Raises:
            UserError: they are of another number of channels, or none at all.
        """
        given, path = self.options.statistics, self.checkpoint.path
        if isinstance(given, float):
            if channels is None:
                raise UserError(f"--statistics {given}: expected a file here")
            if not 1e-12 < given < 1e12:
                raise UserError(f"--statistics {given}: expected a file or a positive number")
            return torch.zeros(channels), torch.full((channels,), 1 / given)
        file = given or (statistics_beside(path, self.format) if path.is_file() else None)
        if file is None:
            return None
        if given is None:
            self.notes.append(f"statistics taken from {file}, which lies beside it")
        mean, std = read_statistics(file)
        if len(mean) != len(std) or channels not in (None, len(mean)):
            raise UserError(f"{file}: statistics of {len(mean)} channels, not of {channels}")
        return mean, std

    def refuse(self, *names: str) -> None:
        """Raises UserError where one of these options is given."""
        for name in names:
            if getattr(self.options, name) is not None:
                option = name.replace("_", "-")
                raise UserError(
                    f"{self.place}: --{option} says nothing to a checkpoint of {self.format}; leave it out"
                )


def standardise(tokenizer: Tokenizer, part: str, statistics: tuple[Tensor, Tensor]) -> None:
    """Gives a tokenizer's part the published mean and standard deviation (C,).

    Raises:
        UserError: they are of another number of channels, or none that latents have.
    """
    (mean, std), channels = statistics, tokenizer.spec[part].channels
    if len(mean) != channels:
        raise UserError(f"statistics of {len(mean)} channels for a {part} of {channels}")
    check_statistics(mean, std, f"statistics of the {part}")
    getattr(tokenizer, f"{part}_mean").copy_(mean)
    getattr(tokenizer, f"{part}_std").copy_(std)
    tokenizer.num_measured_images.fill_(1)  # by whoever published them


def check_statistics(mean: Tensor, std: Tensor, place: str) -> None:
    """Raises UserError where latents would become 0 or no numbers."""
    if not are_sound(mean, std):
        raise UserError(
            f"{place}: a mean is not finite, or a standard deviation not finite and positive; correct it there"
        )
