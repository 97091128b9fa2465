"""What a comparison asks of the recipes of tokenizers: what they are built on, and whether they bring a teacher.

A reference names an embedded recipe, a trained tokenizer, or ``RECIPE@BASE``: the recipe, built on another base.
"""

import re
from pathlib import Path, PurePosixPath
from typing import Literal

from semtok.errors import UserError
from semtok.methods.autoencoder import PRESETS
from semtok.methods.teacher_tokenizer import TeacherTokenizer
from semtok.references import find_recipe
from semtok.registry import get_method
from semtok.settings import read_yaml
from semtok.tokenizer import Tokenizer

TEXTURE = "vae"
"""The recipe of the VAE that others are built on where they name no base, so that rows differ in one thing: that of
their own folder of recipes where it has one."""

BaseSetting = Literal["method.texture", "method.vae", "method.tokenizer.vae"]


def recipe_of(reference: str) -> Path | None:
    """The embedded recipe that is trained for a reference; None: it names a trained tokenizer."""
    return find_recipe(reference.partition("@")[0])


def base_of(reference: str) -> str | None:
    """The reference of what a recipe is built on, or starts from.

    Raises:
        UserError: a base is named, and the recipe takes none.
    """
    name, at, named = reference.partition("@")
    if base_setting(reference) is None:
        if at and find_recipe(name) is not None:
            raise UserError(
                f"'{reference}': the recipe {name} is built on no other; leave '@{named}' out"
            )
        return None
    beside = str(PurePosixPath(name).with_name(TEXTURE))
    return named or (beside if find_recipe(beside) is not None else TEXTURE)


def file_name(reference: str) -> str:
    """A reference as a part of the name of a file."""
    return re.sub(r"[^\w.+-]", "_", reference)


def base_setting(reference: str) -> BaseSetting | None:
    """The setting by which a recipe takes another tokenizer: to build on it, or its weights to start from.
    None: it takes none, or there is no such recipe."""
    path = recipe_of(reference)
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
    """Whether a recipe builds its tokenizer on another one."""
    return base_setting(reference) == "method.texture"


def has_teacher(reference: str) -> bool:
    """Whether a tokenizer brings a teacher of its own to the transformer's training: one that it encodes by."""
    path = recipe_of(reference)
    if path is not None:
        method = get_method(read_yaml(path)["method"]["name"], place=str(path))
        return issubclass(method.tokenizer, TeacherTokenizer)
    return Tokenizer.from_pretrained(reference).teacher_config is not None
