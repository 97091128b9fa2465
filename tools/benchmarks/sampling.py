"""How fast a transformer draws latents."""

from typing import Any

import torch
from pydantic import Field

from benchmarks.synthetic import PUBLISHED
from benchmarks.timing import Step, Timing, counted_flops, time_in_turns, wait_for
from semtok.sampler.architecture import architecture
from semtok.sampler.dit import DiT
from semtok.sampler.draws import SampleNoise
from semtok.sampler.sampling import SamplerConfig, sample_latents
from semtok.sampler.transport import Schedule
from semtok.settings import Config, apply_overrides, parse
from semtok.speed import Compiler, Precision, compile_networks, computing


class Side(Config):
    """How samples are drawn and computed."""

    sampler: SamplerConfig = Field(default_factory=lambda: SamplerConfig(steps=5))
    precision: Precision = "fp32"
    compile: Compiler = "none"


def sampling(
    kind: str, network: str, batch_size: int, rounds: int, sides: dict[str, list[str]]
) -> list[Timing]:
    """Times each side's settings (``sampler.steps=… precision=… compile=…``) on one network with random weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps: dict[str, Step] = {}
    made: dict[str, tuple[Side, float]] = {}
    for name, words in sides.items():
        content = apply_overrides(Side().model_dump(mode="json"), words)
        side = parse(Side, content, "benchmark")
        steps[name] = _draw(kind, network, batch_size, side, device)
        made[name] = (side, counted_flops(steps[name]))
    seconds = time_in_turns(steps, rounds)
    return [
        Timing(name, seconds[name], batch_size, flops=flops, precision=side.precision)
        for name, (side, flops) in made.items()
    ]


def _draw(kind: str, network: str, batch_size: int, side: Side, device: torch.device) -> Step:
    """Draws a batch."""
    published = PUBLISHED[kind]
    leads: dict[str, Any] = dict.fromkeys(published.spec.names, 0.0)
    schedule = Schedule.from_leads(leads | dict(published.diffusion.get("leads", {})))
    timed = () if schedule.is_synchronous else ("semantic", "texture")
    model = DiT(architecture(network), published.spec, num_classes=1000, timed_parts=timed)
    model = model.to(device).eval()
    compile_networks(model.every_block, side.compile)
    labels = torch.arange(batch_size, device=device) % 1000
    grid = published.spec.shape("texture", (256, 256))[1:]

    def draw() -> None:
        noise = SampleNoise(0, range(batch_size), device)
        with computing(device, side.precision):
            sample_latents(model, noise, labels, grid, side.sampler, schedule=schedule)
        wait_for(device)

    return draw
