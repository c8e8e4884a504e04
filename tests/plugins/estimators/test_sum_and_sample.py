"""sum-and-sample: the code outside the explicit ones."""

from __future__ import annotations

from torch import Generator

import dgrad
from dgrad.testing import small_logits


def test_the_code_outside_is_drawn_from_the_rest() -> None:
    """Frequencies of the sampled code against q without the explicit codes, in 5 standard errors."""
    layer, draws = dgrad.latent("2x3"), 50_000
    logits = small_logits(layer)
    estimate = dgrad.estimator("sum-and-sample", explicit=2)(
        layer, logits.expand(draws, -1, -1), lambda codes: codes.sum((-2, -1)), generator=Generator().manual_seed(0)
    )
    support = layer.enumerate(like=logits)
    q = layer.log_prob(logits, support.unsqueeze(1)).exp()[:, 0]
    frequency = (estimate.codes[-1].flatten(1) @ support.flatten(1).T == 2).double().mean(0)
    truth = q.clone()
    truth[q.topk(2).indices] = 0
    truth = truth / truth.sum()
    assert ((frequency - truth).abs() <= 5 * (truth * (1 - truth) / draws).sqrt()).all()
