"""ReinMax, a straight-through estimator of second order."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import ExactLimit, GradientEstimator, LatentLayer, Schedule, Traits, add_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import jacobian_product


class ReinMax(GradientEstimator):
    """ReinMax: straight-through made exact to second order by Heun's method.

    `[2 J((softmax(phi / tau) + z) / 2) - J(p) / 2] h`. `p = softmax(phi)`, `h` is the gradient of `f` at the code,
    `tau` the temperature and `J(q) = diag(q) - q q^T`.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: exact for quadratic objectives at temperature 1. The source advises temperatures of 1 and a little more.

    Cost: S evaluations and one backward pass.

    Reference: Liu, Dong, Liu, Yu & Gao 2023, Bridging discrete and backpropagation: straight-through and beyond (arXiv
    2304.08612).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("reinmax")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    temperature: Tensor

    def __init__(self, temperature: float | Schedule = 1.0, samples: int = 1) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.samples = check_count("samples", samples)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Liu et al. 2023",
            why_unsupported=needs_one_hot_rows("reinmax"),
            limit=ExactLimit("quadratic", {"temperature": 1.0}),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        with torch.no_grad():
            p = layer.mean(logits)  # [B, n, k]
            middle = (layer.mean(logits / self.temperature) + codes) / 2  # [S, B, n, k]
        # [2 J((softmax(phi / tau) + z) / 2) - J(p) / 2] phi, whose Jacobian in phi is the bracket
        proxy = 2 * jacobian_product(middle, logits) - jacobian_product(p, logits) / 2
        return add_gradient(codes, proxy), codes
