"""Direct optimization on the joint space."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Estimate, ExactLimit, GradientEstimator, LatentLayer, Objective, Schedule, Traits, replace_gradient
from dgrad.core.estimator_tools import check_choice, check_count
from dgrad.core.latent_layer import Logits
from dgrad.core.random import gumbel
from dgrad_plugins.estimators._differences import DIFFERENCES, difference
from dgrad_plugins.estimators._exact import losses_of_support, needs_small_support


class DirectJoint(GradientEstimator):
    """Theorem 1 on the joint space: one Gumbel for every code of the support.

    backward: `[z* - z_eps] / eps`, `z* = argmax_z log q(z) + G(z)`, `z_eps = argmax_z log q(z) + G(z) - eps f(z)`.
    Forward and central as for `direct`. With one variable the two are the same estimator, draw for draw.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`.

    Bias: O(eps), central O(eps^2).

    Cost: K + S evaluations. All K codes are evaluated once, and the S drawn ones again with gradient. Refused above a
    support of 4096 codes.

    Reference: Lorberbom, Gane, Jaakkola & Hazan 2019 (arXiv 1806.02867), Theorem 1.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("direct-joint", epsilon=0.5)(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.codes.shape
    torch.Size([1, 4, 2, 3])
    """

    epsilon: Tensor

    def __init__(self, epsilon: float | Schedule = 0.1, samples: int = 1, difference: str = "backward") -> None:
        super().__init__()
        self.hyperparameter("epsilon", epsilon, above=0)
        self.samples = check_count("samples", samples)
        self.difference = check_choice("difference", difference, DIFFERENCES)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=False,
            evaluations=lambda layer: layer.support_size + self.samples,
            reference="Lorberbom et al. 2019",
            why_unsupported=needs_small_support("direct-joint", ", or direct, its product-space approximation"),
            kl_inside=True,
            limit=ExactLimit("any", {"epsilon": 0.01}),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        with torch.no_grad():
            support, log_q = layer.support(logits)  # [K, 1 or B, *code], [K, B]
            losses = losses_of_support(support, len(logits), objective).T  # [B, K]
            potentials = log_q.T + gumbel(log_q.T, self.samples, generator=generator)  # [S, B, K]
            every = torch.arange(len(logits), device=logits.device) if support.shape[1] != 1 else 0
            codes = support[potentials.argmax(-1), every]  # [S, B, *code]
            direction = difference(
                lambda u: support[u.argmax(-1), every], potentials, losses, self.epsilon, self.difference, middle=codes
            )  # [S, B, *code]
        loss = objective(codes)  # [S, B]
        return Estimate(loss=replace_gradient(loss, logits, direction).mean(0), codes=codes)
