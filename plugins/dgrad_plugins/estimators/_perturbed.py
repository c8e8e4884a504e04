"""Perturbed optimizers."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Estimate, ExactLimit, GradientEstimator, LatentLayer, Objective, Schedule, Traits, replace_gradient
from dgrad.core.estimator_tools import carry_back, check_choice, check_count
from dgrad.core.latent_layer import Logits
from dgrad.core.random import gumbel
from dgrad.core.schedules import Constant

NOISES = ("gumbel", "normal")


class PerturbedOptimizer(GradientEstimator):
    """Perturbed optimizer: the Jacobian of the mean MAP state from MAP states alone.

    `sum_s (h_-s . [z(phi + sigma N_s) - z(phi)]) nu'(N_s) / (sigma S)`. `h_-s` is the mean of the other samples'
    gradients of `f`, `exp(-nu)` the density of the noise: `nu'(N) = N` for normal noise, `1 - exp(-N)` for Gumbel
    noise. `z(phi)` is a control variate.

    Shapes: logits `[B, *code]`, loss `[B]`, codes `[S, B, *code]`. Any latent layer with a MAP solver.

    Bias: none for the Jacobian of `E[z(phi + sigma N)]` times the mean of `h` over the perturbed codes. That is not the
    gradient of `E_q[f(z)]`. With Gumbel noise and sigma 1 it has the mean of `straight-through` on one-hot rows, exact
    for linear objectives. With other noise the codes are not samples of `q`, and the loss's value is biased too. The
    variance is ~ 1/S.

    Cost: S >= 2 evaluations, one backward pass and S + 1 MAP solves.

    Reference: Berthet, Blondel, Teboul, Cuturi, Vert & Bach 2020, Learning with differentiable perturbed optimizers
    (arXiv 2002.08676).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("2x3"), torch.zeros(4, 2, 3, requires_grad=True)
    >>> estimate = dgrad.estimator("perturbed", samples=8)(layer, logits, lambda codes: codes[..., 0].sum(-1))
    >>> estimate.codes.shape
    torch.Size([8, 4, 2, 3])
    """

    sigma: Tensor

    def __init__(self, sigma: float | Schedule = 1.0, samples: int = 4, noise: str = "gumbel") -> None:
        super().__init__()
        self.hyperparameter("sigma", sigma, above=0)
        self.samples = check_count("samples", samples, least=2)
        self.noise = check_choice("noise", noise, NOISES)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Berthet et al. 2020",
            unbiased_value=self.noise == "gumbel" and self.schedules["sigma"] == Constant(1.0),
            perturbs=True,
            limit=ExactLimit("linear", {"sigma": 1.0}, rows_only=True) if self.noise == "gumbel" else None,
            pathwise=True,
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes, score = self._perturb(layer, logits, generator)
        at = objective.at(codes, differentiable=True)
        direction = self._direction(layer, logits, codes, score, at.slope())
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes, score = self._perturb(layer, logits, generator)
        logits_now = logits.detach()
        return carry_back(codes, logits, lambda slope: self._direction(layer, logits_now, codes, score, slope)), codes

    @torch.no_grad()
    def _perturb(self, layer: LatentLayer, logits: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        noise, score = self._noise_and_score(logits, generator)  # [S, B, *code] each
        return layer.argmax(logits + self.sigma * noise), score

    @torch.no_grad()
    def _direction(self, layer: LatentLayer, logits: Tensor, codes: Tensor, score: Tensor, slope: Tensor) -> Tensor:
        # h_-s, which does not depend on N_s: a code's own slope would make this the gradient of E[h(z) . z]
        others = (slope.sum(0) - slope) / (self.samples - 1)
        change = others * (codes - layer.argmax(logits))
        # h_-s . [z(phi + sigma N_s) - z(phi)]; for a one-hot row the changes of other rows are noise of mean 0
        axes = (-1,) if layer.one_hot_rows else tuple(range(2, change.ndim))
        return change.sum(axes, keepdim=True) * score / self.sigma

    def _noise_and_score(self, logits: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """The noise N and `nu'(N)`."""
        if self.noise == "gumbel":
            noise = gumbel(logits, self.samples, generator=generator)
            return noise, 1 - (-noise).exp()
        noise = torch.randn(
            (self.samples, *logits.shape), dtype=logits.dtype, device=logits.device, generator=generator
        )
        return noise, noise
