"""exact: the sum over the support, written out. No test here is statistical."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import estimate_and_gradient
from torch import Tensor

import dgrad
from dgrad.testing import small_logits


def test_exact_is_each_value_s_probability_times_its_advantage() -> None:
    """`p_ij (E[f | z_i = j] - E[f])`, by a loop over the 64 codes of 3x4."""
    layer = dgrad.latent("3x4")
    logits = small_logits(layer)
    p = logits[0].softmax(-1).tolist()
    table = {
        code: math.sin(1 + 5 * sum(j * 4**i for i, j in enumerate(code))) for code in itertools.product(*[range(4)] * 3)
    }

    def loss(codes: Tensor) -> Tensor:
        values = [table[tuple(code)] for code in codes.argmax(-1).flatten(0, 1).tolist()]
        return torch.tensor(values, dtype=codes.dtype).view(codes.shape[:2])

    weight = {code: math.prod(p[i][j] for i, j in enumerate(code)) for code in table}
    mean = sum(weight[code] * table[code] for code in table)
    expected = torch.zeros(1, 3, 4, dtype=torch.float64)
    for i, j in itertools.product(range(3), range(4)):
        conditional = sum(weight[code] / p[i][j] * table[code] for code in table if code[i] == j)
        expected[0, i, j] = p[i][j] * (conditional - mean)
    estimate, gradient = estimate_and_gradient(dgrad.estimator("exact"), layer, logits, loss)
    torch.testing.assert_close(gradient, expected)
    assert estimate.loss.item() == pytest.approx(mean)
    assert estimate.codes is not None and estimate.codes.shape == (64, 1, 3, 4)


def test_exact_draws_nothing() -> None:
    layer = dgrad.latent("2x3")
    logits = small_logits(layer, batch=5)
    before = torch.get_rng_state()
    one, other = (
        estimate_and_gradient(dgrad.estimator("exact"), layer, logits, lambda codes: codes[..., 0].prod(-1), seed)
        for seed in (0, 1)
    )
    assert torch.equal(one[1], other[1]) and torch.equal(one[0].loss, other[0].loss)
    assert torch.equal(torch.get_rng_state(), before)
