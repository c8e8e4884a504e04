"""Local expectation gradients. May import torch and dgrad."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from dgrad.gradient_estimator import (
    Estimate,
    GradientEstimator,
    Traits,
    check_count,
    needs_independent_rows,
    replace_gradient,
    sweep_evaluations,
)
from dgrad.latent_layer import LatentLayer
from dgrad.objectives import Objective


class LocalExpectation(GradientEstimator):
    """Local expectation gradients: for each row the exact expectation over its values, the other rows sampled.

    `p_ij (T_ij - sum_m p_im T_im)`, with `p = softmax(phi)` and `T` the sweep: the limit of `direct-rb` as epsilon goes to 0.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Unbiased; low variance; S (n(k-1) + 1) evaluations. With one variable it is exact.

    Source: Titsias & Lázaro-Gredilla 2015, Local expectation gradients for black box variational inference.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("leg")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
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
            differentiable_objective=False,
            evaluations=lambda layer: self.samples * sweep_evaluations(layer),
            reference="Titsias & Lázaro-Gredilla 2015",
            limitation=needs_independent_rows("leg"),
        )

    def estimate(
        self,
        layer: LatentLayer,
        logits: Float[Tensor, "batch *code"],
        objective: Objective,
        *,
        generator: Generator | None = None,
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        loss = objective(codes)  # [S, B]
        with torch.no_grad():
            sweep = objective.sweep(codes, loss)  # [S, B, n, k]
            p = layer.mean(logits)  # [B, n, k]
            # p_ij (T_ij - sum_m p_im T_im)
            direction = p * (sweep - (p * sweep).sum(-1, keepdim=True))
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=codes)
