"""``benchmark``: how fast the library's networks train, beside straightforward PyTorch of the same."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semtok.commands.cli import Parser
from semtok.commands.table import print_table
from semtok.diffusion.dit import PRESETS, DiT, DiTArchitecture, architecture
from semtok.errors import UserError
from semtok.latents import LatentSpec, PartSpec
from semtok.nets.transformer import sincos_positions


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = Parser(prog="benchmark", description=__doc__)
    parser.add_argument("task", choices=("dit",), help="what to time")
    parser.add_argument(
        "--network",
        default="SiT-B/2",
        help=f"a SiT preset: {', '.join(n for n in PRESETS if n[0] == 'S')}",
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7, help="paired rounds of one step each")
    args = parser.parse_args(arguments)

    if min(args.batch_size, args.rounds) < 1:
        raise UserError("--batch-size and --rounds must be at least 1")
    known = [name for name in PRESETS if name.startswith("SiT-")]
    if args.network not in known:
        raise UserError(f"--network: expected one of {', '.join(known)}, got '{args.network}'")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = architecture(args.network)
    steps = {
        "semtok": _step(_ours(config).to(device), args.batch_size, device),
        "plain PyTorch": _step(PlainSiT(config).to(device), args.batch_size, device),
    }
    seconds = time_in_turns(steps, args.rounds)
    flops = 3 * 2 * _forward_macs(config, tokens=(32 // config.patch_size) ** 2) * args.batch_size
    rows = [
        (
            name,
            f"{statistics.median(times) * 1e3:.1f}",
            f"{args.batch_size / statistics.median(times):.2f}",
            f"{flops / statistics.median(times) / 1e9:.1f}",
        )
        for name, times in seconds.items()
    ]
    print_table(
        f"{args.network}, 4x32x32 latents, batch {args.batch_size}, fp32, {device}, {torch.get_num_threads()} threads",
        rows,
        header=("training step", "ms", "images/s", "GFLOP/s"),
    )
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(
        f"semtok is {statistics.median(ratios):.2f} times as fast (rounds: "
        f"{min(ratios):.2f} to {max(ratios):.2f})"
    )
    return 0


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the steps take turns, so that a noisy machine hits them alike."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _ours(config: DiTArchitecture) -> nn.Module:
    network = DiT(config, LatentSpec((PartSpec("texture", 4, 8),)), num_classes=1000)

    class Predict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return self.network({"texture": x}, {"texture": t}, y).velocity.texture

    return Predict()


def _step(network: nn.Module, batch_size: int, device: torch.device) -> Callable[[], None]:
    """One training step: forward, velocity loss, backward, AdamW."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    x1, x0 = torch.randn(2, batch_size, 4, 32, 32, device=device)
    t = torch.rand(batch_size, device=device)
    y = torch.randint(1000, (batch_size,), device=device)
    x = t.view(-1, 1, 1, 1) * x1 + (1 - t.view(-1, 1, 1, 1)) * x0

    def step() -> None:
        (network(x, t, y) - (x1 - x0)).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def _forward_macs(config: DiTArchitecture, tokens: int) -> int:
    """Multiply-accumulates of one image's forward pass: matrix products and attention."""
    block = tokens * config.width**2 * (4 + 2 * config.mlp_ratio) + 2 * tokens**2 * config.width
    return int(config.depth * (block + 6 * config.width**2))


class PlainSiT(nn.Module):
    """SiT written down as its paper describes it, without a thought for speed: the yardstick."""

    def __init__(self, config: DiTArchitecture, channels: int = 4, num_classes: int = 1000) -> None:
        super().__init__()
        width, self.patch, self.channels = config.width, config.patch_size, channels
        self.embed = nn.Conv2d(channels, width, self.patch, stride=self.patch)
        side = 32 // self.patch
        self.register_buffer("positions", sincos_positions((side, side), width))
        self.time = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(_PlainBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.out = nn.Linear(width, self.patch**2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.positions
        frequency = torch.exp(
            -torch.log(torch.tensor(10_000.0)) * torch.arange(128, device=x.device) / 128
        )
        angle = t[:, None] * frequency
        condition = self.time(torch.cat([angle.cos(), angle.sin()], dim=1)) + self.label(y)
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        tokens = self.out(self.norm(tokens) * (1 + scale[:, None]) + shift[:, None])
        tokens = tokens.reshape(len(x), rows, columns, self.patch, self.patch, self.channels)
        return tokens.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class _PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition).chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        batch, tokens, width = h.shape
        q, k, v = self.qkv(h).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + gate1[:, None] * self.proj(h)
        h = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))
