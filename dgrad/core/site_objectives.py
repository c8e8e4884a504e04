"""Objectives of sequences and of codes with forbidden values, as an estimator sees them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad.core.curvature import Curvature
from dgrad.core.evaluations import Evaluation
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.modes import without_gradient
from dgrad.core.objectives import CodeLoss, Objective, as_objective
from dgrad.core.random import RandomState
from dgrad.core.restricted import Restricted
from dgrad.core.sites import Problem
from dgrad.core.wrapped_objectives import in_dtype
from dgrad.errors import InputError


def objective_of(problem: Problem, objective: Objective | CodeLoss) -> Objective:
    """The caller's objective as a function of the estimator's codes."""
    inner = as_objective(objective).of_call(problem)
    if problem.given.dtype != problem.logits.dtype:
        inner = in_dtype(inner, problem.given.dtype)
    return inner if problem.plain else ProblemObjective(problem, inner)


class ProblemObjective(Objective):
    """An objective of the codes that the caller sees, as a function of those of the plain problem.

    No forbidden code reaches the caller's objective.

    Attributes:
        losses: what the caller's objective gave last, `[S, B]` or `[S, B, T]`.
    """

    losses: Tensor | None = None

    def __init__(self, problem: Problem, inner: Objective) -> None:
        self.problem = problem
        self.inner = inner
        self.couples_examples = inner.couples_examples

    @property
    def cost_advice(self) -> tuple[object, list[str]]:
        return self.inner.cost_advice

    def changes_per_call(self, codes: Tensor, count: int) -> int:
        return self.inner.changes_per_call(codes, count)

    @property
    def allowed(self) -> Tensor | None:
        """Bool, broadcasts against the codes; None where all values are allowed."""
        layer = self.problem.layer
        return layer.allowed if isinstance(layer, Restricted) else None

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        of_sites = self.problem.codes(codes)
        self.losses = self.inner(of_sites)
        if self.problem.credit != "example" and self.losses.shape != of_sites.shape[:3]:
            raise InputError(
                f"the objective returned shape {list(self.losses.shape)} for codes of shape {list(of_sites.shape)}; "
                f"credit={self.problem.credit!r} expects one loss for each site, {list(of_sites.shape[:3])}"
            )
        return self.problem.losses(self.losses)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        shared = self.problem.sites is None and (self.allowed is None or len(self.allowed) == 1)
        return self.inner.everywhere(codes, batch) if shared else super().everywhere(codes, batch)

    def _sweeps_rows(self, codes: Tensor) -> bool:
        """Whether the inner objective sweeps the rows of these codes in its own way."""
        if not self.problem.layer.one_hot_rows:
            return False
        if self.problem.sites is None:
            return True
        return self.problem.credit == "example" and self.inner.takes_rows(self.problem.codes(codes))

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        if not self._sweeps_rows(codes):
            return super().curvature(codes, generator=generator)
        return self.inner.curvature(self.problem.folded_codes(self.problem.codes(codes)), generator=generator)

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        evaluation: Evaluation
        if self._sweeps_rows(codes):
            rows = self.problem.folded_codes(self.problem.codes(codes))
            evaluation = _OfAllowed(self, codes, self.inner.evaluate(rows))
        else:
            state = RandomState(codes.device)
            loss = self(codes)
            evaluation = _OfMoves(self, codes, loss, state if state.has_moved() else None)
        if self.allowed is not None:
            evaluation.restrict(self.allowed)
        return evaluation


class _OfAllowed(Evaluation):
    """The inner objective's evaluation; forbidden values have the loss of the code, as if nothing changed."""

    objective: ProblemObjective

    def __init__(self, objective: ProblemObjective, codes: Tensor, inner: Evaluation) -> None:
        super().__init__(objective, codes, inner.loss)
        self.inner = inner

    def restrict(self, allowed: Tensor) -> None:
        self.allowed = allowed
        self.inner.restrict(allowed)

    def _unchanged_where_forbidden(self, table: Tensor) -> Tensor:
        if self.allowed is None:
            return table
        return torch.where(self.allowed, table, self.loss.detach()[..., None, None])

    @without_gradient
    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        return self._unchanged_where_forbidden(self.inner.sweep())

    @without_gradient
    def sweep_rows(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        return self._unchanged_where_forbidden(self.inner.sweep_rows(rows))

    def full_sweep_is_free(self, rows: int) -> bool:
        return self.inner.full_sweep_is_free(rows)


class _OfMoves(Evaluation):
    """Every change is evaluated; a neighbour that is forbidden has the loss of the code."""

    @without_gradient
    def potentials(self, layer: LatentLayer) -> Float[Tensor, "samples batch *code"]:
        if layer.one_hot_rows or layer.moves is None or self.allowed is None:
            return super().potentials(layer)
        neighbours = layer.moves.neighbours(self.codes)  # [C, S, B, *code]
        losses = self.losses_of(neighbours)  # [C, S, B]
        forbidden = ((neighbours > 0.5) & ~self.allowed).flatten(3).any(-1)
        return layer.moves.potentials(self.codes, torch.where(forbidden, 0, losses - self.loss))
