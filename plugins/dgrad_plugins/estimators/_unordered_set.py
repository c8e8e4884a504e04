"""The unordered-set estimator: samples without replacement."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from dgrad import Estimate, GradientEstimator, InputError, LatentLayer, Objective, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows, weighted
from dgrad.core.latent_layer import Logits
from dgrad_plugins.estimators._beam import codes_without_replacement

LARGEST_SET = 8
"""The most samples: the weights are sums over all subsets of them, 256 of 8."""


class UnorderedSet(GradientEstimator):
    """The unordered-set estimator: leave-one-out with samples without replacement.

    `sum_{s in S} p_s R_s [f_s - sum_{s' in S} p_s' R_ss' f_s'] grad log p_s`, averaged over the order of the draws. `S`
    are m codes of the joint space drawn without replacement. `R_s = p(S | s drawn first) / p(S)`, `R_ss' = p(S | s, s'
    drawn first) / p(S | s drawn first)` and `R_ss = 1`: `p_s R_s` is the probability that `s` came first, given `S`.

    Shapes: logits `[B, n, k]`, loss `[B]`, codes `[m, B, n, k]`, which are all different and not equally weighted.

    Bias: none. Less variance than leave-one-out with as many evaluations, which may draw a code twice. No state. With
    as many samples as there are codes it is exact.

    Cost: m evaluations of any objective, m <= 8.

    Reference: Kool, van Hoof & Welling 2020, Estimating gradients for discrete random variables by sampling without
    replacement (arXiv 2002.06043).

    >>> import torch, dgrad
    >>> layer, logits = dgrad.latent("1x2"), torch.zeros(1, 1, 2, requires_grad=True)
    >>> dgrad.estimator("unordered-set", samples=2)(layer, logits, lambda codes: codes[..., 0, 1]).loss.sum().backward()
    >>> logits.grad
    tensor([[[-0.2500,  0.2500]]])
    """

    def __init__(self, samples: int = 4) -> None:
        super().__init__()
        self.samples = check_count("samples", samples, least=2)
        if samples > LARGEST_SET:
            raise InputError(f"samples must be at most {LARGEST_SET}; got {samples}: for more take rloo")

    @property
    def traits(self) -> Traits:
        return Traits(
            unbiased=True,
            differentiable_objective=False,
            evaluations=lambda layer: min(self.samples, layer.support_size),
            reference="Kool et al. 2020",
            why_unsupported=needs_one_hot_rows("unordered-set"),
        )

    def estimate(
        self, layer: LatentLayer, logits: Logits, objective: Objective, *, generator: Generator | None = None
    ) -> Estimate:
        with torch.no_grad():
            log_p = logits.double().log_softmax(-1)
            log_probs, values = codes_without_replacement(log_p, self.samples, generator=generator)  # [m, B], [m, B, n]
            weights, pairs = (table.to(logits.dtype) for table in set_weights(log_probs))  # [m, B], [m, m, B]
            codes = layer.codes(values, logits.dtype)  # [m, B, n, k]
        loss = objective(codes)  # [m, B]
        with torch.no_grad():
            # p_s R_s [f_s - sum_s' p_s' R_ss' f_s'] (z_s - p)
            advantage = weights * (loss - (pairs * loss).sum(1))  # [m, B]
            direction = weighted(codes - layer.mean(logits), advantage)
        # sum_s p_s R_s f_s
        return Estimate(loss=replace_gradient(weights * loss, logits, direction).sum(0), codes=codes)


def set_weights(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """`p_s R_s` `[m, B]` and `p_s' R_ss'` `[m (s), m (s'), B]` of a set, from its `log p` `[m, B]`.

    With `W(A)` the probability of drawing the rest of `S` next when the codes of `A` are gone, `R_s = W({s}) / W({})`
    and `R_ss' = W({s, s'}) / W({s})`. All subsets `A` are computed at once, each a number whose bits say which codes it
    has.
    """
    m = len(log_p)
    singles = 1 << torch.arange(m, device=log_p.device)  # [m]
    subsets = torch.arange(2**m, device=log_p.device).unsqueeze(-1)  # [2^m, 1]
    member = (subsets & singles).bool().unsqueeze(-1)  # [2^m, m, 1]
    larger = subsets | singles  # [2^m, m], A + s
    # 1 - p(A) is no less than the probability of S without A, which has not lost its digits where p(A) is next to 1.
    others = log_p.masked_fill(member, -math.inf)  # [2^m, m, B]
    gone = log_p.masked_fill(~member, -math.inf).exp().sum(1).clamp_max(1)  # p(A), [2^m, B]
    log_remaining = torch.maximum(torch.log1p(-gone), others.logsumexp(1))  # [2^m, B]
    by_size = member.sum(1).flatten().argsort(stable=True)  # [2^m]
    log_w = torch.zeros_like(gone)  # W(S) = 1
    stop = 2**m - 1
    for size in reversed(range(m)):
        # W(A) = sum_{s not in A} p_s W(A + s) / (1 - p(A)), for all A of this size at once
        start = stop - math.comb(m, size)
        level = by_size[start:stop]
        log_w[level] = (others[level] + log_w[larger[level]]).logsumexp(1) - log_remaining[level]
        stop = start
    one = log_w[singles]  # [m, B]
    two = log_w[singles.unsqueeze(-1) | singles]  # [m, m, B]; its diagonal makes R_ss = 1
    return (log_p + one - log_w[0]).exp(), (log_p + two - one.unsqueeze(1)).exp()
