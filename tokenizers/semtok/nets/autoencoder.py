"""The image autoencoder: diffusers' AutoencoderKL, in the sizes that the papers use and a small one."""

from pathlib import Path

from diffusers import AutoencoderKL
from pydantic import Field, model_validator

from semtok.config import Config
from semtok.errors import UserError
from semtok.storage import DAMAGE, first_line


class Architecture(Config):
    """Shape of an AutoencoderKL. Its stride is 2 to the power of (number of blocks - 1)."""

    block_channels: tuple[int, ...]
    """Channels per resolution, finest first."""
    layers_per_block: int = Field(2, ge=1)
    latent_channels: int = Field(ge=1)
    norm_groups: int = Field(32, ge=1)
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


def build_autoencoder(architecture: Architecture) -> AutoencoderKL:
    """A randomly initialised AutoencoderKL."""
    attention = architecture.attention or (False,) * len(architecture.block_channels)
    return AutoencoderKL(
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


def load_autoencoder(reference: str) -> AutoencoderKL:
    """Loads a VAE's weights from a folder that diffusers can read, or from a Hub id.

    A folder may be a diffusers VAE, a diffusers pipeline (its ``vae`` is taken), a tokenizer that
    this library exported, or one of its run folders.

    Raises:
        UserError: nothing there that AutoencoderKL can load, or the weights are damaged.
    """
    folder = Path(reference)
    if folder.is_dir():
        candidates = [folder, folder / "vae", folder / "export" / "vae"]
        found = next(
            (c for c in candidates if list(c.glob("diffusion_pytorch_model*.safetensors"))), None
        )
        if found is None:
            raise UserError(
                f"{folder}: holds no diffusers VAE (config.json with diffusion_pytorch_model.safetensors)"
            )
        source, subfolder = str(found), None
    elif reference.count("/") == 1 and not reference.startswith((".", "/")):
        source, subfolder = reference, None
    else:
        raise UserError(
            f"'{reference}' is neither a preset ({', '.join(PRESETS)}), a folder with a VAE, nor a Hub id (org/name)"
        )
    try:
        autoencoder, report = AutoencoderKL.from_pretrained(
            source, subfolder=subfolder, use_safetensors=True, output_loading_info=True
        )
    except DAMAGE as error:
        raise UserError(f"VAE '{reference}' can't be loaded: {first_line(error)}") from None
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise UserError(
            f"VAE '{reference}': its weights do not fit its config.json ({len(wrong)} tensors, such as {wrong[0]})"
        )
    return autoencoder


def autoencoder_stride(autoencoder: AutoencoderKL) -> int:
    """Image pixels per latent cell along each side."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)
