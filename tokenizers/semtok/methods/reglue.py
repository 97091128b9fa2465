"""REGLUE: a convolutional compressor of several teacher layers, and the CLS token beside it.

"REGLUE Your Latents with Global and Local Semantics for Entangled Diffusion", arXiv 2512.16636.
Patch tokens of the teacher's last layers are concatenated on channels, standardised, and compressed
to a few channels by a small convolutional autoencoder (appendix B.1). The diffusion
transformer denoises the image latents, the compressed features and the CLS token together, at one
time, and is aligned to the teacher (REPA). Without the compressor it is REG (arXiv 2507.01467).
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from semtok.methods.coders import CoderShape, StandardisedCoder
from semtok.methods.composite import (
    GLOBAL_WEIGHT,
    CompositeConfig,
    CompositeObjective,
    CompositeTokenizer,
)
from semtok.objective import Batch, Carry, Inputs, MethodContext, StepOutput, Term
from semtok.registry import register_method
from semtok.sampler.draws import Draws
from semtok.sampler.latents import LatentSpec
from semtok.settings import Config
from semtok.tokenizer import DiffusionDefaults

# Settings ----------------------------------------------------------------------------------------


class CompressorConfig(Config):
    """Shape of the compressor. The paper's is 3072, 256, 16: best of 128, 256, 512 and of 4 to 20."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (256,)
    """Channels between the features and the code, each followed by a residual block."""
    channels: int = Field(16, ge=1)
    """Of the code, the semantic part."""


class REGLUEConfig(CompositeConfig):
    """Settings of REGLUE; with ``compressor: null`` of REG."""

    name: Literal["reglue"] = "reglue"
    global_token: bool = True
    compressor: CompressorConfig | None = CompressorConfig()
    """The autoencoder of the teacher's features; None: no semantic part, which is REG."""

    def has_steps(self) -> bool:
        return self.compressor is not None


# The compressor ----------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm; the input is added before the last ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = _conv(channels, channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(x + y)


class CompressorShape(CoderShape):
    """Shape of a compressor of features of D channels, of all layers together."""

    hidden: tuple[Annotated[int, Field(ge=1)], ...]
    """See ``CompressorConfig``."""


class Compressor(StandardisedCoder):
    """Standardised features to a few channels and back, at one resolution, without sampling."""

    shape_class = CompressorShape

    def __init__(self, shape: CompressorShape) -> None:
        super().__init__(shape)
        widths = [shape.feature_channels, *shape.hidden, shape.channels]
        self.encoder, self.decoder = _stack(widths), _stack(widths[::-1])

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(self.standardise(features))
        return code, torch.zeros_like(code)

    def decode(self, code: Tensor) -> Tensor:
        return self.destandardise(self.decoder(code))


def _conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1)


def _stack(widths: list[int]) -> nn.Sequential:
    """A convolution between consecutive widths, a residual block after each but the last."""
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [_conv(before, after), ResidualBlock(after)]
    return nn.Sequential(*layers[:-1])


class REGLUETokenizer(CompositeTokenizer):
    """Image latents, compressed features, CLS token."""

    coder_class = Compressor


# The objective -----------------------------------------------------------------------------------


class CompressorLearner(nn.Module):
    """Trains the compressor by the squared error of standardised features.

    BatchNorm sees each process's own share of the batch, as in the published code.
    """

    def __init__(self, compressor: Compressor) -> None:
        super().__init__()
        self.compressor = compressor

    def forward(self, inputs: Inputs, draws: Draws, step: int, carry: Carry) -> StepOutput:
        """What is minimised (appendix B.1): L = ‖decoder(encoder(s)) - s‖² / (D h w), s the standardised features.

        Args:
            inputs: the teacher's ``features``.
            draws, step, carry: unused.
        """
        s = self.compressor.standardise(inputs["features"].joined)
        restored = self.compressor.decoder(self.compressor.encoder(s))
        error = (restored.float() - s.float()).square().mean(dim=(1, 2, 3))
        return StepOutput({"mse": Term(error, 1.0)})


class REGLUEObjective(CompositeObjective):
    """Trains the compressor, after one pass that measures the features' statistics."""

    def __init__(self, config: REGLUEConfig, context: MethodContext) -> None:
        assert context.teacher is not None
        compressor = None
        if config.compressor is not None:
            features, shape = sum(context.teacher.widths), dict(config.compressor)
            compressor = Compressor(CompressorShape(feature_channels=features, **shape))
        super().__init__(config, context, compressor)
        if compressor is not None:
            self.learners["compressor"] = CompressorLearner(compressor)
        elif not config.global_token:
            raise ValueError("method: with neither compressor nor global_token nothing is added")

    def measure(self, batches: Iterable[Batch]) -> None:
        if self.coder is not None:
            self.coder.take_statistics(self.feature_moments(batches))

    def diffusion_defaults(self, spec: LatentSpec) -> DiffusionDefaults:
        # As published: both spatial parts weigh the same, each by the mean over its own channels, and
        # REPA's targets hold the CLS token.
        weights = {"semantic": 1.0, "global": GLOBAL_WEIGHT}
        return DiffusionDefaults(
            loss_weights={name: weights[name] for name in spec.names[1:]},
            repa={"weight": 0.5, "with_global": "global" in spec.names},
        )


register_method(
    "reglue",
    config=REGLUEConfig,
    objective=REGLUEObjective,
    tokenizer=REGLUETokenizer,
    papers=("REGLUE, arXiv 2512.16636",),
)
