"""ReinMax: by hand."""

from __future__ import annotations

import torch
from helpers import BEYOND, gradient_of, slope_at, softmax_jacobian, times
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_reinmax_by_hand_at_another_temperature() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=6)
    codes = layer.sample(logits, generator=Generator().manual_seed(0))
    middle = ((logits / 1.5).softmax(-1) + codes) / 2
    jacobian = 2 * softmax_jacobian(middle) - softmax_jacobian(logits.softmax(-1)) / 2
    gradient = gradient_of(dgrad.estimator("reinmax", temperature=1.5), layer, logits, loss)
    torch.testing.assert_close(gradient, times(jacobian, slope_at(loss, codes))[0])
