"""Leave-one-out with a second control variate from the objective's slope."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Traits, replace_gradient
from dgrad.core.estimator_tools import check_choice, check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import jacobian_product
from dgrad_plugins.estimators._coefficients import Coefficients


class DoubleControlVariates(GradientEstimator):
    """Leave-one-out with a linear function of the code as a second control variate.

    `sum_m (F_m - mean F) s_m / (S - 1) - alpha J(p) mean h`, with `F_m = f_m + alpha h_(-m) . s_m` and `s_m = z_m - p`.
    `control=quadratic` adds the curvature A of the batch, measured at codes of their own (`Objective.curvature`). It
    moves the slopes to the mean, `h + A (p - z)`. A third control variate is `s_m' A s_m / 2`, whose mean under q has
    the gradient `J(p) w`, `w_ij = A_ijij / 2 - (A_ii p_i)_j`. It has a coefficient of its own.

    `h` is the objective's slope in the code, `h_(-m)` its mean over the other samples, `J(p) = diag(p) - p p^T` for
    each row. alpha is the coefficient that would have been best in the earlier steps. It starts at -1, which takes off
    all that is linear.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: none, because alpha and A have not seen the draw. A linear objective's gradient is exact with alpha at -1.

    Cost: S >= 2 evaluations and one backward pass through a differentiable objective. The quadratic control costs one
    evaluation more, and one or two backward passes through it.

    Reference: Titsias & Shi 2022, Double control variates for gradient estimation in discrete latent variable models.
    There for binary variables; the formula holds for any number of values.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("double-cv")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 4, control: str = "linear") -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)
        self.control = check_choice("control", control, ("linear", "quadratic"))
        self.alpha = Coefficients([-1.0] if control == "linear" else [-1.0, -1.0])

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples + (self.control == "quadratic"),
            independent_examples=self.control == "linear",
            reference="Titsias & Shi 2022",
            why_unsupported=needs_one_hot_rows("double-cv"),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        at = objective.at(codes, differentiable=True)
        p = layer.mean(logits)  # [B, n, k]
        score, slope, curvature = codes - p, at.slope(), None  # [S, B, n, k]
        if self.control == "quadratic":
            curvature = objective.curvature(layer.sample(logits, generator=generator), generator=generator)
            slope = slope - curvature.times(score)
        with torch.no_grad():
            others = (slope.sum(0) - slope) / (self.samples - 1)  # h_(-m)
            linear = (others * score).flatten(2).sum(-1)  # [S, B]
            # The estimate without alpha, and what is multiplied by it: leave-one-out on h_(-m) . s_m, less J(p) mean h
            plain = leave_one_out(at.loss, score)  # [S, B, n, k]
            variates = [leave_one_out(linear, score) - jacobian_product(p, slope.mean(0))]
            if curvature is not None:
                bend = jacobian_product(p, curvature.within_rows(p))
                variates.append(leave_one_out(curvature.along(score), score) - bend)
            direction = plain
            for alpha, variate in zip(self.alpha.current(), variates, strict=True):
                direction = direction + alpha.to(variate.dtype) * variate
            if self.learning():
                self.alpha.learn(plain.mean(0), [variate.mean(0) for variate in variates])
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)


def leave_one_out(values: Tensor, score: Tensor) -> Tensor:
    """`(v_m - mean of the others) s_m` `[S, B, n, k]`, for values `[S, B]`."""
    samples = len(values)
    return ((values - values.mean(0)) * samples / (samples - 1))[..., None, None] * score
