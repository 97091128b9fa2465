"""Any texture with any semantics, a token, a lead and a network: every pair of these trains, draws and decodes."""

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from benchmarks.timing import TrainerStep
from benchmarks.training import make_trainer
from semtok import Generator, Tokenizer
from semtok.commands.train_dit import build_diffusion_objective
from semtok.data.images.kinds import open_sources
from semtok.methods.vae import KLTokenizer
from semtok.recipe import parse_diffusion_recipe
from semtok.registry import _METHODS
from semtok.training.loop import Trainer
from textures import texture

STEPS = 10
METHODS: dict[str, dict[str, Any]] = {
    "vae": {"name": "vae"},
    "send_vae": {"name": "send_vae"},
    "va_vae": {"name": "va_vae"},
    "equivariance": {"name": "vae", "equivariance": {}},
    "decoder_noise": {"name": "vae", "decoder_noise": {"law": "mixed", "strength": 3.0}},
    "rae": {"name": "rae"},
    "repae": {
        "name": "repae",
        "tokenizer": {"name": "vae", "vae": tiny.AUTOENCODER},
        "diffusion": {
            "network": {"depth": 2, "width": 24, "heads": 2, "patch_size": 2},
            "repa": {"depth": 1, "projector_width": 16},
        },
        "sampler": {"steps": 2},
    },
}
NETWORKS: dict[str, dict[str, Any]] = {
    "SiT": {},
    "LightningDiT": {"rope": True, "rms_norm": True, "swiglu": True, "qk_norm": True},
    "wide head": {"head": {"depth": 1, "width": 32, "heads": 2}},
}
AXES: dict[str, tuple[Any, ...]] = {
    "texture": (*METHODS, "frozen"),
    "semantic": tuple(tiny.SEMANTICS),
    "token": (False, True),
    "lead": (False, True),
    "network": tuple(NETWORKS),
}


def can_be(case: dict[str, Any]) -> bool:
    """A part can lead the texture where there is another one."""
    return not case["lead"] or case["semantic"] != "none" or case["token"]


def pairs_of(case: dict[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(case.items(), 2))


def cover() -> Iterator[dict[str, Any]]:
    """Few cases that have every pair of two axes' values: each next one has most of the pairs that are left."""
    cases = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
    cases = [case for case in cases if can_be(case)]
    left = set().union(*map(pairs_of, cases))
    while left:
        best = max(cases, key=lambda case: len(left & pairs_of(case)))
        left -= pairs_of(best)
        yield best


CASES = list(cover())


def take_steps(trainer: Trainer) -> dict[str, float]:
    """Means of what ten steps have noted; a value that is not finite is an error."""
    step = TrainerStep(trainer)
    for _ in range(STEPS):
        step.take()
    return trainer.metrics.read(lambda values: values)


@pytest.fixture(scope="module")
def textures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """A tokenizer of the texture alone, by name, after ten steps of its training."""
    folder = tmp_path_factory.mktemp("textures")

    @cache
    def build(name: str) -> Tokenizer:
        if name == "frozen":
            return KLTokenizer(texture("dc"), method="vae", statistics=STATISTICS).eval()
        return trained(folder / name, METHODS[name])

    return build


STATISTICS = (torch.zeros(4), torch.full((4,), 0.5))


def trained(folder: Path, method: dict[str, Any]) -> Tokenizer:
    trainer = tiny.trainer(folder, method, steps=STEPS, batch_size=2)
    values = take_steps(trainer)
    assert all(torch.isfinite(torch.tensor(value)) for value in values.values()), values
    objective = trainer.objective
    tokenizer = objective.tokenizer(objective.averaged_module()).eval().requires_grad_(False)
    tokenizer.measure_statistics([tiny.batch_of_shapes(8)])
    return tokenizer


def recipe_of(case: dict[str, Any]) -> Any:
    content = tiny.content(steps=STEPS, batch_size=2)
    del content["method"]
    shape = {"depth": 2, "width": 24, "heads": 2, "patch_size": 2} | NETWORKS[case["network"]]
    leader = "global" if case["semantic"] == "none" else "semantic"
    leads = {"leads": {leader: 0.3 if case["lead"] else 0.0}}
    content["diffusion"] = {"network": shape, **(leads if case["lead"] else {})}
    content |= {"tokenizer": "tiny", "sampler": {"steps": 2}}
    return parse_diffusion_recipe(content, "tiny")


def test_the_cases_have_every_texture_with_every_semantics_and_every_pair_else():
    seen = set().union(*map(pairs_of, CASES))
    for one, other in itertools.combinations(AXES, 2):
        missing = {
            (a, b)
            for a, b in itertools.product(AXES[one], AXES[other])
            if ((one, a), (other, b)) not in seen
        }
        assert not missing, (one, other)
    most = len(AXES["texture"]) * len(AXES["semantic"])
    assert len(CASES) <= most + 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_ten_steps_are_finite_and_what_is_drawn_decodes(case, textures, tmp_path):
    base, with_token = textures(case["texture"]), case["token"]
    made = base
    if case["semantic"] != "none" or with_token:
        made = tiny.measured(tiny.SEMANTICS[case["semantic"]] | {"global_token": with_token}, base)
    recipe = recipe_of(case)
    images, _ = open_sources(recipe.data)
    objective = build_diffusion_objective(recipe, made, images, None, place="tiny")
    tiny.awake(objective.averaged_module())
    values = take_steps(make_trainer(objective, recipe.train, images, tmp_path))
    for part in made.spec.names:
        assert 0 < values[f"loss/velocity/{part}"] < 1e3
    generator = objective.generator(objective.averaged_module())
    assert isinstance(generator, Generator)
    assert ("semantic" in made.spec.names) == (case["semantic"] != "none")
    assert ("global" in made.spec.names) == with_token
    drawn = generator.sample([0, 1], seed=0)
    assert drawn.shape == (2, 3, 16, 16) and drawn.isfinite().all() and drawn.std() > 0


def test_every_registered_method_is_tried_here():
    own = {n for n, m in _METHODS.items() if m.config.__module__.startswith("semtok.methods.")}
    semantics = {settings["name"] for settings in tiny.SEMANTICS.values()}
    assert own == {settings["name"] for settings in METHODS.values()} | semantics
