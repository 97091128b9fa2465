"""Generators as diffusers pipelines: the same images, from a folder that needs no semtok."""

import ast
import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import ModelCard, ModelCardData, constants
from safetensors.torch import load_file
from torch import Tensor

import tiny
from hub_server import TOKEN, hub_server
from semtok import Generator, Tokenizer, UserError
from semtok.commands import hub
from semtok.commands.cli import run
from semtok.diffusion.diffusion_config import (
    DiffusionConfig,
    InternalGuidanceConfig,
    build_network,
    resolve_defaults,
)
from semtok.diffusion.routing import RoutingConfig
from semtok.hub import export_pipeline as code
from semtok.hub.diffusers.pipeline import SemtokPipeline
from semtok.hub.diffusers.scheduler import SemtokScheduler
from semtok.hub.diffusers.transformer import SemtokTransformer
from semtok.hub.export_pipeline import export_pipeline
from semtok.images import to_uint8
from semtok.methods.vae import KLTokenizer
from semtok.pictures import write_png
from semtok.recipe import load_diffusion_recipe, parse_diffusion_recipe
from semtok.sampler import latents
from semtok.sampler.architecture import DiTArchitecture, HeadArchitecture
from semtok.sampler.draws import SampleNoise
from semtok.sampler.guidance import GuidanceConfig
from semtok.sampler.latents import Latents
from semtok.sampler.sampling import SamplerConfig
from semtok.sampler.transport import TimeConfig
from semtok.storage import read_json
from textures import texture

SIT = DiTArchitecture(depth=2, width=32, heads=2, patch_size=2)
LIGHTNING = DiTArchitecture(depth=2, width=32, heads=2, rms_norm=True, swiglu=True, rope=True)
NAMES = ("red circle", "blue square", "7")


def generator(
    tokenizer: Tokenizer,
    shape: DiTArchitecture,
    sampler: dict[str, Any],
    *,
    guidance: dict[str, Any] | None = None,
    image_size: tuple[int, int] = (16, 24),
    **settings: Any,
) -> Generator:
    """One with random weights, whose images depend on every input."""
    torch.manual_seed(0)
    config = DiffusionConfig(network=shape, repa=False, **settings)
    config = resolve_defaults(config, tokenizer)
    names = () if config.unconditional else NAMES
    network = tiny.awake(build_network(config, tokenizer.spec, num_classes=len(names))).eval()
    chosen = SamplerConfig(**sampler, guidance=GuidanceConfig(**(guidance or {})))
    return Generator(network, tokenizer, config, chosen, class_names=names, image_size=image_size)


def rescaled(tokenizer: Tokenizer) -> Tokenizer:
    """A composite whose own statistics of the texture are not those of the tokenizer inside."""
    changed = copy.deepcopy(tokenizer)
    changed.texture_mean += 0.3
    changed.texture_std *= 1.2
    return changed


def plain() -> Generator:
    return generator(
        tiny.tokenizer("vae", "none", False),
        SIT,
        {"method": "euler", "steps": 4},
        guidance={"scale": 1.5, "interval": (0.2, 0.8)},
    )


def frozen() -> Generator:
    """On the latents of another class of autoencoder, that has no posterior."""
    tokenizer = KLTokenizer(texture("dc"), method="vae", statistics=(torch.zeros(4), torch.ones(4)))
    return generator(tokenizer.eval(), SIT, {"method": "euler", "steps": 4})


def reglue() -> Generator:
    return generator(
        rescaled(tiny.tokenizer("vae", "reglue", True)),
        LIGHTNING,
        {"method": "heun", "steps": 3},
        guidance={"scale": {"texture": 2.0, "global": 1.5}, "interval": {"global": (0.1, 0.6)}},
        time=TimeConfig(shift="dimension"),
    )


