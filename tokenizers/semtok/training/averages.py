"""Averages of weights to choose from after a training (Karras et al. 2024, arXiv 2312.02696, section 3).

The average after step t weighs the weights after step s by s^γ. Its width is named by σ_rel, the profile's standard
deviation as a fraction of t. A run follows a few of them and keeps snapshots. Afterwards the average of another σ_rel
is put together from these by least squares over the profiles.
"""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from semtok.errors import UserError
from semtok.storage import DAMAGE, first_line, new_file, write_tensors
from semtok.training.ema import ModelEMA
from semtok.training.train_config import AveragesConfig

AVERAGES = "averages"
"""The folder of a run that holds snapshots."""
TOLERANCE = 0.1
"""How far a profile may be missed, as a fraction of its own norm."""
_NAME = "step_{:08d}.safetensors"
_SIGMAS = np.arange(0.01, 0.281, 0.005)


# Profiles ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """How an average weighs the weights of a training, as a density over time.

    Attributes:
        gamma: the density at time s is proportional to s^gamma.
        step: up to which.
    """

    gamma: float
    step: int

    def dot(self, other: "Profile") -> float:
        """The integral of both densities' product."""
        early, late = sorted((self, other), key=lambda profile: profile.step)
        scale = (self.gamma + 1) * (other.gamma + 1) / (self.gamma + other.gamma + 1)
        return scale * (early.step / late.step) ** late.gamma / late.step


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile: the largest root of σ² (γ + 2)² (γ + 3) = γ + 1.

    Args:
        sigma_rel: in (0, 0.288], which is the width of a plain mean.
    """
    inverse = sigma_rel**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.isreal(roots)].real.max())


def combine(given: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """How to put together one average from others.

    Of all factors whose sum is 1, so that weights that never moved come out as they were, those are taken whose
    profile is nearest to the one wanted.

    Returns:
        factors (N,) in the order of ``given``; by how much their profile misses, as a fraction of the norm of the one
        wanted.
    """
    products = np.array([[one.dot(other) for other in given] for one in given])
    with_wanted = np.array([one.dot(wanted) for one in given])
    num, size = len(given), wanted.dot(wanted)
    system = np.ones((num + 1, num + 1))
    system[:num, :num], system[num, num] = products / size, 0
    factors = np.linalg.lstsq(system, np.append(with_wanted / size, 1), rcond=None)[0][:num]
    missed = 1 + (factors @ products @ factors - 2 * factors @ with_wanted) / size
    return factors, float(np.sqrt(max(0.0, missed)))


# While it trains ---------------------------------------------------------------------------------


class PowerAverage(ModelEMA):
    """Follows a module as ``ModelEMA`` does, by the decay (1 - 1/t)^(γ+1) in the update of step t."""

    def __init__(self, module: nn.Module, sigma_rel: float) -> None:
        super().__init__(module, 0.0, warmup=False)
        self.gamma = gamma_of(sigma_rel)

    def _next_decay(self) -> float:
        return (1 - 1 / (self.num_updates + 1)) ** (self.gamma + 1)


class PowerAverages:
    """The averages that a run follows, and their snapshots.

    Args:
        folder: for snapshots.
    """

    def __init__(self, module: nn.Module, config: AveragesConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.averages = [PowerAverage(module, sigma) for sigma in config.sigma_rel]

    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint keeps of them, by name."""
        return dict(zip(names_of(self.config), (a.module for a in self.averages), strict=True))

    def update(self) -> None:
        """Moves all of them towards the module's present weights."""
        for average in self.averages:
            average.update()

    def go_back(self, step: int, *, forget: bool) -> None:
        """Counts on from a step, whose weights are restored.

        Args:
            forget: remove the snapshots of later steps, which are taken anew, and those that a process which was killed
                has not come to remove.
        """
        for average in self.averages:
            average.num_updates = step
        if forget:
            kept = _kept(step, self.config)
            self._drop(lambda taken: taken not in kept)

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is taken after a step."""
        return step in _kept(step, self.config)

    def write(self, step: int) -> None:
        """Takes a snapshot, and removes those that stand too close now.

        Raises:
            OSError: the disk is full; the earlier snapshots are as they were.
        """
        tensors = {
            f"{number}.{name}": parameter
            for number, average in enumerate(self.averages)
            for name, parameter in average.module.named_parameters()
        }
        about = {"step": str(step), "sigma_rel": json.dumps(self.config.sigma_rel)}
        with new_file(self.folder / _NAME.format(step)) as temporary:
            write_tensors(temporary, tensors, about)
        kept = _kept(step, self.config)
        self._drop(lambda taken: taken not in kept)

    def _drop(self, is_dropped: Callable[[int], bool]) -> None:
        for step, file in list_snapshots(self.folder).items():
            if is_dropped(step):
                file.unlink()

    def disk_line(self) -> str:
        """Tells what the snapshots take on disk at most, and warns where that is not free."""
        parameters = [p for average in self.averages for p in average.module.parameters()]
        one, num = sum(p.numel() * p.element_size() for p in parameters), self.config.keep
        free = shutil.disk_usage(next(p for p in self.folder.parents if p.is_dir())).free
        line = (
            f"averages: up to {num} snapshots of {_size(one)} in {self.folder}, {_size(num * one)}"
        )
        return line if num * one <= free else f"warning: {line}, and {_size(free)} are free"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def names_of(config: AveragesConfig) -> list[str]:
    """Of the averages, in a checkpoint."""
    return [f"average{number}" for number in range(len(config.sigma_rel))]


def _kept(step: int, config: AveragesConfig) -> range:
    """The steps whose snapshots are there after a step."""
    distance = config.every
    while step // distance > config.keep:
        distance *= 2
    return range(distance, step + 1, distance)


# Afterwards --------------------------------------------------------------------------------------


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Whole snapshots by their steps, oldest first."""
    names = {
        file: re.fullmatch(r"step_(\d{8})\.safetensors", file.name) for file in folder.glob("*")
    }
    return dict(sorted((int(match[1]), file) for file, match in names.items() if match))


