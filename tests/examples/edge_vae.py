"""A method of one's own, in a file of one's own: a VAE that is also to keep image gradients.

Used by: plugins: [tests/examples/edge_vae.py], method.name: edge_vae.
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from semtok import register_method
from semtok.methods.vae import AutoencoderLearner, KLTokenizer, VAEConfig, VAEObjective
from semtok.objective import MethodContext, StepOutput, Term
from semtok.sampler.draws import Draws


class EdgeVAEConfig(VAEConfig):
    """The VAE's settings and one more."""

    name: Literal["edge_vae"] = "edge_vae"
    edge_weight: float = 1.0


class EdgeVAELearner(AutoencoderLearner):
    """Adds one named loss; the loop, the log and the gradient clipping need no change."""

    def forward(
        self, inputs: Mapping[str, Any], draws: Draws, step: int, carry: Mapping[str, Tensor]
    ) -> StepOutput:
        q, _, x_hat = self.autoencode(inputs["pixels"], draws)
        terms = self.vae_terms(q, x_hat, inputs)
        x = self.target(inputs["pixels"], draws)
        edges = (x_hat - x).diff(dim=2).square().mean(dim=(1, 2, 3))
        terms["edges"] = Term(edges, self.config.edge_weight)
        terms |= self.adversarial_terms(x_hat, terms, step, draws)
        return StepOutput(terms, carry={"reconstruction": x_hat.detach()})


class EdgeVAEObjective(VAEObjective):
    def __init__(self, config: EdgeVAEConfig, context: MethodContext) -> None:
        super().__init__(config, context, EdgeVAELearner)


register_method("edge_vae", config=EdgeVAEConfig, objective=EdgeVAEObjective, tokenizer=KLTokenizer)
