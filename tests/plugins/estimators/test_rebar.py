"""REBAR: without its control variate, and without learning."""

from __future__ import annotations

import pytest
import torch
from helpers import gradient_of

import dgrad
from dgrad.testing import small_logits, small_objectives


def test_rebar_without_its_control_variate_is_reinforce() -> None:
    layer = dgrad.latent("3x4")
    logits, loss = small_logits(layer, batch=6), small_objectives(layer)["cross-entropy"]
    rebar, reinforce = (
        gradient_of(dgrad.estimator(name, **hyperparameters), layer, logits, loss)
        for name, hyperparameters in (("rebar", {"eta": 0.0}), ("reinforce", {"baseline": "none"}))
    )
    torch.testing.assert_close(rebar, reinforce)


def test_rebar_follows_schedules_where_it_does_not_learn() -> None:
    estimator = dgrad.estimator("rebar", learn="false", temperature="geometric:1:0.1", eta=0.5)
    assert not list(estimator.parameters())
    assert not estimator.state_dict()
    estimator.set_run_length(10)
    estimator.set_step(10)
    assert float(estimator.temperature) == pytest.approx(0.1)
