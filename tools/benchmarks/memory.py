"""How much memory a recipe's training step needs on a GPU, found without computing anything."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.random_inputs import RandomImages, random_weights
from benchmarks.synthetic import PUBLISHED, SpecTokenizer, SyntheticLatents
from semtok.commands.train_tokenizer import build_objective
from semtok.data.source import ImageSource
from semtok.diffusion.training import DiffusionObjective
from semtok.errors import UserError
from semtok.objective import Batch, Objective
from semtok.recipe import load_diffusion_recipe, load_recipe
from semtok.references import DEMO
from semtok.sampler.draws import Draws
from semtok.sampler.roles import find_hidden_matrices
from semtok.settings import read_yaml
from semtok.speed import autocast_dtype
from semtok.tokenizer import Tokenizer
from semtok.training.inputs import on_device
from semtok.training.train_config import MemoryConfig, TrainConfig

_TEACHER = 768  # width of DINOv2-B, which all recipes align to
_CPU = torch.device("cpu")
_FEW, _MORE = 8, 16  # images, between which a step's memory is a straight line
# What CUDA's autocast computes in float32 and the CPU's does not, of all that holds much memory.
_IN_FLOAT32 = (
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.group_norm.default,
    torch.ops.aten.rms_norm.default,
    torch.ops.aten.upsample_nearest2d.vec,
)
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@dataclass(frozen=True)
class MemoryEstimate:
    """GB, of 10^9 bytes, of one process.

    Attributes:
        networks: trained and frozen ones, in float32.
        gradients: twice, as those that processes exchange are copies.
        optimiser: AdamW's two moments, of Muon's matrices one.
        average: the EMA's weights, and those of ``train.averages``.
        step: of a step what does not grow with its images, such as weights in half precision.
        per_image: of each image of a micro-batch: what the forward pass keeps for the backward pass, and what
            passes by.
    """

    networks: float
    gradients: float
    optimiser: float
    average: float
    step: float
    per_image: float

    @property
    def fixed(self) -> float:
        """All but the images' share."""
        return self.networks + self.gradients + self.optimiser + self.average + self.step

    def block(self, gpu: float) -> MemoryConfig:
        """What ``train.memory`` is to say: rounded up to three digits after the point at most."""
        rounded = (round(self.fixed + 0.05, 1), round(self.per_image + 0.0005, 3))
        return MemoryConfig(gpu=gpu, fixed=rounded[0], per_image=rounded[1])


def recipe_memory(
    file: Path, overrides: list[str], latents: str | None, folder: Path
) -> MemoryEstimate:
    """Of a step of a recipe, on random images, or on cached latents of 256x256 images.

    Args:
        latents: one of ``PUBLISHED``, whose latents a generator is trained on.
        folder: for random weights of a tokenizer's frozen networks.

    Raises:
        UserError: a recipe that can't be read, or learns nothing by steps; latents of a tokenizer, or none
            of a generator.
    """
    if "method" in read_yaml(file):
        if latents is not None:
            raise UserError(f"--latents: {file} trains a tokenizer, which sees images")
        recipe = load_recipe(file, overrides)
        if not recipe.train.steps:
            raise UserError(f"{file}: learns nothing by steps, which would need memory")
        composite = recipe.method.texture_reference() is not None
        texture = Tokenizer.from_pretrained(DEMO) if composite else None
        with random_weights(recipe, folder) as built:
            objective: Objective = build_objective(built, texture, place=str(file))
        return _estimate(objective, recipe.train, RandomImages(recipe.data.image_size))
    if latents is None:
        raise UserError(f"{file}: trains a generator; give --latents {' or '.join(PUBLISHED)}")
    recipe = load_diffusion_recipe(file, overrides, tokenizer=latents)
    published = replace(
        PUBLISHED[latents], target_width=_TEACHER if recipe.diffusion.repa else None
    )
    source, tokenizer = SyntheticLatents(published), SpecTokenizer(published.spec)
    with FakeTensorMode():  # the largest networks would not fit into this machine
        objective = DiffusionObjective(
            recipe.diffusion,
            tokenizer,
            class_names=source.class_names,
            image_size=source.image_size,
            sampler=recipe.sampler,
            cached_width=published.target_width,
        )
    return _estimate(objective, recipe.train, source)


