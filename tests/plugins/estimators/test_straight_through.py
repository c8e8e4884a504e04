"""Straight-through: the Jacobian, the slope, the forward temperature."""

from __future__ import annotations

import torch
from helpers import BEYOND, gradient_of, slope_at, softmax_jacobian, times
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_straight_through_is_the_jacobian_times_the_slope_at_the_code() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=6)
    estimator = dgrad.estimator("straight-through", temperature=0.5, samples=3)
    codes = layer.sample(logits, 3, generator=Generator().manual_seed(0))
    expected = (times(softmax_jacobian((logits / 0.5).softmax(-1)), slope_at(loss, codes)) / 0.5).mean(0)
    torch.testing.assert_close(gradient_of(estimator, layer, logits, loss), expected)


def test_the_forward_temperature_changes_the_code_alone() -> None:
    layer, loss = dgrad.latent("2x4"), small_objectives(dgrad.latent("2x4"))[BEYOND]
    logits = small_logits(layer, batch=6)
    estimator = dgrad.estimator("straight-through", forward_temperature=0.25)
    assert not estimator.traits.unbiased_value
    assert not dgrad.estimator("straight-through", forward_temperature="linear:1:0.5").traits.unbiased_value
    assert dgrad.estimator("straight-through", forward_temperature="1").traits.unbiased_value
    codes = layer.sample(logits / 0.25, generator=Generator().manual_seed(0))
    assert torch.equal(estimator(layer, logits, loss, generator=Generator().manual_seed(0)).codes, codes)
    expected = times(softmax_jacobian(logits.softmax(-1)), slope_at(loss, codes))[0]
    torch.testing.assert_close(gradient_of(estimator, layer, logits, loss), expected)
