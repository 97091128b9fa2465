"""What a rehearsal reads instead of what it would fetch: drawn images, random weights."""

from pathlib import Path

import torch
from PIL import Image, ImageDraw

from semtok.errors import UserError
from semtok.methods.vae import PRESETS, build_autoencoder
from semtok.references import is_hub_id

IMAGES = Path("images")
_CLASSES, _TRAIN, _HELD_OUT = 3, 4, 2


def draw_images(folder: Path) -> None:
    """Writes ``train/`` and ``val/``, each with a folder of JPEG files for each of a few classes: a shape on a
    gradient, sides of 256 to 400 pixels. The same each time."""
    generator = torch.Generator().manual_seed(0)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    for split, num in (("train", _TRAIN), ("val", _HELD_OUT)):
        for label in range(_CLASSES):
            place = folder / split / f"class_{label}"
            place.mkdir(parents=True, exist_ok=True)
            for i in range(num):
                width, height = whole(256, 400), whole(256, 400)
                image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
                x, y = whole(0, width // 2), whole(0, height // 2)
                box = (x, y, x + width // 2, y + height // 2)
                pencil = ImageDraw.Draw(image)
                draw = (pencil.ellipse, pencil.rectangle, pencil.rounded_rectangle)[label]
                draw(box, fill=(whole(0, 255), whole(0, 255), whole(0, 255)))
                image.save(place / f"{i}.jpg", quality=90)


def autoencoder_preset(reference: str) -> str:
    """Which image autoencoder a reference to fetched weights means.

    The preset that the reference names (``f16d32`` of ``data/va-vae-f16d32``); else Stable Diffusion's for a Hub
    id, where it is published for diffusers, and f16d32 for a folder, into which ``hub import`` has put weights that
    are not (VA-VAE, LDM).
    """
    named = [name for name in PRESETS if name in reference]
    return named[0] if named else "f8d4" if is_hub_id(reference) else "f16d32"


def lay_autoencoder(reference: str) -> None:
    """Puts a randomly initialised autoencoder for diffusers into the folder that the reference names, below the
    current one; there it goes before the Hub. What is there already stays.

    Raises:
        UserError: the reference leads elsewhere.
    """
    folder = Path(reference)
    if not folder.resolve().is_relative_to(Path.cwd()):
        raise UserError(
            f"'{reference}': random weights can't be put there, outside of the rehearsal's folder; "
            "name weights by a relative path or a Hub id"
        )
    if folder.exists():
        return
    torch.manual_seed(0)
    build_autoencoder(PRESETS[autoencoder_preset(reference)]).save_pretrained(folder)
