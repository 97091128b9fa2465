"""Recipes: one validated, frozen description of a run."""

import difflib
from pathlib import Path
from typing import Any, Generic, TypeVar

import pydantic
import yaml

from semtok.data.images.kinds import data_config_class
from semtok.data.source import DataConfig
from semtok.diffusion.diffusion_config import DiffusionConfig
from semtok.errors import UserError
from semtok.references import RUNS, recipe_folder
from semtok.registry import MethodConfig, get_method, load_plugins
from semtok.sampler.sampling import SamplerConfig
from semtok.settings import Config, apply_overrides, parse, read_yaml
from semtok.storage import write_text
from semtok.teachers import TeacherConfig
from semtok.training.scoring import ScoreConfig
from semtok.training.train_config import TrainConfig

MethodType = TypeVar("MethodType", bound=MethodConfig)
DataType = TypeVar("DataType", bound=DataConfig)

PUBLISHED = "imagenet256"
"""The folder of the embedded recipes that holds those at the papers' settings."""


class TokenizerRecipe(Config, Generic[MethodType, DataType]):
    """Everything that determines a tokenizer's training."""

    method: MethodType
    data: DataType
    teacher: TeacherConfig | None = None
    """Used where the method asks for one."""
    train: TrainConfig
    plugins: tuple[str, ...] = ()
    """Python files that register methods of your own, from the current folder or the recipe's."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "TokenizerRecipe[MethodType, DataType]":
        what = f"method '{self.method.name}' with these settings"
        if self.method.needs_teacher() and self.teacher is None:
            raise ValueError(f"{what} needs a teacher; give teacher.name=…")
        if self.method.needs_same_images() and self.data.draws_crops:
            raise ValueError(
                "method.feature_cache: it would hold one crop of each image, and data.crop=random sees another in each "
                "epoch; leave it out, or pass data.crop=center"
            )
        if self.method.has_steps() and not self.train.steps:
            raise ValueError("train.steps: expected at least 1, got 0")
        if self.train.steps and not self.method.has_steps():
            raise ValueError(f"train.steps: {what} learns nothing by steps; pass train.steps=0")
        return self


class DiffusionRecipe(Config, Generic[DataType]):
    """Everything that determines a generator's training."""

    tokenizer: str
    """Whose latents: a folder, a run's name, a Hub id, or an embedded recipe's name."""
    data: DataType
    diffusion: DiffusionConfig
    sampler: SamplerConfig = SamplerConfig()
    """How pictures are drawn in training, and by default afterwards."""
    teacher: TeacherConfig | None = None
    """Used by REPA; None: the tokenizer's own, where it has one."""
    train: TrainConfig
    score: ScoreConfig | None = None
    """Scores of drawn images on the way of the training; None: there are none."""
    plugins: tuple[str, ...] = ()
    """Python files that register methods of your own, from the current folder or the recipe's."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "DiffusionRecipe[DataType]":
        if not self.train.steps:
            raise ValueError("train.steps: expected at least 1, got 0")
        if self.diffusion.is_contrastive and self.train.batch_size == 1:
            raise ValueError(
                "diffusion.contrastive_weight: compares images of a batch, and train.batch_size is 1; pass more"
            )
        return self


def embedded_recipes() -> dict[str, Path]:
    """The embedded recipes by name: where they lie in their folder, as ``dit`` and ``imagenet256/sit_b2``."""
    folder = recipe_folder()
    found = sorted(folder.rglob("*.yaml")) if folder else []
    names = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    return dict(sorted(names.items(), key=lambda item: ("/" in item[0], item[0])))


def locate_recipe(reference: str | Path, *, first: str = "") -> Path:
    """The file of a recipe: a path; or an embedded one, by its name or the last part of it.

    Also ``recipes/imagenet256/sit_b2.yaml`` is found from any folder. A file that is there goes before names.

    Args:
        first: the embedded folder that goes before the others where several hold one of that name.

    Raises:
        UserError: there is none; the message names those that are near.
    """
    path = Path(reference)
    if path.exists() and not path.is_dir():
        return path
    known = embedded_recipes()
    name = str(reference).removeprefix("recipes/").removesuffix(".yaml")
    ends = [other for other in known if other == name or other.endswith(f"/{name}")]
    if ends:
        preferred = [other for other in ends if first and other.startswith(f"{first}/")]
        return known[(preferred or ends)[0]]
    if path.exists():
        return path
    last = {other.rpartition("/")[2]: other for other in reversed(known)}
    near = difflib.get_close_matches(name, known, n=3)
    near += [last[other] for other in difflib.get_close_matches(name, last, n=2)]
    hint = " or ".join(f"'{other}'" for other in dict.fromkeys(near))
    if not hint and path.suffix:
        raise UserError(f"{reference}: no such file")
    way = f"did you mean {hint}?" if hint else "semtok recipes lists those there are"
    raise UserError(f"{reference}: no such file or recipe; {way}")


def run_name(path: Path) -> str:
    """What a recipe's run is called by default: its name, of an embedded one with its folder."""
    known = {file.resolve(): name for name, file in embedded_recipes().items()}
    return known.get(path.resolve(), path.stem)


