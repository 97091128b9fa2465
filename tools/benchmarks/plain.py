"""Straightforward PyTorch of published training steps, without a thought for speed: the yardstick."""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from semtok.methods.reglue import REGLUETokenizer
from semtok.sampler.dit import DiT
from semtok.sampler.draws import Draws
from semtok.sampler.embeddings import sincos_positions
from semtok.sampler.latents import Posterior
from semtok.speed import Precision, allow_tf32, computing


class PlainSiT(nn.Module):
    """SiT as its paper describes it, with a class token and REPA's projector (REPA, REG, REGLUE).

    Parameters are named as in ``DiT``, so that both start from the same weights.

    Args:
        like: the network whose sizes it takes.
        projector: REPA's head, copied.
        depth: after which block the head reads the tokens.
    """

    def __init__(self, like: DiT, projector: nn.Module | None = None, depth: int = 0) -> None:
        super().__init__()
        config, channels = like.config, sum(like.spatial.values())
        width, self.patch, self.channels = config.width, config.patch_size, channels
        self.depth, self.num_classes = depth, like.num_classes
        self.patch_embed = nn.Conv2d(channels, width, self.patch, stride=self.patch)
        self.vector_embed = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(size, width), nn.LayerNorm(width, eps=1e-6))
                for name, size in like.vectors.items()
            }
        )
        self.time_embed = nn.ModuleDict({"all": _PlainTime(width)})
        self.label_embed = nn.Embedding(like.num_classes + 1, width)
        self.blocks = nn.ModuleList(_PlainBlock(width, config.heads) for _ in range(config.depth))
        self.final = _PlainFinal(width, self.patch**2 * channels, like.vectors)
        self.load_state_dict(like.state_dict())
        self.projector = copy.deepcopy(projector)

    def forward(
        self, x: Tensor, vector: Tensor | None, t: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Velocities of x (B, C, H, W) and of the vector (B, D), and what the projector reads."""
        rows, columns = x.shape[2] // self.patch, x.shape[3] // self.patch
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = tokens + sincos_positions((rows, columns), tokens.shape[-1], device=x.device)
        for embed in self.vector_embed.values():
            assert vector is not None
            tokens = torch.cat([embed(vector)[:, None], tokens], dim=1)
        condition = self.time_embed["all"](t) + self.label_embed(labels)
        projected = None
        for number, block in enumerate(self.blocks, start=1):
            tokens = block(tokens, condition)
            if number == self.depth and self.projector is not None:
                batch, length, width = tokens.shape
                projected = self.projector(tokens.reshape(-1, width)).reshape(batch, length, -1)
        patches, vector = self.final(tokens, condition)
        patches = patches.reshape(len(x), rows, columns, self.patch, self.patch, self.channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape), vector, projected


class _PlainTime(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        exponent = torch.arange(128, device=t.device) / 128
        angle = t[:, None] * torch.exp(-torch.log(torch.tensor(10_000.0)) * exponent)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))


class _PlainAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width))


class _PlainMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class _PlainBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn, self.mlp = _PlainAttention(width, heads), _PlainMlp(width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.modulation(F.silu(condition))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        h = self.norm1(x) * (1 + scale1[:, None]) + shift1[:, None]
        x = x + gate1[:, None] * self.attn(h)
        h = self.norm2(x) * (1 + scale2[:, None]) + shift2[:, None]
        return x + gate2[:, None] * self.mlp(h)


class _PlainFinal(nn.Module):
    def __init__(self, width: int, out: int, vectors: Mapping[str, int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)
        self.vectors = nn.ModuleDict({name: nn.Linear(width, d) for name, d in vectors.items()})

    def forward(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        shift, scale = self.modulation(F.silu(condition)).chunk(2, dim=1)
        x = self.norm(x) * (1 + scale[:, None]) + shift[:, None]
        vector = None
        for head in self.vectors.values():
            vector = head(x[:, 0])
        return self.linear(x[:, len(self.vectors) :]), vector


class PlainREGLUEStep:
    """A step of REGLUE as its training script takes it: image latents from disk, the teacher and the
    compressor on the images of every step, the alignment image by image, the average parameter by
    parameter, each loss read at once; on a GPU in float16.

    Args:
        network: and its projector, moved to the device already.
        tokenizer: whose teacher and compressor run in every step.
        seed: of the random numbers, which are those of the library's own step.
    """

    def __init__(self, network: PlainSiT, tokenizer: REGLUETokenizer, *, seed: int) -> None:
        self.network, self.tokenizer, self.seed = network, tokenizer, seed
        self.average = copy.deepcopy(network).eval()
        self.optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
        self.device = next(network.parameters()).device
        self.precision: Precision = "fp16" if self.device.type == "cuda" else "fp32"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.step, self.losses = 0, []

    def __call__(self, pixels: Tensor, posterior: Posterior, labels: Tensor) -> None:
        """One step.

        Args:
            pixels: (B, 3, 256, 256) in [-1, 1].
            posterior: of the texture, standardised.
            labels: int64 (B,).
        """
        with computing(self.device, self.precision):
            losses = self._losses(pixels, posterior, labels)
        allow_tf32("tf32")  # as the script; the backward pass is outside of autocast
        weights = {"texture": 1.0, "semantic": 1.0, "global": 0.03, "alignment": 0.5}
        total = sum(weights[name] * loss for name, loss in losses.items())
        self.optimiser.zero_grad()
        self.scaler.scale(total).backward()
        self.scaler.unscale_(self.optimiser)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        with torch.no_grad():
            average = dict(self.average.named_parameters())
            for name, parameter in self.network.named_parameters():
                average[name].mul_(0.9999).add_(parameter, alpha=1 - 0.9999)
        self.losses.append({name: loss.item() for name, loss in losses.items()})
        self.step += 1

    def _losses(self, pixels: Tensor, posterior: Posterior, labels: Tensor) -> dict[str, Tensor]:
        batch = len(pixels)
        draws = Draws(self.seed, self.step, batch, 0, batch, self.device)
        with torch.no_grad():
            features = self.tokenizer.features(pixels)
            semantic, _ = self.tokenizer.coder.encode(features.joined)
            semantic = F.interpolate(
                semantic, size=posterior.mean.texture.shape[-2:], mode="bilinear"
            )
        mean, std = posterior.mean.texture, posterior.std.texture
        texture = mean + std * draws.normal("posterior/texture", tuple(mean.shape[1:]))
        parts = {"texture": texture, "semantic": semantic, "global": features.pooled}
        noise = {n: draws.normal(f"noise/{n}", tuple(p.shape[1:])) for n, p in parts.items()}
        dropped = draws.uniform("class_dropout") < 0.1
        labels = torch.where(dropped, self.network.num_classes, labels)
        t = draws.uniform("time")
        x, target = {}, {}
        for name, part in parts.items():
            time = t.view(-1, *(1,) * (part.ndim - 1))
            x[name], target[name] = time * part + (1 - time) * noise[name], part - noise[name]
        joint = torch.cat([x["texture"], x["semantic"]], dim=1)
        velocity, vector, projected = self.network(joint, x["global"], t, labels)
        split = [texture.shape[1], semantic.shape[1]]
        predicted = dict(zip(("texture", "semantic"), velocity.split(split, dim=1), strict=True))
        predicted["global"] = vector
        losses = {n: (predicted[n] - target[n]).square().mean() for n in parts}
        tokens = torch.cat(
            [features.pooled[:, None], features.patches[-1].flatten(2).transpose(1, 2)], dim=1
        )
        alignment = torch.zeros((), device=self.device)
        for own, wanted in zip(projected, tokens, strict=True):
            own, wanted = F.normalize(own, dim=-1), F.normalize(wanted, dim=-1)
            alignment = alignment + 1 - (own * wanted).sum(dim=-1).mean()
        return losses | {"alignment": alignment / batch}
