"""Leave-one-out with control variates from a discrete Stein operator."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Estimate, GradientEstimator, LatentLayer, Objective, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import full_precision
from dgrad_plugins.estimators._coefficients import Coefficients
from dgrad_plugins.estimators._double_cv import leave_one_out


class Rodeo(GradientEstimator):
    """RODEO: leave-one-out on the loss plus `A h`, a function of the code with mean 0.

    `sum_m (F_m - mean F) s_m / (S - 1) + mean_m L h_m(z_m)`, with `F_m = f_m + (A h_m)(z_m)` and `s_m = z_m - p`. `(A
    h)(z) = sum_i E_q[h(z) | all rows but i] - h(z)` is the Stein operator of Gibbs sampling. `(L h)_ij = p_ij (h(z, row
    i = j) - E_q[h(z) | all rows but i])` is the local expectation gradient of h: it takes off the mean of `-(A h) s`.
    The surrogate of sample m knows the other samples alone: `h_m(y) = mean over m' != m of a_1 t + a_2 t^2`, `t =
    slope_m' . (y - z_m')`.

    In the paper a network turns `f_m'` and t into h, and the correction is the Stein operator applied to `h s`. Here A
    of a polynomial has a closed form, free of evaluations and of memory for all flips. a_1 and a_2 are the coefficients
    that would have been best in the earlier steps, and start at 1 and 0. With a_2 = 0 this is `double-cv`.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`. Memory `S^2 B n`, beside that of the codes.

    Bias: none, because the coefficients have not seen the draw.

    Cost: S >= 2 evaluations and one backward pass through a differentiable objective.

    Reference: Shi, Zhou, Hwang, Titsias & Mackey 2022, Gradient estimation with discrete Stein operators (arXiv
    2202.09497). There for binary variables; the formula holds for any number of values.

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("rodeo")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)
        self.coefficients = Coefficients([1.0, 0.0])

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Shi et al. 2022",
            why_unsupported=needs_one_hot_rows("rodeo"),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        at = objective.at(codes, differentiable=True)
        with torch.no_grad():
            p = layer.mean(logits)  # [B, n, k]
            score = codes - p
            plain = leave_one_out(at.loss, score)  # [S, B, n, k]
            variates = [leave_one_out(stein, score) + local for stein, local in _surrogates(p, codes, at.slope())]
            coefficients = self.coefficients.current()
            direction = plain
            for coefficient, variate in zip(coefficients, variates, strict=True):
                direction = direction + coefficient.to(variate.dtype) * variate
            if self.learning():
                self.coefficients.learn(plain.mean(0), [variate.mean(0) for variate in variates])
        return Estimate(loss=replace_gradient(at.loss, logits, direction).mean(0), codes=codes)


@full_precision
def _surrogates(p: Tensor, codes: Tensor, slope: Tensor) -> list[tuple[Tensor, Tensor]]:
    """`(A h_m)(z_m)` `[S, B]` and `(L h_m)(z_m)` `[S, B, n, k]`, for h the others' mean of t and of t^2."""
    others = (1 - torch.eye(len(codes), dtype=codes.dtype, device=codes.device)) / (len(codes) - 1)  # [m, m']
    # A slope is defined up to a constant in each row. With E_p[w_i] = 0, replacing row i of z by j turns t into
    # t - w_i(z) + w_ij.
    w = slope - (p * slope).sum(-1, keepdim=True)  # [m', B, n, k]
    spread = (p * w.square()).sum(-1)  # [m', B, n], the variance of w_i under p
    at_code = torch.einsum("xbik,ybik->xybi", codes, w)  # [m, m', B, n], w_i(z_m) of sample m'
    total = at_code.sum(-1)  # [m, m', B]
    t = total - total.diagonal().T  # slope_m' . (z_m - z_m')

    # A t = -sum_i w_i(z);  L t = p w
    linear = -torch.einsum("xy,xyb->xb", others, total)
    local_linear = p * torch.einsum("xy,ybik->xbik", others, w)
    # A t^2 = sum_i E[(t - w_i(z) + w_ij)^2] - t^2 = sum_i (w_i(z)^2 - 2 t w_i(z) + E[w_ij^2])
    change = at_code.square() - 2 * t.unsqueeze(-1) * at_code + spread
    quadratic = torch.einsum("xy,xybi->xb", others, change)
    # L t^2 = p_ij (2 (t - w_i(z)) w_ij + w_ij^2 - E[w_ij^2])
    rest = 2 * (t.unsqueeze(-1) - at_code) * others[..., None, None]  # [m, m', B, n]
    bend = torch.einsum("xy,ybik->xbik", others, w.square() - spread.unsqueeze(-1))
    local_quadratic = p * (torch.einsum("xybi,ybik->xbik", rest, w) + bend)
    return [(linear, local_linear), (quadratic, local_quadratic)]
