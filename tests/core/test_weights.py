"""Weights of candidates: the sum of weight times score, against enumeration of every group that can be drawn."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor

import dgrad

LOGITS = torch.tensor([0.3, -0.5, 1.1, 0.0], dtype=torch.float64)
LOSSES = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
P = LOGITS.softmax(0)
SCORES = torch.eye(4, dtype=torch.float64) - P  # of each value, the gradient of log pi


def mean_gradient(groups: list[tuple[tuple[int, ...], float]], name: str, **hyperparameters: object) -> Tensor:
    """The mean of `sum weight * grad log pi`, over all groups of candidates with their probabilities."""
    candidates = torch.tensor([group for group, _ in groups]).T  # [K, groups]
    probabilities = torch.tensor([p for _, p in groups], dtype=torch.float64)
    assert float(probabilities.sum()) == pytest.approx(1)
    weights = dgrad.weights(name, LOSSES[candidates], P.log()[candidates], **hyperparameters)
    assert weights.shape == candidates.shape
    return torch.einsum("g,kg,kgv->v", probabilities, weights, SCORES[candidates])


def independent(count: int) -> list[tuple[tuple[int, ...], float]]:
    return [(group, math.prod(P[list(group)].tolist())) for group in itertools.product(range(4), repeat=count)]


def without_replacement(count: int) -> list[tuple[tuple[int, ...], float]]:
    groups = []
    for group in itertools.permutations(range(4), count):
        p, left = 1.0, 1.0
        for value in group:
            p, left = p * float(P[value]) / left, left - float(P[value])
        groups.append((group, p))
    return groups


def explicit_and_one() -> list[tuple[tuple[int, ...], float]]:
    """Values 2 and 0 explicit, one of the others drawn."""
    return [((2, 0, value), float(P[value] / (P[1] + P[3]))) for value in (1, 3)]


@pytest.mark.parametrize(
    ("name", "groups", "hyperparameters"),
    [
        ("reinforce", independent(1), {}),
        ("reinforce", independent(2), {"baseline": 0.7}),
        ("rloo", independent(2), {}),
        ("rloo", independent(3), {}),
        ("unordered-set", without_replacement(2), {}),
        ("unordered-set", without_replacement(3), {}),
        ("sum-and-sample", explicit_and_one(), {}),
    ],
)
def test_unbiased_by_enumeration(
    name: str, groups: list[tuple[tuple[int, ...], float]], hyperparameters: dict[str, object]
) -> None:
    truth = P * (LOSSES - P @ LOSSES)
    torch.testing.assert_close(mean_gradient(groups, name, **hyperparameters), truth)


def test_direct_rb_is_its_closed_form_where_the_group_is_the_policy() -> None:
    """Of values with probabilities 1/2, 1/4, 1/4 as often as that: `[p - softmax(log p - eps f)] / eps`."""
    p, losses = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([1.0, -1.0, 2.0])
    group = torch.tensor([0, 0, 1, 2])
    for epsilon in (0.05, 1.0):
        weights = dgrad.weights("direct-rb", losses[group], epsilon=epsilon)
        gradient = weights @ (torch.eye(3) - p)[group]
        torch.testing.assert_close(
            gradient, (p - (p.log() - epsilon * losses).softmax(0)) / epsilon, rtol=1e-4, atol=1e-5
        )


def test_direct_rb_becomes_leave_one_out_as_epsilon_falls() -> None:
    losses = torch.tensor([1.0, -1.0, 2.0, 0.0], dtype=torch.float64)
    small = dgrad.weights("direct-rb", losses, epsilon=1e-6)
    torch.testing.assert_close(small, dgrad.weights("rloo", losses) * 3 / 4, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "hyperparameters"), [("rloo", {"samples": 3}), ("unordered-set", {"samples": 3}), ("sum-and-sample", {})]
)
def test_the_weights_are_those_of_the_estimator(name: str, hyperparameters: dict[str, object]) -> None:
    layer = dgrad.latent("1x5")
    logits = torch.randn(6, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    draw = dgrad.estimator(name, **hyperparameters).draw(layer, logits)
    losses = draw.codes[..., 0, :] @ torch.tensor([1.0, 3.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    (expected,) = torch.autograd.grad(draw.estimate(losses).loss.sum(), logits)
    log_probs = layer.log_prob(logits, draw.codes)
    weights = dgrad.weights(name, losses, log_probs.detach())
    (gradient,) = torch.autograd.grad((weights * log_probs).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_groups_of_any_shape_and_losses_of_any_number() -> None:
    losses = torch.arange(24).view(4, 2, 3)
    log_probs = torch.rand(4, 2, 3).log_softmax(0)
    for name in ("reinforce", "rloo", "direct-rb", "unordered-set", "sum-and-sample"):
        weights = dgrad.weights(name, losses, log_probs)
        assert (weights.shape, weights.dtype) == (losses.shape, torch.float32)
        torch.testing.assert_close(weights[:, 1, 2], dgrad.weights(name, losses[:, 1, 2], log_probs[:, 1, 2]))


@pytest.mark.parametrize(
    ("name", "losses", "hyperparameters", "message"),
    [
        ("rlo", torch.zeros(3), {}, "unknown weights 'rlo'; did you mean 'rloo'"),
        ("rloo", torch.zeros(3), {"epsilon": 1}, "unknown hyper-parameter of rloo 'epsilon'"),
        (
            "rloo",
            torch.zeros(1, 5),
            {},
            r"losses of shape \[1, 5\]; expected at least 2 candidates along the first axis",
        ),
        ("unordered-set", torch.zeros(17), {}, "expected 2 to 16 candidates"),
        ("unordered-set", torch.zeros(3), {}, "no log_probs; unordered-set expects the log-probability of each"),
        ("rloo", [1.0, 2.0], {}, "losses of type list; expected a tensor"),
        ("direct-rb", torch.zeros(3), {"epsilon": 0}, "epsilon must be above 0; got 0: rloo is the formula at 0"),
    ],
)
def test_what_cannot_be_weighted_is_refused(
    name: str, losses: Any, hyperparameters: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who run no type checker
    with pytest.raises(dgrad.InputError, match=message):
        dgrad.weights(name, losses, **hyperparameters)
