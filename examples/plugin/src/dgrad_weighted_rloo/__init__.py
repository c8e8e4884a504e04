"""A plugin of dgrad: registers the estimator `weighted-rloo`."""

from __future__ import annotations

from collections.abc import Callable

import dgrad

from dgrad_weighted_rloo._estimator import WeightedRlooEstimator

__all__ = ["WeightedRlooEstimator"]


@dgrad.hookimpl
def dgrad_register_estimators(register: Callable[[str, Callable[..., dgrad.GradientEstimator]], None]) -> None:
    """The class is the factory: the keywords of its `__init__` are the hyper-parameters that `--set` knows."""
    register("weighted-rloo", WeightedRlooEstimator)
