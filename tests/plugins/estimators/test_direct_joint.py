"""direct-joint: it is direct where there is one variable."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


@pytest.mark.parametrize("difference", ["backward", "forward", "central"])
def test_direct_and_direct_joint_agree_with_one_variable(difference: str) -> None:
    layer = dgrad.latent("1x6")
    logits, loss = small_logits(layer, batch=50).requires_grad_(), small_objectives(layer)["spiky"]
    gradients, codes = [], []
    for name in ("direct", "direct-joint"):
        estimator = dgrad.estimator(name, epsilon=0.7, samples=3, difference=difference)
        estimate = estimator(layer, logits, loss, generator=Generator().manual_seed(5))
        gradients.append(torch.autograd.grad(estimate.loss.sum(), logits)[0])
        codes.append(estimate.codes)
    assert torch.equal(codes[0], codes[1])
    assert gradients[0].any()
    assert torch.equal(gradients[0], gradients[1])