def sfd() -> Generator:
    return generator(
        tiny.tokenizer("vae", "semvae", False),
        LIGHTNING,
        {"method": "sde", "steps": 5, "diffusion": "linear"},
        guidance={"scale": 1.5, "num_channels": 3},
        path="cosine",
    )


def published() -> Generator:
    """SFD's own way over the borders."""
    return generator(
        tiny.tokenizer("vae", "semvae", False),
        LIGHTNING,
        {"method": "heun2", "steps": 7, "split_at_borders": False, "shift": 0.7},
    )


def adaptive() -> Generator:
    return generator(
        tiny.tokenizer("send_vae", "redi", False),
        LIGHTNING,
        {"method": "dopri5", "rtol": 1e-2, "atol": 1e-3},
        leads={"semantic": 0.3},
    )


def unconditional() -> Generator:
    return generator(
        tiny.tokenizer("vae", "none", False),
        SIT,
        {"method": "heun", "steps": 3},
        unconditional=True,
    )


def routed() -> Generator:
    """Guided from the dropped path, and from a second head where a call says so; predicts data."""
    return generator(
        tiny.tokenizer("vae", "reglue", True),
        LIGHTNING.model_copy(update={"depth": 4, "value_residual": True}),
        {"method": "euler", "steps": 3},
        guidance={"scale": 1.5, "base": "dropped_path", "interval": (0.3, 1.0)},
        routing=RoutingConfig(first=1, last=1),
        internal_guidance=InternalGuidanceConfig(after=1),
        prediction="data",
        class_dropout=0.1,
    )


def rae() -> Generator:
    """On a RAE's tokens, with statistics of each position and so of one grid, by a network with a wide head."""
    head = HeadArchitecture(depth=1, width=48, heads=3)
    return generator(
        tiny.tokenizer("rae", "none", False),
        LIGHTNING.model_copy(update={"head": head}),
        {"method": "euler", "steps": 4},
        guidance={"scale": 1.5, "interval": (0.0, 0.9)},
        image_size=(16, 16),
    )


def reglue_on_rae() -> Generator:
    """On another grid than the decoder's, with statistics of each channel."""
    texture = tiny.measured({"name": "rae", "statistics": "channel"})
    composite = tiny.measured(tiny.SEMANTICS["reglue"] | {"global_token": True}, texture)
    return generator(
        rescaled(composite),
        LIGHTNING,
        {"method": "heun", "steps": 2},
        guidance={"scale": {"texture": 2.0, "global": 1.5}},
    )


SAVED_AGAIN = """
from diffusers import DiffusionPipeline
load = lambda folder: DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
load("{folder}").save_pretrained("{again}")
images = load("{again}")([0, "7", None, "blue square"], seed=5, output_type="pt").images
"""
RAES = ("rae", "reglue_on_rae")
MODELS: dict[str, Callable[[], Generator]] = {
    f.__name__: f
    for f in (plain, frozen, reglue, sfd, published, adaptive, routed, unconditional)
    + (rae, reglue_on_rae)
}


