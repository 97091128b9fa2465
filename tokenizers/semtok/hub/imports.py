"""Published checkpoints as this library's own: tokenizers, generators, or a part of one alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.hub.file_settings import BOOKKEEPING, DIFFERS, UNKNOWN
from semtok.hub.formats import DITS, Checkpoint, Format, open_checkpoint, recognise
from semtok.hub.import_generator import import_generator
from semtok.hub.import_tokenizer import import_tokenizer
from semtok.hub.job import ImportJob, ImportOptions
from semtok.hub.modules import save_module
from semtok.methods.coders import FeatureCoder
from semtok.sampler.dit import DiT
from semtok.tokenizer import Tokenizer

# Formats whose tensors can be the same: what they mean only the user or the file's settings know. SiT's, ReDi's and a
# LightningDiT without its own layers run time the same way; REG's and REGLUE's channels differ in meaning.
_ALIKE: tuple[frozenset[Format], ...] = (
    frozenset({"reg", "reglue"}),
    frozenset({"sit", "redi", "lightningdit"}),
)


@dataclass(frozen=True)
class Imported:
    """An import, not yet written.

    Attributes:
        model: a whole tokenizer or generator, or a part alone.
        became: of every tensor, and of every other entry of the file, what became of it.
        notes: what the user should know, one line each.
    """

    format: Format
    model: Tokenizer | Generator | DiT | FeatureCoder
    trained: Mapping[str, Any]
    became: Mapping[str, str]
    notes: list[str] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Writes it as an export."""
        if isinstance(self.model, Tokenizer | Generator):
            self.model.save_pretrained(folder)
        else:
            save_module(self.model, folder, trained=self.trained)


def import_checkpoint(
    path: str | Path, format: Format | Literal["auto"], options: ImportOptions
) -> Imported:
    """Reads a published checkpoint; nothing in it is run.

    Args:
        path: a file, or a folder of diffusers.
        format: ``auto`` tells it from the names in the file.

    Raises:
        UserError: a file of another or of no known format, tensors that do not fit, by name, options
            that do not belong to it, or settings in it that this library has not, by name.
    """
    return import_opened(open_checkpoint(path, options.weights), format, options)


def import_opened(
    checkpoint: Checkpoint, format: Format | Literal["auto"], options: ImportOptions
) -> Imported:
    """The same of a checkpoint that is read already. Of tensors without contents, on torch's meta device, names
    and shapes are checked alone, and the model has no contents either.

    Raises:
        UserError: see ``import_checkpoint``.
    """
    format = _choose(format, checkpoint)
    trained: dict[str, Any] = {"imported_from": f"{checkpoint.path.name} ({format})"}
    job = ImportJob(checkpoint, format, options, trained)
    if checkpoint.nest is not None:
        job.notes.append(f"weights of '{checkpoint.nest}'")
    model = import_generator(job) if format in DITS else import_tokenizer(job)
    became = job.became
    for fate in (DIFFERS, UNKNOWN, BOOKKEEPING):
        names = [name for name, own in became.items() if own == fate]
        if names:
            job.notes.append(f"{fate}: {', '.join(names)}")
    return Imported(format, model, trained, became, job.notes)


def _choose(wanted: Format | Literal["auto"], checkpoint: Checkpoint) -> Format:
    possible = recognise(checkpoint)
    if wanted == "auto":
        if len(possible) > 1:
            differ = "run time in opposite directions"
            if "repa" not in possible:
                differ = "mean different things by their channels"
            raise UserError(
                f"{checkpoint.path}: can be of {' or '.join(possible)}, which {differ}; "
                "name the format instead of auto"
            )
        return possible[0]
    if wanted not in get_args(Format):
        raise UserError(f"no format '{wanted}'; formats: auto, {', '.join(get_args(Format))}")
    alike = set(possible)
    for group in _ALIKE:
        # A network with LightningDiT's own layers is no SiT.
        if group & alike and alike != {"lightningdit"}:
            alike |= group
    if wanted not in alike:
        raise UserError(
            f"{checkpoint.path}: is of {' or '.join(possible)} by its names, not {wanted}"
        )
    return wanted
