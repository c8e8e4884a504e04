"""Objectives: the sweep of a function."""

from __future__ import annotations

import torch
from torch import Generator

import dgrad
from dgrad.core.objectives import FunctionObjective
from dgrad.testing import small_logits, small_objectives


def test_function_objective_sweep_is_every_single_change() -> None:
    layer = dgrad.latent("3x4")
    codes = layer.sample(small_logits(layer, batch=5), 2, generator=Generator().manual_seed(0))
    loss = small_objectives(layer)["spiky"]
    expected = torch.empty_like(codes)
    for i in range(3):
        for j in range(4):
            changed = codes.clone()
            changed[:, :, i] = torch.eye(4, dtype=codes.dtype)[j]
            expected[:, :, i, j] = loss(changed)
    for per_call in (1, 7, 64, 10_000):
        torch.testing.assert_close(FunctionObjective(loss, codes_per_call=per_call).sweep(codes), expected)
