"""What a recipe's rehearsal runs: its own command, made small, after the runs and weights that it names."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.random_inputs import vae_of
from rehearsal.headers import Header, Sampling, read_header
from rehearsal.inputs import IMAGES
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.errors import UserError
from semtok.methods.vae import PRESETS
from semtok.recipe import (
    PUBLISHED,
    DiffusionRecipe,
    TokenizerRecipe,
    default_run,
    embedded_recipes,
    load_diffusion_recipe,
    load_recipe,
    locate_recipe,
)
from semtok.references import DEMO, RUNS
from semtok.registry import MethodConfig
from semtok.sampler.architecture import architecture
from semtok.sampler.sampling import SamplerConfig
from semtok.settings import read_yaml
from semtok.training.train_config import TrainConfig

BATCH_SIZE = 2
Recipe = TokenizerRecipe[Any, Any] | DiffusionRecipe[Any]

# Of the length of a run and of the machine: a rehearsal has them as they are by default.
_BY_DEFAULT = ("accumulate", "memory", "export_at", "warmup_steps", "constant_steps")


@dataclass(frozen=True)
class Run:
    """A recipe as its own command would run it on the drawn images.

    Attributes:
        file: the recipe's.
        recipe: of full size, with what the command's words set.
        words: of that command, beside the recipe and the run folder; all names are relative to the rehearsal's folder.
        output: the run folder.
        is_default_output: no command names it.
        samplings: how a generator is sampled afterwards.
    """

    file: Path
    recipe: Recipe
    words: tuple[str, ...]
    output: str
    is_default_output: bool
    samplings: tuple[Sampling, ...]

    @property
    def is_generator(self) -> bool:
        """Whether it trains a diffusion transformer."""
        return isinstance(self.recipe, DiffusionRecipe)

    @property
    def references(self) -> tuple[str, ...]:
        """Tokenizers and weights that it is built on."""
        if isinstance(self.recipe, DiffusionRecipe):
            return (self.recipe.tokenizer,)
        method = self.recipe.method
        vae = getattr(vae_of(method)[1], "vae", None)
        named = [method.texture_reference(), vae if isinstance(vae, str) else None]
        return tuple(name for name in named if name is not None and name not in (DEMO, *PRESETS))


def transformer_of(recipe: Recipe) -> tuple[str, DiffusionConfig] | None:
    """Where the settings of the transformer that a recipe trains stand, and those; None: it trains none."""
    if isinstance(recipe, DiffusionRecipe):
        return "diffusion", recipe.diffusion
    diffusion = getattr(recipe.method, "diffusion", None)
    return ("method.diffusion", diffusion) if diffusion is not None else None


def find_recipes(names: Iterable[str]) -> list[Path]:
    """The files of recipes: paths, or names of embedded ones, those at 256 pixels first.

    Raises:
        UserError: there is none of that name.
    """
    return [_file_of(name).resolve() for name in names]


def _file_of(name: str) -> Path:
    try:
        return locate_recipe(name, first=PUBLISHED)
    except UserError:
        known = ", ".join(file.stem for file in all_recipes())
        raise UserError(f"recipe '{name}': no such file; embedded at 256 pixels: {known}") from None


def all_recipes() -> list[Path]:
    """All embedded recipes at 256 pixels."""
    known = embedded_recipes()
    return [file for name, file in known.items() if name.startswith(f"{PUBLISHED}/")]


def plan_run(file: Path) -> Run:
    """Reads a recipe with what the command at its head sets, and the drawn images.

    Raises:
        UserError: it does not parse so, or wants images that a rehearsal does not draw.
    """
    header = read_header(file)
    content = read_yaml(file)
    data = content.get("data")
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in ("folder", "shapes"):
        raise UserError(
            f"{file}: data.kind: a rehearsal draws a folder of images, not '{kind}'; write data.kind: folder for it"
        )
    images = (f"data.path={IMAGES}",) if kind == "folder" else ()
    words = header.words + images
    recipe = _load(file, words, is_generator="diffusion" in content)
    tokenizer = recipe.tokenizer if isinstance(recipe, DiffusionRecipe) else None
    draws = transformer_of(recipe) is not None
    samplings = (header.samplings or (Sampling(),)) if draws else ()
    output = header.output or str(default_run(file, tokenizer))
    return Run(file, recipe, words, output, header.output is None, samplings)


def _load(file: Path, words: Iterable[str], *, is_generator: bool) -> Recipe:
    words = list(words)
    tokenizer = None
    if "--tokenizer" in words:
        at = words.index("--tokenizer")
        tokenizer = words[at + 1]
        del words[at : at + 2]
    option = next((word for word in words if word.startswith("-")), None)
    if option is not None:
        raise UserError(
            f"{file}: the command at its head has {option}, which a rehearsal can't take"
        )
    if is_generator:
        return load_diffusion_recipe(file, words, tokenizer=tokenizer)
    return load_recipe(file, words)


# Runs that others are built on --------------------------------------------------------------------


def maker(reference: str, beside: Path) -> Path | None:
    """The recipe whose run a reference names: a run folder, something in it, or a run's name.

    Args:
        beside: a recipe; those in its folder go before the embedded ones.
    """
    longest: tuple[str, Path] | None = None
    for file in _others(beside):
        output = _output(file)
        if output is None:
            continue
        is_named = any(
            name == output or name.startswith(f"{output}/")
            for name in (reference, str(RUNS / reference))
        )
        if is_named and (longest is None or len(output) > len(longest[0])):
            longest = (output, file)
    return longest[1] if longest else None


def same_output(run: Run) -> list[Path]:
    """Other recipes whose runs would be in the same folder, by their commands."""
    return [file for file in _others(run.file) if file != run.file and _output(file) == run.output]


def _others(beside: Path) -> list[Path]:
    files = (*sorted(beside.parent.glob("*.yaml")), *embedded_recipes().values())
    return list(dict.fromkeys(file.resolve() for file in files))


def _output(file: Path) -> str | None:
    return _output_of(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _output_of(file: Path, _changed: int) -> str | None:
    """Kept, as every reference is looked for in every recipe."""
    header, content = read_header(file), read_yaml(file)
    if header.output is not None:
        return header.output
    if "diffusion" not in content:
        return str(default_run(file))
    tokenizer = _option(header, "--tokenizer") or content.get("tokenizer")
    return str(default_run(file, tokenizer)) if isinstance(tokenizer, str) else None


def _option(header: Header, name: str) -> str | None:
    words = list(header.words)
    return words[words.index(name) + 1] if name in words else None


# One step of little -------------------------------------------------------------------------------


def small_settings(run: Run) -> list[str]:
    """The settings of one step on a CPU, as ``key=value``: only those that differ from the run's own."""
    recipe, train = run.recipe, run.recipe.train
    wanted: dict[str, Any] = {
        "train.steps": min(1, train.steps),
        "train.batch_size": min(BATCH_SIZE, train.batch_size),
        "train.precision": "fp32",
        "train.log_every": 1 if train.steps else train.log_every,
        "train.num_sample_images": min(2, train.num_sample_images),
        "train.num_validation_images": min(2, train.num_validation_images),
        "train.num_statistics_images": min(4, train.num_statistics_images),
        "data.num_workers": 0,
    }
    for name in _BY_DEFAULT:
        if name in TrainConfig.model_fields:
            default = TrainConfig.model_fields[name].default
            wanted[f"train.{name}"] = list(default) if isinstance(default, tuple) else default
    if isinstance(recipe, DiffusionRecipe):
        wanted |= _few_steps("sampler", recipe.sampler)
    else:
        if transformer_of(recipe) is not None:
            wanted |= _few_steps("method.sampler", recipe.method.sampler)
        wanted |= _all_losses(recipe.method)
        decoder = getattr(recipe.method, "decoder", None)
        if decoder is not None:  # of RAE, whose blocks are alike
            wanted["method.decoder.depth"] = min(2, decoder.depth)
        if recipe.method.texture_reference() is not None:  # of random weights
            wanted["method.min_texture_psnr"] = None
    content = recipe.model_dump(mode="json")
    changed = {key: value for key, value in wanted.items() if _value(content, key) != value}
    return [f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in changed.items()]


