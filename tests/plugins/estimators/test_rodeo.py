"""rodeo: its quadratic term and its surrogates, by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import estimate_and_gradient
from torch import Generator, Tensor

import dgrad
from dgrad.testing import exact_gradient, monte_carlo_gradient, small_logits, small_objectives
from dgrad_plugins.estimators._rodeo import Rodeo, _surrogates


def test_rodeo_without_its_quadratic_term_is_double_cv() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["cross-entropy"]
    gradients = [
        estimate_and_gradient(dgrad.estimator(name), layer, logits, loss)[1] for name in ("rodeo", "double-cv")
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("spec", ["3x2", "2x4"])
def test_the_stein_operator_and_the_local_expectation_of_the_surrogates_written_out(spec: str) -> None:
    layer, samples = dgrad.latent(spec), 3
    n, k = layer.shape
    logits = small_logits(layer)
    p, codes = layer.mean(logits), layer.sample(logits, samples, generator=Generator().manual_seed(0))
    slope = torch.randn(codes.shape, dtype=torch.float64, generator=Generator().manual_seed(1))
    for power, (stein, local) in enumerate(_surrogates(p, codes, slope), start=1):
        for m in range(samples):

            def surrogate(y: Tensor, m: int = m, power: int = power) -> Tensor:
                others = [other for other in range(samples) if other != m]
                terms = [(slope[other, 0] * (y - codes[other, 0])).sum() ** power for other in others]
                return torch.stack(terms).mean()

            z = codes[m, 0]
            expected_stein, expected_local = (
                torch.zeros((), dtype=torch.float64),
                torch.zeros(n, k, dtype=torch.float64),
            )
            for i in range(n):
                values = []
                for j in range(k):
                    changed = z.clone()
                    changed[i] = torch.eye(k, dtype=torch.float64)[j]
                    values.append(surrogate(changed))
                mean = (p[0, i] * torch.stack(values)).sum()
                expected_stein += mean - surrogate(z)
                expected_local[i] = p[0, i] * (torch.stack(values) - mean)
            torch.testing.assert_close(stein[m, 0], expected_stein)
            torch.testing.assert_close(local[m, 0], expected_local)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [2, 4])
@pytest.mark.parametrize("spec", ["3x2", "2x4"])
def test_rodeo_is_unbiased_with_any_coefficients(spec: str, samples: int) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer), small_objectives(layer)["smooth"]
    truth = exact_gradient(layer, logits, loss)[0]
    estimator = Rodeo(samples)
    estimator.coefficients.start = [0.3, -0.5]
    # one batch, so that nothing is learned in between
    mean, error = monte_carlo_gradient(estimator, layer, logits, loss, draws=40_000)
    assert ((mean - truth).abs() <= 5 * error).all()
