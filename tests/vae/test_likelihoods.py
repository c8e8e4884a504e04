"""Likelihoods against what they state: probabilities that add up to 1, and curvatures."""

from __future__ import annotations

import pytest
import torch

from dgrad.vae.likelihoods import DiscretizedLogistic


@pytest.mark.parametrize("log_scale", [-4.5, -3.0, -2.0])
@pytest.mark.parametrize("location", [0.0, 0.5])
def test_curvature_of_rounded_logistic_pixels_is_their_fisher_information(location: float, log_scale: float) -> None:
    likelihood = DiscretizedLogistic()
    levels = torch.arange(256, dtype=torch.float64).unsqueeze(-1) / 255
    outputs = torch.tensor([location, log_scale], dtype=torch.float64).repeat(256, 1).requires_grad_()
    loss = likelihood.loss(outputs, levels)
    (score,) = torch.autograd.grad(loss.sum(), outputs)
    probability = (-loss.detach()).exp()
    torch.testing.assert_close(probability.sum(), torch.ones_like(loss[0]))

    information = torch.einsum("x,xi,xj->ij", probability, score, score)
    curvature = likelihood.root_curvature(outputs.detach()[:1]).square().diag_embed()[0]
    # Rounding takes 2 % of the information at a scale of 3 levels, and the ends of the range as much at a scale of 17.
    scale = curvature.diagonal().sqrt()
    torch.testing.assert_close(information / scale.outer(scale), torch.eye(2, dtype=torch.float64), atol=0.025, rtol=0)
