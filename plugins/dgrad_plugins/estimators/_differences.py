"""The finite difference that the direct family shares."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DIFFERENCES = ("backward", "forward", "central")


@torch.no_grad()
def difference(
    solve: Callable[[Tensor], Tensor],
    potentials: Tensor,
    losses: Tensor,
    epsilon: Tensor,
    kind: str,
    middle: Tensor | None = None,
) -> Tensor:
    """The difference quotient of `solve` (an argmax, a softmax) along the losses, in the shape of the potentials.

    Args:
        middle: `solve(potentials)` where the caller has it.
    """
    if kind == "central":
        # [z(u + eps T) - z(u - eps T)] / (2 eps)
        return (solve(potentials + epsilon * losses) - solve(potentials - epsilon * losses)) / (2 * epsilon)
    middle = solve(potentials) if middle is None else middle
    if kind == "forward":
        # [z(u + eps T) - z(u)] / eps
        return (solve(potentials + epsilon * losses) - middle) / epsilon
    # [z(u) - z(u - eps T)] / eps
    return (middle - solve(potentials - epsilon * losses)) / epsilon