@torch.no_grad()
def reconstruct(
    sigma_rel: float,
    config: AveragesConfig,
    step: int,
    latest: Sequence[nn.Module],
    folder: Path,
) -> tuple[nn.Module, float]:
    """The average of another width, after a step.

    Args:
        sigma_rel: within reach of what was followed.
        config: what the run followed.
        latest: its averages after the step, in the order of ``config``; the first becomes the result.
        folder: of the run's snapshots; later ones are passed by.

    Returns:
        the average, buffers as they are after the step; by how much its profile misses, see ``combine``.

    Raises:
        UserError: out of reach; or a snapshot that is damaged, or of another network.
    """
    snapshots = {s: file for s, file in list_snapshots(folder).items() if s < step}
    gammas = [gamma_of(sigma) for sigma in config.sigma_rel]
    given = [Profile(gamma, at) for at in (*snapshots, step) for gamma in gammas]
    factors, missed = combine(given, Profile(gamma_of(sigma_rel), step))
    if missed > TOLERANCE:
        reach = _reach(given, step, config)
        raise UserError(
            f"--average {sigma_rel:g}: the {len(snapshots)} snapshots in {folder} can't give it (they miss by "
            f"{missed:.0%}); within reach: {min(reach):.3g} to {max(reach):.3g}"
        )
    result, num = latest[0], len(config.sigma_rel)
    own = [dict(module.named_parameters()) for module in latest]
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(file)) for file in snapshots.values()]
        for name, parameter in result.named_parameters():
            earlier = [_read(file, f"{i}.{name}", parameter) for file in files for i in range(num)]
            tensors = [*earlier, *(parameters[name] for parameters in own)]
            pairs = zip(factors, tensors, strict=True)
            parameter.copy_(sum(factor * tensor.double() for factor, tensor in pairs))
    return result, missed


def _reach(given: Sequence[Profile], step: int, config: AveragesConfig) -> list[float]:
    """Of many widths those that can be had."""
    sigmas = (*_SIGMAS, *config.sigma_rel)
    return [s for s in sigmas if combine(given, Profile(gamma_of(s), step))[1] <= TOLERANCE]


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except DAMAGE as error:
        raise UserError(
            f"{file}: cut short or damaged ({first_line(error)}); remove it, the others may do"
        ) from None


def _read(snapshot: Any, name: str, like: Tensor) -> Tensor:
    try:
        tensor = snapshot.get_tensor(name)
    except DAMAGE as error:
        raise UserError(f"{AVERAGES}: a snapshot lacks {name} ({first_line(error)})") from None
    if tensor.shape != like.shape:
        raise UserError(f"{AVERAGES}: a snapshot's {name} is of another network")
    return tensor.to(like.device)
