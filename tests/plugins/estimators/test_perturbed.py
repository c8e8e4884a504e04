"""Perturbed optimizers: their mean with Gumbel and normal noise, and their value."""

from __future__ import annotations

import pytest
import torch
from helpers import BEYOND, AsOne, slope_at, softmax_jacobian, times
from torch import Tensor

import dgrad
from dgrad.core.objectives import CodeLoss
from dgrad.testing import monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.latents import Categorical


def _mean_slope(codes: Tensor, weights: Tensor, loss: CodeLoss) -> Tensor:
    return (weights.view(-1, 1, 1) * slope_at(loss, codes.unsqueeze(1))[:, 0]).sum(0)


@pytest.mark.parametrize("samples", [2, 5])
@pytest.mark.parametrize("family", [Categorical, AsOne])
def test_perturbed_with_gumbel_noise_has_the_mean_of_straight_through(family: type[Categorical], samples: int) -> None:
    layer = family(2, 3)
    logits, loss = small_logits(layer), small_objectives(layer)[BEYOND]
    codes = layer.enumerate(like=logits)
    slope = _mean_slope(codes, layer.log_prob(logits, codes.unsqueeze(1)).exp(), loss)
    mean, error = monte_carlo_gradient(dgrad.estimator("perturbed", samples=samples), layer, logits, loss, draws=40_000)
    expected = times(softmax_jacobian(logits[0].softmax(-1)), slope)
    assert ((mean - expected).abs() <= 5 * error).all()


def test_perturbed_uses_that_rows_are_independent() -> None:
    errors = []
    for family in (Categorical, AsOne):
        layer = family(4, 3)
        logits, loss = small_logits(layer), small_objectives(layer)["linear"]
        errors.append(monte_carlo_gradient(dgrad.estimator("perturbed"), layer, logits, loss, draws=20_000)[1])
    assert errors[0].square().sum() < 0.5 * errors[1].square().sum()


@pytest.mark.parametrize("sigma", [0.5, 2.0])
def test_perturbed_with_normal_noise_differentiates_the_perturbed_mean(sigma: float) -> None:
    """Two values: `P(z_1) = Phi(d / (sigma sqrt 2))`, `d` the difference of the logits."""
    layer = dgrad.latent("1x2")
    logits, loss = small_logits(layer), small_objectives(layer)[BEYOND]
    estimator = dgrad.estimator("perturbed", sigma=sigma, noise="normal", samples=3)
    assert not estimator.traits.unbiased_value
    scaled = (logits[0, 0, 1] - logits[0, 0, 0]) / (sigma * 2**0.5)
    p = torch.distributions.Normal(0.0, 1.0).cdf(scaled)
    density = torch.distributions.Normal(0.0, 1.0).log_prob(scaled).exp() / (sigma * 2**0.5)
    slope = _mean_slope(torch.eye(2, dtype=torch.float64).unsqueeze(1), torch.stack([1 - p, p]), loss)[0]
    expected = density * (slope[1] - slope[0])
    mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=100_000)
    assert abs(mean[0, 1] - expected) <= 5 * error[0, 1]
    assert abs(mean[0, 0] + expected) <= 5 * error[0, 0]


def test_the_value_of_perturbed_is_unbiased_with_gumbel_noise_of_scale_1() -> None:
    assert dgrad.estimator("perturbed").traits.unbiased_value
    assert not dgrad.estimator("perturbed", sigma=0.5).traits.unbiased_value
    assert not dgrad.estimator("perturbed", sigma="linear:1:0.5").traits.unbiased_value
