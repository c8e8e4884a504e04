"""Training: the loop over steps, evaluations and checkpoints, of one run or of several at once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dgrad import registry
from dgrad.config import TrainConfig
from dgrad.devices import describe_device
from dgrad.errors import InputError, RunError
from dgrad.training.batches import TrainingData, training_batches
from dgrad.training.build import Build
from dgrad.training.checkpoint import Checkpoint
from dgrad.training.cost import step_cost
from dgrad.training.figures import Figures
from dgrad.training.listener import Listener, Progress, RunFacts
from dgrad.training.processes import ProcessGroup
from dgrad.training.run_directory import Run
from dgrad.training.step import Lockstep, TrainingStep


class Interrupted(RunError):
    """The run was asked to stop; its state is saved."""

    exit_code = 130


class Trainer:
    """The training of one run.

    Building a trainer loads the data and makes the networks but writes nothing: whatever is wrong with a configuration
    comes out before there is a run directory. With several processes (`group`, inside `group.joined`) each has its part
    of every batch and noise of its own. The first writes, calls the hooks and is listened to.

    Args:
        data: of a run that differs from this one in its seed at most, to share it; None to load it.

    Raises:
        InputError: something in the configuration cannot be.
        RunError: the data could not be had.
    """

    def __init__(
        self,
        config: TrainConfig,
        listener: Listener | None = None,
        group: ProcessGroup | None = None,
        data: TrainingData | None = None,
    ) -> None:
        self.group = group or ProcessGroup()
        build = Build(config, None if data is None else data.dataset)
        self.device = self.group.device(config.device)
        if build.why_unsupported is not None:
            raise InputError(build.why_unsupported)
        self.data = TrainingData(build, self.device) if data is None else data.with_seed_of(build)
        self.config = config = build.config
        self.model = build.model.to(self.device)
        self.estimator = build.estimator.to(self.device)
        self.batches = training_batches(config, self.data, build.layer, self.group)
        self.training_step = TrainingStep(config, self.model, self.estimator, self.batches, self.group)
        self.loss = self.training_step.loss
        self.figures = Figures(config, self.model, self.data.valid, self.data.test)
        self.checkpoint = Checkpoint(config, self.training_step, self.figures, self.group)
        self.listener = listener if listener is not None and self.group.is_first else Listener()
        step, unit, device = self.training_step, self.model.likelihood.unit, describe_device(self.device)
        cost = step_cost(self.model, self.estimator, labels=bool(config.labels))
        self.facts = RunFacts(
            config,
            step.total,
            self.batches.steps_per_epoch,
            step.labelled_images,
            unit,
            device,
            self.group.size,
            tuple(map(str, build.choices)),
            cost.evaluations,
            cost.cheaper,
        )
        self.seconds = 0.0
        self._alone = Lockstep([self.training_step])
        self._hook = registry.registry().manager.hook
        self.stop_asked = False
        self._started = 0.0

    @property
    def step(self) -> int:
        """How many steps are made."""
        return self.training_step.number

    def progress(self, pretrained: int = 0, metrics: dict[str, Any] | None = None) -> Progress:
        """How far the run is."""
        return Progress(self.facts, self.training_step.number, self.seconds, pretrained, metrics)

    def train_step(self) -> None:
        """One step on the next batch, and nothing else."""
        self._alone.advance()

    def train(self, run: Run) -> dict[str, Any]:
        """Make the remaining steps, evaluate on the test images, write all into the run directory; the summary.

        Raises:
            Interrupted: `stop` was called; the run can be resumed.
            RunError: the loss is not finite; the last good checkpoint stays.
        """
        outcome = train_together({self: run}, run.path)[self]
        if isinstance(outcome, RunError):
            raise outcome
        return outcome

    def stop(self) -> None:
        """Ask the run to save its state and stop after the current step; safe to call from a signal handler."""
        self.stop_asked = True

    def save(self, run: Run) -> None:
        """Write the checkpoint; several processes do so together, and go on when the first has written it."""
        self.checkpoint.save(run, self.seconds)

    def begin(self, run: Run, home: Path) -> None:
        """The first checkpoint, the clock, and the pretraining."""
        if not self.group.from_first(run.checkpoint_file.exists):
            self.save(run)
        if self.group.is_first:
            self._hook.dgrad_train_start(run=run.path, config=self.config)
        self.listener.started(self.progress())
        self._started = time.perf_counter() - self.seconds
        for made in self.training_step.pretrain(self.config.pretrain_steps):
            self.listener.pretrained(self.progress(pretrained=made))
            if self.stop_asked:
                again = f"continue with: {self.group.command} train --resume {home}"
                raise Interrupted(f"stopped in the pretraining, which will begin anew; {again}")

    def after_step(self, run: Run) -> None:
        """At the end of an epoch, or of several: an evaluation, and a checkpoint when it is due."""
        self.seconds = time.perf_counter() - self._started
        self.listener.stepped(self.progress())
        step = self.training_step
        if step.number % (self.config.eval_every * self.batches.steps_per_epoch) and not step.done:
            return
        metrics = self.figures.evaluate(step, self.seconds, run.path)
        self.seconds = self.group.from_first(lambda: time.perf_counter() - self._started)
        if self.group.is_first:
            run.append_metrics(metrics)
        if self.checkpoint.is_due(self.seconds) or step.done:
            self.save(run)
        if self.group.is_first:
            self._hook.dgrad_evaluation_end(run=run.path, metrics=metrics)
        self.listener.evaluated(self.progress(metrics=metrics))

    def end(self, run: Run) -> dict[str, Any]:
        """The summary, measured on the test images and written."""
        summary = self.figures.summarize(self.progress())
        if self.group.is_first:
            run.write_summary(summary)
            self._hook.dgrad_train_end(run=run.path, summary=summary)
        return summary


def train_together(runs: Mapping[Trainer, Run], home: Path) -> dict[Trainer, dict[str, Any] | RunError]:
    """Train runs of one configuration step by step together; the summary of each, or why it failed.

    Raises:
        Interrupted: a trainer was asked to stop; all can be resumed from `home`.
    """
    outcomes: dict[Trainer, dict[str, Any] | RunError] = {}
    for trainer, run in runs.items():
        trainer.begin(run, home)
    lockstep = Lockstep([trainer.training_step for trainer in runs if not trainer.training_step.done])
    trainers = {trainer.training_step: trainer for trainer in runs}
    while lockstep.running:
        for step in lockstep.advance():
            trainer = trainers[step]
            try:
                trainer.after_step(runs[trainer])
            except RunError as error:
                outcomes[trainer] = error
            if step.done or trainer in outcomes:
                lockstep.leave_out(step)
        running = [trainers[step] for step in lockstep.running]
        if any(trainer.group.any_after(trainer.step, trainer.stop_asked) for trainer in running):
            for trainer in running:
                trainer.save(runs[trainer])
            steps = f"step {min(trainer.step for trainer in running)} of {running[0].facts.steps}"
            saved = "state saved" if len(runs) == 1 else "state of all seeds saved"
            again = f"continue with: {running[0].group.command} train --resume {home}"
            raise Interrupted(f"stopped at {steps}, {saved}; {again}")
    return {trainer: outcomes.get(trainer) or trainer.end(run) for trainer, run in runs.items()}


def resume(
    path: Path,
    listener: Listener | None = None,
    group: ProcessGroup | None = None,
    data: TrainingData | None = None,
    **changes: Any,
) -> tuple[Trainer, Run]:
    """A trainer at the last checkpoint of a run. `changes` are settings that change no figure, such as the device.

    Raises:
        InputError: there is no such run, or its files are damaged.
    """
    run = Run.open(path)
    trainer = Trainer(replace(run.config, **changes), listener, group, data)
    trainer.seconds = trainer.checkpoint.restore(run)
    return trainer, run
