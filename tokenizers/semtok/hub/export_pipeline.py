"""A trained generator as a diffusers pipeline, which brings its code along and needs no semtok.

``DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`` loads the folder. Its code is
``semtok.hub.diffusers`` and the files of ``semtok.sampler``, as they stand.
"""

import hashlib
import re
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires
from importlib.resources import files
from pathlib import Path

import diffusers
import torch

from semtok.card import PICTURES, README, write_readme
from semtok.diffusion.generator import Generator
from semtok.errors import UserError
from semtok.hub.diffusers.decoder import SemtokDecoder
from semtok.hub.diffusers.pipeline import SemtokPipeline
from semtok.hub.diffusers.scheduler import SemtokScheduler
from semtok.hub.diffusers.transformer import SemtokTransformer
from semtok.methods.composite import CompositeTokenizer
from semtok.methods.rae import RAETokenizer
from semtok.methods.vae import KLTokenizer
from semtok.publish import PIPELINE_FILE, is_pipeline
from semtok.storage import new_folder, read_json, write_json, write_text
from semtok.tokenizer import Tokenizer, library_version

_WRITTEN = {PIPELINE_FILE, "pipeline.py", "transformer", "scheduler", "vae"}
_WRITTEN |= {README, "recipe.yaml", PICTURES}
_SAMPLER_IMPORT = re.compile(
    r"^from (semtok\.sampler\.\w+) import (?:\([^)]*\)|.*)\n", flags=re.MULTILINE
)
_ANY_IMPORT = re.compile(r"^(?:from|import) (\w+)", flags=re.MULTILINE)


def export_pipeline(
    generator: Generator, folder: str | Path, *, pictures: Mapping[str, Path] | None = None
) -> None:
    """Writes model_index.json, pipeline.py, the networks and the scheduler with their code, the recipe
    and a model card; an earlier export is replaced whole.

    Args:
        pictures: for the card, files by the names that they get.

    Raises:
        UserError: the texture is decoded neither by an autoencoder of diffusers nor by a RAE's decoder, or the folder
            holds something else.
    """
    folder = Path(folder)
    texture = _texture(generator.tokenizer)
    if (folder / PIPELINE_FILE).is_file() and not is_pipeline(folder):
        raise UserError(f"{folder}: holds somebody else's pipeline; choose another folder")
    foreign = sorted({p.name for p in folder.glob("*")} - _WRITTEN)
    if foreign:
        raise UserError(f"{folder}: holds other files too ({foreign[0]}); choose another folder")
    components = {"transformer": _transformer(generator), "scheduler": _scheduler(generator)}
    if isinstance(texture, RAETokenizer):
        components["vae"] = _decoder(texture, generator.tokenizer)
    with new_folder(folder, replaces=PIPELINE_FILE) as temporary:
        for name, component in components.items():
            component.save_pretrained(temporary / name)
        classes = {"": SemtokPipeline} | {name: type(c) for name, c in components.items()}
        modules = {name: _write_code(temporary, name, kind) for name, kind in classes.items()}
        if isinstance(texture, KLTokenizer):
            modules["vae"] = _write_vae(texture, generator.tokenizer, temporary)
        index = {
            "_class_name": modules.pop(""),
            "_diffusers_version": diffusers.__version__,
            "_library": "semtok",
            "_library_version": library_version(),
            **modules,
            # diffusers takes a list for a component; a mapping is a setting.
            "id2label": {str(i): name for i, name in enumerate(generator.class_names)},
            "height": generator.image_size[0],
            "width": generator.image_size[1],
            "can_be_guided": generator.can_be_guided,
        }
        write_json(temporary / PIPELINE_FILE, index)
        config, papers = generator.to_dict(), generator.papers()
        packages = _packages(temporary)
        write_readme(temporary, config, pictures or {}, papers, packages=packages)


# Networks and settings ---------------------------------------------------------------------------


def _transformer(generator: Generator) -> SemtokTransformer:
    network = generator.network
    with torch.device("meta"):  # it is given the generator's weights, not a copy
        transformer = SemtokTransformer(
            network.config.model_dump(mode="json"),
            network.spec.to_dict(),
            network.num_classes,
            list(network.timed_parts),
        )
    transformer.dit.load_state_dict(network.state_dict(), assign=True)
    return transformer


def _scheduler(generator: Generator) -> SemtokScheduler:
    return SemtokScheduler(
        generator.sampler.model_dump(mode="json"),
        dict(generator.schedule.starts),
        generator.config.path,
        generator.shift,
    )


