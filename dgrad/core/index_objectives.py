"""Objectives of integer codes: lookups, experts, attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dgrad.core.evaluations import Evaluation
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objective_guards import identity_of
from dgrad.core.objectives import FunctionObjective
from dgrad.core.random import RandomState
from dgrad.errors import InputError

IndexLoss = Callable[[Tensor], Tensor]
"""A loss of the compact integer form of codes: int64 `[S, B, n] -> [S, B]`."""


class IndexObjective(FunctionObjective):
    """A function of the compact integer form of codes, int64 `[S, B, n]` for one-hot rows: lookups, experts, attention.

    Its sweep builds no one-hot codes. A sweep of one variable hands over all k values at once.

    Args:
        layer: whose `indices` the function takes; None for one-hot rows.

    >>> table = torch.tensor([5.0, 7.0, 9.0])
    >>> IndexObjective(lambda indices: table[indices].sum(-1)).at(torch.tensor([[[[0.0, 1.0, 0.0]]]])).sweep()
    tensor([[[[5., 7., 9.]]]])
    """

    least_bytes = 64

    def __init__(self, function: IndexLoss, *, layer: LatentLayer | None = None, **options: Any) -> None:
        super().__init__(function, **options)
        self.layer = layer

    @property
    def cost_advice(self) -> tuple[object, list[str]]:
        return identity_of(self.function), ["fewer variables"]

    def indices(self, codes: Float[Tensor, "*lead"]) -> Int[Tensor, "*integers"]:
        """What the function gets for these codes."""
        return codes.argmax(-1) if self.layer is None else self.layer.indices(codes)

    def __call__(self, codes: Float[Tensor, "samples batch *code"]) -> Float[Tensor, "samples batch *sites"]:
        if codes.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "an objective of indices has no gradient in the codes, and this estimator differentiates it; expected "
                "a loss of the codes themselves, or an estimator that evaluates hard codes, such as direct-rb, leg or "
                "rloo"
            )
        return self.loss_of(self.indices(codes))

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self._everywhere(self.indices(codes), batch)

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"] | None:
        return self.shared_indices(self.indices(codes), batch)

    def shared_indices(self, indices: Int[Tensor, "codes *n"], batch: int) -> Float[Tensor, "codes batch"]:
        """The loss of each example at indices that all share, from one call."""
        losses = self._shared(indices, batch)
        return self.loss_of(indices.unsqueeze(1).expand(-1, batch, -1)) if losses is None else losses

    def changes_per_call(self, codes: Tensor, count: int) -> int:
        return super().changes_per_call(codes[..., 0], count)

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        state = RandomState(codes.device)
        loss = self(codes)
        evaluation = Evaluation if self.layer is not None and not self.layer.one_hot_rows else _IndexEvaluation
        return evaluation(self, codes, loss, state if state.has_moved() else None)


class _IndexEvaluation(Evaluation):
    """One-hot rows as indices: changed codes are `[C, S, B, n]`."""

    objective: IndexObjective

    def replaced(self, rows: Tensor, values: Tensor) -> Tensor:
        own = self.codes.argmax(-1)
        return own.expand(len(rows), *own.shape).scatter(-1, rows.unsqueeze(-1), values.unsqueeze(-1))

    def losses_of(self, changed: Tensor) -> Float[Tensor, "changes samples batch"]:
        if self.noise is None:
            return self.objective.loss_of(changed.flatten(0, 1)).unflatten(0, changed.shape[:2])
        return self.with_same_noise(self.objective.loss_of, changed, self.codes.argmax(-1))

    def shared_values(self, values: Int[Tensor, " values"]) -> Float[Tensor, "values batch"]:
        return self.objective.shared_indices(values.unsqueeze(-1), self.codes.shape[1])
