"""bitflip-1: with one variable it is exact, with several it touches one."""

from __future__ import annotations

import torch
from helpers import estimate_and_gradient

import dgrad
from dgrad.testing import exact_gradient, small_logits, small_objectives


def test_bitflip_is_exact_with_one_variable_and_touches_one_of_several() -> None:
    layer = dgrad.latent("1x2")
    logits, loss = small_logits(layer, batch=5), small_objectives(layer)["spiky"]
    estimate, gradient = estimate_and_gradient(dgrad.estimator("bitflip-1"), layer, logits, loss)
    torch.testing.assert_close(gradient, exact_gradient(layer, logits, loss))
    support = layer.enumerate(like=logits).unsqueeze(1).expand(-1, 5, -1, -1)
    torch.testing.assert_close(estimate.loss, (layer.log_prob(logits, support).exp() * loss(support)).sum(0))

    layer, draws = dgrad.latent("4x2"), 8000
    logits = small_logits(layer).expand(draws, -1, -1)
    _, gradient = estimate_and_gradient(
        dgrad.estimator("bitflip-1"), layer, logits, lambda codes: codes[..., 1].sum(-1)
    )
    touched = gradient[..., 1] != 0
    assert (touched.sum(-1) == 1).all()
    assert ((touched.double().mean(0) - 0.25).abs() < 5 * (0.25 * 0.75 / draws) ** 0.5).all()
