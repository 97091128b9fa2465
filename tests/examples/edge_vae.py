"""A method of one's own, in a file of one's own: a VAE that is also to keep image gradients.

Used by: plugins: [tests/examples/edge_vae.py], method.name: edge_vae.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from semtok import register_method
from semtok.methods.vae import AutoencoderLearner, KLTokenizer, VAEConfig, VAEObjective
from semtok.objective import Term
from semtok.sampler.draws import Draws


class EdgeVAEConfig(VAEConfig):
    """The VAE's settings and one more."""

    name: Literal["edge_vae"] = "edge_vae"
    edge_weight: float = 1.0


class EdgeVAELearner(AutoencoderLearner):
    """Adds one named loss; the loop, the log and the gradient clipping need no change."""

    def extra_terms(self, z: Tensor, inputs: Mapping[str, Any], draws: Draws) -> dict[str, Term]:
        difference = self.autoencoder.decode(z).sample - inputs["pixels"]
        edges = difference.diff(dim=2).square().mean(dim=(1, 2, 3))
        return {"edges": Term(edges, self.config.edge_weight)}


class EdgeVAEObjective(VAEObjective):
    learner_class = EdgeVAELearner


register_method("edge_vae", config=EdgeVAEConfig, objective=EdgeVAEObjective, tokenizer=KLTokenizer)
