"""Recipes: each parses, builds and trains; every option is read by something."""

import ast
import json
import math
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import tiny
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import train_tokenizer
from semtok.data.images.kinds import _KINDS
from semtok.recipe import (
    DiffusionRecipe,
    TokenizerRecipe,
    load_diffusion_recipe,
    load_recipe,
    parse_diffusion_recipe,
    parse_recipe,
    recipe_text,
)
from semtok.registry import _METHODS, get_method
from semtok.sampler.architecture import architecture
from semtok.settings import Config, apply_overrides, read_yaml

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


TOKENIZERS = [str(p.relative_to(ROOT)) for p in RECIPES if "method" in read_yaml(p)]
GENERATORS = [str(p.relative_to(ROOT)) for p in RECIPES if "diffusion" in read_yaml(p)]


def test_every_recipe_is_one_or_the_other():
    assert sorted(TOKENIZERS + GENERATORS) == [str(p.relative_to(ROOT)) for p in RECIPES]
    assert len(TOKENIZERS) >= 5 and len(GENERATORS) >= 5


@pytest.mark.parametrize("name", TOKENIZERS + GENERATORS)
def test_a_recipe_survives_being_written_and_read(name):
    if name in TOKENIZERS:
        recipe = load_recipe(ROOT / name, [])
        assert parse_recipe(yaml.safe_load(recipe_text(recipe)), name) == recipe
    else:
        recipe = load_diffusion_recipe(ROOT / name, [], tokenizer="some")
        assert parse_diffusion_recipe(yaml.safe_load(recipe_text(recipe)), name) == recipe


@pytest.mark.parametrize("name", TOKENIZERS + GENERATORS)
def test_a_recipe_says_how_to_run_it_on_what_and_what_comes_out(name):
    head = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("#")]
    text = "\n".join(head)
    command = f"tools/train_tokenizer.py {name}" if name in TOKENIZERS else "tools/train_dit.py "
    assert command in text
    for word in ("Hardware", "Time", "Expected", "Source"):
        assert word in text, word


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_recipe_builds_and_trains_at_toy_size(name, tmp_path):
    content = at_toy_size(read_yaml(ROOT / name))
    vae = content["method"].get("tokenizer", content["method"])
    if "diffusion" in content["method"]:
        shape = {"depth": 2, "width": 32, "heads": 2, "patch_size": 1}
        content["method"]["diffusion"] |= {"network": shape}
        content["method"]["diffusion"]["repa"] |= {"depth": 1, "projector_width": 16}
        content["method"]["sampler"]["steps"] = 2
    if "vae" in vae:
        vae["vae"] = tiny.AUTOENCODER
    if "texture" in content["method"]:
        content["method"]["texture"] = "demo"
    if content["method"]["name"] == "semvae":
        content["method"] |= {"heads": 2, "blocks": 1}
    if vae.get("perceptual") == "lpips":
        vae["perceptual"] = "teacher"  # LPIPS' backbone is not to be had in tests
    if "decoder" in vae:
        vae["decoder"] = tiny.DECODER
    adversarial = vae.get("adversarial", {})
    if "features" in adversarial:
        judged = {"name": "demo", "input_size": 16, "layers": [0, 1]}
        adversarial |= {"features": judged, "start_step": 0, "discriminator_start_step": None}
    elif adversarial:
        small = {"width": 8, "num_layers": 1, "start_step": 0, "discriminator_start_step": None}
        vae["adversarial"] |= small
    if "equivariance" in vae:
        vae["equivariance"]["scales"] = [0.5, 0.75]  # the others leave nothing of 4x4
    if "mapper" in content["method"]:
        content["method"]["mapper"]["projector_width"] = 16
    train_tokenizer(parse_recipe(content, name), tmp_path / "run")
    check_run(tmp_path / "run", num_steps=content["train"]["steps"])


@pytest.mark.parametrize("name", GENERATORS)
def test_a_generator_recipe_builds_and_trains_at_toy_size(name, tmp_path, toy_tokenizers):
    content = at_toy_size(read_yaml(ROOT / name))
    content["tokenizer"] = str(toy_tokenizers[method_of_tokenizer(content)])
    network, routing = content["diffusion"]["network"], content["diffusion"].get("routing")
    shape = architecture(network).model_dump() if isinstance(network, str) else network
    depth = 3 if routing else 2
    content["diffusion"]["network"] = shape | {"depth": depth, "width": 32, "heads": 2}
    if shape.get("head"):
        content["diffusion"]["network"]["head"] = {"depth": 1, "width": 48, "heads": 2}
    if routing:
        routing |= {"first": 1, "last": 1}
    if content["diffusion"].get("repa"):
        content["diffusion"]["repa"] |= {"depth": 1, "projector_width": 16}
    content["sampler"]["steps"] = 2
    train_dit(parse_diffusion_recipe(content, name), tmp_path / "run")
    check_run(tmp_path / "run")


def method_of_tokenizer(content: dict[str, Any]) -> str:
    """Which method's toy stands for the tokenizer that a recipe names: of its own recipe, or of image latents alone."""
    name = Path(content.get("tokenizer") or "").name
    made = [p for p in RECIPES if p.stem == name and "method" in read_yaml(p)]
    method = read_yaml(made[-1])["method"]["name"] if made else "vae"
    return {"reglue": "reglue", "semvae": "semvae", "redi": "semvae"}.get(method, "vae")


