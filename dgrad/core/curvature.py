"""The curvature of a loss in the code, shared by a batch: what a surrogate of the sweep adds to the slope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.core.modes import without_gradient
from dgrad.kernels.numerics import full_precision

EXAMPLES = 64
"""The examples of a batch whose curvature is measured, at most: more make a step slower and a table hardly better."""


@dataclass(frozen=True)
class Curvature:
    """A symmetric matrix `A = sum_r left_r right_r'` of the coordinates of a code. No gradient flows through it.

    Near a code z with the slope h the loss is about `f(z) + h.(y - z) + (y - z)' A (y - z) / 2`.

    >>> curvature = Curvature(torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]]))
    >>> curvature.times(torch.ones(1, 1, 1, 2))  # A = diag(1, 4)
    tensor([[[[1., 4.]]]])
    >>> curvature.along(torch.ones(1, 1, 1, 2))
    tensor([[2.5000]])
    """

    left: Float[Tensor, "factors n k"]
    right: Float[Tensor, "factors n k"]

    @without_gradient
    @full_precision
    def times(self, vectors: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead n k"]:
        """`A v` of each vector."""
        return ((vectors.flatten(-2) @ self.left.flatten(1).T) @ self.right.flatten(1)).view_as(vectors)

    @without_gradient
    @full_precision
    def along(self, vectors: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead"]:
        """`v' A v / 2` of each vector."""
        flat = vectors.flatten(-2)
        return ((flat @ self.left.flatten(1).T) * (flat @ self.right.flatten(1).T)).sum(-1) / 2

    @without_gradient
    @full_precision
    def within_rows(self, center: Float[Tensor, "*lead n k"]) -> Float[Tensor, "*lead n k"]:
        """`(e_j - c_i)' A_ii (e_j - c_i) / 2` for each row i and value j of a center c, but for a constant in a row."""
        # A_ijij / 2 - (A_ii c_i)_j
        left, right = self.left.transpose(0, 1), self.right.transpose(0, 1)  # [n, R, k]
        projected = center.flatten(0, -3).transpose(0, 1) @ left.mT  # [n, N, R]
        return (left * right).sum(1) / 2 - (projected @ right).transpose(0, 1).reshape(center.shape)

    @without_gradient
    def sweep(
        self,
        codes: Float[Tensor, "samples batch n k"],
        slope: Float[Tensor, "samples batch n k"],
        center: Float[Tensor, "*#samples batch n k"],
    ) -> Float[Tensor, "samples batch n k"]:
        """The surrogate of a sweep: the quadratic with row i replaced by `onehot(j)`, but for a constant in each row.

        Args:
            slope: of the loss at the codes.
            center: where the other rows stand: the codes, or the mean of q. At the mean a quadratic's table is the
                mean of the tables over the other rows, which varies less.
        """
        return slope + self.times(center - codes) + self.within_rows(center)

    def to(self, dtype: torch.dtype) -> Curvature:
        """The same in another precision."""
        return Curvature(self.left.to(dtype), self.right.to(dtype))


def combined(combine: Callable[..., Tensor], parts: Sequence[Curvature]) -> Curvature:
    """The curvature of a linear function of losses."""
    rights = [
        combine(*(part.right if other == number else torch.zeros_like(part.right) for other in range(len(parts))))
        for number, part in enumerate(parts)
    ]
    return Curvature(torch.cat([part.left.to(rights[0].dtype) for part in parts]), torch.cat(rights))


def mean_of_squares(factors: Float[Tensor, "factors n k"]) -> Curvature:
    """The mean of `v v'`."""
    return Curvature(factors, factors / max(1, len(factors)))


def mean_of_products(ours: Float[Tensor, "factors n k"], theirs: Float[Tensor, "factors n k"]) -> Curvature:
    """The mean of `(u v' + v u') / 2`."""
    return Curvature(torch.cat([ours, theirs]), torch.cat([theirs, ours]) / (2 * max(1, len(ours))))


def random_signs(like: Tensor, generator: Generator | None) -> Tensor:
    """-1 or 1 with equal chances, in the shape of a tensor, whatever its strides."""
    # `bernoulli_` takes three times as long on a CPU
    signs = torch.randint(0, 2, like.shape, dtype=like.dtype, device=like.device, generator=generator)
    return signs.mul_(2).sub_(1)
