"""What a training step costs, in evaluations of the decoder, and what would cost less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dgrad import registry
from dgrad.core.estimator_tools import sweep_evaluations
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.vae.model import DiscreteVAE
from dgrad.vae.reconstruction import DecoderObjective

FEW = 4
"""So many evaluations are not worth another estimator: the rest of a step costs as much."""
CHEAPER: tuple[tuple[str, dict[str, str]], ...] = (
    ("leg", {"sweep": "surrogate"}),
    ("gumbel-softmax", {}),
    ("rloo", {}),
    ("reinforce", {}),
)
"""Estimators with hyper-parameters, in the order in which they are advised; two at most."""


@dataclass(frozen=True)
class StepCost:
    """What an image costs in a step.

    Attributes:
        evaluations: of the decoder. Where these are shared by a batch, or are differences of a linear layer, 1.
        cheaper: settings that cost less, each with its evaluations.
    """

    evaluations: int
    cheaper: tuple[str, ...] = ()


def step_cost(model: DiscreteVAE, estimator: GradientEstimator, *, labels: bool = False) -> StepCost:
    """The cost of a step of this model by this estimator.

    Args:
        labels: whether some examples' codes are known, which a surrogate of the sweep refuses.
    """
    layer = model.layer
    evaluations = estimator.traits.evaluations(layer)
    if evaluations <= FEW:
        return StepCost(evaluations)
    sweeps = hasattr(estimator, "sweep_share") or evaluations % sweep_evaluations(layer) == 0
    if sweeps and _sweep_is_cheap(model):
        return StepCost(1)
    return StepCost(evaluations, tuple(_cheaper(estimator, layer, evaluations, labels)))


def _sweep_is_cheap(model: DiscreteVAE) -> bool:
    """Whether a sweep costs less than evaluations: by differences of columns, or of one support for all images."""
    gaussian = torch.zeros(1, model.gaussian) if model.gaussian else None
    objective = model.reconstruction(torch.zeros(1, *model.image_shape), gaussian)
    assert isinstance(objective, DecoderObjective)
    one_variable = model.layer.one_hot_rows and model.layer.shape[0] == 1
    return objective.linear_bernoulli or (one_variable and objective.sees_code_alone)


def _cheaper(estimator: GradientEstimator, layer: LatentLayer, evaluations: int, labels: bool) -> Iterator[str]:
    share = getattr(estimator, "sweep_share", None)
    if share is not None and layer.one_hot_rows and share.rows(layer.shape[0]) > 1:
        n, k = layer.shape
        rows = max(1, share.rows(n) // 4)
        yield f"--set sweep-share={rows / n:.2g} ({getattr(estimator, 'samples', 1) * (rows * (k - 1) + 1)})"
    found = 0
    for name, hyperparameters in CHEAPER:
        if found < 2 and name in registry.estimators() and not (labels and hyperparameters):
            traits = registry.estimator(name, **hyperparameters).traits
            if traits.supports(layer) and traits.evaluations(layer) < evaluations:
                found += 1
                settings = "".join(f" --set {key}={value}" for key, value in hyperparameters.items())
                yield f"--estimator {name}{settings} ({traits.evaluations(layer)})"
