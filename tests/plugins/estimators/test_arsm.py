"""ARSM: the formula with swapped values, and the number of evaluations."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import estimate_and_gradient
from torch import Generator

import dgrad
from dgrad.core.random import gumbel
from dgrad.testing import small_logits, small_objectives


@pytest.mark.parametrize("spec", ["1x2", "2x3", "3x4"])
def test_arsm_is_the_formula_written_out(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, batch = dgrad.latent(spec), 6
    k = layer.shape[-1]
    logits, loss = small_logits(layer, batch=batch), small_objectives(layer)["smooth"]
    pi = (-gumbel(logits, generator=Generator().manual_seed(3))[0]).softmax(-1)
    losses = torch.zeros(batch, k, k, dtype=torch.float64)
    for c, j in itertools.product(range(k), range(k)):
        swapped = pi.clone()
        swapped[..., c], swapped[..., j] = pi[..., j], pi[..., c]
        codes = torch.eye(k, dtype=torch.float64)[(swapped * (-logits).exp()).argmin(-1)]
        losses[:, c, j] = loss(codes[None])[0]
    expected = torch.zeros_like(logits)
    for c, j in itertools.product(range(k), range(k)):
        expected[..., c] += (losses[:, c, j] - losses[:, :, j].mean(1))[:, None] * (1 / k - pi[..., j])
    for codes_per_call in (1, 16384):
        monkeypatch.setattr("dgrad_plugins.estimators._arsm.CODES_PER_CALL", codes_per_call)
        estimate, gradient = estimate_and_gradient(dgrad.estimator("arsm"), layer, logits, loss, seed=3)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(estimate.loss, losses[:, 0, 0])


@pytest.mark.parametrize(("spec", "evaluations"), [("1x2", 2), ("20x2", 2), ("3x3", 4), ("7x10", 46)])
def test_arsm_counts_its_evaluations_by_the_values_alone(spec: str, evaluations: int) -> None:
    assert dgrad.estimator("arsm").traits.evaluations(dgrad.latent(spec)) == evaluations
