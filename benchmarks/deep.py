"""Steps through a deep decoder: the sweep in C++ or in torch, in bfloat16, a share of it, or its surrogate."""

from __future__ import annotations

from typing import Any

from benchmarks.measuring import compared, take_turns
from benchmarks.reporting import Bars, Table, nested_lines
from benchmarks.settings import Settings
from dgrad.training.trainer import Trainer
from dgrad.vae.likelihoods import LIKELIHOODS

ABOUT = """A whole training step of `direct`, networks 784-400-200-code and back, batch 100, with `--compile on` and
`off` (on a CPU that is whether the loss of the changed codes is in C++), `on` with `--sweep-precision bfloat16`,
and with a share of the sweep (`--set sweep-share=0.1`). Beside them are the surrogate of the sweep, the quadratic
control of `double-cv`, and `gumbel-softmax`."""
HIDDEN = "400,200"
REFERENCE = "on"
MODES: dict[str, dict[str, Any]] = {
    REFERENCE: {"compile": "on"},
    "off": {"compile": "off"},
    "on, bfloat16": {"compile": "on", "sweep_precision": "bfloat16"},
    **{f"on, share {share}": {"compile": "on", "set": {"sweep_share": share}} for share in (0.5, 0.2, 0.1)},
    "leg, surrogate": {"compile": "on", "estimator": "leg", "set": {"sweep": "surrogate"}},
    "leg, surrogate, 4 samples": {"compile": "on", "estimator": "leg", "set": {"sweep": "surrogate", "samples": 4}},
    "double-cv, quadratic": {"compile": "on", "estimator": "double-cv", "set": {"control": "quadratic"}},
    "gumbel-softmax": {"compile": "on", "estimator": "gumbel-softmax"},
}


def measure(settings: Settings) -> dict[str, Any]:
    """Times of a step by likelihood and latent: `{likelihood: {latent: {mode: ...}}}`."""
    return {name: {latent: _steps(settings, name, latent) for latent in settings.latents} for name in LIKELIHOODS}


def _steps(settings: Settings, likelihood: str, latent: str) -> dict[str, dict[str, Any]]:
    changes = {"model": "mlp", "hidden": HIDDEN, "likelihood": likelihood, "epochs": 1000}
    actions = {
        mode: Trainer(settings.training(**{"estimator": "direct", "latent": latent, **changes, **given})).train_step
        for mode, given in MODES.items()
    }
    warm_up = 1 if settings.quick else 5
    return compared(take_turns(actions, settings.rounds_or(30), settings.device, warm_up=warm_up), REFERENCE)


def tables(figures: dict[str, Any]) -> list[Table]:
    """One for each likelihood."""
    columns = ["latent", "--compile and more", "median, ms", "quartiles, ms", f"/ {REFERENCE}"]
    return [Table(likelihood, columns, nested_lines(latents, REFERENCE)) for likelihood, latents in figures.items()]


def plots(figures: dict[str, Any]) -> list[Bars]:
    """By how much a step is longer or shorter in the other modes."""
    bars = {
        likelihood: {
            f"{latent}: {mode}": row["ratios"][REFERENCE]
            for latent, rows in latents.items()
            for mode, row in rows.items()
            if mode != REFERENCE
        }
        for likelihood, latents in figures.items()
    }
    return [Bars("deep", f"training step with a deep decoder / the same with --compile {REFERENCE}", bars)]
