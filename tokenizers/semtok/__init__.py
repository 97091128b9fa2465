"""semtok: semantic tokenizers for image generation, and the diffusion transformers that use them."""

from semtok import methods
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.registry import register_method
from semtok.sampler.latents import Latents, LatentSpec, PartSpec
from semtok.tokenizer import Tokenizer, library_version

__all__ = [
    "Generator",
    "LatentSpec",
    "Latents",
    "PartSpec",
    "Tokenizer",
    "UserError",
    "methods",
    "register_method",
]
__version__ = library_version()
