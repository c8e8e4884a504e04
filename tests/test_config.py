"""The configuration: text, TOML, JSON, and what is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from dgrad.config import (
    BINARIZATIONS,
    OptimisationSettings,
    TrainConfig,
    configure,
    panel_of,
    read_config,
    read_toml,
)
from dgrad.data import BINARIZATIONS as DATA_BINARIZATIONS
from dgrad.errors import InputError


def test_the_config_round_trips_through_json(tmp_path: Path) -> None:
    config = configure(
        {
            "hidden": "40,20",
            "set": {"epsilon": 0.5},
            "steps": 7,
            "lr": "cosine:0.01:0",
            "plugin": ["a.py"],
            "kl": "inside",
        }
    )
    (tmp_path / "config.json").write_text(config.to_json())
    assert read_config(tmp_path / "config.json") == config


def test_toml_and_options_share_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'batch-size = 50\nlr = 0.01\nhidden = [30, 20]\nlatent = "4x4"\n[set]\nepsilon = "geometric:1:0.1"\n'
    )
    config = configure(read_toml(tmp_path / "a.toml"))
    assert (config.batch_size, config.lr, config.hidden, config.set) == (
        50,
        "0.01",
        (30, 20),
        {"epsilon": "geometric:1:0.1"},
    )


def test_the_two_lists_of_binarisations_agree() -> None:
    assert set(BINARIZATIONS) == set(DATA_BINARIZATIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batchsize": 5}, "unknown setting 'batchsize'; did you mean 'batch-size'"),
        ({"epochs": 0}, "--epochs must be a whole number of at least 1; got 0"),
        ({"epochs": "ten"}, "--epochs must be a whole number; got 'ten'"),
        ({"epochs": 1.5}, "--epochs must be a whole number; got 1.5"),
        ({"steps": -1}, "--steps must be"),
        ({"batch-size": 0}, "--batch-size must be"),
        ({"lr": "nan"}, "--lr: cannot read 'nan'"),
        ({"lr": "0"}, "--lr must be a positive number"),
        ({"lr": "-1"}, "--lr must be"),
        ({"lr": "cosin:1:0"}, "did you mean 'cosine'"),
        ({"input-dropout": 1}, "--input-dropout must be a share"),
        ({"kl": "beside"}, "--kl must be one of outside, inside"),
        ({"kl-weight": -1}, "--kl-weight must be"),
        ({"kl-weight": "nan"}, "--kl-weight: cannot read 'nan'"),
        ({"kl-weight": "linear:1:-1"}, "--kl-weight must be a number of at least 0 or a schedule"),
        ({"labels": -1}, "--labels must be a whole number of at least 0"),
        ({"labelled-batch": 0}, "--labelled-batch must be"),
        ({"sweep-precision": "float16"}, "--sweep-precision must be one of float32, bfloat16; got float16"),
        ({"choose-by": "loss"}, "--choose-by must be one of bound, reconstruction, accuracy; got loss"),
        ({"choose-by": "accuracy"}, "--choose-by must be bound or reconstruction, or given with --labels"),
        ({"label-loss": "hinge"}, "--label-loss must be one of cross-entropy, code"),
        ({"label-weight": "inf"}, "--label-weight must be a finite number"),
        ({"balance-weight": -1}, "--balance-weight must be"),
        ({"adversarial-weight": -1, "labels": 10}, "--adversarial-weight must be a finite number of at least 0"),
        ({"adversarial-weight": 1}, "--adversarial-weight must be given with --labels"),
        ({"adversarial-radius": 0}, "--adversarial-radius must be a finite number above 0"),
        ({"augment": "yes"}, "--augment must be true or false"),
        ({"augment": True}, "--augment must be given with --labels"),
        ({"binarize": "sometimes"}, "--binarize must be one of"),
        ({"hidden": "40,wide"}, "--hidden must be a list such as 400,200"),
        ({"hidden": "0"}, "--hidden must be widths"),
        ({"seed": -1}, "--seed must be"),
        ({"set": "epsilon"}, "--set must be a table"),
        ({"latent": ["20x10"]}, "--latent must be a text"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configure(settings)


@pytest.mark.parametrize(("text", "message"), [("batch-size = ", "is not TOML"), ("\x00", "is not TOML")])
def test_a_damaged_toml_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize("text", ["", "{", "[1]", json.dumps({"epochs": "x"}), json.dumps({"epoch": 1})])
def test_a_damaged_config_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(path)


def test_defaults_are_valid() -> None:
    assert TrainConfig() == configure({})


def test_a_group_stands_for_itself_and_checks_its_own() -> None:
    assert isinstance(TrainConfig(lr="0.1"), OptimisationSettings)
    assert OptimisationSettings(lr="0.1").lr == "0.1"
    with pytest.raises(InputError, match="--lr must be a positive number"):
        OptimisationSettings(lr="0")


def test_a_setting_belongs_to_one_group() -> None:
    groups = TrainConfig.__bases__
    named = [item.name for group in reversed(groups) for item in fields(group)]
    assert named == [item.name for item in fields(TrainConfig)]
    assert len(set(named)) == len(named)
    assert {panel_of(name) for name in named} == {group.panel for group in groups}


def test_a_table_of_hyperparameters_is_of_the_runs_estimator() -> None:
    assert configure({"set": {"direct": {"sweep-share": 0.5}, "epsilon": 1}}).set == {
        "sweep_share": "0.5",
        "epsilon": "1",
    }
    assert configure({"lr": 1}, TrainConfig(set={"epsilon": "2"})).set == {"epsilon": "2"}
    with pytest.raises(InputError, match="unknown estimator in --set 'rloo'; known: direct"):
        configure({"set": {"rloo.samples": 2}})
