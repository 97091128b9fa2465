"""What a comparison asks of the recipes of tokenizers: what they are built on, and whether they bring a teacher."""

from typing import Literal

from semtok.methods.autoencoder import PRESETS
from semtok.methods.teacher_tokenizer import TeacherTokenizer
from semtok.references import find_recipe
from semtok.registry import get_method
from semtok.settings import read_yaml
from semtok.tokenizer import Tokenizer

TEXTURE = "vae"
"""The recipe of the VAE that others are built on, so that rows differ in one thing."""

BaseSetting = Literal["method.texture", "method.vae", "method.tokenizer.vae"]


def base_setting(reference: str) -> BaseSetting | None:
    """The setting by which a recipe of that name takes another tokenizer: to build on it, or its weights to start from.
    None: it takes none, or there is no such recipe."""
    path = find_recipe(reference)
    if path is None:
        return None
    method = read_yaml(path)["method"]
    if "texture" in method:
        return "method.texture"
    sections: dict[BaseSetting, object] = {
        "method.vae": method.get("vae"),
        "method.tokenizer.vae": method.get("tokenizer", {}).get("vae"),
    }
    starts = [key for key, vae in sections.items() if isinstance(vae, str) and vae not in PRESETS]
    return starts[0] if starts else None


def is_composite(reference: str) -> bool:
    """Whether a recipe of that name builds its tokenizer on another one."""
    return base_setting(reference) == "method.texture"


def has_teacher(reference: str) -> bool:
    """Whether a tokenizer brings a teacher of its own to the transformer's training: one that it encodes by."""
    path = find_recipe(reference)
    if path is not None:
        method = get_method(read_yaml(path)["method"]["name"], place=str(path))
        return issubclass(method.tokenizer, TeacherTokenizer)
    return Tokenizer.from_pretrained(reference).teacher_config is not None
