"""Gumbel-softmax: its limit as the temperature falls."""

from __future__ import annotations

import dgrad
from dgrad.testing import exact_gradient, monte_carlo_gradient, small_logits, small_objectives


def test_gumbel_softmax_approaches_the_gradient_as_the_temperature_falls() -> None:
    layer = dgrad.latent("1x5")
    logits, loss = small_logits(layer), small_objectives(layer)["smooth"]
    truth = exact_gradient(layer, logits, loss)[0]
    biases = []
    for temperature in (2.0, 0.5, 0.1):
        mean, error = monte_carlo_gradient(
            dgrad.estimator("gumbel-softmax", temperature=temperature), layer, logits, loss, draws=400_000
        )
        biases.append(float((mean - truth).norm()))
        noise = float(error.norm())
    assert biases[0] > 2 * biases[1] > 2 * (biases[2] - 5 * noise)
