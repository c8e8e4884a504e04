"""MuProp."""

from __future__ import annotations

import torch
from torch import Generator

from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Traits, add_gradient, replace_gradient
from dgrad.core.estimator_tools import check_count, weighted
from dgrad.core.latent_layer import Logits


class MuProp(GradientEstimator):
    """MuProp: REINFORCE on the rest of an expansion around the mean.

    `(f(z) - f(p) - f'(p).(z - p)) (z - p) + J(p) f'(p)`, with `p = E_q[z]` and `J(p)` its Jacobian in the logits. The
    second term is the exact gradient of the expansion.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: none. The variance comes from the curvature of `f`: none for a linear `f`.

    Cost: S + 1 evaluations and one backward pass through the objective, at the mean: off the corners of the simplex.

    Reference: Gu, Levine, Sutskever & Mnih 2016, MuProp: unbiased backpropagation for stochastic neural networks (arXiv
    1511.05176).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("muprop")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        self.samples = check_count("samples", samples)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples + 1,
            reference="Gu et al. 2016",
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, *code]
        loss = objective(codes)  # [S, B]
        mean = layer.mean(logits)  # [B, *code]
        middle = objective.at(mean.unsqueeze(0), differentiable=True)
        with torch.no_grad():
            slope, score = middle.slope(), codes - mean  # [1, B, *code], [S, B, *code]
            # (f(z) - f(p) - f'(p).(z - p)) (z - p)
            rest = loss - middle.loss - (slope * score).flatten(2).sum(-1)  # [S, B]
            direction = weighted(score, rest)
        estimate = replace_gradient(loss, logits, direction).mean(0)
        # J(p) f'(p) is the gradient of <f'(p), E_q[z]>
        return Estimate(loss=add_gradient(estimate, (slope[0] * mean).flatten(1).sum(-1)), codes=codes)
