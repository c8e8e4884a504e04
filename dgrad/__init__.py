"""dgrad: train models with discrete latent variables.

    layer = dgrad.latent("20x10")                            # 20 categorical variables of 10 values
    estimator = dgrad.estimator("direct", epsilon=0.5)       # a gradient estimator, by its registered name
    objective = dgrad.objective(decoder=decoder, loss=dgrad.bernoulli(x))
    estimate = estimator(layer, logits, objective)
    (estimate.loss.mean() + layer.kl(logits).mean()).backward()

Names are loaded on first use, so that programs which need a part of dgrad (the command's help, the exported
codec) do not pay for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dgrad.core.curvature import Curvature
    from dgrad.core.draws import Draw
    from dgrad.core.estimates import Drawn, Estimate
    from dgrad.core.estimator_tools import add_gradient, replace_gradient
    from dgrad.core.evaluations import Evaluation
    from dgrad.core.fenchel_young import fenchel_young
    from dgrad.core.gradient_estimator import GradientEstimator
    from dgrad.core.kl_objective import KLObjective
    from dgrad.core.latent_layer import LatentLayer, LogLinear
    from dgrad.core.moves import Exchanges, Moves, Substitutions, Toggles
    from dgrad.core.objectives import FunctionObjective, Objective
    from dgrad.core.refinement import refine
    from dgrad.core.schedules import Schedule, schedule
    from dgrad.core.sites import restricted
    from dgrad.core.traits import ExactLimit, Limit, Traits
    from dgrad.core.weights import weights
    from dgrad.errors import DgradError, InputError, RunError
    from dgrad.hookspecs import hookimpl, recordable
    from dgrad.hyperparameters import run_defaults
    from dgrad.kernels.lookup import lookup
    from dgrad.registry import datasets, estimator, estimators, latent, latents, load_plugin, models
    from dgrad.vae.likelihoods import bernoulli, discretized_logistic, squared_error
    from dgrad.vae.objectives import objective

__version__ = "0.1.0"

_HOMES = {
    "errors": ["DgradError", "InputError", "RunError"],
    "core.estimator_tools": ["add_gradient", "replace_gradient"],
    "core.curvature": ["Curvature"],
    "core.draws": ["Draw"],
    "core.estimates": ["Drawn", "Estimate"],
    "core.evaluations": ["Evaluation"],
    "core.fenchel_young": ["fenchel_young"],
    "core.gradient_estimator": ["GradientEstimator"],
    "core.kl_objective": ["KLObjective"],
    "hookspecs": ["hookimpl", "recordable"],
    "hyperparameters": ["run_defaults"],
    "core.latent_layer": ["LatentLayer", "LogLinear"],
    "core.moves": ["Exchanges", "Moves", "Substitutions", "Toggles"],
    "core.objectives": ["FunctionObjective", "Objective"],
    "core.traits": ["ExactLimit", "Limit", "Traits"],
    "core.refinement": ["refine"],
    "kernels.lookup": ["lookup"],
    "registry": ["datasets", "estimator", "estimators", "latent", "latents", "load_plugin", "models"],
    "core.schedules": ["Schedule", "schedule"],
    "core.sites": ["restricted"],
    "core.weights": ["weights"],
    "vae.likelihoods": ["bernoulli", "discretized_logistic", "squared_error"],
    "vae.objectives": ["objective"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Curvature",
    "DgradError",
    "Draw",
    "Drawn",
    "Estimate",
    "Evaluation",
    "ExactLimit",
    "Exchanges",
    "FunctionObjective",
    "GradientEstimator",
    "InputError",
    "KLObjective",
    "LatentLayer",
    "Limit",
    "LogLinear",
    "Moves",
    "Objective",
    "RunError",
    "Schedule",
    "Substitutions",
    "Toggles",
    "Traits",
    "__version__",
    "add_gradient",
    "bernoulli",
    "datasets",
    "discretized_logistic",
    "estimator",
    "estimators",
    "fenchel_young",
    "hookimpl",
    "latent",
    "latents",
    "load_plugin",
    "lookup",
    "models",
    "objective",
    "recordable",
    "refine",
    "replace_gradient",
    "restricted",
    "run_defaults",
    "schedule",
    "squared_error",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name == "testing":
        return importlib.import_module("dgrad.testing")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'dgrad' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dgrad.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
