"""What a run gets for settings that nobody gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import run_with_output

import dgrad
from dgrad.config import configure
from dgrad.experiments.comparison import plan
from dgrad.experiments.variants import Variant
from dgrad.hyperparameters import RunDefaults, run_defaults_of
from dgrad.training.build import Build
from dgrad.training.cost import step_cost
from dgrad.training.listener import Progress, RunFacts
from dgrad_cli.display import Watcher


def _chosen(**settings: Any) -> dict[str, str | int]:
    build = Build(configure(settings))
    resolved = build.settings
    assert Build(resolved).settings == resolved, "what is chosen is given from then on"
    assert Build(resolved).choices == []
    return {choice.name: choice.value for choice in build.choices}


EPSILON = "stable-decay:1:0.1:0.3"


CONV = {"lr": "cosine:0.003:0"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"kl": "inside", "set.epsilon": EPSILON, "lr": "cosine:0.06:0"}),
        ({"kl": "outside"}, {"lr": "cosine:0.01:0"}),
        ({"set": {"epsilon": "1"}, "lr": "0.1"}, {"kl": "inside"}),
        ({"labels": 10, "latent": "1x10"}, {"kl": "inside", "lr": "cosine:0.01:0"}),
        ({"estimator": "rloo"}, {"kl": "outside", "lr": "cosine:0.01:0"}),
        ({"model": "conv", "estimator": "gumbel-softmax"}, {"kl": "outside", "gaussian": 0, **CONV}),
        (
            {"model": "conv"},
            {"kl": "inside", "set.epsilon": EPSILON, "gaussian": 0, "set.sweep_share": "0.05", **CONV},
        ),
        ({"model": "conv", "latent": "8x4", "gaussian": 3, "kl": "outside"}, {"set.sweep_share": "0.375", **CONV}),
        ({"model": "conv", "latent": "1x40", "kl": "outside"}, {"gaussian": 0, **CONV}),
        ({"model": "conv", "latent": "8x2", "kl": "outside", "labels": 9}, CONV),
        ({"model": "mlp", "estimator": "rloo", "lr": "1"}, {"kl": "outside"}),
        (
            {"model": "mixture", "estimator": "rloo", "latent": "1x10"},
            {"kl": "outside", "lr": "cosine:0.003:0", "kl_weight": "stable-decay:0.1:1:0.3"},
        ),
        ({"model": "mixture", "estimator": "rloo", "latent": "1x10", "kl_weight": "1", "lr": "1"}, {"kl": "outside"}),
    ],
    ids=str,
)
def test_choices(settings: dict[str, Any], expected: dict[str, str | int]) -> None:
    assert _chosen(**settings) == expected


def test_the_share_of_a_sweep_keeps_to_the_budget_of_the_model() -> None:
    for latent in ("20x10", "8x4", "30x2", "5x3"):
        build = Build(configure({"model": "conv", "latent": latent}))
        assert build.estimator.traits.evaluations(build.layer) <= 11


def test_a_comparison_has_one_rate_for_all(tmp_path: Path) -> None:
    variants = [Variant(name) for name in ("direct", "rloo")]
    entries = plan(configure({"kl": "inside"}), variants, 1, tmp_path)
    assert {entry.config.lr for entry in entries} == {"cosine:0.01:0"}


def test_a_model_of_a_plugin_names_its_rate_and_an_estimator_does_not_inherit_one() -> None:
    @dgrad.run_defaults(lr="0.5", why="mine")
    class Mine:
        pass

    class Child(Mine):
        pass

    assert run_defaults_of(Mine) == RunDefaults(lr="0.5", why="mine")
    assert run_defaults_of(Child) == RunDefaults()


# What a step costs


def _cost(**settings: Any) -> tuple[int, tuple[str, ...]]:
    build = Build(configure(settings))
    cost = step_cost(build.model, build.estimator)
    return cost.evaluations, cost.cheaper


def test_what_a_step_costs_and_what_is_cheaper() -> None:
    assert _cost() == (1, ()), "the sweep of a linear decoder is a difference of columns"
    assert _cost(model="mlp", latent="1x40") == (1, ()), "all images share the codes"
    assert _cost(model="mlp", latent="20x10") == (
        181,
        ("--set sweep-share=0.25 (46)", "--estimator leg --set sweep=surrogate (2)", "--estimator gumbel-softmax (1)"),
    )
    assert _cost(model="mlp", estimator="gumbel-softmax") == (1, ())
    surrogate, relaxed = "--estimator leg --set sweep=surrogate (2)", "--estimator gumbel-softmax (1)"
    assert _cost(model="conv", latent="20x10") == (10, (surrogate, relaxed))
    build = Build(configure({"model": "conv"}))
    with_labels = step_cost(build.model, build.estimator, labels=True)
    assert with_labels.cheaper[-2:] == (relaxed, "--estimator rloo (4)"), "labels refuse a surrogate"


@pytest.mark.parametrize(("seconds", "said"), [(1.5, True), (0.01, False)], ids=["long", "short"])
def test_a_long_run_says_once_what_it_will_take(seconds: float, said: bool, capsys: pytest.CaptureFixture[str]) -> None:
    facts = RunFacts(configure({}), 500, 10, 0, "nats", "cpu", 1, ("--lr 1 (mine)",), 181, ("--estimator rloo (2)",))
    watcher = Watcher(quiet=False, to_stderr=False)
    watcher.started(Progress(facts, 0, 0.0))
    for step in range(1, 500):
        watcher.stepped(Progress(facts, step, 30.0 + seconds * step))
    out = capsys.readouterr().out
    assert "chosen: --lr 1 (mine)\n" in out
    line = (
        "a step takes 1.5 s, 181 evaluations of the decoder for an image: about 12 min 27 s for 498 steps, "
        "without evaluations of the bound; cheaper: --estimator rloo (2)\n"
    )
    assert (out.count(line) == 1) == said
    assert ("a step takes" in out) == said


def test_training_begins_with_what_was_chosen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("--latent", "2x3", "--steps", 2, "--eval-samples", 1, "--device", "cpu", "--out", tmp_path / "run")
    status, out, _ = run_with_output(capsys, "train", *arguments)
    assert status == 0
    assert f"chosen: --kl inside (direct), --set epsilon={EPSILON} (direct), --lr cosine:0.06:0 (direct)" in out