def _few_steps(place: str, sampler: SamplerConfig) -> dict[str, Any]:
    if sampler.method == "dopri5":
        return {f"{place}.rtol": 0.5, f"{place}.atol": 0.5}
    return {f"{place}.steps": min(2, sampler.steps)}


def _all_losses(method: MethodConfig) -> dict[str, Any]:
    """Settings by which the first step has the losses of an adversary too, from random weights."""
    place, vae = vae_of(method)
    adversarial = getattr(vae, "adversarial", None)
    if adversarial is None:
        return {}
    given = {name for name, value in adversarial if value is not None}
    starts = {name: 0 for name in given if name.endswith("start_step")}
    weights: dict[str, Any] = {"weights": None} if "weights" in given else {}
    return {f"{place}.adversarial.{name}": value for name, value in (starts | weights).items()}


def least_depth(diffusion: DiffusionConfig) -> int:
    """The fewest blocks with which a transformer still has all that its recipe names: token routing needs one at the
    start, one at the end and one between, a value residual a second one."""
    if diffusion.routing is not None:
        return 3
    return 2 if architecture(diffusion.network).value_residual else 1


def depth_settings(place: str, diffusion: DiffusionConfig, depth: int) -> list[str]:
    """The settings that make a transformer of fewer blocks, at least ``least_depth``; none where it has no more.

    Args:
        place: where its settings stand, see ``transformer_of``.
    """
    shape, depth = architecture(diffusion.network), max(depth, least_depth(diffusion))
    if depth >= shape.depth:
        return []
    if isinstance(diffusion.network, str):
        shallow = shape.model_dump(mode="json") | {"depth": depth}
        settings = [f"{place}.network={json.dumps(shallow)}"]
    else:
        settings = [f"{place}.network.depth={depth}"]
    repa = diffusion.repa
    if repa and repa.depth is not None and repa.depth > depth:
        settings.append(f"{place}.repa.depth={depth}")
    routing = diffusion.routing
    if routing is not None and routing.first + routing.last >= depth:
        settings += [f"{place}.routing.first=1", f"{place}.routing.last=1"]
    return settings


def _value(content: Any, key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content
