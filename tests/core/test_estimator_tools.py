"""The tools that estimators are written with."""

from __future__ import annotations

import torch

from dgrad.core.estimator_tools import replace_gradient


def test_replace_gradient_changes_the_gradient_and_not_the_value() -> None:
    logits = torch.randn(2, 1, 3, requires_grad=True)
    weight = torch.tensor(2.0, requires_grad=True)
    loss = (weight * torch.ones(1, 2)) + logits.sum((-2, -1)) * 0
    direction = torch.randn(1, 2, 1, 3)
    replaced = replace_gradient(loss, logits, direction)
    assert torch.equal(replaced, loss)
    gradients = torch.autograd.grad(replaced.sum(), (logits, weight))
    torch.testing.assert_close(gradients[0], direction[0])
    assert gradients[1] == 2
