"""`check_objective` finds what makes an objective unfit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgrad
from dgrad.testing import ObjectiveError, check_objective

LAYER, BATCH = dgrad.latent("3x4"), 6
WEIGHT = torch.linspace(-1, 1, 12)
NOISE = np.random.default_rng(0)


def _sound(codes: Tensor) -> Tensor:
    return (codes.flatten(2) * WEIGHT).sum(-1)


TAKEN = torch.randn(BATCH)
NORM = nn.BatchNorm1d(12)
FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "coupled": (
        lambda codes: _sound(codes - 0.1 * codes.mean(1, True)),
        "independent examples: .* couples_examples=True",
    ),
    "attention": (lambda codes: _sound(codes).softmax(1), "independent examples: the loss of an example changes"),
    "taken": (lambda codes: TAKEN.expand(len(codes), -1), "depends on its code: .* actions that were already taken"),
    "shape": (lambda codes: _sound(codes).mean(0), r"shapes: the objective returned shape \[6\] for codes"),
    "error": (lambda codes: _sound(codes).view(1, -1)[:, :BATCH] + codes[1, :, 0, 0], "shapes: it raises IndexError"),
    "numpy": (lambda codes: _sound(codes) + float(NOISE.normal()), "repeatable: the same codes have another loss"),
    "samples": (lambda codes: _sound(codes) / len(codes), "independent samples: a code has another loss alone"),
    "infinite": (lambda codes: _sound(codes) / 0, "finite values: a loss is not finite"),
    "batch norm": (
        lambda codes: NORM(codes.flatten(2).flatten(0, 1)).sum(-1).view(codes.shape[:2]),
        "batch norm: BatchN",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    objective, message = FAULTS[name]
    with pytest.raises(ObjectiveError, match=f"(?s)the objective fails checks:.*{message}"):
        check_objective(objective, LAYER, BATCH)


@pytest.mark.parametrize(
    "objective",
    [
        _sound,
        lambda codes: F.dropout(codes.flatten(2) * WEIGHT, 0.5).sum(-1),
        dgrad.objective(lambda indices: WEIGHT[indices].sum(-1), indices=True),
        dgrad.objective(lambda codes: _sound(codes - codes.mean(1, True)), couples_examples=True),
        dgrad.objective(decoder=nn.Linear(12, 3), loss=dgrad.bernoulli(torch.ones(BATCH, 3))),
    ],
    ids=["plain", "dropout", "indices", "coupled, and says so", "decoder"],
)
def test_a_sound_objective_passes(objective: Callable[[Tensor], Tensor]) -> None:
    check_objective(objective, LAYER, BATCH)


def test_a_loss_that_is_not_finite_fails_one_check() -> None:
    with pytest.raises(ObjectiveError, match=r"^the objective fails checks:\n  finite values: a loss is not finite$"):
        check_objective(lambda codes: _sound(codes) * math.nan, LAYER, BATCH)


def test_no_examples_and_no_layer_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who run no type checker
    with pytest.raises(dgrad.InputError, match="batch must be at least 1; got 0"):
        check_objective(_sound, LAYER, 0)
    layer: Any = "2x3"
    with pytest.raises(dgrad.InputError, match="the layer is a str; expected a latent layer"):
        check_objective(_sound, layer, BATCH)


def test_a_gradient_in_the_codes_is_checked_where_it_is_asked_for() -> None:
    check_objective(_sound, LAYER, BATCH, differentiable=True)
    with pytest.raises(ObjectiveError, match="differentiable: this check needs the objective's"):
        check_objective(lambda codes: WEIGHT[codes.argmax(-1)].sum(-1), LAYER, BATCH, differentiable=True)


def test_structured_codes_and_batches_of_one_are_checked() -> None:
    layer = dgrad.latent("pairs:4")
    check_objective(lambda codes: codes[..., 0], layer, 1)
