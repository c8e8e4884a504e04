"""Who watches a training run, and what it is told. Free of torch, so that a display is there before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dgrad.config import TrainConfig


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What does not change while a run is trained.

    Attributes:
        config: the resolved settings.
        steps: how many steps the run has.
        steps_per_epoch: how many of them make an epoch.
        labelled_images: how many images count as labelled.
        unit: of the bounds.
        device: what the run is trained on, for people.
        processes: how many processes train it.
        choices: what was chosen for settings that nobody gave, and why, each as it is given.
        evaluations: how many of the decoder a step costs for an image.
        cheaper: settings that cost fewer, each with its evaluations.
    """

    config: TrainConfig
    steps: int
    steps_per_epoch: int
    labelled_images: int
    unit: str
    device: str
    processes: int
    choices: tuple[str, ...] = ()
    evaluations: int = 1
    cheaper: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training run is.

    Attributes:
        run: what does not change.
        step: how many steps are made.
        seconds: how long the run has been trained, over all its processes' lives.
        pretrained: how many steps of the pretraining are made.
        metrics: the figures of the evaluation that was made just now, or None.
    """

    run: RunFacts
    step: int
    seconds: float
    pretrained: int = 0
    metrics: Mapping[str, Any] | None = None

    @property
    def steps(self) -> int:
        """How many steps the run has."""
        return self.run.steps

    @property
    def epoch(self) -> float:
        """How many epochs are done; a fraction in the middle of one."""
        return self.step / self.run.steps_per_epoch

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.run.steps


class Listener:
    """What a training run tells whoever watches it. All methods do nothing here; override what you want to hear."""

    def started(self, progress: Progress) -> None:
        """Before the first step."""

    def pretrained(self, progress: Progress) -> None:
        """After each step of the pretraining; must be quick."""

    def stepped(self, progress: Progress) -> None:
        """After each step; must be quick."""

    def evaluated(self, progress: Progress) -> None:
        """After each evaluation on the validation images, whose figures are `progress.metrics`."""
