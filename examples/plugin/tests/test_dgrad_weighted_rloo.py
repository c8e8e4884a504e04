"""The conformance checks of dgrad, and what is special about `weighted-rloo`."""

from __future__ import annotations

from collections.abc import Callable

import dgrad
import torch
from dgrad.testing import parametrize_with_checks, small_logits, small_objectives

dgrad.load_plugin("dgrad_weighted_rloo")  # where the package is not installed


@parametrize_with_checks(["weighted-rloo"])
def test_conforms(estimator: dgrad.GradientEstimator, check: Callable[[dgrad.GradientEstimator], None]) -> None:
    check(estimator)


def test_with_weight_1_it_is_the_leave_one_out_baseline() -> None:
    layer = dgrad.latent("3x4")
    logits = small_logits(layer, batch=5).requires_grad_()
    objective = small_objectives(layer)["spiky"]
    gradients = []
    for name in ("weighted-rloo", "rloo"):
        estimator = dgrad.estimator(name, samples=3)
        estimate = estimator(layer, logits, objective, generator=torch.Generator().manual_seed(0))
        gradients += torch.autograd.grad(estimate.loss.sum(), logits)
    torch.testing.assert_close(*gradients)


def test_the_weight_follows_its_schedule() -> None:
    estimator = dgrad.estimator("weighted-rloo", weight="linear:0:1")
    estimator.set_run_length(4)
    weights = []
    for step in range(4):
        estimator.set_step(step)
        weights.append(float(estimator.weight))
    assert weights == [0.0, 0.25, 0.5, 0.75]
