"""Hyper-parameters in other programs: they are seen in `repr`, and a schedule that nobody moves is noticed."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch

import dgrad
from dgrad.core.scheduled_module import CALLS_WITHOUT_A_STEP
from dgrad.errors import DgradWarning
from dgrad_plugins.estimators import ESTIMATORS

LAYER = dgrad.latent("2x3")


def _calls(estimator: dgrad.GradientEstimator, count: int) -> None:
    logits = torch.zeros(1, 2, 3)
    for _ in range(count):
        estimator(LAYER, logits, lambda codes: codes[..., 0].sum(-1))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_repr_shows_every_hyper_parameter(name: str) -> None:
    estimator = dgrad.estimator(name)
    parameters = list(inspect.signature(type(estimator)).parameters)
    for replica in (estimator, copy.deepcopy(estimator), pickle.loads(pickle.dumps(estimator))):
        shown = replica.extra_repr()
        assert all(f"{parameter}=" in shown for parameter in parameters), shown


def test_repr_shows_the_values_given() -> None:
    assert repr(dgrad.estimator("direct", epsilon="geometric:1:0.1:50", samples=3, sweep_share=0.5)) == (
        "Direct(epsilon=geometric:1:0.1:50, samples=3, difference=backward, sweep=exact, sweep_share=0.5)"
    )
    assert "gap=expected" in repr(dgrad.estimator("gapped-st", gap="expected"))


def test_a_step_of_a_schedule_without_a_length_is_refused() -> None:
    estimator = dgrad.estimator("direct", epsilon="geometric:1:0.02")
    with pytest.raises(dgrad.InputError, match=r"geometric:1:0.02 spans a whole run .* set_run_length\(steps\)"):
        estimator.set_step(0)


def test_a_schedule_that_nobody_moves_is_noticed_once() -> None:
    estimator = dgrad.estimator("direct", epsilon="geometric:1:0.02")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _calls(estimator.eval(), 2 * CALLS_WITHOUT_A_STEP)
        _calls(estimator.train(), CALLS_WITHOUT_A_STEP - 1)
    with pytest.warns(DgradWarning, match=r"epsilon=geometric:1:0.02 has not moved .* estimator.set_step") as caught:
        _calls(estimator, CALLS_WITHOUT_A_STEP)
    assert len(caught) == 1


def test_a_schedule_that_moves_and_a_constant_are_not_noticed() -> None:
    moved = dgrad.estimator("direct", epsilon="geometric:1:0.02")
    moved.set_run_length(10)
    moved.set_step(0)
    for estimator in (moved, dgrad.estimator("direct", epsilon=0.1)):
        _calls(estimator, 2 * CALLS_WITHOUT_A_STEP)
