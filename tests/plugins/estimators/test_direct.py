"""direct: the approximation in product space, written out."""

from __future__ import annotations

import torch
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_direct_with_several_variables_is_the_product_space_approximation() -> None:
    """Row by row: the argmax of the perturbed logits, and the argmax with epsilon times the sweep subtracted."""
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=30), small_objectives(layer)["cross-entropy"]
    noise = layer.noise(logits, 1, generator=Generator().manual_seed(9))
    codes = layer.argmax(logits + noise)
    expected = torch.zeros_like(logits)
    for b in range(30):
        for i in range(3):
            changed = codes[:, b : b + 1].repeat(4, 1, 1, 1)
            changed[:, 0, i] = torch.eye(4, dtype=codes.dtype)
            potentials = (logits + noise)[0, b, i]
            expected[b, i, potentials.argmax()] += 1 / 0.25
            expected[b, i, (potentials - 0.25 * loss(changed)[:, 0]).argmax()] -= 1 / 0.25
    leaf = logits.clone().requires_grad_()
    estimate = dgrad.estimator("direct", epsilon=0.25)(layer, leaf, loss, generator=Generator().manual_seed(9))
    estimate.loss.sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
