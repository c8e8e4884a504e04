"""Adaptive implicit maximum likelihood estimation."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Schedule, Traits, replace_gradient
from dgrad.core.estimator_tools import carry_back, check_count, check_number, needs, perturb_and_map
from dgrad.core.latent_layer import Logits

WEAKEST, STRONGEST = 1e-4, 1e4
"""The range that the strength stays in: where no strength reaches the target, it would grow without end."""


class AdaptiveImplicitMaximumLikelihood(GradientEstimator):
    """Adaptive I-MLE: the strength follows the logits, the slope and the changed rows.

    `[z(phi + lambda h + G) - z(phi - lambda h + G)] / (2 lambda)`, where each code has its own `lambda = beta |phi + G|
    / |h|`. After each step `beta <- beta exp(rate (target - share))`, where `share` is the part of the rows with a
    gradient.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`. Any latent layer with a MAP solver.

    Bias: grows with the target. The variance grows as the target falls. beta is a buffer, in the state dict.

    Cost: S evaluations, one backward pass and 3 S MAP solves.

    Reference: Minervini, Franceschi & Niepert 2023, Adaptive perturbation-based gradient estimation (arXiv 2209.04862).
    There `|phi|` stands for `|phi + G|`, so that equal logits never get a gradient, and a constant is added to beta.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("3x4"), torch.zeros(2, 3, 4, requires_grad=True)
    >>> estimator = dgrad.estimator("aimle", target=0.25, rate=0.1)
    >>> _ = estimator(layer, logits, lambda codes: 0 * codes.sum((-2, -1)))  # no gradient: stronger by exp(0.025)
    >>> estimator.strength
    tensor(1.0253)
    """

    target: Tensor
    rate: Tensor
    strength: Tensor

    def __init__(
        self,
        target: float | Schedule = 0.2,
        rate: float | Schedule = 0.1,
        initial_strength: float = 1.0,
        samples: int = 1,
    ) -> None:
        super().__init__()
        self.hyperparameter("target", target, above=0)
        self.hyperparameter("rate", rate, above=0)
        self.initial_strength = check_number(
            "initial_strength",
            initial_strength,
            f"a number in {WEAKEST:g} .. {STRONGEST:g}",
            lambda number: WEAKEST <= number <= STRONGEST,
        )
        self.samples = check_count("samples", samples)
        self.register_buffer("strength", torch.tensor(self.initial_strength))

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Minervini et al. 2023",
            why_unsupported=needs("aimle", "noise"),
            kl_inside=True,
            perturbs=True,
            pathwise=True,
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        potentials, codes = perturb_and_map(layer, logits, self.samples, generator=generator)
        at = objective.at(codes, differentiable=True)
        direction = self._direction(layer, potentials, at.slope())
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        potentials, codes = perturb_and_map(layer, logits, self.samples, generator=generator)
        # The strength adapts in each backward pass: before it there is no slope.
        return carry_back(codes, logits, lambda slope: self._direction(layer, potentials, slope)), codes

    @torch.no_grad()
    def _direction(self, layer: LatentLayer, potentials: Tensor, slope: Tensor) -> Tensor:
        """The gradient for the logits of each code, from that for the code. It adapts the strength.

        A slope that is c times as large gives c times the gradient, and the same share.
        """
        size = _norm(layer.free(slope))  # [S, B, 1 ...]
        # lambda h = beta |phi + G| h / |h|
        reach = self.strength * _norm(layer.free(potentials)).clamp_min(torch.finfo(potentials.dtype).tiny ** 0.5)
        move = reach * (slope / size.clamp_min(torch.finfo(size.dtype).tiny))
        # [z(phi + G + lambda h) - z(phi + G - lambda h)] / (2 lambda), without a division by |h|, which may be 0
        changed = layer.argmax(potentials + move) - layer.argmax(potentials - move)
        direction = changed * size / (2 * reach)
        # After its use, so that an example's gradient depends on no other example of this step.
        rows = layer.free(torch.ones_like(potentials)).any(-1)
        share = changed.any(-1).sum() / rows.sum().clamp_min(1)
        if self.learning():
            self.strength.mul_((self.rate * (self.target - share)).exp()).clamp_(WEAKEST, STRONGEST)
        return direction


def _norm(tensor: Tensor) -> Tensor:
    """The norm of each code, `[S, B, 1 ...]`."""
    return torch.linalg.vector_norm(tensor, dim=tuple(range(2, tensor.ndim)), keepdim=True)
