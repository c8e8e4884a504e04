"""ARMS: DisARM with two samples, its correlation, its variance."""

from __future__ import annotations

import pytest
import torch
from helpers import estimate_and_gradient, variance_of
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives
from dgrad_plugins.estimators._arms import inverse_decorrelation


def test_arms_with_two_samples_is_disarm() -> None:
    layer = dgrad.latent("3x2")
    logits, loss = small_logits(layer).expand(2000, -1, -1), small_objectives(layer)["spiky"]
    phi = logits[..., 1] - logits[..., 0]
    for name in ("disarm", "arms"):
        estimator = dgrad.estimator(name, **({"samples": 2} if name == "arms" else {}))
        estimate, gradient = estimate_and_gradient(estimator, layer, logits, loss)
        (first, second), losses = estimate.codes[..., 1], loss(estimate.codes)
        expected = 0.5 * (losses[0] - losses[1])[:, None] * (first - second) * phi.abs().sigmoid()
        torch.testing.assert_close(gradient[..., 1], expected)
        # As often different as can be: with probability 2 min(p, 1 - p)
        often = 2 * (-phi[0].abs()).sigmoid()
        differ = (estimate.codes[0, ..., 1] != estimate.codes[1, ..., 1]).double()
        assert ((differ.mean(0) - often).abs() <= 5 * (often * (1 - often) / 2000).sqrt() + 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 3, 4, 9])
def test_the_correlation_of_arms_is_the_stated_one(samples: int) -> None:
    """Against the textbook form where it is accurate, the frequencies, and with 2 samples sig(|phi|)."""
    phi = torch.linspace(-6, 6, 25, dtype=torch.float64)
    p = phi.sigmoid()
    both = 2 * p - 1 + (2 * (1 - p) ** (1 / (samples - 1)) - 1).clamp_min(0) ** (samples - 1)
    torch.testing.assert_close(inverse_decorrelation(phi, samples), p * (1 - p) / (p - both))
    if samples == 2:
        torch.testing.assert_close(inverse_decorrelation(phi, samples), phi.abs().sigmoid())

    layer, draws = dgrad.latent("25x2"), 20_000
    logits = torch.stack([torch.zeros_like(phi), phi], -1).expand(draws, 25, 2)
    with torch.no_grad():
        codes = dgrad.estimator("arms", samples=samples)(
            layer, logits, lambda codes: codes[..., 0, 0], generator=Generator().manual_seed(0)
        ).codes
    for frequency, truth in ((codes[-1, ..., 1], p), (codes[0, ..., 1] * codes[-1, ..., 1], both)):
        error = (truth * (1 - truth) / draws).clamp_min(0).sqrt()
        assert ((frequency.mean(0) - truth).abs() <= 5 * error + 1e-3).all()


def test_the_correlation_of_arms_is_accurate_in_float32_at_any_odds() -> None:
    phi = torch.cat([torch.linspace(-60, 60, 241), torch.tensor([-1e4, -200.0, -100.0, 100.0, 200.0, 1e4])])
    for samples in (2, 4, 50):
        single = inverse_decorrelation(phi, samples)
        torch.testing.assert_close(single.double(), inverse_decorrelation(phi.double(), samples), rtol=2e-5, atol=0)
        assert single[-6] == 1, "rare bits are uncorrelated"
        assert single[-1] == 1, "and so are rare zeros: p - P11 = 1 - p"


def test_antithetic_samples_vary_less_than_independent_ones_at_equal_evaluations() -> None:
    layer = dgrad.latent("10x2")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]

    def variance(name: str, **hyperparameters: object) -> float:
        return variance_of(dgrad.estimator(name, **hyperparameters), layer, logits, loss)

    disarm, arms = variance("disarm"), variance("arms", samples=4)
    assert disarm < variance("arm")
    assert disarm < variance("rloo", samples=2)
    assert arms < variance("rloo", samples=4)
