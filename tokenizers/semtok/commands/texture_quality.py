"""What the texture part of a composite does to the training images, measured before anything is trained on it.

Only the texture part is decoded to images: where it shows them badly, so will whatever is generated, and no loss tells.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from semtok.data.passes import read_images
from semtok.data.source import DataConfig, ImageSource, Key
from semtok.errors import UserError
from semtok.images import to_pixels
from semtok.metrics import psnr
from semtok.processes import gather, process_index, together
from semtok.recipe import TokenizerRecipe
from semtok.references import RUNS
from semtok.settings import Config, parse
from semtok.storage import read_json, write_json
from semtok.tokenizer import Tokenizer

NUM_IMAGES = 64
"""Training images that are looked at; fewer where ``train.num_statistics_images`` is less."""
_FILE = "texture_quality.json"
_ALIKE = 3.0
"""dB: so much less than where a texture was trained, and images are of another kind."""


@dataclass(frozen=True)
class TextureQuality:
    """How well a texture part shows images.

    Attributes:
        psnr: of reconstructions by the posterior's mean, in dB, a mean over images.
        num_images: so many of the training images, unmirrored and cropped at the centre.
        psnr_where_trained: held out of what it was trained on, as its export says; None: it does not.
    """

    psnr: float
    num_images: int
    psnr_where_trained: float | None = None


class _Recorded(Config):
    psnr: float = Field(ge=0)
    num_images: int = Field(ge=1)
    psnr_where_trained: float | None = None


def texture_quality(
    recipe: TokenizerRecipe[Any, Any],
    texture: Tokenizer,
    source: ImageSource,
    folder: Path,
    device: torch.device,
    *,
    resumes: bool,
) -> TextureQuality | None:
    """Measures the texture part on the run's images at their size, in all processes together, and prints what it found.
    A resumed run reads what it found at its start, and refuses nothing.

    Args:
        source: training images.
        folder: the run's.

    Returns:
        None where ``method.min_texture_psnr`` is null.

    Raises:
        UserError: it is less than ``method.min_texture_psnr``.
    """
    least = recipe.method.least_texture_psnr()
    if least is None:
        return None
    if resumes and (folder / _FILE).is_file():
        content = read_json(folder / _FILE)
        return TextureQuality(**parse(_Recorded, content, str(folder / _FILE)).model_dump())
    num_images = min(NUM_IMAGES, recipe.train.num_statistics_images)
    quality = _measured(texture, source, num_images, recipe.train.batch_size, device)
    reference, told = recipe.method.texture_reference(), texture.training_info.get("data")
    where = (
        f"; {quality.psnr_where_trained:.2f} dB where it was trained, {told}"
        if quality.psnr_where_trained is not None
        else ""
    )
    height, width = source.image_size
    found = (
        f"'{reference}' shows {quality.num_images} of the training images at {height}x{width} with a PSNR of "
        f"{quality.psnr:.2f} dB{where}"
    )
    if quality.psnr < least and not resumes:
        raise UserError(f"method.texture: {found}. {_refusal(quality, least, recipe.data)}")
    if not process_index():
        print(f"texture {found}", flush=True)
    return quality


def record(quality: TextureQuality | None, folder: Path) -> None:
    """Keeps what was found at a run's start, for when it is resumed."""
    if quality is not None and not (folder / _FILE).is_file():
        write_json(folder / _FILE, asdict(quality))


@torch.no_grad()
def _measured(
    texture: Tokenizer, source: ImageSource, num_images: int, batch_size: int, device: torch.device
) -> TextureQuality:
    texture = texture.to(device).eval()
    keys = [Key(index) for index in source.chosen(num_images)]
    found: dict[int, float] = {}
    with together():
        for places, batch in read_images(
            source,
            keys,
            batch_size=min(32, batch_size),
            what="measuring the texture part",
        ):
            pixels = to_pixels(batch.images.to(device))
            raw = texture.posterior_raw(pixels).mean
            values = psnr(texture.decode_raw(raw).clamp(-1, 1), pixels).tolist()
            found |= dict(zip(places, values, strict=True))
    values = [value for part in gather(found) for value in part.values()]
    where_trained = texture.training_info.get("metrics", {}).get("psnr")
    return TextureQuality(sum(sorted(values)) / len(values), len(values), where_trained)


def _refusal(quality: TextureQuality, least: float, data: DataConfig) -> str:
    """What so low a PSNR means, and what to do."""
    where_trained = quality.psnr_where_trained
    less = f"Less than method.min_texture_psnr={least:g} means that"
    others = "name a pretrained one, or pass a smaller method.min_texture_psnr"
    if where_trained is not None and where_trained < quality.psnr + _ALIKE:
        own = "and it shows its own images no better; train it longer"
        return f"{less} nothing generated would look good, {own}, {others}"
    return f"{less} it was made for other images, and nothing generated would look better; {_way_out(data)}, {others}"


def _way_out(data: DataConfig) -> str:
    """How to get a texture of these images, in one command or in two."""
    words = [f"data.kind={data.kind}"]
    path = getattr(data, "path", None)
    if isinstance(path, str) and "://" not in path:
        words.append(f"data.path={path}")
    size = list(data.size) if isinstance(data.size, tuple) else data.size
    words.append(f"data.size={size}")
    parts = {name: getattr(data, name, None) for name in ("validation", "num_images")}
    words += [f"data.{name}={part}" for name, part in parts.items() if part is not None]
    two = (
        f"train one on these first, python tools/train_tokenizer.py recipes/vae.yaml {' '.join(words)} --output "
        f"{RUNS}/my_vae, then method.texture={RUNS}/my_vae"
    )
    if (RUNS / "vae").exists():
        return two
    return (
        f"pass method.texture=vae, which trains recipes/vae.yaml on these images first (or {two})"
    )
