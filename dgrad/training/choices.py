"""What a run gets for settings that nobody gave: it depends on the model, the estimator and the latent layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from dgrad import registry
from dgrad.config import TrainConfig, option
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.core.schedules import Constant, schedule
from dgrad.hyperparameters import hyperparameters_of, run_defaults_of

LR = "cosine:0.01:0"
"""The learning rate where neither the model nor the estimator names one."""


class Choice(NamedTuple):
    """The value of a setting, or of a hyper-parameter (`set.NAME`), and why it was chosen."""

    name: str
    value: str | int
    why: str

    def __str__(self) -> str:
        """How the value is given on the command line, and why.

        >>> str(Choice("set.sweep_share", "0.05", "10 evaluations instead of 181"))
        '--set sweep-share=0.05 (10 evaluations instead of 181)'
        """
        head, _, name = self.name.rpartition(".")
        given = f"--set {name.replace('_', '-')}={self.value}" if head else f"{option(name)} {self.value}"
        return f"{given} ({self.why})" if self.why else given


def choose(config: TrainConfig, layer: LatentLayer, estimator: GradientEstimator) -> list[Choice]:
    """The choices for a configuration. Where all is given, there are none.

    Args:
        estimator: with the hyper-parameters that were given.

    Raises:
        InputError: the model is unknown.
    """
    factory = registry.registry().factory("estimators", config.estimator)
    of_estimator = run_defaults_of(factory)
    of_model = run_defaults_of(registry.registry().factory("models", config.model))
    for_estimator, for_model = of_estimator.why or config.estimator, of_model.why or config.model
    choices = []
    if config.kl is None:
        inside = estimator.traits.kl_inside
        choices.append(Choice("kl", "inside" if inside else "outside", config.estimator))
    untrained = schedule(config.kl_weight or 1) == Constant(0)
    if (config.kl or choices[0].value) == "inside" and not untrained and not config.labels:
        known = [(name, value) for name, value in of_estimator.set.items() if name not in config.set]
        choices += [Choice(f"set.{name}", value, for_estimator) for name, value in known]
        if config.lr is None and of_model.lr is None and of_estimator.lr is not None:
            choices.append(Choice("lr", of_estimator.lr, for_estimator))
    if config.lr is None and all(choice.name != "lr" for choice in choices):
        choices.append(Choice("lr", lr_of_model(config.model), for_model))
    if config.kl_weight is None and of_model.kl_weight is not None and not config.labels:
        choices.append(Choice("kl_weight", of_model.kl_weight, f"{for_model}: a code unused at first stays so"))
    if config.gaussian is None and of_model.gaussian is not None and not config.labels:
        choices.append(Choice("gaussian", of_model.gaussian, "no labels"))
    if of_model.evaluations is not None and "sweep_share" in hyperparameters_of(factory).keys() - config.set.keys():
        choices += _share_of_sweep(estimator.traits.evaluations(layer), layer, of_model.evaluations)
    return choices


def lr_of_model(model: str) -> str:
    """The learning rate that suits a model, whatever the estimator."""
    return run_defaults_of(registry.registry().factory("models", model)).lr or LR


def _share_of_sweep(whole: int, layer: LatentLayer, budget: int) -> list[Choice]:
    """The share of a sweep that a budget of evaluations allows: at least one row."""
    if not layer.one_hot_rows or layer.shape[0] == 1 or whole <= budget:
        return []
    n, k = layer.shape
    rows = max(1, (budget - 1) // (k - 1))
    why = f"about {rows * (k - 1) + 1} evaluations of the decoder instead of {whole}"
    return [Choice("set.sweep_share", f"{rows / n:.3g}", why)]


def with_choices(config: TrainConfig, choices: Iterable[Choice]) -> TrainConfig:
    """A configuration with the choices filled in."""
    settings = {choice.name: choice.value for choice in choices if not choice.name.startswith("set.")}
    given = {choice.name.removeprefix("set."): str(choice.value) for choice in choices if choice.name not in settings}
    settings = {"kl_weight": config.kl_weight or "1", **settings}
    return replace(config, **settings, set={**config.set, **given})  # type: ignore[arg-type]