def default_run(path: Path, tokenizer: str | None = None) -> Path:
    """The folder of a recipe's run where none is named.

    Args:
        tokenizer: the reference that a generator is trained on, whose name follows; None: it is a tokenizer's recipe.
    """
    if tokenizer is None:
        return RUNS / run_name(path)
    reference = Path(tokenizer)
    reference = reference.parent if reference.name == "export" else reference
    return RUNS / f"{run_name(path)}_{reference.name}"


def load_recipe(path: Path, overrides: list[str]) -> TokenizerRecipe[Any, Any]:
    """Reads, overrides and validates a tokenizer recipe. Nothing is built yet.

    Raises:
        UserError: with the file, the key, and the nearest valid name or the expected type.
    """
    return parse_recipe(apply_overrides(read_yaml(path), overrides), str(path))


def parse_recipe(content: dict[str, Any], place: str) -> TokenizerRecipe[Any, Any]:
    """Validates the content of a tokenizer recipe; ``place`` starts every message."""
    content = _load_plugins(content, place)
    method = get_method(_choice(content, "method", "name", place), place=f"{place}: method.name")
    data = data_config_class(_choice(content, "data", "kind", place), place=f"{place}: data.kind")
    config = method.config.of(content["method"], place=place)
    return parse(TokenizerRecipe[config, data], content, place)


def load_diffusion_recipe(
    path: Path, overrides: list[str], *, tokenizer: str | None = None
) -> DiffusionRecipe[Any]:
    """Reads, overrides and validates a generator's recipe; ``tokenizer`` replaces the one named there."""
    content = apply_overrides(read_yaml(path), overrides)
    if tokenizer is not None:
        content["tokenizer"] = tokenizer
    return parse_diffusion_recipe(content, str(path))


def parse_diffusion_recipe(content: dict[str, Any], place: str) -> DiffusionRecipe[Any]:
    """Validates the content of a generator's recipe; ``place`` starts every message."""
    if "tokenizer" not in content:
        raise UserError(f"{place}: 'tokenizer' is missing; give --tokenizer REF or tokenizer=…")
    content = _load_plugins(content, place)
    data = data_config_class(_choice(content, "data", "kind", place), place=f"{place}: data.kind")
    return parse(DiffusionRecipe[data], content, place)


def _load_plugins(content: dict[str, Any], place: str) -> dict[str, Any]:
    """Runs the files that a recipe names; where they are not in the current folder, those beside the recipe.

    Returns:
        the content with each file as it was found, so that a recipe recorded elsewhere finds it too.
    """
    plugins = content.get("plugins")
    if not isinstance(plugins, list):
        return content
    found = [str(plugin) for plugin in plugins]
    for number, plugin in enumerate(found):
        beside = Path(place).parent / plugin
        if not Path(plugin).is_file() and beside.is_file():
            found[number] = str(beside)
        elif not Path(plugin).exists():
            raise UserError(
                f"{place}: plugins: no such file '{plugin}', neither in {Path.cwd()} nor beside the recipe"
            )
    try:
        load_plugins(found)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error
    return content | {"plugins": found}


def parse_data(settings: list[str], *, place: str) -> DataConfig:
    """Data settings given as ``key=value`` words on a command line."""
    content = apply_overrides({}, settings)
    kind = _name(content.get("kind", "folder"), place=f"{place} kind")
    model = data_config_class(kind, place=f"{place} kind")
    return parse(model, content, place)


def _choice(content: dict[str, Any], section: str, key: str, place: str) -> str:
    values = content.get(section)
    if not isinstance(values, dict) or key not in values:
        raise UserError(f"{place}: '{section}.{key}' is missing; give {section}.{key}=…")
    return _name(values[key], place=f"{place}: {section}.{key}")


def _name(value: Any, *, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: expected a name, got {value!r}")
    return value


def write_recipe(recipe: Config, path: Path) -> None:
    """Writes the resolved, complete recipe."""
    write_text(path, recipe_text(recipe))


def recipe_text(recipe: Config) -> str:
    """The resolved, complete recipe as YAML that ``load_recipe`` reads back to the same."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
