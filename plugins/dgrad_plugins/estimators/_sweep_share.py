"""Sweeps of some rows only, drawn where a change is likely to matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad import Evaluation, LatentLayer
from dgrad.core.estimator_tools import check_number, needs_moves, needs_one_hot_rows, sweep_evaluations

UNIFORM = 0.1
"""The part of the chances that all rows have alike: a factor is at most `1 / (UNIFORM * share)`.

At small epsilons 0.02, 0.07 and 0.1 measured nearly the same noise on trained weights."""
ROUNDS = 4
"""How often chances above 1 are handed on to other rows. The rest costs a row that is drawn twice, and no bias."""


class SweepShare:
    """The share of a code's rows that is swept, and how a gradient keeps its mean nevertheless.

    Rows are drawn anew for every code, those of a larger weight more often. The gradient is multiplied by `factor`: 0
    for rows that were not drawn, one over the chance of being drawn for the others (Horvitz & Thompson 1952). It must
    be 0 for a row whose values all have the same loss.

    Args:
        share: above 0, at most 1; the nearest whole number of rows, at least one, is swept.
    """

    def __init__(self, share: float) -> None:
        self.share = check_number("sweep_share", share, "a number above 0, at most 1", lambda number: 0 < number <= 1)

    def __str__(self) -> str:
        return f"{self.share:g}"

    def rows(self, n: int) -> int:
        """How many of n rows are swept."""
        return max(1, round(self.share * n))

    def evaluations(self, layer: LatentLayer) -> int:
        """The evaluations of such a sweep, the code itself included."""
        if not layer.one_hot_rows or self.share == 1:
            return sweep_evaluations(layer)
        n, k = layer.shape
        return self.rows(n) * (k - 1) + 1

    def why_unsupported(self, name: str) -> Callable[[LatentLayer], str | None]:
        """Why an estimator that changes one variable at a time, or with a share one row, does not support a layer."""
        return needs_moves(name) if self.share == 1 else needs_one_hot_rows(f"{name} with a sweep_share")

    @torch.no_grad()
    def table(
        self,
        at: Evaluation,
        layer: LatentLayer,
        weights: Callable[[], Float[Tensor, "samples batch n"]],
        generator: Generator | None,
        uniform: float | Tensor = UNIFORM,
    ) -> tuple[Float[Tensor, "samples batch *code"], float | Float[Tensor, "samples batch n 1"]]:
        """The sweep of the rows that are drawn, and the factor. Where a share saves nothing, all potentials and 1.

        Args:
            weights: about how large the gradient is expected to be for each row of each code.
            uniform: the part of the chances that all rows have alike.
        """
        n = layer.shape[0]
        count = self.rows(n)
        if not layer.one_hot_rows or count == n or at.full_sweep_is_free(count):
            return at.potentials(layer), 1.0
        rows, factor = draw_rows(weights(), count, generator, uniform)
        return at.sweep_rows(rows), factor.unsqueeze(-1)


@torch.no_grad()
def draw_rows(
    weights: Float[Tensor, "samples batch n"],
    count: int,
    generator: Generator | None,
    uniform: float | Tensor = UNIFORM,
) -> tuple[Int[Tensor, "samples batch count"], Float[Tensor, "samples batch n"]]:
    """Draw `count` of n rows for each code, with a factor for each row whose mean is 1.

    The factor is one over a row's chance, and 0 where it was not drawn. Chances are proportional to the weights, but
    for the uniform part, and at most 1. The draw is systematic (Madow 1949): rows lie side by side, each as long as its
    chance, and every whole step from a random start hits one.
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
