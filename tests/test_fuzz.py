"""Odd settings, exports, caches and checkpoints are read or refused in one line: see ``fuzzing``."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import strategies as st

import tiny
from fuzzing import FEW, MANY, Files, Inputs, fuzz, only_place, read_files, with_errors, write
from hostile import changed, damaged, little_memory, values
from hostile_files import (
    EVIL,
    ODD_YAML,
    in_zip,
    op_codes,
    recipe_contents,
    saved,
    states,
    tensor_files,
    yaml_texts,
)
from semtok import Generator, Tokenizer
from semtok.data.caches.latent_cache import ensure_latent_cache, open_latent_cache
from semtok.data.caches.shards import INDEX, shard_checksum
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.data.source import Key
from semtok.diffusion.diffusion_config import DiffusionConfig, build_network, resolve_defaults
from semtok.hub.checkpoints import read_checkpoint
from semtok.hub.formats import read_statistics
from semtok.hub.imports import import_checkpoint
from semtok.hub.job import ImportOptions
from semtok.recipe import load_diffusion_recipe, load_recipe, parse_data
from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.sampling import SamplerConfig
from semtok.storage import read_weights
from test_import_vae import of_kinds, official

Kind = Callable[[Path, Path], Inputs]
"""Of a folder of valid files, and the folder that may be written to."""
KINDS: dict[str, Kind] = {}


def kind(make: Kind) -> Kind:
    KINDS[make.__name__] = make
    return make


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small valid files."""
    root = tmp_path_factory.mktemp("valid")
    tokenizer = tiny.measured({"name": "vae"})
    tokenizer.save_pretrained(root / "tokenizer")
    shape = DiTArchitecture(depth=1, width=24, heads=2, patch_size=2)
    config = resolve_defaults(DiffusionConfig(network=shape, repa=False), tokenizer)
    network = build_network(config, tokenizer.spec, num_classes=2)
    Generator(
        network,
        tokenizer,
        config,
        SamplerConfig(steps=2),
        class_names=("a", "b"),
        image_size=(16, 16),
    ).save_pretrained(root / "generator")
    data = ShapesConfig(size=16, num_images=6, num_validation_images=4, cache=str(root / "cache"))
    sources = Shapes(data, train=True), Shapes(data, train=False)
    ensure_latent_cache(sources, tokenizer, root / "cache", data=data, shard_size=4)
    torch.save(official(of_kinds(("", ""), ("", ""))), root / "coder.pt")
    return root


place = pytest.fixture(only_place)


# Settings -----------------------------------------------------------------------------------------


@kind
def recipes(valid: Path, place: Path):
    def read(text: bytes) -> None:
        file = place / "recipe.yaml"
        file.write_bytes(text)
        load = load_diffusion_recipe if b"tokenizer" in text else load_recipe
        load(file, [])

    return yaml_texts(), read


@kind
def overrides(valid: Path, place: Path):
    contents = recipe_contents()
    keys = [
        "data.size",
        "train.steps",
        "train.optimiser",
        "method.name",
        "method.vae",
        "teacher.layers",
    ]
    keys += [
        "plugins",
        "data",
        "method",
        "train.optimiser.betas",
        "data.kind",
        "diffusion.network",
        "sampler",
    ]
    keys += ["diffusion.network.width", "method.vae.block_channels", "data.classes", "data.path"]
    value = values().map(str) | st.sampled_from(ODD_YAML)
    word = st.builds("{}={}".format, st.sampled_from(keys), value) | st.text(max_size=12)
    for number, content in enumerate(contents):
        (place / f"{number}.yaml").write_text(yaml.safe_dump(content))

    def read(given: tuple[int, list[str]]) -> None:
        number, words = given
        load = load_diffusion_recipe if "tokenizer" in contents[number] else load_recipe
        with_errors(
            lambda: load(place / f"{number}.yaml", words),
            lambda: parse_data(
                ["path=.", *(w.removeprefix("data.") for w in words)], place="--data"
            ),
        )

    return st.tuples(
        st.integers(0, len(contents) - 1), st.lists(word, min_size=1, max_size=3)
    ), read


# Exports, caches ----------------------------------------------------------------------------------


@st.composite
def folders(draw: st.DrawFn, files: Files) -> Files:
    """A folder with one or two of its files changed."""
    files = dict(files)
    names = [name for name in files if not name.endswith(("README.md", ".png"))]
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)):
        content = files[name]
        how = draw(st.sampled_from(["inside", "inside", "inside", "bytes", "gone"]))
        if how == "gone":
            del files[name]
        elif how == "inside" and name.endswith(".json"):
            files[name] = json.dumps(draw(changed(json.loads(content)))).encode()
        elif how == "inside" and name.endswith(".safetensors"):
            files[name] = draw(tensor_files(content))
        else:
            files[name] = draw(damaged(content))
    return files


