"""semtok: semantic tokenizers for image generation, and the diffusion transformers that use them."""

from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.latents import Latents, LatentSpec, PartSpec
from semtok.registry import register_method
from semtok.tokenizer import Tokenizer

__all__ = [
    "Generator",
    "LatentSpec",
    "Latents",
    "PartSpec",
    "Tokenizer",
    "UserError",
    "register_method",
]
