"""The log odds that the estimators of binary variables share."""

from __future__ import annotations

import torch

from dgrad_plugins.estimators._binary import log_odds


def test_log_odds_carry_no_gradient() -> None:
    assert not log_odds(torch.zeros(1, 1, 2, requires_grad=True)).requires_grad
