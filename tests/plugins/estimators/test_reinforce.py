"""REINFORCE: its baselines."""

from __future__ import annotations

import pytest
import torch
from helpers import gradient_of, train_learned_parts, with_layer
from torch import Tensor

import dgrad
from dgrad.testing import small_logits


def test_a_moving_average_has_not_seen_its_sample() -> None:
    """The first step's baseline is 0, the second's the first loss: by hand."""
    layer, estimator = dgrad.latent("1x2"), dgrad.estimator("reinforce")
    logits = torch.zeros(1, 1, 2, requires_grad=True)
    for value, baseline in ((4.0, 0.0), (10.0, 4.0)):
        estimate = estimator(layer, logits, lambda codes, value=value: torch.full(codes.shape[:2], value))
        (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
        torch.testing.assert_close(gradient[0, 0], (value - baseline) * (estimate.codes[0, 0, 0] - 0.5))


@pytest.mark.slow
def test_the_baseline_learns_the_loss_of_each_input() -> None:
    """The loss depends on the input alone. The moving average leaves its spread, the network does not."""
    layer = dgrad.latent("2x4")
    logits = small_logits(layer, batch=8, scale=2.0).float()
    levels = 5 * torch.arange(8.0)
    norms = {}
    for baseline in ("moving-average", "input-dependent"):
        estimator = with_layer("reinforce", layer, baseline=baseline)

        def loss(codes: Tensor) -> Tensor:
            return levels.expand(codes.shape[:2])

        if baseline == "input-dependent":
            train_learned_parts(estimator, layer, logits, loss, steps=800, lr=1e-2)
        else:
            for _ in range(800):
                estimator(layer, logits, loss)
        norms[baseline] = float(gradient_of(estimator, layer, logits, loss).norm())
    assert norms["input-dependent"] < 0.05 * norms["moving-average"]
