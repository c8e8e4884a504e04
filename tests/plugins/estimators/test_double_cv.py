"""double-cv, alone and beside rodeo: control variates from the slope."""

from __future__ import annotations

import pytest
import torch
from helpers import estimate_and_gradient, variance_of
from torch import Generator, Tensor

import dgrad
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.objectives import CodeLoss
from dgrad.testing import exact_gradient, small_logits, small_objectives


def _trained(name: str, layer: dgrad.LatentLayer, logits: Tensor, loss: CodeLoss) -> GradientEstimator:
    estimator, generator = dgrad.estimator(name), Generator().manual_seed(11)
    with torch.no_grad():
        for _ in range(30):
            estimator(layer, logits.expand(50, *layer.shape), loss, generator=generator)
    return estimator


@pytest.mark.parametrize("spec", ["3x2", "2x4"])
@pytest.mark.parametrize("name", ["double-cv", "rodeo"])
@pytest.mark.parametrize("samples", [2, 4])
def test_the_gradient_of_a_linear_objective_is_exact_at_the_first_step(name: str, spec: str, samples: int) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["linear"]
    _, gradient = estimate_and_gradient(dgrad.estimator(name, samples=samples), layer, logits, loss)
    torch.testing.assert_close(gradient, exact_gradient(layer, logits, loss))


def test_control_variates_from_the_slope_lower_the_variance() -> None:
    layer = dgrad.latent("10x2")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    plain = variance_of(dgrad.estimator("rloo"), layer, logits, loss)
    double = variance_of(_trained("double-cv", layer, logits, loss), layer, logits, loss)
    rodeo = variance_of(_trained("rodeo", layer, logits, loss), layer, logits, loss)
    assert double < 0.5 * plain
    assert rodeo < double


@pytest.mark.parametrize("name", ["double-cv", "rodeo"])
def test_a_slope_that_misleads_is_soon_left_alone(name: str) -> None:
    layer = dgrad.latent("3x2")
    logits, loss = small_logits(layer), small_objectives(layer)["spiky"]
    plain = variance_of(dgrad.estimator("rloo"), layer, logits, loss)
    assert variance_of(dgrad.estimator(name), layer, logits, loss) > 2 * plain
    assert variance_of(_trained(name, layer, logits, loss), layer, logits, loss) < 1.1 * plain
