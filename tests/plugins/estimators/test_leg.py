"""leg: the limit of direct-rb."""

from __future__ import annotations

import pytest
import torch
from torch import Generator, Tensor

import dgrad
from dgrad.testing import small_logits, small_objectives


@pytest.mark.parametrize("spec", ["2x4", "3x2"])
def test_direct_rb_becomes_leg(spec: str) -> None:
    layer = dgrad.latent(spec)
    logits, loss = small_logits(layer, batch=5).requires_grad_(), small_objectives(layer)["cross-entropy"]

    def gradient(name: str, **hyperparameters: object) -> Tensor:
        estimate = dgrad.estimator(name, **hyperparameters)(layer, logits, loss, generator=Generator().manual_seed(3))
        return torch.autograd.grad(estimate.loss.sum(), logits)[0]

    limit = gradient("leg")
    errors = [(gradient("direct-rb", epsilon=epsilon) - limit).norm() for epsilon in (1e-2, 1e-3)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.1)
