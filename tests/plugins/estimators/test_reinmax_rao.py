"""ReinMax-Rao: by hand, and the bias that its docstring states."""

from __future__ import annotations

import torch
from helpers import BEYOND, EveryCode, gradient_of, slope_at, softmax_jacobian, times
from torch import Generator

import dgrad
from dgrad.testing import exact_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._conditional import conditional_potentials


def test_reinmax_rao_by_hand() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits, generator = small_logits(layer, batch=6), Generator().manual_seed(0)
    codes = layer.sample(logits, generator=generator)
    middle = (logits.softmax(-1) + codes) / 2
    relaxed = (conditional_potentials(middle.log(), codes, 3, generator=generator) / 0.7).softmax(-1)
    jacobian = 2 * softmax_jacobian(relaxed).mean(0) / 0.7 - softmax_jacobian(logits.softmax(-1)) / 2
    estimator = dgrad.estimator("reinmax-rao", temperature=0.7, inner_samples=3)
    torch.testing.assert_close(
        gradient_of(estimator, layer, logits, loss), times(jacobian, slope_at(loss, codes))[0], rtol=1e-5, atol=1e-6
    )


def test_its_mean_is_not_exact_even_for_a_linear_objective() -> None:
    """Codes are enumerated. 4,000 inner draws leave an error of about 0.01 of the gradient's norm."""
    layer = EveryCode(1, 5)
    logits, loss = small_logits(layer), small_objectives(layer)["linear"]
    weights = logits.softmax(-1)[0].T.unsqueeze(-1)  # [K, 1, 1]
    estimator = dgrad.estimator("reinmax-rao", inner_samples=4000)
    mean = (weights * gradient_of(estimator, layer, logits.expand(5, -1, -1), loss)).sum(0)
    truth = exact_gradient(layer, logits, loss)[0]
    assert (mean - truth).norm() > 0.05 * truth.norm()