class Exports:
    """Models, the pipelines they were exported as, and what a process without semtok made of these."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.models = {name: build() for name, build in MODELS.items()}
        for name, model in self.models.items():
            export_pipeline(model, root / name)
        self.results: dict[str, Any] = {}
        self.images_to_start_from = torch.rand(
            2, 3, 16, 24, generator=torch.Generator().manual_seed(0)
        )

    def images(self, call: str) -> Tensor:
        """Pixels in [-1, 1] of a call."""
        result = self.results[call]
        assert isinstance(result, Tensor), result
        return result * 2 - 1


def noise(model: Generator, seed: int, num: int) -> dict[str, Tensor]:
    """What the first samples of a seed start from."""
    draw, grid = SampleNoise(seed, range(num), torch.device("cpu")), (4, 6)
    return {
        part.name: draw((part.channels, *grid) if part.is_spatial else (part.channels,))
        for part in model.network.spec.parts
    }


def calls(exports: Exports) -> dict[str, dict[str, Any]]:
    """All that is asked of the other process."""
    folders = {name: str(exports.root / name) for name in MODELS}
    labels = {name: [0, "7", None, "blue square"] for name in MODELS} | {"unconditional": [0, None]}
    asked: dict[str, dict[str, Any]] = {
        name: {"folder": folder, "arguments": {"class_labels": labels[name], "seed": 5}}
        for name, folder in folders.items()
    }

    def ask(name: str, model: str, **arguments: Any) -> None:
        asked[name] = {"folder": folders[model], "arguments": {"seed": 0} | arguments}

    ask("one", "sfd", class_labels="blue square", seed=5, first=3)
    image = exports.images_to_start_from
    ask("from images", "frozen", class_labels=[1, 1], image=image, strength=0.5)
    for name in RAES:
        ask(f"{name} from images", name, class_labels=[1, 1], image=image, strength=0.5)
        asked[f"{name} in half"] = asked[name] | {"options": {"torch_dtype": torch.bfloat16}}
    asked["rae saved again"] = {
        "code": SAVED_AGAIN.format(folder=folders["rae"], again=exports.root / "again")
    }
    ask("each twice", "plain", class_labels=[2, 0], num_images_per_class=2, seed=5)
    ask("guided otherwise", "reglue", class_labels=[1], guidance_scale=3.0, num_inference_steps=2)
    ask("guided by part", "reglue", class_labels=[1], guidance_scale={"semantic": 2.0})
    for base in ("null_label", "inner_head"):
        ask(base, "routed", class_labels=[1], guidance_base=base)
    ask("no head", "plain", class_labels=[1], guidance_base="inner_head")
    ask("not guided", "plain", class_labels=[1], guidance_scale=1)
    start = noise(exports.models["sfd"], 5, 4)
    ask("started", "sfd", class_labels=labels["sfd"], seed=5, latents=start)
    swapped = {name: part.flip(0) for name, part in start.items()}
    ask("started elsewhere", "sfd", class_labels=[1, 1, 1, 1], seed=5, latents=swapped)
    for kind in ("pil", "np", "latent"):
        ask(kind, "reglue", class_labels=[0, 1], output_type=kind)
    ask("no classes", "unconditional", num_images_per_class=3)
    ask("no guidance", "unconditional", guidance_scale=2.0)
    for dtype in (torch.bfloat16, torch.float16):
        name = f"{dtype}".removeprefix("torch.")
        ask(name, "reglue", class_labels=[0, 1], seed=5)
        asked[name]["options"] = {"torch_dtype": dtype}
    # By the other ways to say which code to run; the second has a sampler of its own from then on.
    file = str(exports.root / "plain" / "pipeline.py")
    asked["by file"] = asked["plain"] | {"options": {"custom_pipeline": file}}
    asked["resampled"] = asked["plain"] | {
        "options": {"custom_pipeline": folders["plain"]},
        "sampler": {"method": "heun", "shift": 2.0},
    }
    asked["in one batch"] = asked["adaptive"] | {
        "options": {"custom_pipeline": folders["adaptive"]},
        "sampler": {"error_over": "batch"},
    }
    return asked


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exports]:
    """Everything is loaded and drawn in one other process, which takes longest to start."""
    root = tmp_path_factory.mktemp("pipelines")
    made = Exports(root)
    asked = calls(made)
    with pytest.MonkeyPatch.context() as patch:
        # As if another version of semtok had made it.
        other = "\n\ndef time_grid(*_, **__):\n    raise ValueError('another version')\n"
        code_of = code.code_of
        patch.setattr(code, "code_of", lambda module: code_of(module) + other)
        export_pipeline(made.models["plain"], root / "other")
    asked["other"] = asked["plain"] | {"folder": str(root / "other")}
    with hub_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.address)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        assert run(hub.main, ["push", str(root / "plain"), "org/name", "--yes"]) == 0
        card = server.files("org/name")["README.md"].decode()
        asked["card"] = {"code": re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]}
        torch.save(asked, root / "calls.pt")
        environment = os.environ | {
            "HF_ENDPOINT": server.address,
            "HF_HOME": str(root / "home"),
            "HF_MODULES_CACHE": str(root / "modules"),
            "HF_HUB_DISABLE_XET": "1",
        }
        script = Path(__file__).with_name("pipeline_process.py")
        words = [sys.executable, str(script), str(root / "calls.pt"), str(root / "results.pt")]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for trouble in ("cannot get type annotation", "Expected types", "not expected by", "Error"):
        assert trouble not in done.stderr
    made.results = torch.load(root / "results.pt", weights_only=True)
    yield made


def same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=1e-4)


# The same images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_pipeline_draws_its_generators_images(exports, name):
    model = exports.models[name]
    labels = [0, 0] if name == "unconditional" else [0, "7", 3, 1]
    wanted = model.sample(labels, seed=5)
    assert wanted.shape == (len(labels), 3, *model.image_size) and wanted.std() > 0.05
    assert same(exports.images(name), wanted)


def test_a_pipeline_starts_from_images_that_an_encoder_without_posterior_has_coded(exports):
    model = exports.models["frozen"]
    wanted = model.sample([1, 1], seed=0, image=exports.images_to_start_from, strength=0.5)
    assert same(exports.images("from images"), wanted)
    assert not same(wanted, model.sample([1, 1], seed=0))


def test_a_raes_pipeline_has_its_decoder_to_the_bit_and_no_encoder(exports):
    for name in RAES:
        wanted = exports.models[name].sample([0, "7", 3, 1], seed=5)
        difference = (exports.images(name) - wanted).abs().max()
        assert difference < 1e-5
        half = (exports.images(f"{name} in half") - wanted).abs().max()
        assert difference < half < 0.1
        weights = load_file(exports.root / name / "vae/diffusion_pytorch_model.safetensors")
        assert {key.split(".")[0] for key in weights} == {"decoder", "latents_mean", "latents_std"}
    assert torch.equal(exports.images("rae saved again"), exports.images("rae"))
    told = "image: this model's latents are a vision model's tokens"
    assert exports.results["rae from images"].startswith(told)
    assert exports.results["reglue_on_rae from images"].startswith("image: this model also draws")


def test_an_image_belongs_to_its_seed_and_place(exports):
    whole = exports.images("sfd")
    assert same(exports.images("one"), whole[3:]) and not same(whole[1:2], whole[3:])
    twice = exports.models["plain"].sample([2, 2, 0, 0], seed=5)
    assert same(exports.images("each twice"), twice)


def test_a_call_can_have_its_own_steps_and_guidance(exports):
    model, own = exports.models["reglue"], exports.models["reglue"].sampler

    def guided(scale: Any, steps: int) -> SamplerConfig:
        guidance = own.guidance.model_copy(update={"scale": scale})
        return own.model_copy(update={"guidance": guidance, "steps": steps})

    for name, sampler in (
        ("guided otherwise", guided(3.0, 2)),
        ("guided by part", guided({"semantic": 2.0}, 3)),
    ):
        assert same(exports.images(name), model.sample([1], seed=0, sampler=sampler))
    model = exports.models["plain"]
    sampler = model.sampler.model_copy(update={"guidance": GuidanceConfig()})
    assert same(exports.images("not guided"), model.sample([1], seed=0, sampler=sampler))


def test_a_call_can_say_what_is_guided_away_from(exports):
    model, drawn = exports.models["routed"], []
    for base in ("null_label", "inner_head"):
        drawn.append(exports.images(base))
        assert same(drawn[-1], model.sample([1], seed=0, guidance_base=base))
    assert not same(drawn[0], drawn[1])
    assert not same(drawn[0], model.sample([1], seed=0))
    told = "sampler.guidance.base: inner_head needs a network with a second head"
    assert exports.results["no head"].startswith(told)


def test_a_scheduler_can_be_given_other_settings(exports):
    model = exports.models["plain"]
    sampler = model.sampler.model_copy(update={"method": "heun", "shift": 2.0})
    wanted = model.sample([0, "7", 3, 1], seed=5, sampler=sampler)
    assert same(exports.images("resampled"), wanted) and same(
        exports.images("by file"), exports.images("plain")
    )
    model = exports.models["adaptive"]
    sampler = model.sampler.model_copy(update={"error_over": "batch"})
    wanted = model.sample([0, "7", 3, 1], seed=5, sampler=sampler)
    assert same(exports.images("in one batch"), wanted)
    assert not torch.equal(exports.images("in one batch"), exports.images("adaptive"))


def test_noise_can_be_given(exports):
    assert same(exports.images("started"), exports.images("sfd"))
    given, drawn = exports.images("started elsewhere"), exports.images("sfd")
    assert not same(given[3:], drawn[3:]), "the class and place are the same, the noise is not"


def test_images_come_as_diffusers_gives_them(exports):
    wanted = exports.models["reglue"].sample([0, 1], seed=0)
    pil, array, latent = (exports.results[kind] for kind in ("pil", "np", "latent"))
    assert array.shape == (2, 16, 24, 3) and same(array.permute(0, 3, 1, 2) * 2 - 1, wanted)
    assert pil.dtype == torch.uint8
    difference = pil.permute(0, 3, 1, 2).int() - to_uint8(wanted).int()
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01
    ours = exports.models["reglue"].sample_latents([0, 1], seed=0)
    assert list(latent) == ["texture", "semantic", "global"]
    assert all(torch.equal(latent[name], ours[name]) for name in ours)


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.1), ("float16", 0.02)])
def test_half_precision_draws_nearly_the_same(exports, dtype, most):
    half, wanted = exports.images(dtype), exports.models["reglue"].sample([0, 1], seed=5)
    assert 0 < (half - wanted).abs().max() < most


def test_an_unconditional_pipeline_takes_no_classes_and_no_guidance(exports):
    wanted = exports.models["unconditional"].sample([0, 0, 0], seed=0)
    assert same(exports.images("no classes"), wanted)
    assert exports.results["no guidance"].startswith(
        "guidance_scale: this model was trained without the null label"
    )


def test_what_is_pushed_loads_from_the_hub_as_its_card_says(exports):
    wanted = exports.models["plain"].sample(["red circle", "blue square"], seed=0)
    difference = exports.results["card"].permute(0, 3, 1, 2).int() - to_uint8(wanted).int()
    assert difference.abs().max() <= 1


def test_models_of_several_versions_run_in_one_process(exports):
    assert exports.results["other"] == "another version"
    # It was loaded last, over the others' pipeline.py, so that this is to need nothing but its class.
    source = (exports.root / "plain/pipeline.py").read_text()
    definitions = [
        n for n in ast.parse(source).body if not isinstance(n, ast.ImportFrom | ast.Import)
    ]
    assert [type(n) for n in definitions] == [ast.Expr, ast.ClassDef]


def test_the_samplers_files_fit_into_one():
    """Each name that two of them give means the same in both, and they import nothing else of the library."""
    meanings: dict[str, set[str]] = {}
    for file in sorted(Path(latents.__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None)
                for alias in node.names:
                    meaning = f"{module or alias.name}.{alias.name if module else ''}"
                    if module and module.startswith("semtok"):
                        assert module.startswith("semtok.sampler.") and alias.asname is None
                        meaning = f"{module.rpartition('.')[2]}.{alias.name}"
                    meanings.setdefault(alias.asname or alias.name, set()).add(meaning)
                continue
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]
            for name in filter(None, names):
                meanings.setdefault(name, set()).add(f"{file.stem}.{name}")
    assert {"DiT", "sample_latents", "torch"} <= meanings.keys()
    assert not {name: found for name, found in meanings.items() if len(found) > 1}


# What is refused ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(exports: Exports) -> SemtokPipeline:
    """The export of ``sfd``, by the classes that its code was made of."""
    folder = exports.root / "sfd"
    made = SemtokPipeline(
        SemtokTransformer.from_pretrained(folder / "transformer"),
        SemtokScheduler.from_pretrained(folder / "scheduler"),
        AutoencoderKL.from_pretrained(folder / "vae"),
        **{
            k: v
            for k, v in read_json(folder / "model_index.json").items()
            if k in ("id2label", "height", "width")
        },
    )
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"class_labels": ["green"]},
            "no class 'green'; this model has 0 to 2, or by name red circle",
        ),
        ({"class_labels": [4]}, "no class 4; this model has 0 to 2"),
        ({"class_labels": []}, "no images asked for"),
        ({"class_labels": 0, "num_images_per_class": 0}, "no images asked for"),
        (
            {"num_inference_steps": 0},
            "sampler.steps: Input should be greater than or equal to 1, got 0",
        ),
        ({"guidance_scale": {"semantc": 2.0}}, "no part semantc; this model's: texture, semantic"),
        ({"guidance_scale": "2"}, "sampler.guidance.scale.float: Input should be a valid number"),
        (
            {"latents": {"texture": torch.zeros(1, 4, 4, 6)}},
            r"latents: expected {.*'semantic': \(1, 4, 4, 6\)",
        ),
        ({"output_type": "jpeg"}, "output_type 'jpeg': expected pil, np, pt or latent"),
    ],
)
def test_wrong_arguments_are_told_in_their_own_words(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**{"class_labels": [0]} | arguments)
    assert "\n" not in str(error.value)


def test_settings_that_exclude_each_other_are_told(pipeline):
    config = pipeline.scheduler.config
    with pytest.raises(ValueError, match="^sampler.split_at_borders=false goes with euler"):
        SemtokScheduler.from_config(config, sampler=config.sampler | {"split_at_borders": False})


def test_a_bar_shows_each_step_once(pipeline, capfd):
    pipeline.set_progress_bar_config(disable=False)
    pipeline([0, 1])
    pipeline.set_progress_bar_config(disable=True)
    assert "7/7" in capfd.readouterr().err, "five steps, of which the lead splits two"


def test_channels_that_a_model_has_not_are_told(pipeline):
    config = pipeline.scheduler.config
    guidance = config.sampler["guidance"] | {"num_channels": 9}
    other = copy.copy(pipeline)
    other.scheduler = SemtokScheduler.from_config(
        config, sampler=config.sampler | {"guidance": guidance}
    )
    with pytest.raises(ValueError, match="num_channels: the texture has 4 channels, not 9"):
        other([0])


def test_a_texture_of_another_kind_is_refused_before_anything_is_written(tmp_path):
    class Darker(KLTokenizer):
        def decode_raw(self, raw: Latents) -> Tensor:
            return super().decode_raw(raw) - 0.5

    model = plain()
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.__class__, model.tokenizer.method = Darker, "darker"
    with pytest.raises(
        ValueError, match="method 'darker': its texture is decoded neither by an autoencoder"
    ):
        export_pipeline(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_foreign_folders_are_left_alone_and_own_ones_replaced(exports, tmp_path):
    model = exports.models["plain"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes: holds other files"):
        export_pipeline(model, tmp_path / "notes")
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="sd: holds somebody else's pipeline"):
        export_pipeline(model, tmp_path / "sd")
    assert run(hub.main, ["push", str(tmp_path / "sd"), "org/name", "--yes"]) == 2
    for _ in range(2):
        export_pipeline(model, tmp_path / "own")
    assert (tmp_path / "own/pipeline.py").read_text() == (
        exports.root / "plain/pipeline.py"
    ).read_text()


def test_a_raes_card_says_what_it_has_not(exports):
    cards = {name: ModelCard.load(exports.root / name / "README.md").text for name in MODELS}
    without = {name for name, text in cards.items() if "takes no `image` to start from" in text}
    assert without == set(RAES)
    assert cards["rae"].count("- RAE, arXiv 2510.11690") == 1


def test_a_pipeline_is_no_tokenizer_and_no_generator(exports):
    with pytest.raises(
        ValueError, match="is a diffusers pipeline; its image autoencoder is .*plain/vae"
    ):
        Tokenizer.from_pretrained(exports.root / "plain")
    with pytest.raises(
        ValueError, match="is a diffusers pipeline; give the model that it was exported"
    ):
        Generator.from_pretrained(exports.root / "plain")
    for folder in (exports.root / "rae", exports.root / "rae/vae"):
        with pytest.raises(UserError, match="alone; give the tokenizer of the model that it was"):
            Tokenizer.from_pretrained(folder)
    vae = Tokenizer.from_pretrained(exports.root / "reglue" / "vae")
    assert torch.allclose(vae.texture_mean, exports.models["reglue"].tokenizer.texture_mean)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("offload", [False, True])
def test_a_pipeline_moves_to_a_gpu(exports, pipeline, offload):
    moved = copy.deepcopy(pipeline)
    moved.enable_model_cpu_offload() if offload else moved.to("cuda")
    images = moved([0, "7", None, 1], seed=5, output_type="pt").images
    assert images.device.type == "cuda"
    assert (images.cpu() * 2 - 1 - exports.images("sfd")).abs().max() < 0.02  # TF32


# The command -------------------------------------------------------------------------------------


def test_the_command_exports_a_run_with_its_card_and_recipe(tmp_path, capsys):
    content = tiny.content(steps=2) | {"diffusion": {"network": SIT.model_dump()}}
    content |= {"tokenizer": "demo"}
    del content["method"], content["teacher"]
    model = plain()
    model.training_info = {
        "data": "shapes (24 images)",
        "metrics": {"velocity": 0.5},
        "recipe": parse_diffusion_recipe(content, "tiny").model_dump(mode="json"),
    }
    write_png(tmp_path / "samples.png", torch.zeros(3, 8, 8, dtype=torch.uint8))
    model.save_pretrained(tmp_path / "dit", pictures={"samples": tmp_path / "samples.png"})
    output = tmp_path / "pipeline"
    assert run(hub.main, ["export", str(tmp_path / "dit"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"diffusers pipeline: {output}" and len(printed) == 4
    assert f'from_pretrained("{output}", trust_remote_code=True)' in printed[2]

    index = read_json(output / "model_index.json")
    assert index["_class_name"] == ["pipeline", "SemtokPipeline"] and index["_library"] == "semtok"
    for component in ("transformer", "scheduler"):
        assert (output / component / f"{index[component][0]}.py").is_file()
    assert load_diffusion_recipe(output / "recipe.yaml", []).train.steps == 2
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "diffusers" and card.data.datasets == ["shapes"]
    assert card.data.license == "apache-2.0"
    assert ModelCardData(**card.data.to_dict()).to_dict() == card.data.to_dict()
    assert "arXiv 2401.08740" in card.text and "arXiv 2112.10752" in card.text
    assert "](pictures/samples.png)" in card.text and (output / "pictures/samples.png").is_file()
    pip = next(line for line in card.text.splitlines() if line.startswith("pip install"))
    for package in ("diffusers", "einops", "pydantic", "timm", "torch"):
        assert re.search(rf"\b{package}\b", pip)
    assert "semtok" not in pip and "torchdiffeq" not in pip
    assert run(hub.main, ["export", "nowhere", "--output", str(tmp_path / "x")]) == 2
