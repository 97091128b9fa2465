"""Networks without what surrounds them in use, as published checkpoints hold them: a diffusion
transformer without a tokenizer (a *network*), or a feature coder without image latents (a *coder*).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from semtok.card import provenance, write_readme
from semtok.errors import UserError
from semtok.hub.checkpoints import built
from semtok.methods.coders import FeatureCoder
from semtok.methods.composite import CompositeTokenizer
from semtok.privacy import fit_to_show
from semtok.references import locate_export
from semtok.registry import get_method, papers_of
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT
from semtok.sampler.latents import LatentSpec, PartSpec
from semtok.settings import Config, parse
from semtok.storage import (
    first_line,
    new_folder,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from semtok.tokenizer import FORMAT_VERSION, check_format_version, library_version

_CONFIG_FILE, _TENSORS_FILE = "config.json", "part.safetensors"
_CODERS = ("reglue", "semvae", "redi")


def save_module(
    module: DiT | FeatureCoder, folder: str | Path, *, trained: Mapping[str, Any] | None = None
) -> None:
    """Writes config.json, the weights and a card; an existing export is replaced whole.

    Args:
        trained: what it comes from; for readers.

    Raises:
        UserError: the folder holds something else.
    """
    config: dict[str, Any] = {
        "library": "semtok",
        "library_version": library_version(),
        "format_version": FORMAT_VERSION,
    }
    if isinstance(module, DiT):
        config |= {
            "kind": "network",
            "latents": module.spec.to_dict(),
            "architecture": module.config.model_dump(mode="json"),
            "num_classes": module.num_classes,
            "timed_parts": list(module.timed_parts),
        }
        papers: tuple[str, ...] = ("SiT, arXiv 2401.08740",)
    else:
        method = next(name for name in _CODERS if isinstance(module, _coder_class(name)))
        config |= {"kind": "coder", "method": method, "settings": module.settings()}
        papers = papers_of(method)
    config["trained"] = fit_to_show(dict(trained or {}))
    with new_folder(Path(folder), replaces=_CONFIG_FILE) as temporary:
        write_tensors(temporary / _TENSORS_FILE, module.state_dict(), provenance(config))
        write_json(temporary / _CONFIG_FILE, config)
        write_readme(temporary, config, {}, papers)


def load_module(reference: str | Path) -> DiT | FeatureCoder:
    """What ``save_module`` wrote, in eval mode.

    Args:
        reference: a folder or a Hub id.

    Raises:
        UserError: nothing found, something else, a damaged file, or a newer format.
    """
    folder = locate_export(str(reference), "model")
    place = folder / _CONFIG_FILE
    config = read_json(place)
    kind = config.get("kind") if isinstance(config, dict) else None
    if kind not in ("network", "coder") or config.get("library") != "semtok":
        raise UserError(f"{place}: neither a network nor a coder alone, but {kind or 'foreign'}")
    check_format_version(config, place)
    build = _network(config, str(place)) if kind == "network" else _coder(config, str(place))
    state, weights = read_tensors(folder / _TENSORS_FILE), str(folder / _TENSORS_FILE)
    try:
        return built(build, state, weights)
    except UserError:
        raise
    except ValueError as error:  # a network's own check of its settings
        raise UserError(f"{place}: {first_line(error)}") from None


class _NetworkSettings(Config):
    architecture: DiTArchitecture
    latents: tuple[PartSpec, ...]
    num_classes: NonNegativeInt
    timed_parts: tuple[str, ...]


def _network(config: Mapping[str, Any], place: str) -> Callable[[], DiT]:
    told = {name: config[name] for name in _NetworkSettings.model_fields if name in config}
    settings = parse(_NetworkSettings, told, place)
    return lambda: DiT(
        settings.architecture,
        LatentSpec(settings.latents),
        num_classes=settings.num_classes,
        timed_parts=settings.timed_parts,
    )


def _coder(config: Mapping[str, Any], place: str) -> Callable[[], FeatureCoder]:
    kind = _coder_class(config.get("method"))
    shape = parse(kind.shape_class, config.get("settings"), f"{place}: settings")
    return lambda: kind(shape)


def _coder_class(method: str) -> type[FeatureCoder]:
    tokenizer = get_method(method, place="coder").tokenizer
    if not issubclass(tokenizer, CompositeTokenizer) or tokenizer.coder_class is None:
        raise UserError(f"method '{method}' has no coder")
    return tokenizer.coder_class
