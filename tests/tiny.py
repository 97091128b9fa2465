"""Tiny recipes and objectives that several tests train."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch

from semtok import Tokenizer
from semtok.commands.tokenizer_export import statistics_batches
from semtok.commands.train_dit import train_dit
from semtok.commands.train_tokenizer import build_objective, train_tokenizer
from semtok.data.images.kinds import open_sources
from semtok.data.images.shapes import Shapes, ShapesConfig
from semtok.images import to_pixels
from semtok.objective import TokenizerObjective
from semtok.recipe import parse_diffusion_recipe, parse_recipe
from semtok.sampler.dit import DiT
from semtok.sampler.draws import Draws
from semtok.training.inputs import on_device
from semtok.training.loop import Trainer
from semtok.training.process import make_accelerator

AUTOENCODER = {
    "block_channels": [8, 8, 16],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_groups": 4,
}
DECODER = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 32, "patch_size": 4}
COMPOSITES = ("redi", "reglue", "semvae")
SEMANTICS: dict[str, dict[str, Any]] = {
    "none": {"name": "reglue", "compressor": None},
    "redi": {"name": "redi", "channels": 4},
    "reglue": {"name": "reglue", "compressor": {"hidden": [8], "channels": 4}},
    "semvae": {"name": "semvae", "channels": 4, "width": 16, "heads": 2, "blocks": 1},
}
ADVERSARIAL = {"start_step": 0, "width": 8, "num_layers": 1}


def content(method: dict[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """A recipe of the given method settings (Send-VAE's by default) that trains in a second."""
    method = {"name": "send_vae"} | (method or {})
    if method["name"] == "rae":
        method.setdefault("decoder", deepcopy(DECODER))
    elif method["name"] not in (*COMPOSITES, "repae"):
        method.setdefault("vae", deepcopy(AUTOENCODER))
    if method["name"] == "send_vae":
        method.setdefault("mapper", {"projector_width": 16, "heads": 2})
    return {
        "method": method,
        "data": {
            "kind": "shapes",
            "size": 16,
            "num_images": 24,
            "num_validation_images": 8,
            "classes": ["shape", "hue"],
        },
        "teacher": {"name": "demo"},
        "train": {
            "steps": 6,
            "batch_size": 4,
            "optimiser": {"learning_rate": 1e-3},
            "schedule": "cosine",
            "warmup_steps": 2,
            "ema_decay": 0.9,
            "log_every": 2,
            "checkpoint_every": 100,
            "sample_every": 100,
            "num_sample_images": 2,
            "num_validation_images": 4,
            "num_statistics_images": 8,
        }
        | train,
    }


def build(method: dict[str, Any] | None = None, **train: Any) -> TokenizerObjective:
    """The objective of ``content(method)``, freshly initialised."""
    return build_objective(parse_recipe(content(method, **train), "tiny"), place="tiny")


def trainer(
    folder: Path,
    method: dict[str, Any] | None = None,
    *,
    texture: Tokenizer | None = None,
    scaler: torch.amp.GradScaler | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of a tiny recipe, in a folder that is made for it.

    Args:
        texture: the tokenizer that the method is built on, where it is on one.
        scaler: of the gradients.
    """
    recipe = parse_recipe(content(method, **settings), "tiny")
    folder.mkdir(exist_ok=True, parents=True)
    train, held_out = open_sources(recipe.data)
    accelerator = make_accelerator(recipe.train, folder)
    if scaler is not None:
        accelerator.scaler = scaler
    return Trainer(
        build_objective(recipe, texture, place="tiny", class_names=train.class_names),
        recipe.train,
        accelerator=accelerator,
        folder=folder,
        source=train,
        validation=held_out,
        num_workers=0,
        tracked={},
    )


def runs(root: Path, **train: Any) -> None:
    """A VAE, two steps long, in ``root/tok``, and a generator on its latents in ``root/dit``."""
    train_tokenizer(parse_recipe(content({"name": "vae"}, steps=2), "tiny"), root / "tok")
    recipe = content(**train)
    del recipe["method"], recipe["teacher"]
    shape = {"depth": 1, "width": 24, "heads": 2, "patch_size": 2}
    recipe |= {"tokenizer": str(root / "tok"), "diffusion": {"network": shape}}
    recipe["sampler"] = {"steps": 2}
    train_dit(parse_diffusion_recipe(recipe, "tiny"), root / "dit")


def measured(method: dict[str, Any], texture: Tokenizer | None = None) -> Tokenizer:
    """A tokenizer of a method with its first weights: statistics measured, nothing trained."""
    learns = method["name"] in ("vae", "send_vae") or method.get("compressor", True) is not None
    learns = learns and method["name"] != "redi"
    recipe = parse_recipe(
        content(method, **({} if learns else {"steps": 0, "warmup_steps": 0})), "tiny"
    )
    objective = build_objective(recipe, texture, place="tiny")
    source = Shapes(recipe.data, train=True)
    cpu = torch.device("cpu")
    objective.measure(batch for _, batch in statistics_batches(source, recipe, cpu))
    tokenizer = objective.tokenizer(objective.averaged_module()).eval()
    with torch.no_grad():
        batches = statistics_batches(source, recipe, cpu)
        tokenizer.measure_statistics((places, b.pixels) for places, b in batches)
    return tokenizer


@cache
def tokenizer(texture: str, semantic: str, with_global: bool) -> Tokenizer:
    """One of every kind: the texture's method, the semantic part's (``SEMANTICS``), a global part or none."""
    base = measured({"name": texture})
    if semantic == "none" and not with_global:
        return base
    return measured(SEMANTICS[semantic] | {"global_token": with_global}, base)


def awake(network: DiT) -> DiT:
    """Gives zero-initialised layers weights, without which every output is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return network


def batch(objective: TokenizerObjective, num: int = 4) -> dict[str, Any]:
    """Prepared inputs of the first training images."""
    loaded = Shapes(ShapesConfig(size=16), train=True).load(range(num))
    return objective.prepare(on_device(loaded, torch.device("cpu")))


def batch_of_shapes(num: int) -> torch.Tensor:
    """Pixels of the first training images, 16x16."""
    return to_pixels(Shapes(ShapesConfig(size=16), train=True).load(range(num)).images)


def draws(step: int = 0, num: int = 4) -> Draws:
    return Draws(seed=0, step=step, global_batch=num, first=0, num=num, device=torch.device("cpu"))


def ten_steps_without_synchronisation(quiet: Trainer) -> None:
    """Raises RuntimeError where a step, but for the first two, makes the host wait for the GPU."""
    batches = quiet._batches()
    for _ in range(2):
        quiet.train_step(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            quiet.train_step(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The networks of a checkpoint: trained ones, and their average."""
    import safetensors.torch

    return safetensors.torch.load_file(checkpoint / "model.safetensors")


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint: networks, EMA, optimisers."""
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    tensors = tensors_of(newest)
    state = torch.load(newest / "state.pt", weights_only=True)
    for learner, optimiser in state["optimisers"].items():
        kinds = {"": optimiser} if "state" in optimiser else optimiser  # one, or Muon with AdamW
        for kind, inner in kinds.items():
            for index, values in inner["state"].items():
                tensors |= {f"{learner}.{kind}{index}.{k}": v for k, v in values.items()}
    return tensors
