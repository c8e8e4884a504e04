"""Whole runs: seconds of training to a validation bound of 110 nats, for each estimator. Needs MNIST."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.measuring import seconds_of
from benchmarks.reporting import Lines, Table
from benchmarks.settings import Settings
from dgrad.training.trainer import Trainer
from dgrad.vae.evaluation import evaluate_bound, evaluation_generator

ABOUT = """Seconds of training, without those of evaluation, until the validation bound is 110 nats: 20x10, linear
networks, everything else as `dgrad train` has it by default (100 epochs along a cosine from 0.01). The runs take
turns of 100 steps, with an evaluation on the validation images after each. One seed."""
TARGET = 110.0
LATENT = "20x10"
STEPS = 100
REFERENCE = "gumbel-softmax"
ESTIMATORS = (REFERENCE, "st-gumbel-softmax", "reinmax", "direct", "direct-rb", "leg", "direct-unbiased", "rloo")
QUICK_SECONDS = 2.0


class Contestant:
    """A run that goes on by some steps at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.seconds = 0.0
        self.curve: list[tuple[float, float]] = []
        self.diverged = False

    def go_on(self, steps: int) -> None:
        """Train, then evaluate; only the training counts."""
        trainer = self.trainer
        steps = min(steps, trainer.facts.steps - trainer.step)

        def train() -> None:
            for _ in range(steps):
                trainer.train_step()

        self.seconds += seconds_of(train, trainer.device)
        generator = evaluation_generator(trainer.device, trainer.config.seed)
        bound = evaluate_bound(trainer.model, trainer.data.valid, samples=1, generator=generator)
        self.diverged = not math.isfinite(bound.bound)
        if not self.diverged:
            self.curve.append((self.seconds, bound.bound))

    def is_through(self, target: float, limit: float) -> bool:
        """Whether it has reached the target, has run out of time or steps, or has nothing finite left."""
        out_of_time = self.seconds >= limit or self.trainer.step >= self.trainer.facts.steps
        return self.diverged or out_of_time or self.reached(target) is not None

    def reached(self, target: float) -> float | None:
        """After how many seconds the bound was the target or less, or None."""
        return next((seconds for seconds, bound in self.curve if bound <= target), None)


def measure(settings: Settings, *, target: float = TARGET) -> dict[str, Any]:
    """For each estimator: `reached` in seconds or None, the steps, the best bound, the curve of seconds and bounds."""
    limit = min(settings.seconds, QUICK_SECONDS) if settings.quick else settings.seconds
    contestants = {
        name: Contestant(Trainer(settings.training(name, LATENT))) for name in settings.estimators or ESTIMATORS
    }
    racing = list(contestants.values())
    while racing:
        for contestant in racing:
            contestant.go_on(STEPS)
        racing = [contestant for contestant in racing if not contestant.is_through(target, limit)]
    rows = {
        name: {
            "reached": contestant.reached(target),
            "steps": contestant.trainer.step,
            "seconds": contestant.seconds,
            "best": min((bound for _, bound in contestant.curve), default=None),
            "curve": contestant.curve,
        }
        for name, contestant in contestants.items()
    }
    return {"target": target, "limit": limit, "latent": LATENT, "estimators": rows}


def tables(figures: dict[str, Any]) -> list[Table]:
    """Estimators in the order in which they reached the bound."""
    rows = figures["estimators"]
    reference = rows.get(REFERENCE, {}).get("reached")
    lines = []
    for name, row in sorted(
        rows.items(), key=lambda item: (item[1]["reached"] or math.inf, item[1]["best"] or math.inf)
    ):
        reached, best = row["reached"], row["best"]
        taken = [f"{reached:.1f}" if reached else "not reached"]
        taken += [f"{reached / reference:.2f}" if reached and reference else ""]
        lines.append([name, *taken, str(row["steps"]), f"{best:.1f}" if best else "not finite"])
    columns = ["estimator", f"seconds to {figures['target']:g} nats", f"/ {REFERENCE}", "steps", "best bound, nats"]
    return [Table(f"{figures['latent']}, at most {figures['limit']:g} seconds each", columns, lines)]


def plots(figures: dict[str, Any]) -> list[Lines]:
    """The validation bound against seconds of training."""
    curves = {
        name: ([seconds for seconds, _ in row["curve"]], [bound for _, bound in row["curve"]])
        for name, row in figures["estimators"].items()
    }
    mark = (figures["target"], f"{figures['target']:g} nats")
    title, group = "validation bound", {figures["latent"]: curves}
    return [Lines("run", title, "seconds of training", "nats", group, mark=mark)]
