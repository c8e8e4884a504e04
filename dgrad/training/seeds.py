"""Several seeds of one configuration, trained at once. May import all of the core.

A small model leaves most of a GPU idle: several of them trained in step, their steps recorded as branches of one CUDA graph, take
little longer than one. Each seed stays an ordinary run, in a directory of its own, with the figures that it would have alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgrad.config import TrainConfig, configure
from dgrad.errors import InputError, RunError
from dgrad.files.atomic import made_whole, write_text
from dgrad.training.cuda_graph import CapturedSteps
from dgrad.training.listener import Listener
from dgrad.training.run_directory import SEEDS_FILE, Run
from dgrad.training.trainer import Interrupted, Trainer, record, resume, step_together


class Lockstep:
    """Trainers of one configuration that make their steps together; one that is behind the others catches up first."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.running = list(trainers)
        self._captured: CapturedSteps | None = None

    def step(self) -> list[Trainer]:
        """One step of each trainer that has made the fewest, on CUDA as one graph where all of them have; those that made it."""
        least = min(trainer.step for trainer in self.running)
        behind = [trainer for trainer in self.running if trainer.step == least]
        replay = self._recorded() if len(behind) == len(self.running) else None
        step_together(behind, replay)
        return behind

    def _recorded(self) -> Callable[[], None] | None:
        if self._captured is None and all(trainer.captures for trainer in self.running):
            self._captured = record(self.running)
        return None if self._captured is None else self._captured.replay

    def leave_out(self, trainer: Trainer) -> None:
        """Go on without a trainer; the others are recorded anew."""
        self.running.remove(trainer)
        self._captured = None


class Seeds:
    """The runs of one configuration with several seeds, in one directory.

    seeds.json      which seeds there are
    seed0, seed1    the run of each: an ordinary run directory
    summary.json    the figures of the finished runs side by side

    All are made, or read back, before anything is trained; the images are on the device once, unless their pixels depend on the seed.
    """

    def __init__(self, path: Path, trainers: Sequence[Trainer]) -> None:
        self.path = path
        self.trainers = list(trainers)
        self.runs = {trainer: Run(run_path(path, trainer.config.seed)) for trainer in trainers}
        self._stop = False

    @classmethod
    def create(
        cls, path: Path, config: TrainConfig, count: int, listener: Listener | None = None, *, overwrite: bool = False
    ) -> Seeds:
        """New runs with the seeds `config.seed`, `config.seed + 1` and so on, their directory there whole or not at all.

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
        trainers = [first, *(Trainer(each, data=first.data) for each in configs[1:])]
        with made_whole(path) as staging:
            for trainer in trainers:
                Run.create(run_path(staging, trainer.config.seed), trainer.config, first_save=trainer.save)
            write_text(staging / SEEDS_FILE, json.dumps({"seeds": [each.config.seed for each in trainers]}) + "\n")
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
        for each in paths[1:]:
            if replace(Run.open(each).config, seed=0) != common:
                raise InputError(
                    f"{each} differs from {paths[0]} in more than its seed; continue each with --resume RUN"
                )
        first, _ = resume(paths[0], listener, **changes)
        others = [resume(each, data=first.data, **changes)[0] for each in paths[1:]]
        return cls(path, [first, *others])

    def train(self) -> dict[str, Any]:
        """Train all to the end and return the summary, which is also written; a seed that fails is left behind, and named in it.

        The seconds in the figures of each run are those of all together.

        Raises:
            Interrupted: `stop` was called; the runs can be resumed.
        """
        problems: dict[int, str] = {}
        for trainer, run in self.runs.items():
            try:
                trainer.begin(run)
            except Interrupted:
                raise Interrupted(
                    f"stopped in the pretraining, which will begin anew; continue with: dgrad train --resume {self.path}"
                ) from None
        lockstep = Lockstep([trainer for trainer in self.trainers if not trainer.done])
        while lockstep.running:
            for trainer in lockstep.step():
                try:
                    trainer.after_step(self.runs[trainer])
                except RunError as error:
                    problems[trainer.config.seed] = str(error)
                    lockstep.leave_out(trainer)
                else:
                    if trainer.done:
                        lockstep.leave_out(trainer)
            if self._stop and lockstep.running:
                self._interrupt(lockstep.running)
        for trainer, run in self.runs.items():
            if trainer.config.seed not in problems:
                trainer.end(run)
        summary = summarize(self.path, problems)
        write_text(self.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        return summary

    def stop(self) -> None:
        """Ask the runs to save their state and stop after the current step; safe to call from a signal handler."""
        self._stop = True
        for trainer in self.trainers:
            trainer.stop()

    def _interrupt(self, running: list[Trainer]) -> None:
        for trainer in running:
            trainer.save(self.runs[trainer])
        steps = f"step {min(trainer.step for trainer in running)} of {running[0].total_steps}"
        raise Interrupted(
            f"stopped at {steps}, state of all seeds saved; continue with: dgrad train --resume {self.path}"
        )


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

    `test_bound` has the mean, the standard deviation (None with one seed), the least and the greatest over the seeds whose bound is finite;
    it is None where there is none.
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
