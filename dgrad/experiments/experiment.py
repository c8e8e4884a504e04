"""Several trainings that belong together: which they are, what is left to do of them, what came of them. May import all of the core.

Each is an ordinary run in a directory of its own. What is finished is not trained again, and what is half finished goes on.
`dgrad compare` trains them one after the other in its own process, `dgrad sweep` in processes or Slurm jobs (`dgrad.experiments.launchers`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgrad.config import TrainConfig, option
from dgrad.data import Dataset
from dgrad.errors import InputError
from dgrad.pictures.of_a_run import RUN_PICTURES
from dgrad.training.build import build_dataset, build_model, find_dataset
from dgrad.training.listener import Listener
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer, resume


@dataclass(frozen=True)
class Experiment:
    """One of several trainings.

    Attributes:
        label: what tells it from the others, but for the seed.
        config: everything about the run.
        path: its directory.
        limitation: why the estimator cannot work with the latent, or None.
    """

    label: str
    config: TrainConfig
    path: Path
    limitation: str | None

    @property
    def name(self) -> str:
        """The experiment for people."""
        return f"{self.label}, seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do, down to the pictures."""
        return Run(self.path).summary() is not None and all((self.path / name).is_file() for name in RUN_PICTURES)

    @property
    def state(self) -> str:
        """`left out` (see `limitation`), `finished`, `begun` or `to do`."""
        if self.limitation is not None:
            return "left out"
        if self.finished:
            return "finished"
        return "begun" if Run(self.path).checkpoint_file.is_file() else "to do"

    def open(self, listener: Listener | None = None) -> tuple[Trainer, Run]:
        """The trainer and its run: a new one, or the half-finished one at its last checkpoint.

        Raises:
            DgradError: the configuration cannot be, or the run's files are damaged.
        """
        if (self.path / "config.json").is_file():
            return resume(self.path, listener, device=self.config.device)
        trainer = Trainer(self.config, listener)
        return trainer, Run.create(self.path, trainer.config, first_save=trainer.save)

    def create(self) -> None:
        """Make the run directory, unless it is there, so that `dgrad train --resume` begins or continues it."""
        if not (self.path / "config.json").is_file():
            Run.create(self.path, self.config)


def check(experiments: Sequence[Experiment], *, read_data: bool = True) -> None:
    """Make sure, before any of them begins, that all can run: nothing is in their way, their data and models can be had.

    Without `read_data` no data is read or downloaded, nor is a model built, whose size depends on the data.

    Raises:
        InputError: one cannot; or no estimator works with its latent.
        RunError: the data could not be downloaded.
    """
    if all(experiment.limitation is not None for experiment in experiments):
        reasons = "; ".join(dict.fromkeys(str(experiment.limitation) for experiment in experiments))
        latents = ", ".join(dict.fromkeys(experiment.config.latent for experiment in experiments))
        raise InputError(f"none of the estimators works with latent {latents}: {reasons}")
    for experiment in experiments:
        _check_place(experiment)
    datasets: dict[Any, Dataset] = {}
    for config in {experiment.label: experiment.config for experiment in experiments}.values():
        if not read_data:
            find_dataset(config)
            continue
        source = (config.dataset, config.data_root, config.attributes)
        if source not in datasets:
            datasets[source] = build_dataset(config)
        build_model(config, datasets[source].image_shape)


def _check_place(experiment: Experiment) -> None:
    """Make sure that the run can be made, or is the one that is asked for."""
    path = experiment.path
    if not (path / "config.json").is_file():
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} holds files but no run; choose another --out, or move them away")
        Run.check_free(path)
        return
    asked, found = deciding(experiment.config), deciding(Run(path).config)
    differences = [
        f"{option(name)} {_shown(found[name])} where {_shown(asked[name])} is asked for"
        for name in asked
        if asked[name] != found[name]
    ]
    if differences:
        raise InputError(
            f"{path} is a run with {', '.join(differences)}; give the options it was begun with, or choose another --out"
        )


def deciding(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's figures, as JSON has them: all but the device."""
    settings: dict[str, Any] = json.loads(config.to_json())
    del settings["device"]
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    return (",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)) or "none"
