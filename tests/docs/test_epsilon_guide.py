"""docs/guides/epsilon.md: its program, its table, and its advice."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import dgrad
from benchmarks.given_up_value import steps_until_revived
from dgrad.config import configure
from dgrad.errors import InputError
from dgrad.training.figures import collapse_warning
from dgrad.training.trainer import Trainer
from dgrad.vae.usage import CodeUsage, code_usage

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "guides" / "epsilon.md").read_text(encoding="utf-8")


def test_steps_until_a_value_comes_back_are_those_of_the_guide() -> None:
    rows = dict(re.findall(r"^\| `direct-rb`, epsilon (\S+) \| (\d+) \|$", GUIDE, re.M))
    assert sorted(rows) == ["0.8", "0.9", "1"]
    for epsilon in ("0.9", "1"):
        estimator = dgrad.estimator("direct-rb", epsilon=float(epsilon))
        assert steps_until_revived(estimator) == int(rows[epsilon])


def test_the_exact_gradient_does_not_bring_it_back() -> None:
    assert steps_until_revived(dgrad.estimator("exact"), 5) is None


@pytest.mark.slow
def test_what_the_warning_says_to_try_helps() -> None:
    common = {"latent": "1x40", "epochs": 10, "device": "cpu", "compile": "off"}
    first = _usage({**common, "estimator": "direct", "set": {"epsilon": "0.1"}, "lr": "cosine:0.01:0"})
    told = collapse_warning(first.to_json(), configure(common))
    assert told is not None
    estimator, rate = told.partition("try ")[2].split(", ")[:2]
    words = estimator.split()
    assert words[::2] == ["--estimator", "--kl", "--set"]
    name, value = words[5].split("=")
    changes = {"estimator": words[1], "kl": words[3], "set": {name: value}, "lr": rate.split()[-1]}
    second = _usage({**common, **changes})
    assert second.collapsed is None
    assert second.distinct_codes > 2 * first.distinct_codes


def _usage(settings: dict[str, Any]) -> CodeUsage:
    trainer = Trainer(configure(settings))
    while not trainer.training_step.done:
        trainer.train_step()
    return code_usage(trainer.model, trainer.data.test, generator=None)


def test_a_run_that_has_these_settings_hears_of_others() -> None:
    code = {"collapsed": "3 distinct codes for 320 images"}
    told = collapse_warning(code, configure({"estimator": "direct-rb", "kl": "inside"}))
    assert told is not None
    assert "--estimator" not in told
    deep = collapse_warning(code, configure({"model": "mlp", "lr": "cosine:0.01:0"}))
    assert deep is not None
    assert "a lower learning rate" in deep
    assert "cosine:0.1:0" not in deep, "a high rate makes a deep decoder ignore its code"
    assert collapse_warning({"collapsed": None}, configure({})) is None
    assert collapse_warning(None, configure({})) is None


def test_the_schedules_of_the_guide_can_be_read() -> None:
    for text in {*re.findall(r"(?:stable-decay|cosine|geometric)(?::[\d.]+)+", GUIDE)}:
        dgrad.schedule(text)
    with pytest.raises(InputError, match="STABLE"):
        dgrad.schedule("stable-decay:1:0.1")
