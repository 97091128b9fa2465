"""What a tokenizer reference means: a folder, a finished run, a Hub id, or an embedded recipe."""

import re
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from semtok.errors import UserError, did_you_mean

_HUB_SECONDS = 10
RUNS = Path("runs")
DEMO = "demo"
"""Name of the embedded VAE, which every installation has."""


def locate_export(
    reference: str,
    kind: Literal["tokenizer", "model"],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Finds the exported folder that a reference names.

    The order: a folder (an export, a run that holds one, or one around a diffusers VAE), ``runs/<name>``,
    ``demo`` for the embedded VAE, a Hub id.

    Args:
        kind: what is looked for, for messages.

    Raises:
        UserError: none of these; where an embedded recipe has that name, the message says how to train it.
    """
    exports = ["", "export"]
    if kind == "model":  # of a joint training
        exports.insert(1, generator_beside(Path("export")).name)
    for folder in (Path(reference), RUNS / reference):
        for candidate in (folder / name for name in exports):
            if (candidate / "config.json").is_file():
                return candidate
        if (folder / "model_index.json").is_file():
            way_on = "give the model that it was exported from"
            if kind == "tokenizer" and any((folder / "vae").glob("*.py")):  # code of a decoder
                way_on = "it has a decoder alone; give the tokenizer of the model that it was exported from"
            elif kind == "tokenizer":
                way_on = f"its image autoencoder is {folder / 'vae'}"
            raise UserError(f"{folder}: is a diffusers pipeline; {way_on}")
        if (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder}: this run has no export yet; let it finish with --resume")
        if kind == "tokenizer" and (folder / "vae" / "config.json").is_file():
            return folder / "vae"
    if Path(reference).is_file():
        raise UserError(f"{kind} '{reference}': {from_a_file(reference)}")
    if Path(reference).is_dir():
        raise UserError(f"{reference}: no {kind} there (no config.json)")
    if reference == DEMO and kind == "tokenizer":
        return demo_folder()
    recipe = find_recipe(reference) if kind == "tokenizer" else None
    if recipe is not None:
        raise UserError(
            f"tokenizer '{reference}' is not trained yet; "
            f"train it by: semtok train_tokenizer {reference}"
        )
    if is_hub_id(reference):
        return _from_hub(reference, kind, revision=revision, local_files_only=local_files_only)
    known = [*finished_runs(), *(recipe_names() if kind == "tokenizer" else ())]
    if kind == "model":
        way = did_you_mean(reference, known, "train one by: semtok train_dit --tokenizer send_vae")
        raise UserError(f"model '{reference}': no such folder or run (runs/{reference}); {way}")
    way = did_you_mean(reference, known, f"recipes: {', '.join(recipe_names())}")
    raise UserError(
        f"tokenizer '{reference}': no such folder, run (runs/{reference}) or recipe; {way}"
    )


def generator_beside(export: Path) -> Path:
    """Where the generator is that was trained together with an exported tokenizer."""
    return export.with_name(f"{export.name}_generator")


def demo_folder() -> Path:
    """Where the embedded VAE lies."""
    return Path(str(files("semtok") / "assets" / "demo_tokenizer"))


def from_a_file(path: str | Path) -> str:
    """What to do with a published file where a folder belongs, for messages."""
    return (
        f"a file; make an export of it first, semtok hub import auto {path} --output DIR, and give "
        "that folder"
    )


def finished_runs() -> list[str]:
    """Names of the runs in ``runs/`` that have an export, those in a folder of their own with its name."""
    exports = [*RUNS.glob("*/export/config.json"), *RUNS.glob("*/*/export/config.json")]
    return sorted(file.parents[1].relative_to(RUNS).as_posix() for file in exports)


def is_hub_id(reference: str) -> bool:
    """Whether a reference reads as ``org/name``."""
    if reference.startswith((".", f"{RUNS}/")):
        return False
    return re.fullmatch(r"[\w.-]+/[\w.-]+", reference) is not None


def recipe_folder() -> Path | None:
    """Where the embedded recipes lie: in the checkout, or where the wheel put them.

    Of ``pip install --user`` the wheel's list of files tells; ``--target`` puts them beside the package.
    """
    return next((folder for folder in _recipe_folders() if folder.is_dir()), None)


def _recipe_folders() -> Iterator[Path]:
    """Where they may lie, the likeliest first; what costs more to find is looked for later."""
    source = Path(__file__).parents[1]
    if source.name == "tokenizers":  # a folder of that name beside site-packages is somebody else's
        yield source.parent / "recipes"
    yield from _listed_recipes()
    for data in (source, Path(sysconfig.get_path("data"))):
        yield data / "share" / "semtok" / "recipes"


def _listed_recipes() -> list[Path]:
    try:
        listed = metadata.files("semtok") or []
    except metadata.PackageNotFoundError:
        return []
    ending = ("share", "semtok", "recipes", "dit.yaml")
    return [Path(file.locate()).resolve().parent for file in listed if file.parts[-4:] == ending]


def recipe_names() -> list[str]:
    """Names of the tokenizer recipes that run on the embedded data."""
    folder = recipe_folder()
    files = sorted(folder.glob("*.yaml")) if folder else []
    return [file.stem for file in files if _is_of_a_tokenizer(file)]


def find_recipe(name: str) -> Path | None:
    """The tokenizer's recipe of that name, if there is one: ``send_vae``, or ``imagenet256/send_vae``."""
    folder = recipe_folder()
    if folder is None or not re.fullmatch(r"(\w+/)?\w+", name):
        return None
    file = folder / f"{name}.yaml"
    return file if file.is_file() and _is_of_a_tokenizer(file) else None


def _is_of_a_tokenizer(recipe: Path) -> bool:
    return "\nmethod:" in recipe.read_text(encoding="utf-8")


def check_hub(repository: str, file: str) -> None:
    """Asks the Hub once for a file, as its client asks six times and prints each.

    Raises:
        UserError: it can't be reached. What it answers otherwise is for whoever fetches the file.
    """
    try:
        get_hf_file_metadata(hf_hub_url(repository, file), timeout=_HUB_SECONDS)
    except HfHubHTTPError:
        return
    except (HTTPError, OSError):
        raise UserError(
            f"{repository} is not in the local cache, and the Hugging Face Hub can't be reached; where there is "
            f"network: hf download {repository}"
        ) from None


def _from_hub(reference: str, kind: str, *, revision: str | None, local_files_only: bool) -> Path:
    try:
        found = snapshot_download(reference, revision=revision, local_files_only=local_files_only)
    except (HfHubHTTPError, OSError) as error:
        match error:
            case GatedRepoError():
                reason = "access is gated; ask for it there, then 'hf auth login'"
            case RepositoryNotFoundError():
                reason = "there is no such repository (or it is private; then 'hf auth login')"
            case RevisionNotFoundError():
                reason = f"it has no revision '{revision}'" if revision else "it is empty"
            case _:
                reason = "it can't be reached, nor is it in the local cache"
        place = f"{kind} '{reference}': no such folder or run, and on the Hugging Face Hub"
        hint = did_you_mean(reference, finished_runs())
        raise UserError(f"{place} {reason}{'; ' + hint if hint else ''}") from None
    return Path(found)
