"""How well a tokenizer reconstructs held-out images, and what its latents are like as numbers.

PSNR, SSIM, LPIPS and rFID by either of two protocols, see ``PROTOCOLS``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semtok.data.passes import chosen_images
from semtok.data.source import ImageSource
from semtok.evaluation.frechet import Gaussian, frechet_distance
from semtok.evaluation.protocol import PixelDigest
from semtok.images import to_pixels, to_uint8
from semtok.metrics import psnr, ssim
from semtok.statistics import StreamingMoments
from semtok.tokenizer import Tokenizer

_DEAD = 1e-2  # of the spread that the statistics promise


@dataclass(frozen=True)
class ReconstructionProtocol:
    """What is decoded, and what LPIPS is told.

    Attributes:
        sample: a draw from the posterior is decoded, instead of its mean.
        clamps: LPIPS sees the decoder's output clamped to [-1, 1]. PSNR and Fréchet distances see 8 bits, and
            SSIM clamps, by either protocol.
        measures: the protocol in words.
    """

    sample: bool
    clamps: bool
    measures: str


PROTOCOLS = {
    "adm": ReconstructionProtocol(
        sample=False,
        clamps=True,
        measures="images cropped as ADM does, 8 bits; PSNR of 8 bits; SSIM with a range of (-1, 1); LPIPS of clamped "
        "output; Fréchet distances between 8-bit images and reconstructions, by unbiased moments in float64; means "
        "over images",
    ),
    "lightningdit": ReconstructionProtocol(
        sample=True,
        clamps=False,
        measures="images resized bilinearly, antialiased, as tensors of floats and cropped at the centre, not rounded "
        "before they are encoded; PSNR of 8 bits; SSIM with a range of (-1, 1); LPIPS of unclamped output; Fréchet "
        "distances between 8-bit images and reconstructions, by unbiased moments in float64, Inception's input "
        "resized as pytorch-fid does; means over images",
    ),
}
"""By name: ``adm`` reads images as everything else here does; ``lightningdit`` is that of LightningDiT's
``evaluate_tokenizer``, whose figures VA-VAE, REPA-E and Send-VAE compare with."""

FeatureExtractor = Callable[[Tensor], Tensor]
"""uint8 images (B, 3, H, W) to features (B, D)."""


@dataclass(frozen=True)
class PartStatistics:
    """Latents of one part, over all images and positions.

    Attributes:
        mean, std: per channel (C,), of standardised latents: near 0 and 1 where held-out images are
            as those that the statistics were measured on.
        kl_bits: of the posterior from N(0, 1), in bits per dimension; None where it is no Gaussian.
        num_dead: channels that hardly vary.
    """

    mean: Tensor
    std: Tensor
    kl_bits: float | None
    num_dead: int


@dataclass(frozen=True)
class ReconstructionReport:
    """What ``evaluate_reconstruction`` finds.

    Attributes:
        scores: means over images: ``psnr`` (dB), ``ssim``, ``lpips`` where asked for; and for each
            feature extractor its Fréchet distance, by its name.
        psnr: of each image (N,), in the order of ``source.chosen(N)``.
        parts: per part of the latents.
        digest: of the images, see ``PixelDigest``.
    """

    scores: dict[str, float]
    psnr: Tensor
    parts: dict[str, PartStatistics]
    digest: str


@torch.no_grad()
def evaluate_reconstruction(
    tokenizer: Tokenizer,
    source: ImageSource,
    num_images: int,
    *,
    perceptual: nn.Module | None = None,
    extractors: dict[str, FeatureExtractor] | None = None,
    protocol: ReconstructionProtocol = PROTOCOLS["adm"],
    seed: int = 0,
    batch_size: int = 32,
) -> ReconstructionReport:
    """Encodes and decodes ``source.chosen(num_images)``; never holds more than a batch.

    Args:
        perceptual: LPIPS; None leaves it out.
        extractors: networks for Fréchet distances, by the name of the score.
        protocol: what is decoded and how it is compared; how images are read is the source's.
        seed: of the draws.
    """
    device = tokenizer.texture_mean.device
    generator = torch.Generator(device).manual_seed(seed)
    sums: dict[str, Tensor] = {}
    all_psnr: list[Tensor] = []
    moments = {
        name: (StreamingMoments(covariance=True), StreamingMoments(covariance=True))
        for name in extractors or {}
    }
    latents = {name: StreamingMoments() for name in tokenizer.spec.names}
    kl_sums: dict[str, tuple[float, int]] = {}
    digest = PixelDigest()
    what = "reconstructing held-out images"
    for batch in chosen_images(source, num_images, batch_size=batch_size, what=what):
        digest.add(batch.images)
        pixels = to_pixels(batch.images, device=device)
        raw = tokenizer.posterior_raw(pixels)
        posterior = tokenizer.standardise_posterior(raw)
        drawn = posterior.sample(generator)
        kept = drawn if protocol.sample else posterior.mean
        output = tokenizer.decode_raw(tokenizer.destandardise(kept))
        decoded = output.clamp(-1, 1)
        values = {"psnr": psnr(decoded, pixels), "ssim": ssim(decoded, pixels)}
        if perceptual is not None:
            values["lpips"] = perceptual(decoded if protocol.clamps else output, pixels)
        for name, value in values.items():
            sums[name] = sums.get(name, 0) + value.double().sum()
        all_psnr.append(values["psnr"].cpu())
        for name, extract in (extractors or {}).items():
            for seen, images in zip(moments[name], (pixels, decoded), strict=True):
                seen.add(extract(to_uint8(images)))
        for name, seen in latents.items():
            seen.add(drawn[name])
        for name, mean in raw.mean.items():
            if (std := raw.std[name]).any():
                kl = 0.5 * (mean.square() + std.square() - 1 - 2 * std.log()).double().sum()
                total, count = kl_sums.get(name, (0.0, 0))
                kl_sums[name] = (total + float(kl), count + mean.numel())
    count = sum(len(values) for values in all_psnr)
    scores = {name: float(value / count) for name, value in sums.items()}
    scores |= {name: frechet_distance(*map(Gaussian.of, pair)) for name, pair in moments.items()}
    parts = _parts(latents, kl_sums)
    return ReconstructionReport(scores, torch.cat(all_psnr), parts, str(digest))


def _parts(
    latents: dict[str, StreamingMoments], kl_sums: dict[str, tuple[float, int]]
) -> dict[str, PartStatistics]:
    parts = {}
    for name, seen in latents.items():
        total, numbers = kl_sums.get(name, (math.nan, 0))
        parts[name] = PartStatistics(
            mean=seen.mean.cpu(),
            std=seen.std.cpu(),
            kl_bits=total / numbers / math.log(2) if numbers else None,
            num_dead=int((seen.std < _DEAD).sum()),
        )
    return parts
