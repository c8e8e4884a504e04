"""What a configuration builds: layer, estimator, data set and model, each part once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

from dgrad import registry
from dgrad.config import TrainConfig, option
from dgrad.core.gradient_estimator import GradientEstimator
from dgrad.core.latent_layer import LatentLayer
from dgrad.data import Dataset, binarize, dataset_loader, default_data_root
from dgrad.errors import InputError
from dgrad.hyperparameters import hyperparameters_of
from dgrad.training.choices import Choice, choose, with_choices
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE

MODEL_OPTIONS = {"gaussian": "Gaussian variables", "dropout": "dropout"}
"""Settings that a model's factory takes if it has an argument of that name."""


class Build:
    """Everything that a configuration builds. A part is built when it is first asked for, and then kept.

    Args:
        config: the settings as they were given; their plugins are loaded here.
        dataset: the data set that the settings name, where it is in memory already.

    Raises:
        InputError: a plugin cannot be loaded. Each part raises one of its own where the settings cannot be.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset | None = None) -> None:
        for plugin in config.plugins:
            registry.load_plugin(plugin)
        self.given = config
        if dataset is not None:
            self.dataset = dataset

    @cached_property
    def choices(self) -> list[Choice]:
        """What was chosen for settings that nobody gave."""
        return choose(self.given, self.layer, self._estimator_as_given)

    @cached_property
    def settings(self) -> TrainConfig:
        """The settings with the choices filled in and absolute paths, so that a run resumes from anywhere."""
        config = with_choices(self.given, self.choices)
        return replace(
            config,
            dataset=config.dataset if config.dataset in registry.datasets() else _absolute(config.dataset),
            data_root=None if config.data_root is None else str(Path(config.data_root).resolve()),
            plugins=tuple(_absolute(plugin) for plugin in config.plugins),
        )

    @cached_property
    def config(self) -> TrainConfig:
        """The settings, and with labels the names of the attributes, for which the data is read."""
        attributes = self.dataset.attributes if self.settings.labels else None
        return self.settings if attributes is None else replace(self.settings, attributes=attributes)

    @cached_property
    def layer(self) -> LatentLayer:
        """The latent layer."""
        return registry.latent(self.given.latent)

    @cached_property
    def estimator(self) -> GradientEstimator:
        """The gradient estimator. `model` gives it its parameters."""
        if self.settings.set == self.given.set:
            return self._estimator_as_given
        return registry.estimator(self.given.estimator, **self.settings.set)

    @cached_property
    def _estimator_as_given(self) -> GradientEstimator:
        return registry.estimator(self.given.estimator, **self.given.set)

    @cached_property
    def why_unsupported(self) -> str | None:
        """Why the estimator cannot work with the latent layer, or None."""
        return self.estimator.traits.why_unsupported(self.layer)

    def find_dataset(self) -> Callable[[Path], Dataset]:
        """The loader of the data set. Nothing is read or downloaded yet.

        Raises:
            InputError: the data set is unknown.
        """
        config, names = self.given, registry.datasets()
        if config.dataset not in names and registry.registry().claimed("datasets", config.dataset):
            registry.registry().factory("datasets", config.dataset)  # claimed twice: it raises, and says by whom
        return dataset_loader(config.dataset, names)

    @cached_property
    def dataset(self) -> Dataset:
        """The data set, before binarisation.

        Raises:
            InputError: it is unknown or damaged.
            RunError: it could not be downloaded.
        """
        config = self.given
        dataset: object = self.find_dataset()(Path(config.data_root) if config.data_root else default_data_root())
        if not isinstance(dataset, Dataset):
            raise InputError(
                f"the factory of dataset {config.dataset!r} made a {type(dataset).__name__}; "
                "expected a dgrad.data.Dataset: ask its plugin's author"
            )
        return dataset.with_attributes(config.attributes) if config.attributes else dataset

    @cached_property
    def evaluation_data(self) -> Dataset:
        """The data set as it is evaluated: binarised as in training; `dynamic` draws once, from the run's seed."""
        mode = self.given.binarize
        return binarize(self.dataset, "static" if mode == "dynamic" else mode, seed=self.given.seed)

    @cached_property
    def model(self) -> DiscreteVAE:
        """The untrained model. The seed decides its weights, and then the estimator's own parameters.

        Raises:
            InputError: the model or the likelihood is unknown, or they do not go with the latent layer.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.given.seed)
            model = build_model(self.settings, self.dataset.image_shape, self.layer)
            if self.why_unsupported is None:
                self.estimator.set_layer(self.layer)
        return model


def build_model(
    config: TrainConfig, image_shape: tuple[int, int, int], layer: LatentLayer | None = None
) -> DiscreteVAE:
    """The untrained model that a configuration describes, its weights drawn from the global generator.

    Args:
        layer: the latent layer, where it has been built; None builds it.

    Raises:
        InputError: the latent, the model or the likelihood is unknown, or they do not go together.
    """
    layer = registry.latent(config.latent) if layer is None else layer
    arguments = (layer, image_shape, likelihood(config.likelihood), config.hidden)
    chosen = {name: getattr(config, name) for name in MODEL_OPTIONS if getattr(config, name) is not None}
    known = hyperparameters_of(registry.registry().factory("models", config.model)) if chosen else {}
    for name, value in chosen.items():
        if name not in known:
            others = "mixture or conv" if name == "gaussian" else "mixture"
            raise InputError(
                f"the model {config.model} has no {MODEL_OPTIONS[name]}; got {option(name)} {value}: "
                f"leave it out, or take --model {others}"
            )
    return registry.build("models", config.model, DiscreteVAE, *arguments, **chosen)


def _absolute(text: str) -> str:
    return str(Path(text).resolve()) if Path(text).exists() else text
