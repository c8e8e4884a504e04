"""Several seeds of one configuration, trained at once.

A small model leaves most of a GPU idle. Several of them, their steps recorded as branches of one CUDA graph, take
little longer than one. Each seed is an ordinary run in a directory of its own, with the figures that it would have
alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgrad.config import TrainConfig, configure
from dgrad.errors import InputError, RunError
from dgrad.files.atomic import atomic_directory, write_text
from dgrad.training.listener import Listener
from dgrad.training.run_directory import SEEDS_FILE, Run
from dgrad.training.trainer import Trainer, resume, train_together


class Seeds:
    """The runs of one configuration with several seeds, in one directory.

    seeds.json      which seeds there are
    seed0, seed1    the run of each: an ordinary run directory
    summary.json    the figures of the finished runs side by side

    All are made, or read back, before anything is trained. The images are on the device once, unless their pixels
    depend on the seed.
    """

    def __init__(self, path: Path, trainers: Sequence[Trainer]) -> None:
        self.path = path
        self.trainers = list(trainers)
        self.runs = {trainer: Run(run_path(path, trainer.config.seed)) for trainer in trainers}

    @classmethod
    def create(
        cls, path: Path, config: TrainConfig, count: int, listener: Listener | None = None, *, overwrite: bool = False
    ) -> Seeds:
        """New runs with the seeds `config.seed`, `config.seed + 1` and so on, all of them or none.

        Args:
            listener: to the first of them.

        Raises:
            InputError: something in the configuration cannot be, or `path` is not free.
            RunError: the data could not be had.
        """
        if count < 1:
            raise InputError(f"--seeds-in-parallel must be a whole number of at least 1; got {count}")
        Run.check_free(path, overwrite=overwrite)
        configs = [configure({"seed": config.seed + index}, config) for index in range(count)]
        first = Trainer(configs[0], listener)
        trainers = [first, *(Trainer(seed_config, data=first.data) for seed_config in configs[1:])]
        with atomic_directory(path) as staging:
            for trainer in trainers:
                Run.create(run_path(staging, trainer.config.seed), trainer.config, first_save=trainer.save)
            write_text(
                staging / SEEDS_FILE, json.dumps({"seeds": [trainer.config.seed for trainer in trainers]}) + "\n"
            )
        return cls(path, trainers)

    @classmethod
    def resume(cls, path: Path, listener: Listener | None = None, **changes: Any) -> Seeds:
        """The runs of an existing directory, each at its last checkpoint.

        Args:
            listener: to the first of them.
            changes: settings that may differ without changing the result, such as the device.

        Raises:
            InputError: files are missing or damaged, or the runs differ in more than the seed.
        """
        paths = [run_path(path, seed) for seed in read_seeds(path)]
        common = replace(Run.open(paths[0]).config, seed=0)
        for other in paths[1:]:
            if replace(Run.open(other).config, seed=0) != common:
                raise InputError(
                    f"{other} differs from {paths[0]} in more than its seed; continue each with --resume RUN"
                )
        first, _ = resume(paths[0], listener, **changes)
        others = [resume(other, data=first.data, **changes)[0] for other in paths[1:]]
        return cls(path, [first, *others])

    def train(self) -> dict[str, Any]:
        """Train all to the end and return the summary, which is also written. It names the seeds that failed.

        The seconds in the figures of each run are those of all together.

        Raises:
            Interrupted: `stop` was called; the runs can be resumed.
        """
        outcomes = train_together(self.runs, self.path)
        failed = {trainer.config.seed: str(error) for trainer, error in outcomes.items() if isinstance(error, RunError)}
        summary = summarize(self.path, failed)
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def stop(self) -> None:
        """Ask the runs to save their state and stop after the current step; safe to call from a signal handler."""
        for trainer in self.trainers:
            trainer.stop()


def run_path(path: Path, seed: int) -> Path:
    """Where the run of a seed is."""
    return path / f"seed{seed}"


def read_seeds(path: Path) -> list[int]:
    """The seeds of the runs in a directory.

    Raises:
        InputError: the directory is no such one, or damaged.
    """
    file = path / SEEDS_FILE
    try:
        seeds = [int(seed) for seed in json.loads(file.read_text(encoding="utf-8"))["seeds"]]
    except (OSError, ValueError, KeyError, TypeError):
        seeds = []
    if not seeds:
        raise InputError(f"{file} does not list seeds; continue each run with dgrad train --resume {path}/seed0")
    return seeds


def summarize(path: Path, problems: dict[int, str] | None = None) -> dict[str, Any]:
    """The figures of the finished runs in a directory, their test bound in the mean, and why others failed.

    `test_bound` has the mean, the standard deviation (None with one seed), the least and the greatest over the seeds
    whose bound is finite. It is None where no bound is.
    """
    found = {seed: Run(run_path(path, seed)).summary() for seed in read_seeds(path)}
    summaries = {
        seed: summary for seed, summary in found.items() if summary is not None and seed not in (problems or {})
    }
    bounds = [summary["test_bound"] for summary in summaries.values() if summary["test_bound"] is not None]
    return {
        "test_bound": {
            "mean": statistics.fmean(bounds),
            "standard_deviation": statistics.stdev(bounds) if len(bounds) > 1 else None,
            "least": min(bounds),
            "greatest": max(bounds),
        }
        if bounds
        else None,
        "seeds": {str(seed): summary for seed, summary in summaries.items()},
        "problems": {str(seed): problem for seed, problem in (problems or {}).items()},
    }
