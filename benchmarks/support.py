"""Steps whose codes are the same for all images, decoded once for a batch or for each image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from benchmarks.measuring import compared, take_turns
from benchmarks.reporting import Bars, Table, nested_lines
from benchmarks.settings import Settings
from dgrad.core.objectives import Objective
from dgrad.training.trainer import Trainer
from dgrad.vae import reconstruction

ABOUT = """A whole training step, batch 100, of estimators that evaluate every code (`exact`, `direct-joint`) or
every change of one variable (`direct`). With one variable, or few, these codes are the same for all images: each
goes through the decoder once for the batch, and the same step as it was before that, with each image's codes
evaluated for that image alone."""
REFERENCE = "once for the batch"
EACH = "for each image"
CASES = (
    ("exact", "1x10", "300"),
    ("exact", "1x320", "300"),
    ("direct", "1x10", "300"),
    ("direct", "1x320", "300"),
    ("direct", "1x60", "400,200"),
    ("direct", "2x30", "400,200"),
    ("direct-joint", "6x2", ""),
)
"""Estimator, latent and hidden layers, none for the linear model."""


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step: `{"estimator latent, hidden": {mode: ...}}`."""
    cases = CASES[-1:] if settings.quick else CASES
    return {
        f"{estimator} {latent}, {hidden or 'linear'}": _steps(settings, estimator, latent, hidden)
        for estimator, latent, hidden in cases
    }


def _steps(settings: Settings, estimator: str, latent: str, hidden: str) -> dict[str, dict[str, Any]]:
    changes = {"model": "mlp", "hidden": hidden} if hidden else {}
    steps = [Trainer(settings.training(estimator, latent, epochs=1000, **changes)).train_step for _ in range(2)]
    actions = {REFERENCE: steps[0], EACH: _each_image_alone(steps[1])}
    warm_up = 1 if settings.quick else 3
    return compared(take_turns(actions, settings.rounds_or(20), settings.device, warm_up=warm_up), REFERENCE)


def _each_image_alone(step: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        with (
            patch.object(reconstruction.Reconstruction, "everywhere", Objective.everywhere),
            patch.object(reconstruction, "support_is_smaller", lambda codes: False),
        ):
            step()

    return run


def tables(figures: dict[str, Any]) -> list[Table]:
    """One row for each case and mode."""
    columns = ["step", "codes decoded", "median, ms", "quartiles, ms", f"/ {REFERENCE}"]
    return [Table("steps", columns, nested_lines(figures, REFERENCE))]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """By how much a step is longer that decodes each image's codes for that image alone."""
    bars = {"step": {case: modes[EACH]["ratios"][REFERENCE] for case, modes in figures.items()}}
    return [Bars("support", "training step: codes decoded for each image / once for the batch", bars, logarithmic=True)]
