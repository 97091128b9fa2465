"""How far a tokenizer is from equivariant: whether it commutes with scaling and turning images.

EQ-VAE (arXiv 2502.09509) trains for it, see ``methods/equivariance``.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from semtok.sampler.latents import Latents
from semtok.tokenizer import Tokenizer
from semtok.transforms import scaled, turned, whole_scales

SCALES = (0.5, 0.75)
TURNS = (1, 2, 3)

Transform = Callable[[Tensor], Tensor]


def transforms(stride: int, image_size: tuple[int, int]) -> dict[str, list[Transform]]:
    """What images of (height, width) and their latents are put through, by kind: ``scaling`` and ``turning``.

    Scales are those of ``SCALES`` that keep the grid whole, bilinear; turns are clockwise quarters, of images that are
    not square by half a turn alone. A kind without any is left out.
    """
    scales = whole_scales(SCALES, *(n / stride for n in image_size))
    turns = TURNS if image_size[0] == image_size[1] else (2,)
    kinds: dict[str, list[Transform]] = {
        "scaling": [lambda x, s=s: scaled(x, (s, s)) for s in scales],
        "turning": [lambda x, k=k: turned(x, k) for k in turns],
    }
    return {kind: those for kind, those in kinds.items() if those}


def equivariance_errors(
    tokenizer: Tokenizer, pixels: Tensor, latents: Latents
) -> dict[str, Tensor]:
    """Root mean square errors, (B,) each, the mean over the transforms T of a kind.

    ``encoder_…``: of the latents of T x against T of the latents of x, all parts together; vectors are to stay as they
    are. 1 is a standard deviation of the latents. ``decoder_…``: of the image that T of the latents decodes to against
    T x; 2 is from black to white. It holds the error of plain reconstruction too. T is of raw latents, which statistics
    per position do not commute with. Latents that such statistics bind to one grid have no errors of scaling.

    Args:
        pixels: x (B, 3, H, W) in [-1, 1].
        latents: the posterior's means of x, standardised.
    """
    errors, raw = {}, tokenizer.destandardise(latents)
    size = (pixels.shape[-2], pixels.shape[-1])
    for kind, those in transforms(tokenizer.spec.stride, size).items():
        if kind == "scaling" and tokenizer.positions:
            continue
        encoder, decoder = [], []
        for transform in those:
            seen, wanted = transform(pixels), tokenizer.standardise(_on_maps(raw, transform))
            own = tokenizer.posterior(seen).mean
            encoder.append(_rms([own[name] - wanted[name] for name in wanted]))
            decoder.append(_rms([tokenizer.decode(wanted) - seen]))
        errors[f"encoder_{kind}_error"] = torch.stack(encoder).mean(dim=0)
        errors[f"decoder_{kind}_error"] = torch.stack(decoder).mean(dim=0)
    return errors


def _on_maps(latents: Latents, transform: Transform) -> Latents:
    return latents.map(lambda part: transform(part) if part.ndim == 4 else part)


def _rms(differences: list[Tensor]) -> Tensor:
    rows = torch.cat([d.flatten(1).float() for d in differences], dim=1)
    return rows.norm(dim=1) / math.sqrt(rows.shape[1])
