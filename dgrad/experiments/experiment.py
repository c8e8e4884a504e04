"""Several trainings that belong together: which they are, and what is left to do of them.

Each is an ordinary run in a directory of its own. A finished run is not trained again, and a half-finished run goes on.
`dgrad compare` trains them one after the other in its own process. `dgrad sweep` trains them in processes or Slurm jobs
(`dgrad.experiments.launchers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgrad.config import TrainConfig, option
from dgrad.data import Dataset
from dgrad.errors import InputError
from dgrad.training.build import Build
from dgrad.training.figures import figure_settings
from dgrad.training.listener import Listener
from dgrad.training.run_directory import Run
from dgrad.training.trainer import Trainer, resume


@dataclass(frozen=True)
class Experiment:
    """One of several trainings.

    Attributes:
        label: the settings that tell it from the others, without the seed.
        config: the resolved configuration.
        why_unsupported: why the estimator cannot work with the latent, or None.
    """

    label: str
    config: TrainConfig
    path: Path
    why_unsupported: str | None

    @property
    def name(self) -> str:
        """The experiment for people."""
        return f"{self.label}, seed {self.config.seed}"

    @property
    def finished(self) -> bool:
        """Whether the run has a summary."""
        return Run(self.path).summary() is not None

    @property
    def state(self) -> str:
        """`left out` (see `why_unsupported`), `finished`, `begun` or `to do`."""
        if self.why_unsupported is not None:
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
    """Make sure, before any begins, that all can run: their paths are free, their data and models can be had.

    Without `read_data` no data is read or downloaded, nor is a model built, whose size depends on the data.

    Raises:
        InputError: one cannot; or no estimator works with its latent.
        RunError: the data could not be downloaded.
    """
    if all(experiment.why_unsupported is not None for experiment in experiments):
        reasons = "; ".join(dict.fromkeys(str(experiment.why_unsupported) for experiment in experiments))
        latents = ", ".join(dict.fromkeys(experiment.config.latent for experiment in experiments))
        raise InputError(f"none of the estimators works with latent {latents}: {reasons}")
    for experiment in experiments:
        _check_place(experiment)
    datasets: dict[Any, Dataset] = {}
    for config in {experiment.label: experiment.config for experiment in experiments}.values():
        source = (config.dataset, config.data_root, config.attributes)
        build = Build(config, datasets.get(source))
        if read_data:
            datasets[source] = build.dataset
            build.model  # noqa: B018
        else:
            build.find_dataset()


def _check_place(experiment: Experiment) -> None:
    """Make sure that the run can be made, or is the one that is asked for."""
    path = experiment.path
    if not (path / "config.json").is_file():
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} holds files but no run; choose another --out, or move them away")
        Run.check_free(path)
        return
    asked, found = figure_settings(experiment.config), figure_settings(Run(path).config)
    differences = [
        f"{option(name)} {value_text(found[name])} where {value_text(asked[name])} is asked for"
        for name in asked
        if asked[name] != found[name]
    ]
    if differences:
        raise InputError(
            f"{path} is a run with {', '.join(differences)}; "
            "give the options it was begun with, or choose another --out"
        )


def value_text(value: Any) -> str:
    """A setting's value as it is given.

    >>> value_text([400, 200]), value_text({"epsilon": "1"}), value_text([])
    ('400,200', 'epsilon=1', 'none')
    """
    if isinstance(value, dict):
        value = [f"{name}={text}" for name, text in value.items()]
    return (",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)) or "none"