@pytest.fixture(scope="module")
def toy_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("toy")
    methods = {
        "vae": {"name": "vae"},
        "reglue": {"name": "reglue", "compressor": {"hidden": [8], "channels": 4}},
        "semvae": {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1},
    }
    for name, method in methods.items():
        train_tokenizer(parse_recipe(tiny.content(method, steps=2), "tiny"), root / name)
    return {name: root / name for name in methods}


def at_toy_size(content: dict[str, Any]) -> dict[str, Any]:
    """A recipe with its method's settings, but with data, teacher and length of a test."""
    toy = tiny.content(steps=2, log_every=1)
    content["data"], content["teacher"] = toy["data"], toy["teacher"]
    accumulate = content["train"].get("accumulate", 1)
    content["train"]["accumulate"] = accumulate if accumulate == "auto" else min(accumulate, 2)
    content["train"].pop("export_at", None)
    learns = content["train"]["steps"] > 0
    for key in toy["train"].keys() - {"optimiser", "ema_decay", "schedule"}:
        if key not in ("steps", "warmup_steps") or learns:
            content["train"][key] = toy["train"][key]
    content["train"].pop("constant_steps", None)
    content["train"]["precision"] = "fp32"  # bf16 is slow on CPUs, and has its own test
    return content


def check_run(folder: Path, num_steps: int = 2) -> None:
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.open()] if num_steps else []
    assert len(rows) == num_steps
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert (folder / "export" / "config.json").is_file()


def models_in(model: type[BaseModel]) -> set[type[BaseModel]]:
    found, kinds = {model}, [field.annotation for field in model.model_fields.values()]
    while kinds:
        kind = kinds.pop()
        kinds += get_args(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= models_in(kind)
    return found


def models_of_recipes() -> set[type[BaseModel]]:
    """Every config that a recipe can hold, of all methods and all kinds of data."""
    get_method("vae", place="")  # registers those that the library brings
    own = {n: m for n, m in _METHODS.items() if m.config.__module__.startswith("semtok.methods.")}
    assert {"vae", "send_vae"} <= own.keys() and {"shapes", "folder"} <= _KINDS.keys()
    pairs = [(method.config, data) for method in own.values() for data, _ in _KINDS.values()]
    generators = [DiffusionRecipe[data] for data, _ in _KINDS.values()]
    recipes = [TokenizerRecipe[pair] for pair in pairs] + generators
    return set().union(*(models_in(recipe) for recipe in recipes))


def without_validators(tree: ast.Module) -> ast.Module:
    """Leaves out functions that only check settings: an option read nowhere else does nothing."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [
                part
                for part in node.body
                if not any(
                    "validator" in ast.unparse(d) for d in getattr(part, "decorator_list", [])
                )
            ]
    return tree


@cache
def attributes_read() -> frozenset[str]:
    """Names that the library reads as ``something.name``, to do something."""
    read = set()
    for file in (ROOT / "tokenizers").rglob("*.py"):
        for node in ast.walk(without_validators(ast.parse(file.read_text()))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                read.add(node.attr)
    # What a recipe's other settings depend on is read before the recipe is parsed.
    before = ast.walk(ast.parse((ROOT / "tokenizers/semtok/recipe.py").read_text()))
    calls = [node for node in before if isinstance(node, ast.Call)]
    asked = {a.value for call in calls for a in call.args if isinstance(a, ast.Constant)}
    return frozenset(read | asked)


def unread_options(models: set[type[BaseModel]], read: frozenset[str]) -> list[str]:
    return sorted(f"{m.__name__}.{f}" for m in models for f in m.model_fields if f not in read)


def test_every_option_of_every_recipe_is_read_by_something():
    assert unread_options(models_of_recipes(), attributes_read()) == []


def test_an_option_that_nothing_reads_is_found():
    class Nested(Config):
        projector_widht: int = 1

    class Outer(Config):
        steps: int = 1
        nested: tuple[Nested, ...] | None = None

    models = models_in(Outer)
    assert models == {Outer, Nested}
    found = unread_options(models, attributes_read() | {"nested"})
    assert found == ["Nested.projector_widht"]


def test_reading_an_option_in_a_validator_does_not_count():
    text = (
        "class A:\n  @model_validator(mode='after')\n  def f(self): self.x\n  def g(self): self.y"
    )
    nodes = ast.walk(without_validators(ast.parse(text)))
    assert {node.attr for node in nodes if isinstance(node, ast.Attribute)} == {"y"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("-2.5E+3", -2500.0),
        ("[1e-4, 2]", [1e-4, 2]),
        ("{x: 1}", {"x": 1}),
        ("5", 5),
        ("[1, 2]", [1, 2]),
        ("null", None),
        ("true", True),
        ("a/b", "a/b"),
    ],
)
def test_overrides_are_read_as_yaml_and_numbers_as_numbers(text: str, value: Any):
    content = {"a": {"b": 0, "c": 1}}
    assert apply_overrides(content, [f"a.b={text}"]) == {"a": {"b": value, "c": 1}}
    assert content == {"a": {"b": 0, "c": 1}}, "the original stays as it was"


def test_overrides_reach_into_a_recipe_and_make_sections_that_it_lacks():
    recipe = load_recipe(
        ROOT / "recipes/vae.yaml",
        ["train.optimiser.learning_rate=1e-4", "data.classes=[shape]", "teacher.layers=[0, -1]"],
    )
    assert recipe.train.optimiser.learning_rate == 1e-4
    assert recipe.data.classes == ("shape",) and recipe.teacher.layers == (0, -1)
