"""Schedules: values, text, and what is refused."""

from __future__ import annotations

import math
import pickle
import re

import pytest

from dgrad.core.schedules import Constant, Cosine, Exponential, Geometric, Linear, StableDecay, Warmup, schedule
from dgrad.errors import InputError


@pytest.mark.parametrize(
    "value",
    [
        Constant(0.5),
        Exponential(1, 1e-5, 1000, 0.1),
        Geometric(1, 0.02),
        Linear(1, 0),
        Cosine(0.024, 0),
        Geometric(1, 0.5, 200),
        StableDecay(1, 0.1, stable=0.6),
        StableDecay(1, 0.1, 200, stable=0.6),
        Warmup(0, 1, rise=0.3),
    ],
)
def test_text_and_pickle_round_trip(value: object) -> None:
    assert schedule(str(value)) == value
    assert pickle.loads(pickle.dumps(value)) == value


def test_exponential_moves_only_at_intervals_and_stops_at_its_minimum() -> None:
    anneal = Exponential(1.0, 1e-3, 500, 0.1)
    assert anneal(499) == 1.0
    assert anneal(500) == anneal(999) == pytest.approx(math.exp(-0.5))
    assert anneal(10**7) == 0.1 == anneal.lowest


@pytest.mark.parametrize("kind", [Geometric, Linear, Cosine])
def test_whole_run_schedules_go_from_start_to_end(kind: type[Geometric]) -> None:
    bound = kind(1.0, 0.1).over(100)
    values = [bound(step) for step in range(101)]
    assert values[0] == 1.0
    assert values[-1] == pytest.approx(0.1) == bound(1000)
    assert values == sorted(values, reverse=True)
    assert bound.over(7) == bound, "a length once set stays"


def test_stable_decay_stays_and_then_falls_by_equal_factors() -> None:
    epsilon = schedule("stable-decay:1:0.01:0.6").over(100)
    assert [epsilon(step) for step in (0, 30, 60, 80, 100, 101)] == pytest.approx([1, 1, 1, 0.1, 0.01, 0.01])
    assert epsilon.lowest == 0.01


def test_warmup_rises_and_then_stays() -> None:
    weight = schedule("warmup:0.1:1:0.3").over(100)
    assert [weight(step) for step in (0, 15, 30, 99)] == pytest.approx([0.1, 0.55, 1, 1])


def test_a_whole_run_schedule_without_a_length_says_so() -> None:
    with pytest.raises(InputError, match="set_run_length"):
        Geometric(1, 0.1)(3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "a finite number or a schedule"),
        ("nan", "a finite number"),
        ("inf", "a finite number"),
        ("geometric:1", "geometric:START:END[:STEPS]"),
        ("geometric:1:0", "between positive values"),
        ("geometrik:1:2", "did you mean 'geometric'"),
        ("linear:1:2:3:4", "linear:START:END[:STEPS]"),
        ("exponential:1:-1:5", "rate >= 0"),
        ("exponential:1:0.1:0", "interval >= 1"),
        ("cosine:a:b", "cosine:START:END[:STEPS]"),
        ("linear:1:0:0", "at least 1"),
        ("stable-decay:1:0.1", "stable-decay:START:END:STABLE[:STEPS]"),
        ("stable-decay:1:0.1:1", "at least 0 and below 1"),
        ("stable-decay:1:0:0.5", "between positive values"),
        ("warmup:0:1:0", "above 0, at most 1"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        schedule(text)
