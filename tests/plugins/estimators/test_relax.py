"""RELAX: a loss without a gradient."""

from __future__ import annotations

import torch
from helpers import with_layer
from torch import Tensor

import dgrad


def test_relax_takes_a_loss_without_a_gradient() -> None:
    layer = dgrad.latent("2x3")
    estimator = with_layer("relax", layer)
    table = torch.tensor([[1.0, 5.0, 2.0], [0.0, 1.0, 7.0]])

    def loss(codes: Tensor) -> Tensor:
        return table[torch.arange(2), codes.argmax(-1)].sum(-1)

    logits = torch.zeros(64, 2, 3, requires_grad=True)
    estimator(layer, logits, loss).loss.mean().backward()
    assert logits.grad is not None
    assert logits.grad.any()
    assert all(parameter.grad is not None for parameter in estimator.parameters())
