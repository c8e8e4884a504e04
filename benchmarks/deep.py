"""Steps of `direct` through a deep decoder, whose changed codes have their loss in C++ or in torch. May import torch and dgrad."""

from __future__ import annotations

from typing import Any

from benchmarks.measuring import compared, take_turns
from benchmarks.reporting import Bars, Table, milliseconds, ratio
from benchmarks.settings import Settings
from dgrad.likelihoods import LIKELIHOODS
from dgrad.training import Trainer

ABOUT = """A whole training step of `direct`, networks 784-400-200-code and back, batch 100, with `--compile on` and `off`; on a CPU that is whether the loss of the
changed codes is in C++."""
HIDDEN = "400,200"
REFERENCE = "on"
MODES = (REFERENCE, "off")


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step by likelihood and latent: `{likelihood: {latent: {mode: ...}}}`."""
    return {name: {latent: _steps(settings, name, latent) for latent in settings.latents} for name in LIKELIHOODS}


def _steps(settings: Settings, likelihood: str, latent: str) -> dict[str, dict[str, Any]]:
    changes = {"model": "mlp", "hidden": HIDDEN, "likelihood": likelihood, "epochs": 1000}
    actions = {mode: Trainer(settings.training("direct", latent, **changes, compile=mode)).train_step for mode in MODES}
    warm_up = 1 if settings.quick else 5
    return compared(take_turns(actions, settings.rounds_or(30), settings.device, warm_up=warm_up), REFERENCE)


def tables(figures: dict[str, Any]) -> list[Table]:
    """One for each likelihood."""
    columns = ["latent", "--compile", "median, ms", "quartiles, ms", f"/ {REFERENCE}"]
    return [
        Table(
            likelihood,
            columns,
            [
                [latent, mode, *milliseconds(row), ratio(row, REFERENCE)]
                for latent, rows in latents.items()
                for mode, row in rows.items()
            ],
        )
        for likelihood, latents in figures.items()
    ]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """By how much a step without compiled kernels is longer."""
    return [
        Bars(
            "deep",
            "training step with a deep decoder: --compile off / on",
            {
                likelihood: {latent: rows["off"]["ratios"][REFERENCE] for latent, rows in latents.items()}
                for likelihood, latents in figures.items()
            },
        )
    ]
