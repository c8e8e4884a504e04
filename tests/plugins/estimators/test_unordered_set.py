"""The unordered set: its weights, and its variance beside leave-one-out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers import variance_of

import dgrad
from dgrad.core.weights import set_weights
from dgrad.testing import small_logits, small_objectives


def test_the_weights_of_a_set_are_those_of_all_its_orders() -> None:
    """Against the sum over permutations, in the plainest form."""
    p = torch.tensor([0.3, 0.05, 0.2, 0.1], dtype=torch.float64)

    def probability(order: tuple[int, ...], gone: float) -> float:
        result = 1.0
        for s in order:
            result *= float(p[s]) / (1 - gone)
            gone += float(p[s])
        return result

    def of_set(codes: set[int], without: set[int]) -> float:
        gone = sum(float(p[s]) for s in without)
        return sum(probability(order, gone) for order in itertools.permutations(codes - without))

    everything = set(range(4))
    weights, pairs = set_weights(p.log().unsqueeze(-1))
    for s in range(4):
        first = of_set(everything, {s}) / of_set(everything, set())
        assert float(weights[s, 0]) == pytest.approx(float(p[s]) * first)
        for other in range(4):
            second = 1.0 if s == other else of_set(everything, {s, other}) / of_set(everything, {s})
            assert float(pairs[s, other, 0]) == pytest.approx(float(p[other]) * second)


@pytest.mark.parametrize("m", [2, 5, 8])
def test_the_weights_of_a_set_stay_an_average_at_extremes(m: int) -> None:
    """One code with all the probability, all with next to none: weights and baselines still sum to 1."""
    for log_p in (
        torch.cat([torch.zeros(1), torch.full((m - 1,), -2e4)]),
        torch.cat([torch.full((1,), -1e-17), -40 - torch.arange(m - 1.0)]),
        torch.full((m,), -46.0),
        torch.full((m,), -2e4),
        torch.full((m,), -math.log(m)),
    ):
        weights, pairs = set_weights(log_p.double().unsqueeze(-1))
        torch.testing.assert_close(weights.sum(0), torch.ones(1, dtype=torch.float64))
        torch.testing.assert_close(pairs.sum(1), torch.ones(m, 1, dtype=torch.float64))


def test_at_equal_evaluations_without_replacement_beats_leave_one_out() -> None:
    layer = dgrad.latent("2x4")
    logits, loss = small_logits(layer), small_objectives(layer)["cross-entropy"]
    rloo, unordered = (
        variance_of(dgrad.estimator(name, samples=4), layer, logits, loss, 20_000) for name in ("rloo", "unordered-set")
    )
    assert unordered < 0.9 * rloo
