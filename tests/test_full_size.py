"""Every network of every recipe at the papers' settings, at full size: as many parameters as published code makes.

On the meta device, which keeps no weights.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from semtok.diffusion.diffusion_config import build_network, resolve_defaults
from semtok.methods.adversarial import PatchDiscriminator
from semtok.methods.reglue import Compressor, CompressorShape
from semtok.methods.semvae import SemVAE, SemVAEShape
from semtok.methods.send_vae import Mapper
from semtok.methods.vae import PRESETS, build_autoencoder
from semtok.recipe import (
    PUBLISHED,
    DiffusionRecipe,
    TokenizerRecipe,
    embedded_recipes,
    load_diffusion_recipe,
    load_recipe,
)
from semtok.sampler.architecture import architecture
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.sampler.vit_decoder import ViTDecoder
from semtok.settings import read_yaml
from semtok.teachers import silu_mlp
from semtok.tokenizer import DiffusionDefaults

TEACHER_WIDTH = 768  # of DINOv2-B, which all of them use
IMPORTED = {
    "stabilityai/sd-vae-ft-ema": "f8d4",
    "runs/imagenet256/va_vae": "f16d32",
    "runs/imagenet256/ldm_f16d32": "f16d32",
    "runs/imagenet256/invae": "f16d32",
    "runs/imagenet256/kl_f8": "f8d4",
}
"""Shapes of autoencoders that are not trained here."""
RAE = {"runs/imagenet256/rae": LatentSpec((PartSpec("texture", 768, 16),))}
"""Latents of a frozen encoder."""

GENERATORS = {
    "sit_b2": 130_303_504,
    "sit_xl2": 674_816_272,
    "sit_xl2_repa": 674_816_272,
    "sit_xl2_reg": 676_589_968,
    "sit_b2_reglue": 131_584_592,
    "sit_xl2_reglue": 676_737_488,
    "sit_b2_redi": 130_352_688,
    "sit_xl1_send_vae": 674_853_152,
    # SiT-B/2's, with 32 instead of 16 numbers a token that go in and out.
    "sit_b1_send_vae": 130_303_504 + 2 * 16 * 768 + 16,
    "lightningdit_xl1": 674_961_824,
    "lightningdit_b1_sfd": 130_090_800,
    "lightningdit_b1_sfd_guide": 130_090_800,
    "lightningdit_xl1_sfd": 674_339_184,
    "lightningdit_1p0b1_sfd": 1_027_880_496,
    # The published 140.24 million with REPA's projector, without the table of positions.
    "srdit_b1": 132_692_779,
    "srdit_b1_send_vae": 131_510_827,
    "srdit_b1_reglue": 132_766_555,
    "srdit_b1_semvae": 131_535_419,
    # The published 675 million.
    "ddt_xl2": 674_646_352,
    "rae_ditdh_xl": 838_675_796,
}
"""Trained parameters without REPA's projector."""
PROJECTORS = {768: 7_344_896, 1152: 8_131_328, 1536: 8_917_760}
"""Parameters of REPA's projector by the transformer's width."""
TOKENIZERS = {
    "vae_f16d32": {"autoencoder": 69_836_067, "discriminator": 2_765_633},
    "vae_f8d4": {"autoencoder": 83_653_863, "discriminator": 2_765_633},
    "send_vae": {"autoencoder": 69_836_067, "discriminator": 2_765_633, "mapper": 14_458_112},
    "va_vae_f16d32": {"autoencoder": 69_836_067, "discriminator": 2_765_633},
    "eq_vae": {"autoencoder": 83_653_863, "discriminator": 2_765_633},
    "rae": {"decoder": 415_352_704},
    "raev2": {"decoder": 415_647_616},
    "reglue": {"coder": 16_595_472},
    "semvae": {"coder": 57_924_896},
    # SiT-XL/1's, with its table of positions, and REPA's projector.
    "repae": {
        "autoencoder": 69_836_067,
        "discriminator": 2_765_633,
        "network": 674_853_152 + 256 * 1152,
        "projector": 8_131_328,
    },
    "reg": {},
    "reg_invae": {},
    "redi": {},
}


