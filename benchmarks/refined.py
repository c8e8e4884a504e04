"""A training step whose decoder learns from a refined q, against one whose decoder does not."""

from __future__ import annotations

from typing import Any

from benchmarks.measuring import compared, take_turns
from benchmarks.reporting import Bars, Table, nested_lines
from benchmarks.settings import Settings
from dgrad.training.trainer import Trainer

ABOUT = """A whole training step of `direct-rb`, batch 100, linear networks, in which q of each image is refined in
so many steps (`--refine-steps`), each an evaluation and a sweep; the decoder learns from codes of that q, a further
evaluation. With one variable one step is all there is."""
ESTIMATOR = "direct-rb"
REFERENCE = "0"
COUNTS = (0, 1, 3, 10)


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step: `{latent: {number of refinement steps: ...}}`."""
    return {latent: _steps(settings, latent) for latent in settings.latents}


def _steps(settings: Settings, latent: str) -> dict[str, dict[str, Any]]:
    counts = COUNTS[:2] if settings.quick or latent.startswith("1x") else COUNTS
    actions = {
        str(count): Trainer(settings.training(ESTIMATOR, latent, epochs=1000, refine_steps=count)).train_step
        for count in counts
    }
    warm_up = 2 if settings.quick else 20
    return compared(take_turns(actions, settings.rounds_or(100), settings.device, warm_up=warm_up), REFERENCE)


def tables(figures: dict[str, Any]) -> list[Table]:
    """One row for each latent and number of steps."""
    columns = ["latent", "refinement steps", "median, ms", "quartiles, ms", "/ none"]
    return [Table("training step", columns, nested_lines(figures, REFERENCE))]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """Ratios to the step without refinement."""
    bars = {
        latent: {count: row["ratios"][REFERENCE] for count, row in counts.items()} for latent, counts in figures.items()
    }
    return [Bars("refined", f"{ESTIMATOR}: training step with refinement steps / without", bars, logarithmic=False)]
