"""Adaptive I-MLE: by hand, and the strength that it adapts."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BEYOND, gradient_of, slope_at
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_aimle_by_hand_and_its_strength_moves_after_use() -> None:
    layer, loss = dgrad.latent("2x3"), small_objectives(dgrad.latent("2x3"))[BEYOND]
    logits = small_logits(layer, batch=20)
    estimator = dgrad.estimator("aimle", target=0.3, rate=0.2, initial_strength=0.5)
    potentials = logits + layer.noise(logits, generator=Generator().manual_seed(0))
    slope = slope_at(loss, layer.argmax(potentials))
    lam = 0.5 * potentials.flatten(2).norm(dim=-1) / slope.flatten(2).norm(dim=-1)  # [1, B]
    lam = lam[..., None, None]
    change = layer.argmax(potentials + lam * slope) - layer.argmax(potentials - lam * slope)
    torch.testing.assert_close(gradient_of(estimator, layer, logits, loss), (change / (2 * lam))[0])
    share = float((change != 0).any(-1).double().mean())
    assert 0 < share < 1
    assert float(estimator.strength) == pytest.approx(0.5 * math.exp(0.2 * (0.3 - share)))
    assert torch.equal(estimator.state_dict()["strength"], estimator.strength)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.1, 0.5])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_aimle_reaches_its_target_at_any_scale_of_the_loss(target: float, scale: float) -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer, batch=200), small_objectives(layer)[BEYOND]
    estimator = dgrad.estimator("aimle", target=target, rate=0.5)
    shares = []
    for step in range(60):
        gradient = gradient_of(estimator, layer, logits, lambda codes: scale * loss(codes), seed=step)
        shares.append(float((gradient != 0).any(-1).double().mean()))
    assert sum(shares[30:]) / 30 == pytest.approx(target, abs=0.03)


def test_aimle_stays_finite_without_a_slope_and_without_logits() -> None:
    layer, estimator = dgrad.latent("2x3"), dgrad.estimator("aimle", rate=10.0)
    logits = torch.zeros(64, 2, 3)
    for _ in range(20):
        assert not gradient_of(estimator, layer, logits, lambda codes: 0 * codes.sum((-2, -1))).any()
    assert estimator.strength == 1e4, "where no strength brings a gradient it stops at the end of its range"
    gradient = gradient_of(dgrad.estimator("aimle"), layer, logits, lambda codes: codes[..., 0].sum(-1))
    assert gradient.isfinite().all()
    assert gradient.any(), "equal logits get a gradient"