def _texture(tokenizer: Tokenizer) -> KLTokenizer | RAETokenizer:
    """The tokenizer that decodes the texture part.

    Raises:
        UserError: it decodes in a way of its own.
    """
    inner = tokenizer.texture if _decodes_as(tokenizer, CompositeTokenizer) else tokenizer
    if not any(_decodes_as(inner, kind) for kind in (KLTokenizer, RAETokenizer)):
        raise UserError(
            f"method '{inner.method}': its texture is decoded neither by an autoencoder of diffusers alone nor by a "
            "RAE's decoder, so that no pipeline can do without its code; share the generator itself by hub push"
        )
    return inner


def _decodes_as(tokenizer: Tokenizer, kind: type[Tokenizer]) -> bool:
    """Whether a tokenizer decodes as this class does, also where it is of a subclass."""
    return isinstance(tokenizer, kind) and all(
        getattr(type(tokenizer), name) is getattr(kind, name)
        for name in ("decode", "decode_raw", "destandardise")
    )


def _write_vae(vae: KLTokenizer, tokenizer: Tokenizer, folder: Path) -> list[str]:
    """Writes ``vae/``, whose statistics are those of the latents that are generated, and returns the names of
    library and class as model_index.json has them."""
    vae.save_networks(folder)
    place = folder / "vae" / "config.json"
    statistics = {
        "latents_mean": tokenizer.texture_mean.tolist(),
        "latents_std": tokenizer.texture_std.tolist(),
    }
    write_json(place, read_json(place) | statistics)
    return ["diffusers", type(vae.autoencoder).__name__]


def _decoder(rae: RAETokenizer, tokenizer: Tokenizer) -> SemtokDecoder:
    """A RAE's decoder, with the statistics of the latents that are generated.

    diffusers' AutoencoderRAE is none for all: it knows three encoders, which it needs in memory, square images alone,
    and no trained position codes.
    """
    ours = rae.decoder
    with torch.device("meta"):  # it is given the tokenizer's weights, not a copy
        decoder = SemtokDecoder(
            ours.shape.model_dump(mode="json"),
            ours.channels,
            list(ours.grid),
            "position" if "texture" in tokenizer.positions else "channel",
        )
    state = {f"decoder.{name}": value for name, value in ours.state_dict().items()}
    state |= {"latents_mean": tokenizer.texture_mean, "latents_std": tokenizer.texture_std}
    decoder.load_state_dict(state, assign=True)
    return decoder


# Code --------------------------------------------------------------------------------------------


def _write_code(folder: Path, component: str, kind: type) -> list[str]:
    """Writes a class's module, with what it needs, and returns both names as model_index.json has them.

    Args:
        component: its folder; empty: the pipeline, which lies beside these.
    """
    note = f"# Made of the sources of semtok {library_version()}, file by file.\n"
    source = note + code_of(kind.__module__)
    module = "pipeline"
    if component:
        # diffusers copies the code of all folders into one and runs it from there, so that two models'
        # code must have two names, unless it is the same.
        digest = hashlib.blake2b(source.encode(), digest_size=4).hexdigest()
        module = f"semtok_{component}_{digest}"
    write_text(folder / component / f"{module}.py", source)
    return [module, kind.__name__]


def code_of(module: str) -> str:
    """A module's file, with the sampler's files that it imports in the place of these imports, each once.

    It is one file, as diffusers downloads no other from a folder with weights.
    """
    written = set()

    def text_of(name: str) -> str:
        package, _, stem = name.rpartition(".")
        text = (files(package) / f"{stem}.py").read_text(encoding="utf-8")
        return _SAMPLER_IMPORT.sub(lambda found: include(found[1]), text)

    def include(name: str) -> str:
        if name in written:
            return ""
        written.add(name)
        return f"\n# {name} {'-' * (97 - len(name))}\n\n{text_of(name)}\n"

    return text_of(module)


def _packages(folder: Path) -> list[str]:
    """What the code of a folder imports, with the versions that semtok asks for, as pip takes it."""
    needed = {"accelerate"}  # diffusers loads by it
    for file in folder.rglob("*.py"):
        needed |= set(_ANY_IMPORT.findall(file.read_text(encoding="utf-8")))
    try:
        known = requires("semtok") or []
    except PackageNotFoundError:  # imported from a checkout that was not installed
        known = []
    bounds = {re.split(r"[^\w.-]", line)[0]: line for line in known}
    needed -= {"PIL", *sys.stdlib_module_names}  # diffusers brings Pillow
    return [bounds.get(name, name) for name in sorted(needed)]
