"""The unordered-set estimator: samples without replacement."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from dgrad import Drawn, Estimate, GradientEstimator, InputError, LatentLayer, Traits, replace_gradient
from dgrad.core.estimator_tools import check_count, needs_one_hot_rows, weighted
from dgrad.core.latent_layer import Logits
from dgrad.core.weights import unordered_set
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
            one_pass=True,
        )

    def draw_codes(self, layer: LatentLayer, logits: Logits, *, generator: Generator | None = None) -> Drawn:
        log_p = logits.detach().double().log_softmax(-1)
        log_probs, values = codes_without_replacement(log_p, self.samples, generator=generator)  # [m, B], [m, B, n]
        return Drawn(layer.codes(values, logits.dtype), (log_probs,))

    def estimate_from(self, layer: LatentLayer, logits: Logits, drawn: Drawn, loss: Tensor) -> Estimate:
        (log_probs,) = drawn.kept  # [m, B]
        with torch.no_grad():
            # p_s R_s and p_s R_s [f_s - sum_s' p_s' R_ss' f_s'], [m, B] each
            share, weight = unordered_set(loss, log_probs)
            direction = weighted(drawn.codes - layer.mean(logits), weight)
        # sum_s p_s R_s f_s
        return Estimate(loss=replace_gradient(share * loss, logits, direction).sum(0), codes=drawn.codes)
