"""A whole training step of every estimator against Gumbel-softmax's and against plain steps."""

from __future__ import annotations

from typing import Any

import dgrad
from benchmarks.measuring import compared, take_turns
from benchmarks.plain import COMPILED, PLAIN, plain_steps
from benchmarks.reporting import Bars, Table, milliseconds, ratio
from benchmarks.settings import Settings
from dgrad.training.trainer import Trainer

ABOUT = """A whole training step: batch, forward, estimate, backward, optimizer. `plain autograd` is an ordinary
torch VAE with a relaxed code and a fused Adam, on one batch that never changes: a loop with nothing of dgrad, also
under `torch.compile`. `linear` is one layer each way, `mlp` has 300 hidden units."""
REFERENCE = "gumbel-softmax"
WARM_UP = 20
HIDDEN = {"linear": [], "mlp": [300]}
"""The widths of the plain networks' hidden layers; those of dgrad's models by default."""


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step, `{model: {latent: {estimator: ...}}}`, of each estimator that fits the latent."""
    names = sorted({REFERENCE, *(settings.estimators or (QUICK if settings.quick else dgrad.estimators()))})
    return {
        model: {latent: step_times(settings, model, latent, names) for latent in settings.latents} for model in HIDDEN
    }


QUICK = ("direct-rb", "rloo")


def step_times(settings: Settings, model: str, latent: str, names: list[str]) -> dict[str, dict[str, Any]]:
    """Times of a step of each estimator that supports the latent, and of the plain ones, all taking turns."""
    layer = dgrad.latent(latent)
    trainers = {
        name: Trainer(settings.training(name, latent, model=model, epochs=1000))
        for name in names
        if dgrad.estimator(name).traits.supports(layer)
    }
    images = next(trainers[REFERENCE].batches).images.flatten(1)
    n, k = layer.shape
    plain = plain_steps(images, n, k, HIDDEN[model], compiled=not settings.quick)
    actions = plain | {name: trainer.train_step for name, trainer in trainers.items()}
    warm_up = 2 if settings.quick else WARM_UP
    return compared(take_turns(actions, settings.rounds_or(100), settings.device, warm_up=warm_up), REFERENCE, *plain)


def tables(figures: dict[str, Any]) -> list[Table]:
    """One for each model and latent, the fastest first."""
    return [
        Table(
            f"{model}, {latent}",
            ["step", "median, ms", "quartiles, ms", *(f"/ {reference}" for reference in rows[REFERENCE]["ratios"])],
            [
                [name, *milliseconds(row), *(ratio(row, reference) for reference in row["ratios"])]
                for name, row in sorted(rows.items(), key=lambda item: item[1]["median"])
            ],
        )
        for model, latents in figures.items()
        for latent, rows in latents.items()
    ]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """Ratios to Gumbel-softmax's step, a plot for each model."""
    result = []
    for model, latents in figures.items():
        bars = {key: {name: row["ratios"][REFERENCE] for name, row in rows.items()} for key, rows in latents.items()}
        title = f"training step, {model} networks: median / {REFERENCE}'s"
        result.append(Bars(f"steps-{model}", title, bars, logarithmic=True))
    return result


def for_choosing(part: dict[str, Any]) -> dict[str, Any]:
    """`steps.json`, which `python -m benchmarks.choosing` reads: the linear model's steps, without the plain ones.

    Args:
        part: the entry of `steps` in results.json.
    """
    figures, machine = part["figures"], part["machine"]
    steps = {
        latent: {
            name: {
                "least_ms": 1000 * row["least"],
                "median_ms": 1000 * row["median"],
                "least_ratio": row["least_ratios"][REFERENCE],
                "median_ratio": row["ratios"][REFERENCE],
            }
            for name, row in rows.items()
            if name not in (PLAIN, COMPILED)
        }
        for latent, rows in figures["linear"].items()
    }
    first = next(iter(figures["linear"].values()))[REFERENCE]
    return {
        "device": machine["device"],
        "machine": machine["processor"],
        **{name: machine[name] for name in ("python", "torch", "dgrad", "threads")},
        "data": part["data"],
        "compile": part["compile"],
        "rounds": first["rounds"],
        "steps": steps,
    }
