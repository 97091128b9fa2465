"""Which tokens training drops: the settings of token routing, and its law."""

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from semtok.sampler.draws import Draws
from semtok.sampler.routing import Route
from semtok.settings import Config

Ratio = Annotated[float, Field(ge=0, lt=1)]
_SIDE = 2  # of the groups of cells from each of which the grid's law keeps as many tokens


def at_step(values: float | dict[int, float], step: int) -> float:
    """One value, or of values by the step from which they hold the one that holds at a step (0-based)."""
    if isinstance(values, dict):
        return values[max(start for start in values if start <= step)]
    return values


class RoutingConfig(Config):
    """Token routing (SPRINT, arXiv 2510.21986; SR-DiT, arXiv 2512.12386): see ``sampler.routing``."""

    first: int = Field(2, ge=1)
    """Blocks at the start that see all tokens."""
    last: int = Field(2, ge=1)
    """Blocks at the end that see all tokens."""
    drop: Ratio | dict[int, Ratio] = 0.75
    """Share of the patch tokens that the blocks between do not see in training. Either one, or shares by the step
    (0-based) from which they hold, as {0: 0.75, 90000: 0.0} for a last phase with all tokens."""
    law: Literal["random", "grid"] = "random"
    """Which are kept: any, or as many of each 2x2 cells (SPRINT)."""
    vectors: Literal["kept", "routed"] = "kept"
    """Tokens of vector parts are always kept, or take part in the draw (SR-DiT)."""
    path_drop: float = Field(0.1, ge=0, lt=1)
    """How often the path through the blocks between is dropped, which path-drop guidance needs."""
    path_drop_per: Literal["sample", "batch"] = "sample"
    """Drawn for each image (SPRINT), or once a step for the whole batch (SR-DiT)."""

    @field_validator("drop")
    @classmethod
    def _from_the_first_step(cls, drop: float | dict[int, float]) -> float | dict[int, float]:
        if isinstance(drop, dict) and (0 not in drop or min(drop) < 0):
            raise ValueError(f"shares by step begin with step 0, got {drop}")
        return drop

    @model_validator(mode="after")
    def _consistent(self) -> "RoutingConfig":
        for key, other in (("law", "random"), ("vectors", "kept")):
            if getattr(self, key) != other and not any(self._shares()):
                raise ValueError(f"{key} takes effect where tokens are dropped, and drop is 0")
        if self.path_drop_per != "sample" and not self.path_drop:
            raise ValueError("path_drop_per takes effect with some path_drop, and it is 0")
        if self.law == "grid":
            for drop in self._shares():
                if drop * _SIDE**2 % 1:
                    raise ValueError(f"of 2x2 cells 0.25, 0.5 or 0.75 can be dropped, not {drop}")
            if self.vectors == "routed":
                raise ValueError(
                    "vectors: routed goes with law: random, as they are in no 2x2 cells"
                )
        return self

    def _shares(self) -> list[float]:
        return list(self.drop.values()) if isinstance(self.drop, dict) else [self.drop]

    def check_use(self, num_patches: int, num_vectors: int) -> None:
        """Raises ValueError where settings would drop nothing of so many tokens."""
        shares = [share for share in self._shares() if share]
        if not shares and not self.path_drop:
            raise ValueError(
                "diffusion.routing: drop and path_drop are 0, so that nothing is dropped; pass some drop, or "
                "diffusion.routing=null"
            )
        num_tokens = num_patches + (num_vectors if self.vectors == "routed" else 0)
        if shares and num_tokens == 1:
            raise ValueError(
                "diffusion.routing.drop: of one token none is dropped; pass a network of smaller patches, or "
                "diffusion.routing=null"
            )

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raises ValueError where a grid of tokens can't be cut into 2x2 cells, if that is the law."""
        if self.law == "grid" and any(side % _SIDE for side in grid):
            raise ValueError(
                f"diffusion.routing.law: a grid of {grid[0]}x{grid[1]} tokens has no whole 2x2 cells; pass random"
            )

    def drop_at(self, step: int) -> float:
        """The share that is dropped at a step (0-based)."""
        return at_step(self.drop, step)

    def route(self, draws: Draws, grid: tuple[int, int], num_vectors: int, step: int) -> Route:
        """What the blocks between see in a training step.

        Args:
            grid: (rows, columns) of the patch tokens, which stand after the vectors' tokens.
        """
        return Route(self._kept(draws, grid, num_vectors, step), self._dropped(draws))

    def _kept(
        self, draws: Draws, grid: tuple[int, int], num_vectors: int, step: int
    ) -> Tensor | None:
        drop = self.drop_at(step)
        if not drop:
            return None
        num_patches = grid[0] * grid[1]
        if self.vectors == "routed":
            return kept_at_random(draws.uniform("route", (num_vectors + num_patches,)), drop)
        numbers = draws.uniform("route", (num_patches,))
        of_cells = self.law == "grid"
        patches = kept_of_cells(numbers, grid, drop) if of_cells else kept_at_random(numbers, drop)
        vectors = torch.arange(num_vectors, device=patches.device).expand(len(patches), -1)
        return torch.cat([vectors, patches + num_vectors], dim=1)

    def _dropped(self, draws: Draws) -> Tensor:
        """Drawn also where the path is never dropped: so the mask token has a gradient in every step, as processes
        that wait for each other's, and optimisers, expect."""
        per_batch = self.path_drop_per == "batch"
        number = draws.uniform_of_step("path") if per_batch else draws.uniform("path")
        return number.expand(draws.num) < self.path_drop


def kept_at_random(numbers: Tensor, drop: float) -> Tensor:
    """Places int64 (B, K) of the smallest of numbers (B, N); K is N (1 - drop), rounded down, at least 1."""
    # Of 100 tokens 0.9 leaves 10, which is a little less in binary numbers.
    count = max(1, int(numbers.shape[1] * (1 - drop) + 1e-9))
    return numbers.argsort(dim=1)[:, :count]


def kept_of_cells(numbers: Tensor, grid: tuple[int, int], drop: float) -> Tensor:
    """Places int64 (B, K) of the largest of numbers (B, rows * columns) in each 2x2 cells."""
    rows, columns = grid
    place = torch.arange(rows * columns, device=numbers.device).view(rows, columns)
    groups = place.unfold(0, _SIDE, _SIDE).unfold(1, _SIDE, _SIDE).reshape(-1, _SIDE**2)
    count = round(_SIDE**2 * (1 - drop))
    chosen = numbers[:, groups].topk(count, dim=2).indices
    return groups.expand(len(numbers), -1, -1).gather(2, chosen).flatten(1)
