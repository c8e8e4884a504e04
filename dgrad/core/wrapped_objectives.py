"""Objectives that wrap another: sweeps that are kept, codes of another dtype, a loss that must depend on its code."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from dgrad.core.curvature import Curvature
from dgrad.core.evaluations import CombinedEvaluation, Evaluation
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.objective_guards import check_dependence
from dgrad.core.objectives import Objective
from dgrad.core.sites import Problem


class SweepCache(Objective):
    """An objective whose sweeps are kept, so that estimators that draw the same codes share one table.

    `direct`, `direct-rb` and `leg` draw the same codes from the same noise, whatever their epsilon and difference.
    Looking a table up waits for the device: it is not for training steps.

    Args:
        objective: the objective that is swept.
        tables: where the sweeps are kept, by `name` and codes. Hand them to the next objective of the same losses.
        name: tells objectives of other losses apart.
        most: how many numbers the tables may hold together. Later tables are not kept.

    >>> import dgrad
    >>> objective, tables = dgrad.objective(lambda codes: codes[..., 0].sum(-1)), {}
    >>> codes = torch.tensor([[[[1.0, 0.0]]]])
    >>> SweepCache(objective, tables).sweep(codes) is SweepCache(objective, tables).sweep(codes.clone())
    True
    """

    def __init__(
        self, objective: Objective, tables: dict[Hashable, Tensor], name: Hashable = None, *, most: int = 2**27
    ) -> None:
        self.objective = objective
        self.couples_examples = objective.couples_examples
        self.tables = tables
        self.name = name
        self.most = most

    def __call__(self, codes: Float[Tensor, "samples #batch *code"]) -> Float[Tensor, "samples batch"]:
        return self.objective(codes)

    def of_call(self, problem: Problem) -> Objective:
        inner = self.objective.of_call(problem)
        return self if inner is self.objective else SweepCache(inner, self.tables, self.name, most=self.most)

    def everywhere(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"]:
        return self.objective.everywhere(codes, batch)

    def shared(self, codes: Float[Tensor, "codes *code"], batch: int) -> Float[Tensor, "codes batch"] | None:
        return self.objective.shared(codes, batch)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return self.objective.curvature(codes, generator=generator)

    def evaluate(self, codes: Float[Tensor, "samples #batch *code"]) -> Evaluation:
        return _CachedEvaluation(self, self.objective.evaluate(codes))


class _CachedEvaluation(Evaluation):
    objective: SweepCache

    def __init__(self, objective: SweepCache, inner: Evaluation) -> None:
        super().__init__(objective, inner.codes, inner.loss)
        self.inner = inner

    def restrict(self, allowed: Tensor) -> None:
        self.inner.restrict(allowed)

    def sweep(self) -> Float[Tensor, "samples batch n k"]:
        cache = self.objective
        key = (cache.name, self.codes.shape, self.codes.argmax(-1).cpu().numpy().tobytes())
        table = cache.tables.get(key)
        if table is None:
            table = self.inner.sweep()
            if (len(cache.tables) + 1) * table.numel() <= cache.most:
                cache.tables[key] = table
        return table

    def sweep_rows(self, rows: Int[Tensor, "samples batch m"]) -> Float[Tensor, "samples batch n k"]:
        return self._masked(rows)

    def full_sweep_is_free(self, rows: int) -> bool:
        return self.inner.full_sweep_is_free(rows)

    def potentials(self, layer: LatentLayer) -> Float[Tensor, "samples batch *code"]:
        return self.sweep() if layer.one_hot_rows else self.inner.potentials(layer)


class _InDtype(Objective):
    """Hands codes to the inner objective in its own dtype and takes losses back in the caller's."""

    def __init__(self, inner: Objective, dtype: torch.dtype) -> None:
        self.inner = inner
        self.dtype = dtype
        self.couples_examples = inner.couples_examples

    def __call__(self, codes: Tensor) -> Tensor:
        return self.inner(codes.to(self.dtype)).to(codes.dtype)

    def takes_rows(self, codes: Tensor) -> bool:
        return self.inner.takes_rows(codes.to(self.dtype))

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.inner.everywhere(codes.to(self.dtype), batch).to(codes.dtype)

    def shared(self, codes: Tensor, batch: int) -> Tensor | None:
        losses = self.inner.shared(codes.to(self.dtype), batch)
        return None if losses is None else losses.to(codes.dtype)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return self.inner.curvature(codes.to(self.dtype), generator=generator).to(codes.dtype)

    def evaluate(self, codes: Tensor) -> Evaluation:
        inner = self.inner.evaluate(codes.to(self.dtype))
        return CombinedEvaluation(self, codes, lambda losses: losses.to(codes.dtype), [inner])


class _Differentiated(Objective):
    """The same objective, for an estimator that differentiates it in the codes: it refuses a loss that ignores them."""

    def __init__(self, inner: Objective, name: str) -> None:
        self.inner = inner
        self.name = name
        self.couples_examples = inner.couples_examples

    def __call__(self, codes: Tensor) -> Tensor:
        loss = self.inner(codes)
        check_dependence(loss, codes, self.name)
        return loss

    def everywhere(self, codes: Tensor, batch: int) -> Tensor:
        return self.inner.everywhere(codes, batch)

    def curvature(self, codes: Float[Tensor, "one batch *code"], *, generator: Generator | None = None) -> Curvature:
        return self.inner.curvature(codes, generator=generator)

    def evaluate(self, codes: Tensor) -> Evaluation:
        inner = self.inner.evaluate(codes)
        check_dependence(inner.loss, codes, self.name)
        return inner


def in_dtype(objective: Objective, dtype: torch.dtype) -> Objective:
    """`objective`, evaluated on codes of `dtype` whatever the dtype of the codes that it is given."""
    return _InDtype(objective, dtype)


def differentiated(objective: Objective, name: str) -> Objective:
    """`objective`, as the estimator of this name differentiates it: an InputError where its loss ignores the codes."""
    return _Differentiated(objective, name)
