"""direct-unbiased: its regressions by hand, its mean by enumeration. No test here is statistical."""

from __future__ import annotations

import pytest
import torch
from helpers import BEYOND, estimate_and_gradient, gradient_of, mean_over_draws, softmax_jacobian, times

import dgrad
from dgrad.testing import exact_gradient, small_logits, small_objectives


@pytest.mark.parametrize("objective", [BEYOND, "spiky"])
@pytest.mark.parametrize(("spec", "samples"), [("1x5", 2), ("3x2", 2), ("2x2", 3), ("1x3", 4)])
def test_the_mean_over_all_draws_is_the_exact_gradient(spec: str, samples: int, objective: str) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    mean = mean_over_draws(dgrad.estimator("direct-unbiased", samples=samples), spec, logits, loss, samples)
    torch.testing.assert_close(mean, exact_gradient(layer, logits, loss)[0])


def test_each_sample_s_surrogate_is_the_ridge_regression_of_the_others() -> None:
    """`1/S sum_m [(f_m - b_m - c_m . s_m) s_m + J(p) c_m]`, each regression solved on its own, centred."""
    layer = dgrad.latent("2x3")
    logits, loss = small_logits(layer, batch=4), small_objectives(layer)[BEYOND]
    estimator = dgrad.estimator("direct-unbiased", samples=6, ridge=0.5)
    estimate, gradient = estimate_and_gradient(estimator, layer, logits, loss)
    assert estimate.codes is not None
    p, losses = logits.softmax(-1), loss(estimate.codes)
    expected = torch.zeros_like(logits)
    for b in range(4):
        scores = (estimate.codes[:, b] - p[b]).flatten(1)
        for m in range(6):
            others = [j for j in range(6) if j != m]
            features, targets = scores[others], losses[others, b]
            centred = features - features.mean(0)
            gram = centred.T @ centred + 0.5 * torch.eye(6, dtype=torch.float64)
            slope = torch.linalg.solve(gram, centred.T @ (targets - targets.mean()))
            predicted = targets.mean() + (scores[m] - features.mean(0)) @ slope
            score_part = ((losses[m, b] - predicted) * scores[m]).view(2, 3)
            expected[b] += (score_part + times(softmax_jacobian(p[b]), slope.view(2, 3))) / 6
    torch.testing.assert_close(gradient, expected)


def test_a_linear_loss_leaves_no_variance_when_the_ridge_is_small() -> None:
    """Near-uniform logits, so that the other samples have drawn every value."""
    layer = dgrad.latent("2x3")
    logits, loss = small_logits(layer, scale=0.1).expand(20, -1, -1), small_objectives(layer)["linear"]
    gradient = gradient_of(dgrad.estimator("direct-unbiased", samples=64, ridge=1e-6), layer, logits, loss)
    torch.testing.assert_close(gradient, exact_gradient(layer, logits, loss), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("samples", "ridge"), [(2, 2.0), (8, 1e12)], ids=["two samples", "a large ridge"])
def test_without_a_surrogate_it_is_rloo(samples: int, ridge: float) -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=6), small_objectives(layer)[BEYOND]
    ours = gradient_of(dgrad.estimator("direct-unbiased", samples=samples, ridge=ridge), layer, logits, loss)
    theirs = gradient_of(dgrad.estimator("rloo", samples=samples), layer, logits, loss)
    torch.testing.assert_close(ours, theirs)
    assert theirs.abs().max() > 0.01
