"""ARM: the formula on its uniform numbers."""

from __future__ import annotations

import torch
from helpers import estimate_and_gradient
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_arm_is_the_formula_on_its_uniform_numbers() -> None:
    layer = dgrad.latent("3x2")
    logits, loss = small_logits(layer, batch=50), small_objectives(layer)["cross-entropy"]
    estimate, gradient = estimate_and_gradient(dgrad.estimator("arm"), layer, logits, loss)
    phi = logits[..., 1] - logits[..., 0]
    uniform = torch.rand(50, 3, dtype=torch.float64, generator=Generator().manual_seed(0))
    up, down = (uniform > (-phi).sigmoid()).double(), (uniform < phi.sigmoid()).double()
    torch.testing.assert_close(estimate.codes[..., 1], torch.stack([up, down]))
    losses = loss(torch.stack([1 - estimate.codes[..., 1], estimate.codes[..., 1]], -1))
    torch.testing.assert_close(gradient[..., 1], (losses[0] - losses[1])[:, None] * (uniform - 0.5))
    torch.testing.assert_close(gradient[..., 0], -gradient[..., 1])
    torch.testing.assert_close(estimate.loss, losses.mean(0))


def test_several_pairs_are_averaged() -> None:
    layer, pairs = dgrad.latent("3x2"), 3
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["cross-entropy"]
    estimate, gradient = estimate_and_gradient(dgrad.estimator("arm", samples=pairs), layer, logits, loss)
    assert estimate.codes.shape == (2 * pairs, 5, 3, 2)
    uniform = torch.rand(pairs, 5, 3, dtype=torch.float64, generator=Generator().manual_seed(0))
    up, down = loss(estimate.codes).chunk(2)
    torch.testing.assert_close(gradient[..., 1], ((up - down).unsqueeze(-1) * (uniform - 0.5)).mean(0))
