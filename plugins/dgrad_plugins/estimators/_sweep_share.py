"""Sweeps of some rows only, drawn where a change is likely to matter. May import torch and dgrad."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad.core.estimator_tools import needs_changes, needs_independent_rows, sweep_evaluations
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objectives import Objective
from dgrad.errors import InputError

UNIFORM = 0.1
"""The part of the chances that all rows have alike, so that a factor is at most `1 / (UNIFORM * share)`. At small epsilons 0.02, 0.07 and 0.1
measured nearly the same noise on trained weights."""
ROUNDS = 4
"""How often chances above 1 are handed on to other rows; what is left after that costs a row that is drawn twice, and no bias."""


class SweepShare:
    """The share of a code's rows that is swept, and how a gradient keeps its mean nevertheless.

    Which rows is drawn anew for every code, those of a larger weight more often. A gradient that is 0 for a row whose values all have the same loss
    is multiplied by `factor`, which is 0 for rows that were not drawn and one over the chance of being drawn for the others (Horvitz & Thompson 1952).

    Args:
        share: above 0, at most 1; the nearest whole number of rows, at least one, is swept.
    """

    def __init__(self, share: float) -> None:
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise InputError(f"sweep_share must be a number above 0, at most 1; got {share!r}")
        self.share = float(share)

    def rows(self, n: int) -> int:
        """How many of n rows are swept."""
        return max(1, round(self.share * n))

    def evaluations(self, layer: LatentLayer) -> int:
        """The evaluations of such a sweep, the code itself included."""
        if not layer.independent_rows or self.share == 1:
            return sweep_evaluations(layer)
        n, k = layer.shape
        return self.rows(n) * (k - 1) + 1

    def limitation(self, name: str) -> Callable[[LatentLayer], str | None]:
        """The limitation of an estimator that changes one variable at a time, or with a share one row."""
        return needs_changes(name) if self.share == 1 else needs_independent_rows(f"{name} with a sweep_share")

    @torch.no_grad()
    def table(
        self,
        objective: Objective,
        layer: LatentLayer,
        codes: Float[Tensor, "samples batch *code"],
        loss: Float[Tensor, "samples batch"],
        weights: Callable[[], Float[Tensor, "samples batch n"]],
        generator: Generator | None,
        uniform: float | Tensor = UNIFORM,
    ) -> tuple[Float[Tensor, "samples batch *code"], float | Float[Tensor, "samples batch n 1"]]:
        """The sweep of the rows that are drawn, and the factor; or the potentials of all variables where a share would save nothing, and 1.

        Args:
            weights: for each row of each code about how large the gradient is expected to be there.
            uniform: the part of the chances that all rows have alike.
        """
        n = layer.shape[0]
        count = self.rows(n)
        if not layer.independent_rows or count == n or objective.sweeps_all_rows_at_once(codes, count):
            return objective.potentials(layer, codes, loss), 1.0
        rows, factor = draw_rows(weights(), count, generator, uniform)
        return objective.sweep_rows(codes, rows, loss), factor.unsqueeze(-1)


@torch.no_grad()
def draw_rows(
    weights: Float[Tensor, "samples batch n"],
    count: int,
    generator: Generator | None,
    uniform: float | Tensor = UNIFORM,
) -> tuple[Int[Tensor, "samples batch count"], Float[Tensor, "samples batch n"]]:
    """Draws `count` of n rows for each code, and one over each one's chance, 0 where it was not drawn: its mean is 1 for every row.

    Chances are proportional to the weights, but for the uniform part, and at most 1. The draw is systematic (Madow 1949): rows lie side by
    side, each as long as its chance, and every whole step from a random start hits one.
    """
    n = weights.shape[-1]
    tiny = torch.finfo(weights.dtype).tiny
    ideal = (1 - uniform) * weights / weights.sum(-1, keepdim=True).clamp_min(tiny) + uniform / n
    chance = (count * ideal / ideal.sum(-1, keepdim=True)).clamp(max=1)
    for _ in range(ROUNDS):
        certain = chance >= 1
        left = count - certain.sum(-1, keepdim=True)
        others = torch.where(certain, 0, ideal)
        chance = torch.where(certain, 1, others * left / others.sum(-1, keepdim=True)).clamp(max=1)
    chance = chance * (count / chance.sum(-1, keepdim=True))
    start = torch.rand(*weights.shape[:-1], 1, generator=generator, device=weights.device, dtype=weights.dtype)
    points = start + torch.arange(count, device=weights.device)
    rows = torch.searchsorted(chance.cumsum(-1), points, right=True).clamp(max=n - 1)  # [S, B, count]
    times = torch.zeros_like(chance).scatter_add(-1, rows, torch.ones_like(points))
    return rows, times / chance
