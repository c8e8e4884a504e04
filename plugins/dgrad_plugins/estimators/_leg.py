"""Local expectation gradients."""

from __future__ import annotations

import torch
from torch import Generator

from dgrad import Estimate, ExactLimit, GradientEstimator, LatentLayer, Objective, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import jacobian_product
from dgrad_plugins.estimators._sweep_share import SweepShare


class LocalExpectation(GradientEstimator):
    """Local expectation gradients: each row exact over its values, others sampled.

    `p_ij (T_ij - sum_m p_im T_im)`, with `p = softmax(phi)` and `T` the sweep: the limit of `direct-rb` as epsilon goes
    to 0.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: none, and low variance. With one variable it is exact. With `sweep=surrogate` the table is a quadratic of the
    code. It is biased then, and exact for a linear loss. `sweep=corrected` is unbiased.

    Cost: S (m(k-1) + 1) evaluations. `sweep_share` below 1 sweeps m of the n rows, drawn where q is undecided. A
    surrogate costs S + 1 evaluations and two backward passes to the code. A corrected sweep costs both.

    Reference: Titsias & Lázaro-Gredilla 2015, Local expectation gradients for black box variational inference.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("leg")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 1, sweep: str = "exact", sweep_share: float = 1.0) -> None:
        super().__init__()
        self.samples = check_count("samples", samples)
        self.sweep = sweep
        self.sweep_share = SweepShare(sweep_share, sweep)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=self.sweep != "surrogate",
            differentiable_objective=self.sweep_share.differentiable,
            evaluations=lambda layer: self.sweep_share.evaluations(layer, self.samples),
            reference="Titsias & Lázaro-Gredilla 2015",
            why_unsupported=needs_one_hot_rows("leg"),
            independent_examples=not self.sweep_share.differentiable,
            limit=ExactLimit("linear") if self.sweep == "surrogate" else None,
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        at = objective.at(codes, differentiable=self.sweep_share.differentiable)
        with torch.no_grad():
            p = layer.mean(logits)  # [B, n, k]
            direction = self.sweep_share.direction(
                objective,
                at,
                layer,
                lambda table: jacobian_product(p, table),
                mean=lambda: p,
                weights=lambda: (1 - p.square().sum(-1)).expand(codes.shape[:-1]),
                generator=generator,
            )  # [S, B, n, k]
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)
