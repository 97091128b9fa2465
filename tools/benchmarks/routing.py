"""What token routing saves: training, and guided sampling, with and without it, in operations and in seconds."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.synthetic import (
    PUBLISHED,
    SpecTokenizer,
    SyntheticLatents,
    transformer_inputs,
)
from benchmarks.timing import Step, time_in_turns, wait_for
from benchmarks.training import route_without_contents
from semtok.diffusion.diffusion_config import DiffusionConfig, build_network, resolve_defaults
from semtok.diffusion.learner import DiTLearner
from semtok.errors import UserError
from semtok.sampler.dit import DiT
from semtok.sampler.draws import Draws
from semtok.sampler.guidance import Base, guided_velocity
from semtok.sampler.transport import Times
from semtok.settings import apply_overrides, parse
from semtok.speed import Precision, computing

NUM_CLASSES = 1000


@dataclass(frozen=True)
class Saving:
    """The same work without and with routing.

    Attributes:
        name: of the work.
        operations: floating-point operations, without and with.
        seconds: of each round, without and with; on a CPU the processor's own, so that what else runs there does not
            count.
    """

    name: str
    operations: tuple[float, float]
    seconds: tuple[list[float], list[float]]


def savings(
    kind: str,
    network: str,
    batch_size: int,
    rounds: int,
    words: Sequence[str],
    precision: Precision,
) -> Iterator[Saving]:
    """Forward and backward passes of a training step, then a guided prediction by each base.

    Args:
        kind: one of ``PUBLISHED``, whose latents; without REPA.
        words: settings of the network and of routing, as ``diffusion.routing.drop=0.5``.

    Raises:
        UserError: settings that do not fit, or without routing.
    """
    work = _Work(kind, network, batch_size, words, precision)
    dense, routed = work.training(routed=False), work.training(routed=True)
    seconds = time_in_turns({"without": dense, "with": routed}, rounds, work.clock)
    yield Saving(
        "training: forward and backward",
        (work.training_operations(routed=False), work.training_operations(routed=True)),
        (seconds["without"], seconds["with"]),
    )
    work.network.zero_grad(set_to_none=True)
    bases: tuple[Base, Base] = ("null_label", "dropped_path")
    first, second = (work.prediction(base) for base in bases)
    seconds = time_in_turns({"without": first, "with": second}, rounds, work.clock)
    without, with_it = (work.prediction_operations(base) for base in bases)
    name = "guided prediction: null_label, dropped_path"
    yield Saving(name, (without, with_it), (seconds["without"], seconds["with"]))


def optimiser_seconds(
    kind: str, network: str, batch_size: int, words: Sequence[str], rounds: int
) -> list[float]:
    """Of AdamW's step on this network, which routing does not change."""
    work = _Work(kind, network, batch_size, words, "fp32")
    made = work.network
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser = torch.optim.AdamW(made.parameters(), fused=True)

    def step() -> None:
        optimiser.step()
        wait_for(work.device)

    return time_in_turns({"step": step}, rounds, work.clock)["step"]


class _Work:
    """One network for both sides: without routing the same weights, and no fusion."""

    def __init__(
        self, kind: str, network: str, batch_size: int, words: Sequence[str], precision: Precision
    ) -> None:
        published = PUBLISHED[kind]
        content = {"diffusion": {"network": network, "routing": {}, "repa": False}}
        content["diffusion"] |= {k: v for k, v in published.diffusion.items() if k != "repa"}
        given = apply_overrides(content, list(words))["diffusion"]
        config = parse(DiffusionConfig, given, "benchmark")
        if config.routing is None:
            raise UserError("diffusion.routing: is what is measured; leave it on")
        self.config = resolve_defaults(config, SpecTokenizer(published.spec))
        self.spec, self.batch_size, self.precision = published.spec, batch_size, precision
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(0)
        self.network = self._built(self.config).to(self.device)
        batch = SyntheticLatents(published).load(range(batch_size))
        self.labels = batch.labels.to(self.device)
        self.posterior = batch.latents.map(lambda part: part.float().to(self.device))
        self.draws = Draws(0, 0, batch_size, 0, batch_size, self.device)

    @property
    def clock(self) -> Callable[[], float]:
        """See ``Saving.seconds``."""
        return time.perf_counter if self.device.type == "cuda" else time.process_time

    def _built(self, config: DiffusionConfig) -> DiT:
        return build_network(config, self.spec, num_classes=NUM_CLASSES)

    def _plain(self) -> DiffusionConfig:
        return self.config.model_copy(update={"routing": None})

    def training(self, *, routed: bool) -> Step:
        """Forward and backward of all losses, from a batch of latents."""
        config, network = self.config, self.network
        if not routed:
            config = self._plain()
            with torch.device("meta"):
                network = self._built(config)
            network.load_state_dict(
                self.network.state_dict(keep_vars=True), strict=False, assign=True
            )
        learner = DiTLearner(config, network, None).train()
        inputs: dict[str, Any] = {"posterior": self.posterior, "labels": self.labels}

        def step() -> None:
            with computing(self.device, self.precision):
                terms = learner(inputs, self.draws, 0, {}).terms.values()
                total = torch.stack([term.weight * term.value.mean() for term in terms]).sum()
            total.backward()
            learner.zero_grad(set_to_none=True)
            wait_for(self.device)

        return step

    def prediction(self, base: Base) -> Step:
        """A guided velocity, as a sampler asks for it."""
        network = self.network.eval()
        x, times, labels = transformer_inputs(self.spec, self.batch_size, self.device)

        @torch.no_grad()
        def step() -> None:
            with computing(self.device, self.precision):
                guided_velocity(network, x, times, labels, dict.fromkeys(x, 2.0), base=base)
            wait_for(self.device)

        return step

    # Operations are counted on tensors without contents -------------------------------------------

    def training_operations(self, *, routed: bool) -> float:
        """Of forward and backward, attention counted."""
        config = self.config if routed else self._plain()
        route = route_without_contents(config, self.network, self.batch_size)
        network, inputs = self._empty(config)
        with FlopCounterMode(display=False) as counter:
            velocity = network(*inputs, route=route).velocity
            torch.stack([part.sum() for part in velocity.values()]).sum().backward()
        return float(counter.get_total_flops())

    def prediction_operations(self, base: Base) -> float:
        """Of a guided velocity."""
        network, (x, times, labels) = self._empty(self.config)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            guided_velocity(network, x, times, labels, dict.fromkeys(x, 2.0), base=base)
        return float(counter.get_total_flops())

    def _empty(
        self, config: DiffusionConfig
    ) -> tuple[DiT, tuple[dict[str, Tensor], Times, Tensor]]:
        with torch.device("meta"):
            network = self._built(config)
        return network, transformer_inputs(self.spec, self.batch_size, torch.device("meta"))
