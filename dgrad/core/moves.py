"""How a code is changed a little, in layers without one-hot rows."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

RIDGE = 1e-8
"""Makes a least-squares fit unique. In float64 it moves fitted potentials by some 1e-8 of their size."""
SHARP = 12.0
"""Logits of a code's coordinates so large that two exchanges at once weigh nothing beside one, in float64."""


class Moves(ABC):
    """The neighbours of a code, in a layer without one-hot rows, and the potentials that describe them."""

    count: int
    """How many neighbours a code has."""

    @abstractmethod
    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        """Every code that differs a little from these.

        Neighbours may leave the support, where decoders do not mind. A code that has fewer than `count` is its own
        neighbour.
        """

    def potentials(
        self, codes: Float[Tensor, "samples batch *code"], changes: Float[Tensor, "changes samples batch"]
    ) -> Float[Tensor, "samples batch *code"]:
        """Potentials `T` by which the neighbours differ from the codes: `<T, z'> - <T, z> = changes`.

        By default they are fitted by least squares. That is exact for losses that are linear in the code.
        """
        steps = (self.neighbours(codes) - codes).flatten(3).movedim(0, -2).double()  # D: [S, B, C, d]
        target = changes.movedim(0, -1).double().unsqueeze(-1)  # [S, B, C, 1]
        # T = (D' D + r)^-1 D' changes = D' (D D' + r)^-1 changes, by the smaller of the two matrices
        if self.count > steps.shape[-1]:
            fitted = _solve(steps.mT @ steps, steps.mT @ target)
        else:
            fitted = steps.mT @ _solve(steps @ steps.mT, target)
        return fitted.reshape(codes.shape).to(codes.dtype)


def _solve(matrix: Tensor, target: Tensor) -> Tensor:
    ridge = RIDGE * torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_ex(matrix + ridge, target).result


class Toggles(Moves):
    """Each coordinate of a code is changed by itself, from 0 to 1 or from 1 to 0."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.count = math.prod(shape)

    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        each = torch.eye(self.count, dtype=codes.dtype, device=codes.device).view(self.count, 1, 1, *self.shape)
        return codes + each * (1 - 2 * codes)

    def potentials(
        self, codes: Float[Tensor, "samples batch *code"], changes: Float[Tensor, "changes samples batch"]
    ) -> Float[Tensor, "samples batch *code"]:
        # what a coordinate that is 1 loses by becoming 0 is what it gains by being 1
        return (1 - 2 * codes) * changes.movedim(0, -1).reshape(codes.shape)


class Substitutions(Moves):
    """One integer of the compact form of a code, `[..., variables]`, takes another of its values.

    Args:
        indices, codes: the layer's.
        variables: how many integers a code has.
        values: how many values each has.
    """

    def __init__(
        self, indices: Callable[[Tensor], Tensor], codes: Callable[..., Tensor], variables: int, values: int
    ) -> None:
        self.indices, self.codes = indices, codes
        self.variables, self.values = variables, values
        self.count = variables * (values - 1)

    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        shifts = torch.arange(1, self.values, device=codes.device)[:, None, None]
        steps = shifts * torch.eye(self.variables, dtype=torch.long, device=codes.device)  # [values - 1, n, n]
        indices = self.indices(codes) + steps.flatten(0, 1)[:, None, None]  # [C, S, B, n]
        return self.codes(indices % self.values, codes.dtype)


class Exchanges(Moves):
    """A coordinate that is 1 and one that is 0 change places, where the result is a code.

    At logits `b (2z - 1)` the code z has almost all the weight, and each exchange of it `exp(-2b)`. A pair that can be
    exchanged has a covariance of minus that much, a pair that cannot almost none.

    Args:
        log_z: the layer's. Its second derivatives are these covariances.
        shape: the shape of a code.
        ones: how many coordinates are 1: as many in every code.
    """

    def __init__(self, log_z: Callable[[Tensor], Tensor], shape: tuple[int, ...], ones: int) -> None:
        self.log_z, self.ones = log_z, ones
        self.count = ones * (math.prod(shape) - ones)

    def neighbours(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "changes samples batch *code"]:
        flat = codes.flatten(2)
        out, into = flat.argsort(stable=True, descending=True).tensor_split([self.ones], -1)
        unit = torch.eye(flat.shape[-1], dtype=codes.dtype, device=codes.device)
        leaving = unit[out]  # [S, B, ones, d]
        covariances = self._covariances(codes, leaving.movedim(2, 0).reshape(-1, *codes.shape)).flatten(3).movedim(0, 2)
        possible = covariances.gather(-1, into.unsqueeze(2).expand(-1, -1, self.ones, -1)) < -math.exp(-2 * SHARP) / 2
        steps = unit[into].unsqueeze(2) - leaving.unsqueeze(3)  # [S, B, ones, zeros, d]
        changed = flat[..., None, None, :] + possible.unsqueeze(-1) * steps
        return changed.flatten(2, 3).movedim(2, 0).reshape(-1, *codes.shape)

    def _covariances(self, codes: Tensor, directions: Tensor) -> Tensor:
        """Those of the coordinate in each direction `[ones, S, B, *code]` with all others, at sharp logits."""
        logits = SHARP * (2 * codes.double() - 1).expand(directions.shape)
        mean = torch.func.grad(lambda potentials: self.log_z(potentials).sum())
        covariances: Tensor = torch.func.vjp(mean, logits)[1](directions.double())[0]
        return covariances