@kind
def exports(valid: Path, place: Path):
    made = {name: read_files(valid / name) for name in ("tokenizer", "generator")}
    inputs = st.sampled_from(sorted(made)).flatmap(
        lambda name: st.tuples(st.just(name), folders(made[name]))
    )

    def read(given: tuple[str, Files]) -> None:
        name, files = given
        folder = write(place / "export", files)
        (Tokenizer if name == "tokenizer" else Generator).from_pretrained(folder)

    return inputs, read


@kind
def caches(valid: Path, place: Path):
    tokenizer = Tokenizer.from_pretrained(valid / "tokenizer")
    data = ShapesConfig(size=16, num_images=6, num_validation_images=4, cache=str(valid / "cache"))
    inputs = st.tuples(folders(read_files(valid / "cache")), st.booleans())

    def read(given: tuple[Files, bool]) -> None:
        files, is_signed = given
        folder = write(place / "cache", files)
        if is_signed:  # by somebody who knows how
            sign(folder)
        for source in open_latent_cache(folder, tokenizer, data=data):
            source.load(range(len(source)))
            if source.flip:
                source.load_keys([Key(0, True)])

    return inputs, read


def sign(folder: Path) -> None:
    """Writes the sizes and checksums of the shards as they are into the index."""
    for index in folder.glob(f"*/{INDEX}"):
        try:
            content = json.loads(index.read_bytes())
            for entry in content["shards"]:
                file = index.parent / Path(entry["file"]).name
                entry |= {"bytes": file.stat().st_size, "checksum": shard_checksum(file)}
        except (ValueError, LookupError, TypeError, OSError):
            continue
        index.write_text(json.dumps(content))


# Checkpoints --------------------------------------------------------------------------------------


@kind
def pickles(valid: Path, place: Path):
    form = st.sampled_from(["zip", "old", "plain"])
    array = np.arange(6, dtype=np.float32)
    good = {"mean": torch.zeros(3), "std": torch.ones(3), "n": np.float64(3), "a": [1, {"b": "c"}]}
    plain = {"components": array, "pca_mean": array, "mean": array, "std": array + 1}
    of = {"zip": saved(good, "zip"), "old": saved(good, "old"), "plain": saved(plain, "plain")}
    content = {"model": {"a": torch.ones(1)}}
    evil = st.sampled_from([saved(content | {"x": one}, f) for one in EVIL for f in of])
    odd_names = st.sampled_from(
        ["../data.pkl", "archive/../../data.pkl", "/data.pkl", "archive/data.pkl"]
    )
    inputs = (
        form.flatmap(lambda f: damaged(of[f]))
        | evil
        | evil.flatmap(damaged)
        | op_codes()
        | st.builds(in_zip, op_codes())
        | st.builds(in_zip, st.just(pickle.dumps({"mean": [1.0], "std": [2.0]}, 2)), odd_names)
    )

    def read(content: bytes) -> None:
        file = place / "x.pt"
        file.write_bytes(content)
        with_errors(
            lambda: read_checkpoint(file), lambda: read_weights(file), lambda: read_statistics(file)
        )
        assert not (place.parent / "hit").exists()

    return inputs, read


@kind
def checkpoints(valid: Path, place: Path):
    state = torch.load(valid / "coder.pt", weights_only=True)
    nested = st.builds(
        lambda own, name, more: {name: own, "args": more, "epoch": 1} if name else own,
        states(state),
        st.sampled_from(["", "model", "ema", "state_dict"]),
        changed({"resolution": 256, "model": "SiT-B/2", "loss": {"weight": 1}}),
    )
    folder = read_files(valid / "tokenizer" / "vae")
    inputs = st.builds(saved, nested, st.just("zip")).map(
        lambda content: {"x.pt": content}
    ) | folders(folder)

    def read(files: Files) -> None:
        folder = write(place / "checkpoint", files)
        path = folder / "x.pt" if "x.pt" in files else folder
        import_checkpoint(path, "auto", ImportOptions()).save(place / "imported")

    return inputs, read


@pytest.mark.parametrize("name", KINDS)
def test_odd_files_are_read_or_refused_in_one_line(name, valid, place):
    fuzz(KINDS[name](valid, place), place, FEW)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_many_odd_files_are_read_or_refused_in_one_line(name, valid, place):
    fuzz(KINDS[name](valid, place), place, MANY)


def test_a_pickle_asks_for_no_table_larger_than_itself(place):
    """Of two billion places, in eight bytes."""
    (place / "x.pkl").write_bytes(b"\x80\x02}r\xff\xff\xff\x7f.")
    with little_memory():
        assert read_checkpoint(place / "x.pkl") == {}
