"""The built-in plugin: all that dgrad registers, through the hooks that any plugin has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dgrad
from dgrad_plugins.datasets import DATASETS
from dgrad_plugins.estimators import ESTIMATORS
from dgrad_plugins.labels import dgrad_batch_losses as dgrad_batch_losses
from dgrad_plugins.labels import dgrad_code_losses as dgrad_code_losses
from dgrad_plugins.labels import dgrad_label_images as dgrad_label_images
from dgrad_plugins.latents import Pairs, parse_categorical
from dgrad_plugins.models import conv_vae, linear_vae, mixture_vae, mlp_vae

Register = Callable[[str, Callable[..., Any]], None]


@dgrad.hookimpl
def dgrad_register_estimators(register: Register) -> None:
    for name, factory in ESTIMATORS.items():
        register(name, factory)


@dgrad.hookimpl
def dgrad_register_latents(register: Register) -> None:
    register("categorical", parse_categorical)
    register("pairs", Pairs.parse)


@dgrad.hookimpl
def dgrad_register_datasets(register: Register) -> None:
    for name, load in DATASETS.items():
        register(name, load)


@dgrad.hookimpl
def dgrad_register_models(register: Register) -> None:
    register("linear", linear_vae)
    register("mlp", mlp_vae)
    register("mixture", mixture_vae)
    register("conv", conv_vae)
