"""Rao-Blackwellised straight-through Gumbel-softmax: its mean, its variance, its noise."""

from __future__ import annotations

import pytest
import torch
from helpers import BEYOND, gradient_of, slope_at, softmax_jacobian, times
from torch import Generator

import dgrad
from dgrad.testing import monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._conditional import conditional_potentials


@pytest.mark.slow
def test_rao_has_the_mean_of_st_gumbel_softmax_and_less_variance() -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)[BEYOND]
    plain = monte_carlo_gradient(dgrad.estimator("st-gumbel-softmax"), layer, logits, loss, draws=100_000)
    errors = [plain[1]]
    for inner in (1, 5, 50):
        estimator = dgrad.estimator("rao-st-gumbel-softmax", inner_samples=inner)
        mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=10_000 if inner == 50 else 100_000)
        assert ((mean - plain[0]).abs() <= 5 * (error.square() + plain[1].square()).sqrt()).all()
        errors.append(error * (10_000 / 100_000) ** 0.5 if inner == 50 else error)
    torch.testing.assert_close(errors[1], errors[0], rtol=0.05, atol=0)
    assert (errors[2] < errors[1]).all()
    assert (errors[3] < errors[2]).all()


def test_rao_holds_the_conditional_noise_fixed() -> None:
    layer, loss = dgrad.latent("2x3"), small_objectives(dgrad.latent("2x3"))[BEYOND]
    logits = small_logits(layer, batch=4)
    generator = Generator().manual_seed(0)
    codes = layer.sample(logits, generator=generator)
    potentials = conditional_potentials(logits.log_softmax(-1), codes, 7, generator=generator)
    jacobian = softmax_jacobian((potentials / 0.5).softmax(-1)).mean(0) / 0.5
    estimator = dgrad.estimator("rao-st-gumbel-softmax", temperature=0.5, inner_samples=7)
    expected = times(jacobian, slope_at(loss, codes))[0]
    torch.testing.assert_close(gradient_of(estimator, layer, logits, loss), expected)
