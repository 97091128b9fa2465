"""Image autoencoders of diffusers: AutoencoderKL built from a few numbers, and those that people have, loaded."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.methods.texture_classes import (
    TRAINED_CLASS,
    check_sizes,
    texture_class,
    trained_class,
)
from semtok.references import DEMO, RUNS, check_hub, demo_folder, from_a_file
from semtok.settings import Config
from semtok.storage import DAMAGE, as_damage, first_line, read_json, read_weights

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

# Shapes ------------------------------------------------------------------------------------------


class Architecture(Config):
    """Shape of an AutoencoderKL. Its stride is 2 to the power of (number of blocks - 1)."""

    block_channels: tuple[int, ...]
    """Channels per resolution, finest first."""
    layers_per_block: int = Field(2, ge=1)
    """Residual layers per resolution; the decoder has one more."""
    latent_channels: int = Field(ge=1)
    """Channels of the latents."""
    norm_groups: int = Field(32, ge=1)
    """Groups of each group norm."""
    attention: tuple[bool, ...] | None = None
    """Which resolutions have self-attention, beside the middle one; None: none of them."""

    @model_validator(mode="after")
    def _consistent(self) -> "Architecture":
        channels = self.block_channels
        if not channels or any(c < 1 or c % self.norm_groups for c in channels):
            raise ValueError(
                f"block_channels {self.block_channels} must be multiples of norm_groups {self.norm_groups}"
            )
        if self.attention is not None and len(self.attention) != len(self.block_channels):
            raise ValueError("attention and block_channels must have the same length")
        return self


PRESETS: dict[str, Architecture] = {
    # For the embedded recipes: 32x32 images to 8x8x8 latents.
    "tiny": Architecture(
        block_channels=(16, 32, 64), layers_per_block=1, latent_channels=8, norm_groups=8
    ),
    # Stable Diffusion's VAE (Rombach et al. 2022): 256x256 to 32x32x4.
    "f8d4": Architecture(block_channels=(128, 256, 512, 512), latent_channels=4),
    # LightningDiT's f16d32 (Yao et al. 2025), an LDM autoencoder: ch 128, mult 1,1,2,2,4,
    # attention at the coarsest resolution: 256x256 to 16x16x32.
    "f16d32": Architecture(
        block_channels=(128, 128, 256, 256, 512),
        latent_channels=32,
        attention=(False, False, False, False, True),
    ),
}


_WEIGHTS = "diffusion_pytorch_model"
_UNFIT = "its weights do not fit its config.json"


def build_autoencoder(architecture: Architecture) -> "AutoencoderKL":
    """A randomly initialised AutoencoderKL."""
    attention = architecture.attention or (False,) * len(architecture.block_channels)
    return trained_class()(
        down_block_types=tuple(
            "AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention
        ),
        up_block_types=tuple(
            "AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)
        ),
        block_out_channels=architecture.block_channels,
        layers_per_block=architecture.layers_per_block,
        latent_channels=architecture.latent_channels,
        norm_num_groups=architecture.norm_groups,
    )


# Weights that people have ------------------------------------------------------------------------


def load_autoencoder(reference: str) -> "AutoencoderKL":
    """Loads the weights of a VAE that is trained on, from a folder that diffusers can read or from a Hub id.

    A folder may be a diffusers VAE, a diffusers pipeline (its ``vae`` is taken), a tokenizer that this library
    exported, or one of its run folders, also by the run's name; ``demo`` is the embedded VAE. Weights may be a variant
    of diffusers (``fp16``) or an older ``.bin``, of which tensors alone are read; whole safetensors go first. On the
    Hub the same files are looked for, at the top and under ``vae``.

    Raises:
        UserError: nothing there that AutoencoderKL can load, of other than three channels, or the weights are damaged
            or not finite.
    """
    folder = autoencoder_folder(reference)
    if folder is None:
        return _checked(lambda: _from_hub(reference), reference, None)
    return _from_folder(trained_class(), reference, folder)


def load_texture(place: Path) -> nn.Module:
    """Loads an autoencoder of any of ``TEXTURE_CLASSES`` from a folder, as ``load_autoencoder`` finds it there.

    Raises:
        UserError: nothing there that can be loaded, of other than three channels, weights that are damaged or not
            finite, or sizes that don't go together.
    """
    folder = _folder_with_weights(place)
    kind = check_autoencoder(read_json(folder / "config.json"), str(folder))
    autoencoder = _from_folder(kind, str(place), folder)
    if kind is not trained_class():  # whose sizes follow from its class
        check_sizes(autoencoder.eval(), str(folder))
    return autoencoder


def _from_folder(kind: type[nn.Module], reference: str, folder: Path) -> Any:
    which = _which_weights(folder)
    return _checked(lambda: _loaded(kind, str(folder), **which), reference, folder)


def _checked(load: Callable[[], tuple[Any, dict]], reference: str, folder: Path | None) -> Any:
    """What is loaded, if its weights are whole, finite and those of its config.

    Raises:
        UserError: they are not.
    """
    try:
        with as_damage():
            autoencoder, report = load()
    except DAMAGE as error:
        _check_weights_files(folder)
        unfit = re.search(r"because (\S+) expected shape", first_line(error))
        if unfit:
            raise UserError(f"VAE '{reference}': {_UNFIT} (such as {unfit[1]})") from None
        raise UserError(f"VAE '{reference}' can't be loaded: {first_line(error)}") from None
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        _check_weights_files(folder)
        raise UserError(f"VAE '{reference}': {_UNFIT} ({len(wrong)} tensors, such as {wrong[0]})")
    _check_finite(autoencoder, str(folder or reference))
    return autoencoder


def _check_weights_files(folder: Path | None) -> None:
    """Raises UserError where one of a folder's weights files is damaged or holds other things than weights."""
    if folder is None:
        return
    use = _which_weights(folder)
    suffix, variant = ("bin", "safetensors")[use["use_safetensors"]], use.get("variant")
    for file in sorted(folder.glob(f"{_WEIGHTS}*.{suffix}")):
        if variant is not None and variant not in file.name:
            continue
        content = read_weights(file)
        if not isinstance(content, dict) or not all(
            isinstance(v, Tensor) for v in content.values()
        ):
            keys = (
                ", ".join(map(str, list(content)[:3])) if isinstance(content, dict) else "no names"
            )
            raise UserError(
                f"{file}: is no plain weights file, it holds {keys}; save its tensors alone there, or, of weights in "
                "CompVis' layout, let semtok hub import auto FILE --output DIR make a folder"
            )


