"""What a configuration builds: model, data set, paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dgrad import registry
from dgrad.config import TrainConfig, option
from dgrad.data import Dataset, binarize, dataset_loader, default_data_root
from dgrad.errors import InputError
from dgrad.hyperparameters import hyperparameters_of
from dgrad.vae.likelihoods import likelihood
from dgrad.vae.model import DiscreteVAE

MODEL_OPTIONS = {"gaussian": "Gaussian variables", "dropout": "dropout"}
"""Settings that a model's factory takes if it has an argument of that name."""


def load_state(module: Any, tensors: Mapping[str, Tensor], prefix: str, path: Path) -> None:
    """Load the tensors whose names start with `prefix` into a module.

    Raises:
        InputError: names or shapes do not fit.
    """
    try:
        module.load_state_dict(
            {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise InputError(f"checkpoint {path} does not fit the model of its config.json: {detail}") from None


def build_model(config: TrainConfig, image_shape: tuple[int, int, int]) -> DiscreteVAE:
    """The untrained model that a configuration describes.

    Raises:
        InputError: the latent, the model or the likelihood is unknown, or they do not go together.
    """
    layer = registry.latent(config.latent)
    arguments = (layer, image_shape, likelihood(config.likelihood), config.hidden)
    chosen = {name: getattr(config, name) for name in MODEL_OPTIONS if getattr(config, name) is not None}
    known = hyperparameters_of(registry.registry().factory("models", config.model)) if chosen else {}
    for name, value in chosen.items():
        if name not in known:
            raise InputError(
                f"the model {config.model} has no {MODEL_OPTIONS[name]}; got {option(name)} {value}: leave it out, or take --model mixture{' or conv' if name == 'gaussian' else ''}"
            )
    return registry.build("models", config.model, DiscreteVAE, *arguments, **chosen)


def build_dataset(config: TrainConfig) -> Dataset:
    """The data set that a configuration describes, before binarisation.

    Raises:
        InputError: it is unknown or damaged.
        RunError: it could not be downloaded.
    """
    load = find_dataset(config)
    dataset: object = load(Path(config.data_root) if config.data_root else default_data_root())
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"the factory of dataset {config.dataset!r} made a {type(dataset).__name__}; expected a dgrad.data.Dataset: ask its "
            "plugin's author"
        )
    return dataset.with_attributes(config.attributes) if config.attributes else dataset


def find_dataset(config: TrainConfig) -> Callable[[Path], Dataset]:
    """What loads the data set that a configuration names; nothing is read or downloaded yet.

    Raises:
        InputError: it is unknown.
    """
    names = registry.datasets()
    if config.dataset not in names and registry.registry().claimed("datasets", config.dataset):
        registry.registry().factory("datasets", config.dataset)  # claimed twice: it raises, and says by whom
    return dataset_loader(config.dataset, names)


def evaluation_data(config: TrainConfig, dataset: Dataset) -> Dataset:
    """The data set as it is evaluated: binarised as in training, where `dynamic` draws once, from the run's seed."""
    return binarize(dataset, "static" if config.binarize == "dynamic" else config.binarize, seed=config.seed)


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with paths made absolute, so that a run can be resumed from another directory."""

    def absolute(text: str) -> str:
        return str(Path(text).resolve()) if Path(text).exists() else text

    return replace(
        config,
        dataset=config.dataset if config.dataset in registry.datasets() else absolute(config.dataset),
        data_root=None if config.data_root is None else str(Path(config.data_root).resolve()),
        plugins=tuple(absolute(plugin) for plugin in config.plugins),
    )
