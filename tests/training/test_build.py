"""What a configuration builds: each part once, nothing that is not asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from dgrad import registry
from dgrad.config import configure
from dgrad.data import Dataset
from dgrad.training.build import Build
from dgrad.training.trainer import Trainer

SETTINGS = {"latent": "3x4", "estimator": "rloo", "device": "cpu"}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are built, in order."""
    made: list[str] = []
    build = registry.build

    def note(kind: str, *arguments: Any, **named: Any) -> object:
        made.append(kind)
        return build(kind, *arguments, **named)

    monkeypatch.setattr(registry, "build", note)
    monkeypatch.setattr(
        "dgrad.training.build.dataset_loader",
        lambda name, names: lambda root: made.append("dataset") or names[name](root),  # type: ignore[func-returns-value]
    )
    return made


def test_a_trainer_builds_each_part_once(calls: list[str]) -> None:
    Trainer(configure(SETTINGS))
    assert sorted(calls) == ["dataset", "estimators", "latents", "models"]


def test_settings_are_resolved_without_data_or_model(calls: list[str]) -> None:
    build = Build(configure({**SETTINGS, "data-root": "here"}))
    assert (build.settings.kl, build.why_unsupported) == ("outside", None)
    assert build.settings.data_root == str(Path("here").resolve())
    assert set(calls) == {"estimators", "latents"}
    assert Build(build.settings).settings == build.settings


def test_an_impossible_pair_says_why_and_still_has_a_model() -> None:
    build = Build(configure({**SETTINGS, "estimator": "arm"}))
    assert "binary" in str(build.why_unsupported)
    assert build.model.layer is build.layer
    with pytest.raises(dgrad.InputError, match="binary"):
        Trainer(build.settings)


def test_the_seed_decides_the_weights_and_the_global_generator_stays() -> None:
    before = torch.get_rng_state()
    one, same, other = (Build(configure({**SETTINGS, "seed": seed})).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_data_set_in_memory_is_not_read_again(calls: list[str]) -> None:
    dataset: Dataset = Build(configure(SETTINGS)).dataset
    build = Build(configure({**SETTINGS, "binarize": "dynamic"}), dataset)
    assert build.dataset is dataset
    assert set(build.evaluation_data.test.images.unique().tolist()) == {0, 255}
    assert calls.count("dataset") == 1