def _check_finite(autoencoder: nn.Module, place: str) -> None:
    """Raises UserError where weights are NaN or infinite."""
    for name, tensor in autoencoder.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{place}: its weights are not finite (NaN or infinite in {name}); fetch or train it again"
            )


def _loaded(kind: type[Any], place: str, **files: Any) -> tuple[Any, dict[str, list[str]]]:
    with quiet_diffusers():
        return kind.from_pretrained(place, output_loading_info=True, **files)


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Within this context diffusers prints neither bars nor errors of its own; what it raises is told in one line."""
    from diffusers.utils import logging

    level, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bar:
            logging.enable_progress_bar()


def _from_hub(reference: str) -> "tuple[AutoencoderKL, dict[str, list[str]]]":
    """As ``_loaded`` gives it.

    Raises:
        UserError: of another class, or of other channels.
        OSError: it can't be had.
    """
    kind = trained_class()
    first: OSError | None = None  # the reason that counts: the others follow from it
    for is_local in (
        True,
        False,
    ):  # the cache first: without network the client asks for half a minute
        if not is_local:
            check_hub(reference, "config.json")
        for subfolder in (None, "vae"):
            options = {"subfolder": subfolder, "local_files_only": is_local}
            try:
                with quiet_diffusers():
                    config = kind.load_config(reference, **options)
            except OSError as error:
                first = first if is_local else first or error
                continue
            _check_trained(config, reference)
            for files in ({}, {"variant": "fp16"}, {"use_safetensors": False}):
                try:
                    return _loaded(kind, reference, **options, **{"use_safetensors": True} | files)
                except OSError as error:
                    first = first if is_local else first or error
    assert first is not None
    raise first


def autoencoder_folder(reference: str) -> Path | None:
    """The folder of diffusers that a reference means; None: it is a Hub id. The name of a run and ``demo`` are folders.

    Raises:
        UserError: it is neither, or a folder with another kind of autoencoder.
    """
    folder = Path(reference)
    if not folder.exists() and (RUNS / reference).is_dir():
        folder = RUNS / reference
    elif not folder.exists() and reference == DEMO:
        folder = demo_folder()
    if folder.is_file():
        raise UserError(f"{folder}: {from_a_file(folder)}")
    if folder.is_dir():
        found = _folder_with_weights(folder)
        _check_trained(read_json(found / "config.json"), str(found))
        return found
    if reference.count("/") != 1 or reference.startswith((".", "/")):
        raise UserError(
            f"'{reference}' is neither a preset ({', '.join(PRESETS)}), a folder with a VAE, a run, {DEMO}, "
            "nor a Hub id (org/name); of a published file, semtok hub import makes such a folder"
        )
    return None


def _folder_with_weights(folder: Path) -> Path:
    """The folder of diffusers that a folder is or holds.

    Raises:
        UserError: there is none.
    """
    candidates = [folder, folder / "vae", folder / "export" / "vae"]
    found = next((c for c in candidates if any(c.glob(f"{_WEIGHTS}*"))), None)
    if found is None:
        raise UserError(
            f"{folder}: {_other_kind(folder)}holds no diffusers VAE (config.json with {_WEIGHTS}.safetensors); pass a "
            f"folder, a run or a Hub id with one, or {DEMO}"
        )
    return found


def _other_kind(folder: Path) -> str:
    """What a folder without a VAE is, where it is of this library, for messages."""
    for place in (folder / "export" / "config.json", folder / "config.json"):
        content = read_json(place) if place.is_file() else None
        if isinstance(content, dict) and content.get("library") == "semtok":
            return (
                f"is a {content.get('kind', 'tokenizer')} of the method '{content.get('method')}', "
            )
    return ""


def _check_trained(config: Any, place: str) -> None:
    """Raises UserError where a diffusers config is of no autoencoder that can be trained."""
    kind = check_autoencoder(config, place)
    if kind is not trained_class():
        raise UserError(
            f"{place}: is of diffusers' {kind.__name__}, and only {TRAINED_CLASS} can be trained; as it is, "
            "method.texture and --tokenizer take it"
        )


def check_autoencoder(config: Any, place: str) -> type[nn.Module]:
    """The class of a diffusers config, if it can be a texture.

    Args:
        place: starts messages.

    Raises:
        UserError: it is of another class, or of images of other than three channels.
    """
    if not isinstance(config, dict):
        raise UserError(f"{place}: its config.json holds no settings by name, so it is of no VAE")
    kind = texture_class(config, place)
    check_channels(config.get("in_channels", 3), config.get("out_channels", 3), place)
    return kind


def check_channels(taken: int, given: int, place: str) -> None:
    """Raises UserError where an autoencoder takes or gives images of other than three channels."""
    if (taken, given) != (3, 3):
        raise UserError(
            f"{place}: takes images of {taken!r} channels and gives {given!r}; only autoencoders of RGB images, 3 and "
            "3, can be used"
        )


def _which_weights(folder: Path) -> dict[str, Any]:
    """Which of a folder's weights are loaded, as arguments of diffusers: of several variants the first by name."""
    for suffix in ("safetensors", "bin"):
        use = {"use_safetensors": suffix == "safetensors"}
        # Weights in several files have an index, which lists them.
        if any((folder / f"{_WEIGHTS}.{suffix}{end}").is_file() for end in ("", ".index.json")):
            return use
        whole = rf"{_WEIGHTS}\.(?P<variant>[^.]+)\.{suffix}"
        listed = rf"{_WEIGHTS}\.{suffix}\.index\.(?P<variant>[^.]+)\.json"
        for file in sorted(folder.iterdir()):
            named = re.fullmatch(f"{whole}", file.name) or re.fullmatch(listed, file.name)
            if named and not re.search(r"-\d+-of-\d+$", named["variant"]):
                return use | {"variant": named["variant"]}
    return {"use_safetensors": True}
