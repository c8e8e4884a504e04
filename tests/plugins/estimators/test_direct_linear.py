"""direct-linear: direct with a first-order sweep."""

from __future__ import annotations

import pytest
import torch
from helpers import BEYOND, gradient_of, slope_at
from torch import Generator

import dgrad
from dgrad.testing import small_logits, small_objectives


@pytest.mark.parametrize("difference", ["backward", "forward", "central"])
def test_direct_linear_is_direct_for_a_linear_objective(difference: str) -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=100), small_objectives(layer)["linear"]
    given = {"epsilon": 0.5, "samples": 2, "difference": difference}
    exact = gradient_of(dgrad.estimator("direct", **given), layer, logits, loss)
    assert exact.any()
    assert torch.equal(gradient_of(dgrad.estimator("direct-linear", **given), layer, logits, loss), exact)
    assert torch.equal(gradient_of(dgrad.estimator("direct", sweep="linear", **given), layer, logits, loss), exact)


def test_direct_linear_adds_the_first_order_expansion() -> None:
    """`T[i, j] = f(z) + h_i . (onehot(j) - z_i)`, written out, in the place of the sweep."""
    layer, loss = dgrad.latent("3x4"), small_objectives(dgrad.latent("3x4"))[BEYOND]
    logits = small_logits(layer, batch=100)
    potentials = logits + layer.noise(logits, generator=Generator().manual_seed(0))
    codes = layer.argmax(potentials)
    sweep = loss(codes)[..., None, None] + layer.linear_sweep(slope_at(loss, codes), codes)
    expected = (codes - layer.argmax(potentials - 0.5 * sweep))[0] / 0.5
    torch.testing.assert_close(
        gradient_of(dgrad.estimator("direct-linear", epsilon=0.5), layer, logits, loss), expected
    )


def test_the_traits_of_direct_follow_its_sweep() -> None:
    layer = dgrad.latent("3x4")
    exact, linear = dgrad.estimator("direct", samples=2).traits, dgrad.estimator("direct-linear", samples=2).traits
    assert (exact.evaluations(layer), linear.evaluations(layer)) == (2 * (3 * 3 + 1), 2)
    assert (exact.differentiable_objective, linear.differentiable_objective) == (False, True)
    assert (exact.limit.exact_for, linear.limit.exact_for) == ("any", "linear")
    assert dgrad.estimator("direct-linear", difference="central").traits.limit.exact_for == "quadratic"
