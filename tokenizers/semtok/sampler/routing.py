"""Token routing: most blocks see only some of the tokens in training (SPRINT, arXiv 2510.21986; SR-DiT, 2512.12386).

The blocks are split in three: the first f and the last h see all tokens, those between, g, only the kept ones:

    dense = f(x),  sparse = g(kept tokens of dense),  out = h(W [dense, sparse at its places, a mask token elsewhere])

In sampling g sees all tokens. Where the path through g is dropped, the mask token stands at all places; in sampling
such samples skip g, which is what path-drop guidance moves away from.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from semtok.sampler.roles import hidden_matrix


@dataclass(frozen=True)
class Route:
    """What the blocks between see of one batch.

    Attributes:
        kept: places of the kept tokens, int64 (B, K), each once, of vectors and patches; None: all tokens.
        dropped: samples whose path through these blocks is dropped, bool (B,); None: none.
        num_skipped: so many samples at the batch's end do not enter these blocks at all, as if dropped.
    """

    kept: Tensor | None = None
    dropped: Tensor | None = None
    num_skipped: int = 0


DENSE = Route()
"""All tokens of all samples, as in sampling."""


def taken(tokens: Tensor, places: Tensor) -> Tensor:
    """Some tokens of each sample: (B, N, D) at places (B, K) to (B, K, D)."""
    return tokens.gather(1, places[:, :, None].expand(-1, -1, tokens.shape[2]))


def taken_values(values: Tensor, places: Tensor) -> Tensor:
    """Some tokens' values of each sample: (B, heads, N, D) at places (B, K) to (B, heads, K, D)."""
    index = places[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
    return values.gather(2, index)


def taken_rotary(rotary: tuple[Tensor, Tensor], places: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary tables (N, D) of some tokens (B, K): (B, 1, K, D)."""
    return rotary[0][places][:, None], rotary[1][places][:, None]


class Fusion(nn.Module):
    """Joins what the first blocks and the blocks between have made: W [dense, sparse] + b.

    The mask token is learned. It starts at zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.linear = hidden_matrix(nn.Linear(2 * width, width), slices=2, along="inputs")

    def forward(self, dense: Tensor, sparse: Tensor, route: Route) -> Tensor:
        """Tokens (B, N, D).

        Args:
            dense: all tokens, (B, N, D).
            sparse: kept tokens (B - skipped, K, D), at the places of the route.
        """
        mask = self.mask_token.to(sparse.dtype)
        if route.kept is not None:
            places = route.kept[:, :, None].expand(-1, -1, sparse.shape[2])
            sparse = mask.expand(len(sparse), dense.shape[1], -1).scatter(1, places, sparse)
        if route.dropped is not None:
            # Chosen, not multiplied: an infinite number in a dropped path is nobody's.
            sparse = torch.where(route.dropped[:, None, None], mask, sparse)
        if route.num_skipped:
            absent = mask.expand(route.num_skipped, dense.shape[1], -1)
            sparse = torch.cat([sparse, absent])
        return self.linear(torch.cat([dense, sparse.to(dense.dtype)], dim=2))
