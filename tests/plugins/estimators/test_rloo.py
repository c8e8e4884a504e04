"""rloo: the other samples as a baseline, by hand and by enumeration. No test here is statistical."""

from __future__ import annotations

import pytest
import torch
from helpers import BEYOND, estimate_and_gradient, gradient_of, mean_over_draws

import dgrad
from dgrad.testing import exact_gradient, small_logits, small_objectives


def test_each_sample_s_baseline_is_the_mean_loss_of_the_others() -> None:
    """`1/S sum_m (f_m - mean of the other losses) (z_m - p)`."""
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=6), small_objectives(layer)[BEYOND]
    estimate, gradient = estimate_and_gradient(dgrad.estimator("rloo", samples=5), layer, logits, loss)
    assert estimate.codes is not None
    losses, p = loss(estimate.codes), logits.softmax(-1)
    expected = torch.zeros_like(logits)
    for b in range(6):
        for m in range(5):
            others = [float(losses[j, b]) for j in range(5) if j != m]
            expected[b] += (losses[m, b] - sum(others) / 4) * (estimate.codes[m, b] - p[b]) / 5
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(estimate.loss, losses.mean(0))


@pytest.mark.parametrize("objective", [BEYOND, "spiky"])
@pytest.mark.parametrize(("spec", "samples"), [("1x5", 2), ("3x2", 2), ("2x2", 3), ("1x3", 4)])
def test_the_mean_over_all_draws_is_the_exact_gradient(spec: str, samples: int, objective: str) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer), small_objectives(layer)[objective]
    mean = mean_over_draws(dgrad.estimator("rloo", samples=samples), spec, logits, loss, samples)
    torch.testing.assert_close(mean, exact_gradient(layer, logits, loss)[0])


def test_a_constant_added_to_the_loss_changes_no_draw() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=6), small_objectives(layer)[BEYOND]
    plain, raised = (
        gradient_of(dgrad.estimator("rloo"), layer, logits, lambda codes, level=level: loss(codes) + level)
        for level in (0.0, 100.0)
    )
    torch.testing.assert_close(plain, raised)
    assert plain.abs().max() > 0.01