def _estimate(objective: Objective, config: TrainConfig, source: ImageSource) -> MemoryEstimate:
    objective.train()
    learners, frozen = list(objective.learners.values()), objective.frozen_modules()
    networks = _distinct_bytes([*learners, *frozen])
    trained = _distinct_bytes(learners, buffers=False)
    moments = 2 * trained - _of_matrices(learners) * _uses_muon(config)
    followers = (config.ema_decay is not None) + len(
        config.averages.sigma_rel if config.averages is not None else ()
    )
    averaged = followers * _distinct_bytes([objective.averaged_module()])
    batches = [on_device(source.load(range(num)), _CPU) for num in (_FEW, _MORE)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for network in (*learners, *frozen):
            _empty(network)
        peaks = [
            _peak_of_a_step(objective, config, _without_contents(batch, mode)) for batch in batches
        ]
    per_image = (peaks[1] - peaks[0]) / (_MORE - _FEW)
    step = max(0.0, peaks[0] - _FEW * per_image)
    parts = (networks, 2 * trained, moments, averaged, step, per_image)
    return MemoryEstimate(*(1e-9 * part for part in parts))


def _peak_of_a_step(objective: Objective, config: TrainConfig, batch: Batch) -> int:
    """Bytes that one micro-batch needs at most, beside networks and gradients, which are there before."""
    step, num = config.steps - 1, len(batch)
    dtype = autocast_dtype(config.precision)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)

    for parameter in objective.learners.parameters():
        parameter.grad = torch.empty_like(parameter)
    with autocast_as_on_cuda(), LiveBytes() as live:
        with autocast():
            inputs = objective.prepare(batch)
        draws = Draws(seed=0, step=step, global_batch=num, first=0, num=num, device=_CPU)
        carry: dict[str, Tensor] = {}
        for name in objective.active_learners(step):
            with autocast():
                output = objective.learners[name](inputs, draws, step, carry)
            terms = [term.weight * term.value.float().mean() for term in output.terms.values()]
            torch.stack(terms).sum().backward()
            carry |= output.carry
            del output, terms
    return live.most


def _distinct_bytes(modules: Sequence[nn.Module], *, buffers: bool = True) -> int:
    tensors = {id(t): t for m in modules for t in m.parameters()}
    if buffers:
        tensors |= {id(t): t for m in modules for t in m.buffers()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _uses_muon(config: TrainConfig) -> bool:
    return config.optimiser is not None and config.optimiser.name == "muon"


def _of_matrices(modules: Sequence[nn.Module]) -> int:
    """Bytes of the hidden matrices."""
    weights = (m.parameter for module in modules for m in find_hidden_matrices(module))
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _empty(network: nn.Module) -> None:
    """Takes the contents of its weights; ``network.to`` can't, as it keeps the weights' own objects."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), parameter.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _without_contents(batch: Batch, mode: FakeTensorMode) -> Batch:
    fake = mode.from_tensor
    return Batch(
        fake(batch.pixels) if batch.pixels is not None else None,
        fake(batch.labels),
        features=batch.features.map(fake) if batch.features is not None else None,
        latents=batch.latents.map(fake) if batch.latents is not None else None,
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that come into being within this context and are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakKeyDictionary[Any, None] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage not in self._known and storage not in given:
                    self._add(storage)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._known[storage] = None
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


@contextmanager
def autocast_as_on_cuda() -> Iterator[None]:
    """Within this context the CPU's autocast computes norms and magnified images in float32, as CUDA's does."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        for operator in _IN_FLOAT32:
            library.impl(operator, partial(_in_float32, operator), "AutocastCPU")
        yield


def _in_float32(operator: OpOverload, *args: Any, **kwargs: Any) -> Any:
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        return operator(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs)
