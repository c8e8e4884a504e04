"""MuProp: exact for a linear loss, and by hand."""

from __future__ import annotations

import torch
from helpers import gradient_of
from torch import Generator, Tensor

import dgrad
from dgrad.testing import exact_gradient, small_logits, small_objectives


def test_muprop_is_exact_for_a_linear_loss() -> None:
    layer = dgrad.latent("3x4")
    logits = small_logits(layer, batch=5)
    weight = torch.randn(3, 4, dtype=torch.float64, generator=Generator().manual_seed(0))

    def loss(codes: Tensor) -> Tensor:
        return (codes * weight).sum((-2, -1)) + 3

    expected = exact_gradient(layer, logits, loss)
    torch.testing.assert_close(gradient_of(dgrad.estimator("muprop"), layer, logits, loss), expected)


def test_muprop_by_hand() -> None:
    layer = dgrad.latent("2x3")
    logits = small_logits(layer, batch=4)
    loss = small_objectives(layer)["cross-entropy"]
    leaf = logits.clone().requires_grad_()
    estimate = dgrad.estimator("muprop")(layer, leaf, loss, generator=Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(estimate.loss.sum(), leaf)
    p = logits.softmax(-1).requires_grad_()
    (slope,) = torch.autograd.grad(loss(p.unsqueeze(0)).sum(), p)
    codes = estimate.codes[0]
    with torch.no_grad():
        rest = loss(codes.unsqueeze(0))[0] - loss(p.unsqueeze(0))[0] - (slope * (codes - p)).sum((-2, -1))
        expected = rest[:, None, None] * (codes - p) + p * (slope - (p * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected)
