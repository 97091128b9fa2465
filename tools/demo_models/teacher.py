"""How the embedded teacher was trained: supervised, on the embedded data's own attributes.

DINOv2 can't be shipped in four megabytes, nor be learned on a laptop in minutes. This small
network takes its place offline. Its class token, and the mean of its patch tokens, each learn to
tell all eight attributes; every patch token also learns to tell its own pixels, which keeps the
tokens local. It is trained on scenes of another seed than those that tokenizers see.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from semtok.data.images.shapes import ATTRIBUTES
from semtok.objective import Batch, Objective, StepOutput, Term
from semtok.sampler.draws import Draws
from semtok.teachers import DEMO_WIDTH, demo_network

_PATCH = 4
_PIXEL_WEIGHT = 3.0


class DemoTeacherLearner(nn.Module):
    """The teacher with the heads that it is trained through; only the teacher is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.network = demo_network()
        self.class_heads = _heads()
        self.patch_heads = _heads()
        self.pixel_head = nn.Linear(DEMO_WIDTH, 3 * _PATCH**2)

    def forward(
        self, inputs: Mapping[str, Any], draws: Draws, step: int, carry: Mapping[str, Tensor]
    ) -> StepOutput:
        """Cross-entropies summed over attributes, and the squared error of pixels."""
        tokens = self.network.forward_features(inputs["pixels"])
        cls, patches = tokens[:, 0], tokens[:, 1:]
        target = rearrange(
            inputs["pixels"], "b c (h p) (w q) -> b (h w) (c p q)", p=_PATCH, q=_PATCH
        )
        pixels = (self.pixel_head(patches) - target).square().mean(dim=(1, 2))
        return StepOutput(
            {
                "class_token": Term(
                    _cross_entropy(self.class_heads, cls, inputs["attributes"]), 1.0
                ),
                "patch_tokens": Term(
                    _cross_entropy(self.patch_heads, patches.mean(dim=1), inputs["attributes"]), 1.0
                ),
                "pixels": Term(pixels, _PIXEL_WEIGHT),
            }
        )


class DemoTeacherObjective(Objective):
    """Trains the embedded teacher."""

    def __init__(self) -> None:
        super().__init__()
        self.learners = nn.ModuleDict({"teacher": DemoTeacherLearner()})

    def averaged_module(self) -> nn.Module:
        return self.learners["teacher"].network

    def prepare(self, batch: Batch) -> dict[str, Any]:
        return {"pixels": batch.pixels, "attributes": batch.attributes}

    def validate(
        self,
        averaged: nn.Module,
        pixels: Tensor,
        inputs: Mapping[str, Any],
        *,
        indices: Sequence[int],
    ) -> dict[str, Tensor]:
        """Accuracy of the class token's heads, per attribute (the heads are not averaged)."""
        cls = averaged.forward_features(pixels)[:, 0]
        heads = self.learners["teacher"].class_heads
        return {
            f"accuracy/{name}": (heads[name](cls).argmax(dim=1) == label).float()
            for name, label in inputs["attributes"].items()
        }


def _heads() -> nn.ModuleDict:
    return nn.ModuleDict(
        {name: nn.Linear(DEMO_WIDTH, len(categories)) for name, categories in ATTRIBUTES.items()}
    )


def _cross_entropy(
    heads: nn.ModuleDict, features: Tensor, attributes: Mapping[str, Tensor]
) -> Tensor:
    losses = [
        F.cross_entropy(heads[name](features), label, reduction="none")
        for name, label in attributes.items()
    ]
    return sum(losses[1:], start=losses[0])