def recipe_of(name: str) -> TokenizerRecipe | DiffusionRecipe:
    path = embedded_recipes()[f"{PUBLISHED}/{name}"]
    return (load_recipe if "method" in read_yaml(path) else load_diffusion_recipe)(path, [])


def spec_of(tokenizer: str) -> LatentSpec:
    """Parts of the latents of a tokenizer that a recipe names."""
    if tokenizer in RAE:
        return RAE[tokenizer]
    if tokenizer in IMPORTED:
        shape = PRESETS[IMPORTED[tokenizer]]
        stride = 2 ** (len(shape.block_channels) - 1)
        return LatentSpec((PartSpec("texture", shape.latent_channels, stride),))
    method = recipe_of(tokenizer.rpartition("/")[2]).method
    if method.name == "send_vae":
        return spec_of(method.vae)
    parts = list(spec_of(method.texture).parts)
    inner = getattr(method, "compressor", method)
    if inner is not None:
        parts.append(PartSpec("semantic", inner.channels, 16))
    if method.global_token:
        parts.append(PartSpec("global", TEACHER_WIDTH, None))
    return LatentSpec(tuple(parts))


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_tables_have_every_recipe():
    names = [name for name in embedded_recipes() if name.startswith(f"{PUBLISHED}/")]
    assert sorted(f"{PUBLISHED}/{name}" for name in GENERATORS | TOKENIZERS) == sorted(names)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_has_as_many_parameters_as_published(name):
    recipe, repa = recipe_of(name), recipe_of(name).diffusion.repa
    spec = spec_of(recipe.tokenizer)
    tokenizer = SimpleNamespace(spec=spec, diffusion_defaults=DiffusionDefaults())
    diffusion, width = resolve_defaults(recipe.diffusion, tokenizer), width_of(recipe)
    with torch.device("meta"):
        assert size(build_network(diffusion, spec, num_classes=1000)) == GENERATORS[name]
        if repa:
            projector = silu_mlp(width, repa.projector_width_for(width), TEACHER_WIDTH)
            assert size(projector) == PROJECTORS[width]


def width_of(recipe: DiffusionRecipe) -> int:
    return architecture(recipe.diffusion.network).width


def networks_of(recipe: TokenizerRecipe) -> dict[str, nn.Module]:
    """What a tokenizer's recipe trains."""
    method, found = recipe.method, {}
    if method.name in ("vae", "send_vae", "va_vae", "repae"):
        own = method.tokenizer if method.name == "repae" else method
        preset = IMPORTED.get(own.vae, own.vae)
        found["autoencoder"] = build_autoencoder(PRESETS[preset])
        made = own.adversarial.model_dump(include={"width", "num_layers", "norm"})
        found["discriminator"] = PatchDiscriminator(**made)
    if method.name == "rae":
        channels = {"b": 768, "l": 1024}[recipe.teacher.name.removeprefix("vit_")[0]]
        found["decoder"] = ViTDecoder(method.decoder, channels=channels, grid=(16, 16))
    if method.name == "send_vae":
        channels = PRESETS[preset].latent_channels
        found["mapper"] = Mapper(method.mapper, channels=channels, teacher_width=TEACHER_WIDTH)
    if method.name == "repae":
        leads = {"leads": {"texture": 0.0}}
        diffusion = method.diffusion.model_copy(update=leads)
        found["network"] = build_network(diffusion, spec_of(own.vae), num_classes=1000)
        width = architecture(diffusion.network).width
        hidden = diffusion.repa.projector_width_for(width)
        found["projector"] = silu_mlp(width, hidden, TEACHER_WIDTH)
    if method.name == "reglue" and method.compressor is not None:
        features = TEACHER_WIDTH * len(recipe.teacher.layers)
        shape = CompressorShape(feature_channels=features, **dict(method.compressor))
        found["coder"] = Compressor(shape)
    if method.name == "semvae":
        shape = method.model_dump(include={"channels", "width", "heads", "blocks"})
        found["coder"] = SemVAE(SemVAEShape(feature_channels=TEACHER_WIDTH, **shape))
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_has_as_many_parameters_as_published(name):
    with torch.device("meta"):
        networks = networks_of(recipe_of(name))
    assert {part: size(network) for part, network in networks.items()} == TOKENIZERS[name]
