"""Sweeps of all rows, of some that are drawn where a change is likely to matter, and by a surrogate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad import Evaluation, InputError, LatentLayer, Objective
from dgrad.core.estimator_tools import (
    check_choice,
    check_number,
    needs_moves,
    needs_one_hot_rows,
    sweep_evaluations,
)

UNIFORM = 0.1
"""The part of the chances that all rows have alike: a factor is at most `1 / (UNIFORM * share)`.

At small epsilons 0.02, 0.07 and 0.1 measured nearly the same noise on trained weights."""
ROUNDS = 4
"""How often chances above 1 are handed on to other rows. The rest costs a row that is drawn twice, and no bias."""


SWEEPS = ("exact", "surrogate", "corrected")


class SweepShare:
    """How an estimator sweeps: exactly, all rows or a share of them, by a surrogate, or by a surrogate and a share.

    Let `g(T)` be the gradient of a table T. Row i of it depends on row i of T alone, and is 0 where all values of the
    row have the same loss. S is the surrogate (`Curvature.sweep`), `F_i` the factor of row i: one over the
    chance of being drawn for rows that were, 0 for the others (Horvitz & Thompson 1952).

    - `exact`: `g(T)`, with a share `F_i g_i(T)`
    - `surrogate`: `g(S)`
    - `corrected`: `g_i(S) + F_i (g_i(T) - g_i(S))`, which has the mean of `g(T)`

    Rows are drawn anew for every code, those of a larger weight more often.

    Args:
        share: above 0, at most 1; the nearest whole number of rows, at least one, is swept.
        sweep: one of the three.
    """

    def __init__(self, share: float, sweep: str = "exact") -> None:
        self.share = check_number("sweep_share", share, "a number above 0, at most 1", lambda number: 0 < number <= 1)
        self.sweep = check_choice("sweep", sweep, SWEEPS)
        if sweep == "surrogate" and self.share < 1:
            raise InputError(
                f"sweep_share {share} is a share of the exact sweep; leave it out with sweep=surrogate, or take "
                "sweep=corrected"
            )
        if sweep == "corrected" and self.share == 1:
            raise InputError("sweep=corrected sweeps a share of the rows; expected a sweep_share below 1, such as 0.1")

    def __str__(self) -> str:
        return f"{self.share:g}"

    @property
    def differentiable(self) -> bool:
        """Whether the objective's gradient in the codes is needed."""
        return self.sweep != "exact"

    @property
    def exact_for(self) -> str:
        """The objectives of whose sweep the mean is taken exactly, as `ExactLimit` names them."""
        return "linear" if self.sweep == "surrogate" else "any"

    def rows(self, n: int) -> int:
        """How many of n rows are swept."""
        return max(1, round(self.share * n))

    def evaluations(self, layer: LatentLayer, samples: int) -> int:
        """The evaluations of sweeps around as many codes, the codes included, and one to measure a curvature."""
        if self.sweep == "surrogate":
            return samples + 1
        if not layer.one_hot_rows or self.share == 1:
            return samples * sweep_evaluations(layer)
        n, k = layer.shape
        return samples * (self.rows(n) * (k - 1) + 1) + (self.sweep == "corrected")

    def why_unsupported(self, name: str) -> Callable[[LatentLayer], str | None]:
        """Why an estimator that changes one variable at a time, or with a share one row, does not support a layer."""
        if self.differentiable:
            return needs_one_hot_rows(f"{name} with sweep={self.sweep}")
        return needs_moves(name) if self.share == 1 else needs_one_hot_rows(f"{name} with a sweep_share")

    @torch.no_grad()
    def direction(
        self,
        objective: Objective,
        at: Evaluation,
        layer: LatentLayer,
        gradient: Callable[[Tensor], Tensor],
        *,
        mean: Callable[[], Float[Tensor, "batch *code"]],
        weights: Callable[[], Float[Tensor, "samples batch n"]],
        generator: Generator | None,
        uniform: float | Tensor = UNIFORM,
    ) -> Float[Tensor, "samples batch *code"]:
        """The gradient of the sweep, whole, by a share, or by a surrogate.

        Args:
            objective: of the evaluation.
            at: the codes, evaluated with `differentiable=self.differentiable`.
            gradient: of a table `[S, B, *code]`, in the same shape.
            mean: of q, where the surrogate has the rows that are not changed.
            weights: about how large the gradient is expected to be for each row of each code.
            uniform: the part of the chances that all rows have alike.
        """
        n = layer.shape[0]
        count = self.rows(n)
        if self.sweep == "exact":
            if not layer.one_hot_rows or count == n or at.full_sweep_is_free(count):
                return gradient(at.potentials(layer))
            rows, factor = draw_rows(weights(), count, generator, uniform)
            return factor.unsqueeze(-1) * gradient(at.sweep_rows(rows))
        codes = at.codes.detach()
        curvature = objective.curvature(codes[:1], generator=generator)
        # As a control it stands where the sweep stands, at the code. Alone, the mean of q leaves less variance.
        center = mean() if self.sweep == "surrogate" else codes
        of_surrogate = gradient(curvature.sweep(codes, at.slope(), center))
        if self.sweep == "surrogate":
            return of_surrogate
        rows, factor = draw_rows(weights(), count, generator, uniform)
        return of_surrogate + factor.unsqueeze(-1) * (gradient(at.sweep_rows(rows)) - of_surrogate)


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
