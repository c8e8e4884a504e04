"""DisARM: the mean of ARM given its codes."""

from __future__ import annotations

import torch
from helpers import estimate_and_gradient

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_disarm_is_the_mean_of_arm_given_its_codes() -> None:
    """One variable; a fine grid of uniform numbers, the mean over those that give different codes."""
    layer, grid = dgrad.latent("1x2"), 100_000
    for phi in (-2.0, -0.1, 0.0, 1.5):
        uniform = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        bits = uniform > torch.tensor(-phi).sigmoid(), uniform < torch.tensor(phi).sigmoid()
        arm = ((bits[0].double() - bits[1].double()) * (uniform - 0.5))[bits[0] != bits[1]]
        logits = torch.tensor([[[0.0, phi]]], dtype=torch.float64).expand(200, -1, -1)
        estimate, gradient = estimate_and_gradient(
            dgrad.estimator("disarm"), layer, logits, lambda codes: codes[..., 0, 1]
        )
        differ = estimate.codes[0, :, 0, 1] != estimate.codes[1, :, 0, 1]
        assert differ.any()
        assert not gradient[~differ].any()
        torch.testing.assert_close(gradient[differ, 0, 1], arm.mean().expand(int(differ.sum())), rtol=1e-3, atol=1e-4)


def test_several_pairs_are_averaged() -> None:
    layer, pairs = dgrad.latent("3x2"), 3
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["cross-entropy"]
    estimate, gradient = estimate_and_gradient(dgrad.estimator("disarm", samples=pairs), layer, logits, loss)
    assert estimate.codes.shape == (2 * pairs, 5, 3, 2)
    (first, second), (bits, antithetic) = loss(estimate.codes).chunk(2), estimate.codes[..., 1].chunk(2)
    certainty = (logits[..., 1] - logits[..., 0]).abs().sigmoid()
    expected = 0.5 * (first - second).unsqueeze(-1) * (bits - antithetic) * certainty
    torch.testing.assert_close(gradient[..., 1], expected.mean(0))
