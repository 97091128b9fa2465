"""The image autoencoder's presets, without allocating them."""

import pytest
import torch

from semtok import UserError
from semtok.methods.texture_classes import autoencoder_stride
from semtok.methods.vae import PRESETS, build_autoencoder, load_autoencoder


@pytest.mark.parametrize(
    ("name", "stride", "channels"), [("tiny", 4, 8), ("f8d4", 8, 4), ("f16d32", 16, 32)]
)
def test_a_preset_has_the_stride_and_channels_of_its_name(name, stride, channels):
    with torch.device("meta"):
        autoencoder = build_autoencoder(PRESETS[name])
        posterior = autoencoder.encode(torch.empty(1, 3, 256, 256)).latent_dist
        decoded = autoencoder.decode(posterior.mean).sample
    assert autoencoder_stride(autoencoder) == stride
    assert posterior.mean.shape == (1, channels, 256 // stride, 256 // stride)
    assert decoded.shape == (1, 3, 256, 256)


def test_f8d4_has_as_many_parameters_as_stable_diffusions_vae():
    with torch.device("meta"):
        autoencoder = build_autoencoder(PRESETS["f8d4"])
    assert sum(p.numel() for p in autoencoder.parameters()) == 83_653_863


def test_f16d32_attends_at_its_coarsest_resolution_and_in_the_middle_only():
    with torch.device("meta"):
        autoencoder = build_autoencoder(PRESETS["f16d32"])
    names = {n for n, m in autoencoder.named_modules() if type(m).__name__ == "Attention"}
    down = {f"encoder.down_blocks.4.attentions.{i}" for i in range(2)}
    up = {f"decoder.up_blocks.0.attentions.{i}" for i in range(3)}
    middle = {f"{side}.mid_block.attentions.0" for side in ("encoder", "decoder")}
    assert names == down | up | middle
    assert autoencoder.config.block_out_channels == (128, 128, 256, 256, 512)


def test_a_folder_without_a_vae_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no diffusers VAE"):
        load_autoencoder(str(tmp_path))
