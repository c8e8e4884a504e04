"""Gapped straight-through."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import GradientEstimator, InputError, LatentLayer, Schedule, Traits, schedule
from dgrad.core.estimator_tools import add_gradient, check_count, needs_one_hot_rows
from dgrad.core.latent_layer import Logits
from dgrad.kernels.numerics import log_softmax


class GappedStraightThrough(GradientEstimator):
    """Gapped straight-through: the Jacobian where the drawn code leads by a gap.

    `J(softmax((phi + m1 - m2) / tau)) h / tau`. `m1 = (max phi - phi_z) z` raises the drawn value to the maximum, and
    `m2 = relu(phi_j - max phi + gap)` lowers the others to the gap below it. Both are constants for the gradient.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[S, B, n, k]`.

    Bias: for linear objectives too. The variance is below that of `st-gumbel-softmax`: no noise but the code's enters
    the Jacobian. The gap is a number, or `expected`: `-log(1 - p_z) / p_z`, the mean lead of the drawn value's
    perturbed logit.

    Cost: S evaluations and one backward pass.

    Reference: Fan, Chi, Rudnicky & Ramadge 2022, Training discrete deep generative models via gapped straight-through
    estimator (arXiv 2206.07235).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("gapped-st")(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.1966,  0.1966]]])
    """

    temperature: Tensor
    gap: Tensor | str

    def __init__(
        self, temperature: float | Schedule = 1.0, samples: int = 1, gap: float | str | Schedule = 1.0
    ) -> None:
        super().__init__()
        self.hyperparameter("temperature", temperature, above=0)
        self.samples = check_count("samples", samples)
        if gap == "expected":
            self.gap = "expected"
        else:
            try:
                size = schedule(gap)
            except InputError as error:
                raise InputError(f"gap: {error}, or `expected`") from None
            self.hyperparameter("gap", size, above=0)

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=False,
            differentiable_objective=True,
            evaluations=lambda layer: self.samples,
            reference="Fan et al. 2022",
            why_unsupported=needs_one_hot_rows("gapped-st"),
            pathwise=True,
        )

    def differentiable_codes(
        self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        codes = layer.sample(logits, self.samples, generator=generator)  # [S, B, n, k]
        with torch.no_grad():
            below = logits - logits.amax(-1, keepdim=True)  # [B, n, k]
            gap = _expected_gap(logits, codes) if isinstance(self.gap, str) else self.gap
            # m1 = (max phi - phi_z) z;  m2_j = relu(phi_j - max phi + gap), j != z
            moved = torch.where(codes.bool(), -below, -(below + gap).relu())  # [S, B, n, k]
        soft = layer.relax(logits + moved, self.temperature)
        return add_gradient(codes, soft), codes


def _expected_gap(logits: Tensor, codes: Tensor) -> Tensor:
    """`-log(1 - p_z) / p_z` of each row, `[S, B, n, 1]`."""
    log_p = log_softmax(logits)
    # The sum over the others: 1 - p_z itself would round to 0.
    log_rest = torch.where(codes.bool(), -torch.inf, log_p).logsumexp(-1, keepdim=True)
    p = (codes * log_p).sum(-1, keepdim=True).exp()
    # 1 is its limit at p = 0, where the quotient would be 0 / 0
    return (-log_rest / p.clamp_min(torch.finfo(p.dtype).tiny)).clamp_min(1.0)
