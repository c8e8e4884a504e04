"""DisARM: the mean of ARM given its codes."""

from __future__ import annotations

import torch
from helpers import estimate_and_gradient

import dgrad


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
