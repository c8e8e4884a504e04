"""A run's pictures: what was not drawn at its end is drawn later, from its weights alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dgrad.config import configure
from dgrad.experiments.experiment import Experiment
from dgrad.pictures.of_a_run import RUN_PICTURES, draw_missing_of, draw_missing_pictures, save_run_pictures
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer
from dgrad_cli.main import main


@pytest.mark.parametrize("missing", [RUN_PICTURES, RUN_PICTURES[:1]])
def test_missing_pictures_are_those_that_training_draws(tmp_path: Path, missing: tuple[str, ...]) -> None:
    settings = {
        "latent": "3x4",
        "estimator": "rloo",
        "model": "mlp",
        "hidden": "8",
        "epochs": 3,
        "lr": "linear:0.001:3",
    }
    trainer = Trainer(configure({**settings, "device": "cpu"}))
    run = Run.create(tmp_path / "run", trainer.config)
    summary = trainer.train(run)
    assert summary["best"]["step"] < summary["final"]["step"], "the best weights should not be the last"
    save_run_pictures(run, trainer.model, trainer.data.test)
    drawn = {path.name: path.read_bytes() for path in run.path.iterdir()}
    assert set(RUN_PICTURES) <= set(drawn)
    for name in missing:
        (run.path / name).unlink()
    draw_missing_pictures(run)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == drawn


def _compare() -> int:
    options = "--estimators rloo --seeds 1 --latent 3x4 --epochs 1 --device cpu --quiet --out out"
    with pytest.raises(SystemExit, match=r"^\d+$") as exit_:
        main(["compare", *options.split()])
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_pictures_is_finished(
    train: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _compare() == 0
    path = Path("out/rloo-seed0")
    before = json.loads((path / "summary.json").read_text())
    for name in RUN_PICTURES:
        (path / name).unlink()

    def refuse(*_: object) -> None:
        raise AssertionError("it is trained again")

    monkeypatch.setattr(Trainer, "train", refuse)
    monkeypatch.setattr(Trainer, "train_step", refuse)
    assert _compare() == 0
    assert all((path / name).is_file() for name in RUN_PICTURES)
    assert json.loads((path / "summary.json").read_text()) == before


@pytest.mark.slow
def test_a_run_that_gets_no_pictures_stops_no_other(train: Callable[..., Run], tmp_path: Path) -> None:
    runs = [train(name) for name in ("one", "other")]
    runs[0].checkpoint_file.unlink()
    told: list[str] = []
    draw_missing_of([Experiment(run.path.name, run.config, run.path, None) for run in runs], told.append)
    (text,) = told
    assert text.startswith(f"{runs[0].path} gets no pictures: cannot read checkpoint")
    assert all((runs[1].path / name).is_file() for name in RUN_PICTURES)
