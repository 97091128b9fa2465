"""What each way of being fast brings on this machine: the same work without and with it, in turns."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.synthetic import PUBLISHED, transformer_inputs
from benchmarks.timing import Step, TrainerStep, time_in_turns, wait_for
from benchmarks.training import dit_step
from semtok.methods.vae import PRESETS, build_autoencoder
from semtok.sampler.architecture import architecture
from semtok.sampler.dit import DiT
from semtok.sampler.guidance import guided_velocity
from semtok.speed import Compiler, Precision, compile_networks, computing
from semtok.training.ema import ModelEMA

_AUTOENCODER_SIZE = 64  # pixels along a side; at 256 it is 16 times the work
_STEPS = 3  # of training without waiting


@dataclass(frozen=True)
class Trick:
    """Seconds of the same work in each round.

    Attributes:
        name: what is done, and on what.
    """

    name: str
    without: list[float]
    with_it: list[float]


def tricks(
    network: str,
    batch_size: int,
    rounds: int,
    *,
    precision: Precision,
    compiler: Compiler,
    folder: Path,
) -> Iterator[Trick]:
    """Times every trick on the sizes of REGLUE with the network given, one after another."""
    made = _Work(network, batch_size, precision, compiler, folder)
    for name, pair in {
        "optimiser: AdamW in one fused kernel": made.optimiser,
        "moving average: all tensors in one call": made.average,
        "attention, forward and backward: the fused kernel": made.attention,
        f"training step: blocks compiled by {compiler}": made.compiled_step,
        "training step: losses stay on the device": made.losses_stay,
        "guidance: both predictions in one batch": made.guidance,
        f"prediction: blocks compiled by {compiler}": made.compiled_prediction,
        "autoencoder, forward and backward: channels last": made.channels_last,
    }.items():
        without, with_it = pair()
        seconds = time_in_turns({"without": without, "with": with_it}, rounds)
        yield Trick(name, seconds["without"], seconds["with"])


class _Work:
    """Pairs of steps, without and with a trick; each pair is built when it is asked for."""

    def __init__(
        self, network: str, batch_size: int, precision: Precision, compiler: Compiler, folder: Path
    ) -> None:
        self.network, self.batch_size, self.folder = network, batch_size, folder
        self.precision, self.compiler = precision, compiler
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.spec = PUBLISHED["reglue"].spec

    def optimiser(self) -> tuple[Step, Step]:
        """Steps of AdamW on all parameters."""

        def step(fused: bool) -> Step:
            network = self._dit()
            for parameter in network.parameters():
                parameter.grad = torch.full_like(parameter, 1e-3)
            # Without: what PyTorch takes by itself, a loop on a CPU and foreach on a GPU.
            made = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=fused or None)
            return self._waiting(made.step)

        return step(False), step(True)

    def average(self) -> tuple[Step, Step]:
        """Updates of the moving average of all parameters."""

        network = self._dit()
        follower, copied = ModelEMA(network, 0.9999), copy.deepcopy(network)

        @torch.no_grad()
        def one_by_one() -> None:
            for mine, theirs in zip(copied.parameters(), network.parameters(), strict=True):
                mine.mul_(0.9999).add_(theirs, alpha=1 - 0.9999)

        return self._waiting(one_by_one), self._waiting(follower.update)

    def attention(self) -> tuple[Step, Step]:
        """Attention of all heads of a block."""

        config = architecture(self.network)
        tokens = self.spec.shape("texture", (256, 256))[1] ** 2 // config.patch_size**2 + 1
        shape = (3, self.batch_size, config.heads, tokens, config.width // config.heads)
        qkv = torch.randn(shape, device=self.device, requires_grad=True)

        def explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v

        def step(attend: object) -> Step:
            def run() -> None:
                with computing(self.device, self.precision):
                    out = attend(*(qkv.bfloat16() if self.precision == "bf16" else qkv).unbind(0))
                out.sum().backward()
                qkv.grad = None

            return self._waiting(run)

        return step(explicit), step(F.scaled_dot_product_attention)

    def compiled_step(self) -> tuple[Step, Step]:
        """Whole training steps."""

        return self._training(), self._training(f"train.compile={self.compiler}")

    def losses_stay(self) -> tuple[Step, Step]:
        """Several steps, and the device is waited for at the end alone, as between two lines of a log."""

        def steps(read: bool) -> Step:
            made = self._training()

            def run() -> None:
                for _ in range(_STEPS):
                    made.take()
                    if read:
                        made.trainer.metrics.read(lambda values: values)
                made.trainer.metrics.clear()

            return self._waiting(run)

        return steps(True), steps(False)

    def guidance(self) -> tuple[Step, Step]:
        """Guided predictions of the velocity."""

        network = self._dit().eval()
        x, times, labels = self._noised()
        null = torch.full_like(labels, network.num_classes)

        @torch.no_grad()
        def one_by_one() -> None:
            with computing(self.device, self.precision):
                base = network(x, times, null).velocity
                own = network(x, times, labels).velocity
            for name in x:
                torch.lerp(base[name], own[name], 2.0)

        @torch.no_grad()
        def together() -> None:
            with computing(self.device, self.precision):
                guided_velocity(network, x, times, labels, dict.fromkeys(x, 2.0))

        return self._waiting(one_by_one), self._waiting(together)

    def compiled_prediction(self) -> tuple[Step, Step]:
        """Predictions of the velocity, as sampling makes them."""

        def step(compiler: Compiler) -> Step:
            network = self._dit().eval()
            compile_networks(network.every_block, compiler)
            noised = self._noised()

            @torch.no_grad()
            def run() -> None:
                with computing(self.device, self.precision):
                    network(*noised)

            return self._waiting(run)

        return step("none"), step(self.compiler)

    def channels_last(self) -> tuple[Step, Step]:
        """SD's autoencoder on small images."""

        size = (self.batch_size, 3, _AUTOENCODER_SIZE, _AUTOENCODER_SIZE)
        pixels = torch.randn(size, device=self.device)

        def step(layout: torch.memory_format) -> Step:
            torch.manual_seed(0)
            network = build_autoencoder(PRESETS["f8d4"]).to(self.device, memory_format=layout)

            def run() -> None:
                with computing(self.device, self.precision):
                    mean = network.encode(pixels).latent_dist.mean
                    image = network.decode(mean).sample
                image.float().square().mean().backward()
                network.zero_grad()

            return self._waiting(run)

        return step(torch.contiguous_format), step(torch.channels_last)

    # What they are made of ----------------------------------------------------------------------

    def _waiting(self, work: Step) -> Step:
        def run() -> None:
            work()
            wait_for(self.device)

        return run

    def _dit(self) -> nn.Module:
        torch.manual_seed(0)
        return DiT(architecture(self.network), self.spec, num_classes=1000).to(self.device)

    def _noised(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        return transformer_inputs(self.spec, self.batch_size, self.device)

    def _training(self, *words: str) -> TrainerStep:
        settings = [f"train.precision={self.precision}", *words]
        step, _ = dit_step("reglue", self.network, self.batch_size, settings, self.folder)
        return step
