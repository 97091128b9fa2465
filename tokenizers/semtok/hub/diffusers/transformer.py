"""The network of a generator, as a diffusers model."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from semtok.sampler.architecture import DiTArchitecture
from semtok.sampler.dit import DiT, DiTOutput
from semtok.sampler.latents import LatentSpec
from semtok.sampler.routing import DENSE, Route


class SemtokTransformer(ModelMixin, ConfigMixin):
    """Predicts the velocity of noised latents, all parts together, from their time and class.

    Args:
        architecture: the network's shape, see ``DiTArchitecture``.
        latents: the parts: name, channels, and stride in image pixels (None: a vector).
        num_classes: classes 0 ... n - 1; label n stands for none.
        timed_parts: parts with an embedded time of their own; empty: all share the texture's.
    """

    @register_to_config
    def __init__(
        self,
        architecture: dict[str, Any],
        latents: list[dict[str, Any]],
        num_classes: int,
        timed_parts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.spec, self.num_classes = LatentSpec.from_dict(latents), num_classes
        self.dit = DiT(
            DiTArchitecture.model_validate_json(json.dumps(architecture)),
            self.spec,
            num_classes=num_classes,
            timed_parts=tuple(timed_parts),
        )

    def forward(
        self,
        x: Mapping[str, Tensor],
        times: Mapping[str, Tensor],
        labels: Tensor,
        *,
        route: Route = DENSE,
        inner: bool = False,
        state: Tensor | None = None,
    ) -> DiTOutput:
        """One forward pass; the velocity is of the latents' dtype, whatever that of the weights.

        Args:
            x: noised latents; spatial parts (B, C, H, W) on one grid, vector parts (B, D).
            times: per part (B,) in [0, 1], from noise to data.
            labels: int64 (B,) in [0, num_classes].
            route: of a network with token routing, which samples skip most blocks.
            inner: also give what the second head predicts, of a network that has one.
            state: of another pass of a network with a head, which alone is then run.
        """
        output = self.dit(x, times, labels, route=route, inner=inner, state=state)
        dtype = x["texture"].dtype
        second = output.inner.to(dtype) if output.inner is not None else None
        return DiTOutput(output.velocity.to(dtype), None, second, output.state)

    @property
    def architecture(self) -> DiTArchitecture:
        """The network's shape."""
        return self.dit.config
