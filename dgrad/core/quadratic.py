"""The surrogate of a sweep: a quadratic around each evaluated code, with a curvature that the batch shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.modes import without_gradient
from dgrad.kernels.numerics import full_precision

EXAMPLES = 128
"""The examples of a batch whose curvature is measured, at most: more make a step slower and a table hardly better."""


@dataclass(frozen=True)
class Quadratic:
    """`f(z) + h.(y - z) + (y - z)' A (y - z) / 2` around each code z, with `A = sum_r weight_r P_r P_r'`.

    Nothing in it has a gradient.

    Attributes:
        codes: the codes z, `[S, B, n, k]`.
        loss: `f(z)`.
        slope: `h`, the gradient of f at z.
        factors: `P`, shared by the batch. Their number R is independent of the size of a code.
        weights: one for each factor.
    """

    codes: Float[Tensor, "samples batch n k"]
    loss: Float[Tensor, "samples batch"]
    slope: Float[Tensor, "samples batch n k"]
    factors: Float[Tensor, "factors n k"]
    weights: Float[Tensor, " factors"]

    @without_gradient
    @full_precision
    def slope_at(self, center: Float[Tensor, "#samples batch n k"]) -> Float[Tensor, "samples batch n k"]:
        """The quadratic's slope at another point, such as the mean of q: `h + A (center - z)`."""
        factors = self.factors.flatten(1)  # [R, n*k]
        projected = (center - self.codes).flatten(2) @ factors.T  # [S, B, R]
        return self.slope + ((projected * self.weights) @ factors).view_as(self.slope)

    @without_gradient
    @full_precision
    def bend(self, center: Float[Tensor, "*lead batch n k"]) -> Float[Tensor, "*lead batch n k"]:
        """`A_ijij / 2 - (A_ii center_i)_j`: what the curvature inside row i adds to the slope at the center."""
        rows = self.factors.transpose(0, 1)  # [n, R, k]
        weighted = self.weights.unsqueeze(-1) * rows  # [n, R, k]
        projected = center.flatten(0, -3).transpose(0, 1) @ rows.mT  # [n, N, R]
        within = (projected @ weighted).transpose(0, 1).reshape(center.shape)
        return (weighted * rows).sum(1) / 2 - within

    @without_gradient
    def sweep(self, center: Float[Tensor, "#samples batch n k"] | None = None) -> Float[Tensor, "samples batch n k"]:
        """The quadratic with row i of z replaced by `onehot(j)`, for every (i, j).

        Args:
            center: where the other rows stand: the mean of q. A table then has the mean of the tables of all codes,
                and less variance. None for z.
        """
        at_center = self.slope if center is None else self.slope_at(center)
        table = at_center + self.bend(self.codes if center is None else center)
        return table - (table * self.codes).sum(-1, keepdim=True) + self.loss[..., None, None]

    @without_gradient
    @full_precision
    def curvature_along(self, directions: Float[Tensor, "samples batch n k"]) -> Float[Tensor, "samples batch"]:
        """`d' A d / 2` of each direction."""
        projected = directions.flatten(2) @ self.factors.flatten(1).T  # [S, B, R]
        return (projected.square() * self.weights).sum(-1) / 2


def combined(combine: Callable[..., Tensor], parts: list[Quadratic]) -> Quadratic:
    """The quadratic of a linear function of losses."""
    weights = [
        combine(*(part.weights if other == index else torch.zeros_like(part.weights) for other in range(len(parts))))
        for index, part in enumerate(parts)
    ]
    loss = combine(*(part.loss for part in parts))
    slope = combine(*(part.slope for part in parts))
    factors = [part.factors.to(slope.dtype) for part in parts]
    return Quadratic(parts[0].codes.to(slope.dtype), loss, slope, torch.cat(factors), torch.cat(weights))


def random_signs(like: Tensor, generator: Generator | None) -> Tensor:
    """-1 or 1 with equal chances, in the shape of a tensor."""
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
