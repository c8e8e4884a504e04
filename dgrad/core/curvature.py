"""The curvature of a loss in the code, shared by a batch: what a surrogate of the sweep adds to the slope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.modes import without_gradient
from dgrad.kernels.numerics import full_precision

EXAMPLES = 128
"""The examples of a batch whose curvature is measured, at most: more make a step slower and a table hardly better."""


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix `A = sum_r weight_r P_r P_r'` of the coordinates of a code. No gradient flows through it.

    Near a code z with the slope h the loss is about `f(z) + h.(y - z) + (y - z)' A (y - z) / 2`.

    Attributes:
        factors: `P`.
        weights: one for each factor; they may be negative.

    >>> curvature = Curvature(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.ones(2))  # A = diag(1, 4)
    >>> curvature.times(torch.ones(1, 1, 1, 2))
    tensor([[[[1., 4.]]]])
    >>> curvature.along(torch.ones(1, 1, 1, 2))
    tensor([[2.5000]])
    """

    factors: Float[Tensor, "factors n k"]
    weights: Float[Tensor, " factors"]

    @without_gradient
    @full_precision
    def times(self, vectors: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead n k"]:
        """`A v` of each vector."""
        factors = self.factors.flatten(1)  # [R, n*k]
        return (((vectors.flatten(-2) @ factors.T) * self.weights) @ factors).view_as(vectors)

    @without_gradient
    @full_precision
    def along(self, vectors: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead"]:
        """`v' A v / 2` of each vector."""
        return ((vectors.flatten(-2) @ self.factors.flatten(1).T).square() * self.weights).sum(-1) / 2

    @without_gradient
    @full_precision
    def within_rows(self, center: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead n k"]:
        """`A_ijij / 2 - (A_ii c_i)_j` around a center c.

        It is half the curvature from `c_i` to `onehot(j)`, but for a constant in each row.
        """
        rows = self.factors.transpose(0, 1)  # [n, R, k]
        weighted = self.weights.unsqueeze(-1) * rows
        projected = center.flatten(0, -3).transpose(0, 1) @ rows.mT  # [n, N, R]
        return (weighted * rows).sum(1) / 2 - (projected @ weighted).transpose(0, 1).reshape(center.shape)

    @without_gradient
    def sweep(
        self,
        codes: Float[Tensor, "samples batch n k"],
        slope: Float[Tensor, "samples batch n k"],
        center: Float[Tensor, "*#samples batch n k"],
    ) -> Float[Tensor, "samples batch n k"]:
        """The surrogate of a sweep: the quadratic with row i replaced by `onehot(j)`, less a constant in each row.

        Args:
            center: where the other rows stand: the codes, or the mean of q. At the mean a quadratic's table is the
                mean of the tables over the other rows, which varies less.
        """
        return slope + self.times(center - codes) + self.within_rows(center)


def combined(combine: Callable[..., Tensor], parts: Sequence[Curvature]) -> Curvature:
    """The curvature of a linear function of losses."""
    weights = [
        combine(*(part.weights if other is part else torch.zeros_like(part.weights) for other in parts))
        for part in parts
    ]
    return Curvature(torch.cat([part.factors.to(weights[0].dtype) for part in parts]), torch.cat(weights))


def mean_of_squares(factors: Float[Tensor, "factors n k"]) -> Curvature:
    """The mean of `P P'`."""
    return Curvature(factors, factors.new_full((len(factors),), 1 / max(1, len(factors))))


def mean_of_products(ours: Float[Tensor, "factors n k"], theirs: Float[Tensor, "factors n k"]) -> Curvature:
    """The mean of `(u v' + v u') / 2 = ((u + v) (u + v)' - (u - v) (u - v)') / 4`."""
    weights = ours.new_full((len(ours),), 1 / (4 * max(1, len(ours))))
    return Curvature(torch.cat([ours + theirs, ours - theirs]), torch.cat([weights, -weights]))


def random_signs(like: Tensor, generator: Generator | None) -> Tensor:
    """-1 or 1 with equal chances, in the shape of a tensor."""
    return torch.empty_like(like).bernoulli_(0.5, generator=generator).mul_(2).sub_(1)
