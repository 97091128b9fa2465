"""A tokenizer that encodes by a frozen teacher's features: who holds the teacher, and how exports know it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from semtok.errors import UserError
from semtok.objective import Unregistered
from semtok.sampler.latents import LatentSpec
from semtok.storage import write_tensors
from semtok.teachers import Teacher, TeacherConfig
from semtok.tokenizer import Tokenizer

_TEACHER_FILE = "teacher.safetensors"
HeldTeacher = Teacher | tuple[TeacherConfig, str]
"""A teacher; or its settings and fingerprint, to load it later."""


class TeacherTokenizer(Tokenizer):
    """Decoding needs no teacher, so a loaded tokenizer reads the teacher's weights when it first encodes; they must be
    those that it was trained with.

    Args:
        teacher: by whose features it encodes.
        positions: as ``Tokenizer`` takes them.
    """

    def __init__(
        self,
        spec: LatentSpec,
        teacher: HeldTeacher,
        *,
        method: str,
        positions: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(spec, method=method, positions=positions)
        # Not a submodule: it is neither trained, nor saved with the weights, nor there before its use.
        self._teacher: Unregistered | None = None
        if not isinstance(teacher, tuple):
            self._teacher, teacher = Unregistered(teacher), (teacher.config, teacher.fingerprint())
        self.teacher_config, self.teacher_fingerprint = teacher

    @property
    def teacher(self) -> Teacher:
        """The teacher, loaded when it is first asked for.

        Raises:
            UserError: it can't be had, or its weights are not those that trained this tokenizer.
        """
        if self._teacher is None:
            with torch.random.fork_rng(
                devices=[]
            ):  # whoever asks first is to draw what others draw
                teacher = Teacher(self.teacher_config)
            if teacher.fingerprint() != self.teacher_fingerprint:
                raise UserError(
                    f"teacher '{self.teacher_config.name}': its weights here are not those that this "
                    "tokenizer was trained with; encoding would mean something else"
                )
            self._teacher = Unregistered(teacher)
        teacher, place = self._teacher.module, self.texture_mean
        # Moving nothing takes milliseconds too, and each step would.
        if (teacher.mean.device, teacher.mean.dtype) != (place.device, place.dtype):
            teacher.to(place)
        return teacher

    @property
    def loaded_teacher(self) -> Teacher | None:
        return self._teacher.module if self._teacher is not None else None

    def means_the_same(self, other: Tokenizer) -> bool:
        return (
            super().means_the_same(other)
            and isinstance(other, TeacherTokenizer)
            and self.teacher_fingerprint == other.teacher_fingerprint
        )

    # Files ------------------------------------------------------------------------------------

    def save_teacher(self, folder: Path) -> dict[str, Any]:
        """Writes a teacher that only a local file has; gives its settings and fingerprint as JSON."""
        config = self.teacher_config
        if config.checkpoint is not None:
            write_tensors(folder / _TEACHER_FILE, self.teacher.network.state_dict())
            config = config.model_copy(update={"checkpoint": _TEACHER_FILE})
        return {
            "teacher": config.model_dump(mode="json"),
            "teacher_fingerprint": self.teacher_fingerprint,
        }


def saved_teacher(config: TeacherConfig, fingerprint: str, folder: Path) -> HeldTeacher:
    """What ``save_teacher`` noted, with the weights that lie in the same folder where there are any."""
    if config.checkpoint is not None:
        config = config.model_copy(update={"checkpoint": str(folder / _TEACHER_FILE)})
    return config, fingerprint


def token_grid(image_size: tuple[int, int], stride: int) -> tuple[int, int]:
    """(rows, columns) of the patch tokens of images of (height, width)."""
    return image_size[0] // stride, image_size[1] // stride
