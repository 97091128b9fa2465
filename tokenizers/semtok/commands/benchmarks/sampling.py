"""How fast a transformer draws latents."""

import torch

from semtok.commands.benchmarks.synthetic import PUBLISHED
from semtok.commands.benchmarks.timing import Timing, matmul_rate, time_in_turns, wait_for
from semtok.commands.benchmarks.training import dit_forward_flops
from semtok.config import apply_overrides, parse
from semtok.diffusion.dit import DiT, architecture
from semtok.diffusion.sampling import SampleNoise, SamplerConfig, sample_latents
from semtok.diffusion.transport import Schedule


def sampling(
    kind: str, network: str, batch_size: int, rounds: int, sides: dict[str, list[str]]
) -> tuple[list[Timing], float]:
    """Times each side's sampler settings (``sampler.steps=…``) on one network with random weights.

    Returns:
        Timings, one a side, and the FLOP/s of a matrix product in the same run.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    published = PUBLISHED[kind]
    leads = dict.fromkeys(published.spec.names, 0.0) | dict(published.diffusion.get("leads", {}))
    schedule = Schedule.from_leads(leads)
    timed = () if schedule.is_synchronous else ("semantic", "texture")
    model = DiT(architecture(network), published.spec, num_classes=1000, timed_parts=timed)
    model = model.to(device).eval()
    labels = torch.arange(batch_size, device=device) % 1000
    grid = published.spec.shape("texture", (256, 256))[1:]
    forward = dit_forward_flops(model, batch_size)
    steps, flops = {}, {}
    for name, words in sides.items():
        content = apply_overrides({"sampler": {"steps": 5}}, words)
        config = parse(SamplerConfig, content["sampler"], "benchmark: sampler")
        guided = any(config.guidance.scale_of(part) != 1 for part in published.spec.names)

        def draw(config: SamplerConfig = config) -> None:
            noise = SampleNoise(0, range(batch_size), device)
            sample_latents(model, noise, labels, grid, config, schedule=schedule)
            wait_for(device)

        steps[name] = draw
        flops[name] = (
            forward * config.steps * (2 if guided else 1) if config.method == "euler" else None
        )
    seconds = time_in_turns(steps, rounds)
    timings = [Timing(name, seconds[name], batch_size, flops=flops[name]) for name in sides]
    return timings, matmul_rate(device, "fp32")
