"""The coefficients that double-cv and rodeo learn."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from dgrad_plugins.estimators._coefficients import Coefficients


def test_coefficients_are_the_regression_on_earlier_steps() -> None:
    generator, coefficients = Generator().manual_seed(0), Coefficients([1.0, 0.0])
    assert [float(each) for each in coefficients.current()] == [1.0, 0.0]
    for _ in range(100):
        first, second, noise = torch.randn(3, 64, 5, generator=generator)
        second = second + 0.5 * first
        coefficients.learn(-2 * first + 30 * second + 0.1 * noise, [first, second])
    assert [float(each) for each in coefficients.current()] == pytest.approx([2, -30], rel=0.02)


def test_coefficients_stay_finite_where_a_variate_vanishes_or_repeats() -> None:
    coefficients = Coefficients([1.0, 0.0])
    first = torch.randn(8, 5, generator=Generator().manual_seed(0))
    coefficients.learn(first, [torch.zeros(8, 5), first])
    assert [float(each) for each in coefficients.current()] == pytest.approx([0, -1], rel=0.01)
    coefficients.learn(first, [first, first])
    assert all(each.isfinite() for each in coefficients.current())
    coefficients = Coefficients([1.0, 0.0])
    coefficients.learn(1e-12 * first, [1e-12 * first, 1e-24 * first])  # the second one's square is 0 in float32
    assert all(each.isfinite() for each in coefficients.current())
