"""Straight-through Gumbel-softmax: hard codes, relaxed Jacobian."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

import dgrad
from dgrad.testing import small_logits


def test_straight_through_evaluates_hard_codes_and_uses_the_relaxed_jacobian() -> None:
    layer = dgrad.latent("2x3")
    logits = small_logits(layer, batch=4).requires_grad_()
    weight = torch.randn(2, 3, dtype=torch.float64, generator=Generator().manual_seed(0))
    seen = []

    def loss(codes: Tensor) -> Tensor:
        seen.append(codes.detach())
        return (codes * weight).sum((-2, -1))

    estimate = dgrad.estimator("st-gumbel-softmax", temperature=0.7)(
        layer, logits, loss, generator=Generator().manual_seed(1)
    )
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), logits)
    assert torch.equal(seen[0], estimate.codes)
    noise = layer.noise(logits, generator=Generator().manual_seed(1))
    relaxed = ((logits + noise) / torch.tensor(0.7)).softmax(-1)
    (expected,) = torch.autograd.grad((relaxed * weight).sum(), logits)
    torch.testing.assert_close(gradient, expected)
