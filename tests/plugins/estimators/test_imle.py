"""I-MLE: the central difference of direct-linear."""

from __future__ import annotations

import torch
from helpers import BEYOND, gradient_of

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_imle_is_the_central_difference_of_direct_linear() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=100), small_objectives(layer)[BEYOND]
    imle = gradient_of(dgrad.estimator("imle", strength=0.3, samples=2), layer, logits, loss)
    linear = dgrad.estimator("direct-linear", epsilon=0.3, samples=2, difference="central")
    assert imle.any()
    assert torch.equal(imle, gradient_of(linear, layer, logits, loss))
